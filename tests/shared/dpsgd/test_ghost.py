"""What leaves the private optimizer: clipped, noised by the promised amount, divided by a public number."""

from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.dpsgd.chance import Chance
from shared.dpsgd.ghost import GhostDpSgd
from shared.errors import RefusedError
from shared.privacy.releases import DpSgdRelease
from tests.shared.generators.test_multvae import model, users

MAX_GRAD_NORM = 0.5
SIZE = 400


def linear(size: int = 3) -> nn.Linear:
    layer = nn.Linear(size, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def private_steps(layer: nn.Module, *, noise_multiplier: float, max_users: int = 10, seed: int = 0) -> GhostDpSgd:
    release = DpSgdRelease(noise_multiplier=noise_multiplier, sample_rate=0.5, num_steps=1, max_users=max_users)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    return GhostDpSgd(layer, optimizer, release, max_grad_norm=MAX_GRAD_NORM, chance=Chance.seeded(seed, "noise"))


def released_sum(inputs: torch.Tensor, *, noise_multiplier: float, max_users: int = 10, seed: int = 0) -> torch.Tensor:
    """The gradient that one step of plain descent applies, times the public normaliser."""
    layer = linear(inputs.shape[1])
    steps = private_steps(layer, noise_multiplier=noise_multiplier, max_users=max_users, seed=seed)
    steps.step(inputs, lambda users: layer(users)[:, 0])
    return -layer.weight.detach()[0] * 0.5 * max_users


TINY = 1e-9  # a noise multiplier that leaves the sum visible


@given(rows=st.lists(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_one_user_moves_the_sum_by_at_most_the_clip(rows):
    users = torch.tensor(rows, dtype=torch.float32)
    moved = released_sum(users, noise_multiplier=TINY) - released_sum(users[:-1], noise_multiplier=TINY)
    assert moved.norm() <= MAX_GRAD_NORM * (1 + 1e-4)  # float32 sums of up to six clipped gradients


def test_the_sum_is_that_of_a_loop_over_users():
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)) * 2
    expected = sum(x * min(1.0, MAX_GRAD_NORM / float(x.norm())) for x in rows)
    assert torch.allclose(released_sum(rows, noise_multiplier=TINY), expected, atol=1e-5)


def noise_ratio(scale: float) -> float:
    """Measured spread of what leaves an empty batch, over the promised one."""
    draws = torch.cat(
        [released_sum(torch.zeros(0, SIZE), noise_multiplier=2.0 * scale, seed=seed) for seed in range(100)]
    )
    return float(draws.std()) / (2.0 * MAX_GRAD_NORM)


def test_noise_has_the_promised_spread():
    # The spread of n normals is known to a relative 1/sqrt(2n); four of those is 1.4 %.
    tolerance = 4 / sqrt(2 * 100 * SIZE)
    assert noise_ratio(1.00) == pytest.approx(1.0, abs=tolerance)
    assert noise_ratio(0.95) != pytest.approx(1.0, abs=tolerance)  # 5 % too little is caught


def test_the_divisor_is_public():
    # The same users with the same noise under twice the public bound: half the released step,
    # whatever the number of users in the batch.
    users = torch.ones(4, 3)
    layer_steps = []
    for max_users in (10, 20):
        total = released_sum(users, noise_multiplier=1.0, max_users=max_users, seed=3)
        layer_steps.append(total / (0.5 * max_users))
    assert torch.allclose(layer_steps[0], 2 * layer_steps[1])


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, lambda losses: losses.sum()[None], lambda x: x[:, None]])
def test_a_loss_that_is_not_per_user_is_refused(reduce):
    layer = linear()
    steps = private_steps(layer, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="one loss for each"):
        steps.step(torch.ones(4, 3), lambda users: reduce(layer(users)[:, 0]))
    assert not layer.weight.any()


def test_no_step_beyond_the_release():
    layer = linear()
    steps = private_steps(layer, noise_multiplier=1.0)
    steps.step(torch.ones(4, 3), lambda users: layer(users)[:, 0])
    with pytest.raises(RefusedError, match="charge another release"):
        steps.step(torch.ones(4, 3), lambda users: layer(users)[:, 0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38, -3e38])
def test_a_user_who_is_not_finite_counts_as_zero(poison):
    users = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    poisoned = torch.cat([users, torch.tensor([[poison, poison, 1.0]])])
    assert torch.allclose(released_sum(poisoned, noise_multiplier=TINY), released_sum(users, noise_multiplier=TINY))
    alone = released_sum(poisoned[-1:], noise_multiplier=1.0, seed=4)
    assert torch.equal(alone, released_sum(poisoned[:0], noise_multiplier=1.0, seed=4))


def test_optimizer_state_sees_noised_gradients_only():
    layer = linear(SIZE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    release = DpSgdRelease(noise_multiplier=3.0, sample_rate=1.0, num_steps=1, max_users=1)
    steps = GhostDpSgd(layer, optimizer, release, max_grad_norm=1.0, chance=Chance.seeded(0, "noise"))
    steps.step(torch.zeros(1, SIZE), lambda users: layer(users)[:, 0])
    remembered = optimizer.state[layer.weight]["momentum_buffer"]
    assert float(remembered.std()) == pytest.approx(3.0, rel=4 / np.sqrt(2 * SIZE))


@pytest.mark.parametrize("prior", ["gaussian", "mixture"])
def test_the_generators_clipped_sum_is_that_of_a_loop_over_users(prior):
    one = model(prior=prior, dropout=0.0)
    with torch.no_grad():
        one.to_log_variance.weight.zero_()
        one.to_log_variance.bias.fill_(-60.0)  # no latent draw matters, so that users can be taken one by one
    rows = users(8)

    def losses(batch: torch.Tensor) -> torch.Tensor:
        return one.loss(batch, kl_weight=0.0, generator=torch.Generator().manual_seed(0))

    expected = {name: torch.zeros_like(p) for name, p in one.named_parameters()}
    for row in rows:
        one.zero_grad()
        losses(row[None]).sum().backward()
        norm = float(torch.cat([p.grad.ravel() for p in one.parameters()]).norm())
        for name, parameter in one.named_parameters():
            expected[name] += parameter.grad * min(1.0, MAX_GRAD_NORM / norm)
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    one.zero_grad()
    private_steps(one, noise_multiplier=TINY).step(rows, losses)
    for name, parameter in one.named_parameters():
        applied = (before[name] - parameter.detach()) * 5.0  # times the expected batch
        assert torch.allclose(applied, expected[name], atol=2e-5), name
