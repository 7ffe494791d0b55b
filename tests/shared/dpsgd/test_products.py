"""Norms and clipped sums of products, in both ways of computing them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.dpsgd import products
from tests.shared.dpsgd.models import numbers

ROUNDING = 1 + 1e-3  # what products.py promises of a norm


@pytest.mark.parametrize(("places", "formed"), [(1, False), (2, False), (30, True)])
@pytest.mark.parametrize("kept", [0, 1 << 24])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_both_ways_give_the_norms_and_the_sum(monkeypatch, places, formed, kept, chunk):
    monkeypatch.setattr(products, "_KEPT", kept)
    monkeypatch.setattr(products, "_CHUNK", chunk)
    draw = numbers(places, torch.float64)
    weight, bias = torch.zeros(4, 6).double(), torch.zeros(4).double()
    weight.grad, bias.grad = draw(4, 6), draw(4)
    inputs, gradients, factors = draw(7, places, 6), draw(7, places, 4), draw(7).abs()
    by_user = torch.einsum("uto,uti->uoi", gradients, inputs)
    of_bias = 3.0 * gradients.sum(1)
    expected = weight.grad + torch.einsum("uoi,u->oi", by_user, factors), bias.grad + factors @ of_bias

    both = products.Products(weight, bias, bias_scale=3.0)
    squares = both.squared_norms(inputs, gradients)
    both.add_clipped(inputs, gradients, factors)
    assert torch.allclose(squares, by_user.square().sum((1, 2)) + of_bias.square().sum(1), rtol=1e-13)
    assert torch.allclose(weight.grad, expected[0], rtol=1e-13)
    assert torch.allclose(bias.grad, expected[1], rtol=1e-13)
    # The other assertions say nothing about the two ways unless both are taken.
    assert (both._formed is not None) == (formed and kept > 0)
    both.clear()
    assert both._formed is None
    assert both._summed is None


@given(
    seed=st.integers(0, 2**16),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    places=st.integers(2, 40),
    rank=st.integers(1, 3),
    # About -2.5 a norm is just above what rounding leaves of it.
    off=st.one_of(st.integers(-80, 0), st.integers(-30, -18)).map(lambda tenths: tenths / 10),
)
@settings(deadline=None, max_examples=100)
def test_no_norm_is_a_thousandth_too_small(seed, width, height, places, rank, off):
    # Without forming: places of few directions, the last of which takes back the others but for a share of 10^off.
    draw = numbers(seed, torch.float64)
    inputs = (draw(1, places, rank) @ draw(rank, width)).float()
    gradients = draw(1, 1, height).expand(1, places, height).float().clone()
    inputs[:, -1] = -inputs[:, :-1].sum(1) * (1 + 10**off)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_KEPT", 0)
        squares = products.Products(torch.zeros(height, width), None).squared_norms(inputs, gradients)
    exact = torch.einsum("uto,uti->uoi", gradients.double(), inputs.double()).norm()
    assert float(squares.double().sqrt()) * ROUNDING >= float(exact)
    # Nor is it larger than the floor explains: 4000 roundings of the terms.
    terms = (gradients.double().norm(dim=2) * inputs.double().norm(dim=2)).sum()
    assert float(squares.double().sqrt()) <= ROUNDING * max(float(exact), float(terms) * math.sqrt(4000 * 2**-23))
