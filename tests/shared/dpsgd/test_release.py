"""What a step applies depends on the private users through their clipped sum alone, and is what the release prices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from torch import nn

from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import ENGINES, build_engine
from shared.errors import FedAugError
from shared.privacy.accounting import opacus_epsilon
from tests.shared.dpsgd.models import numbers, refilled
from tests.shared.dpsgd.stepping import (
    ALL_ENGINES,
    Case,
    flat,
    largest_gap,
    norm,
    release_of,
    released,
    steps,
)

ENGINE = pytest.mark.parametrize("engine", ALL_ENGINES)


def linear_case(num_zero: int = 0) -> Case:
    """Five users, and as many more as wanted who have no gradient."""
    draw = numbers(1, torch.float64)
    rows = torch.cat([draw(5, 4), torch.zeros(num_zero, 4, dtype=torch.float64)])
    scales = torch.cat([torch.ones(5), torch.zeros(num_zero)]).double()
    module = refilled(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), draw)
    return Case(module, lambda module, users: scales[users] * module(rows[users]).square().sum(1))


@ENGINE
def test_the_divisor_is_the_public_one(engine):
    # The same users, the same noise, twice the public bound on users: half the step. (Opacus issues 571 and 819 are
    # about divisors that follow the batch.)
    case = linear_case()
    moved = []
    for max_users in (10, 20):
        _, _, module = steps(ENGINES[engine], case, [[0, 1, 2]], noise_multiplier=1.0, max_users=max_users, seed=3)
        before = dict(case.module.named_parameters())
        moved.append({name: p.detach() - before[name].detach() for name, p in module.named_parameters()})
    assert norm(moved[0]) > 0.1
    assert largest_gap(moved[0], {name: 2 * value for name, value in moved[1].items()}) < 1e-12


@ENGINE
@given(num_zero=st.integers(1, 9))
@settings(deadline=None, max_examples=5)
def test_users_without_a_gradient_do_not_change_the_step(engine, num_zero):
    alone = released(ENGINES[engine], linear_case(), [0, 1, 2, 3, 4], noise_multiplier=1.0)
    crowd = [*range(5, 5 + num_zero), 0, 1, 2, 3, 4]
    among = released(ENGINES[engine], linear_case(num_zero), crowd, noise_multiplier=1.0)
    assert largest_gap(among, alone) < 1e-12


@ENGINE
def test_an_empty_batch_is_a_batch_of_users_without_a_gradient(engine):
    empty = released(ENGINES[engine], linear_case(), [], noise_multiplier=1.0)
    zeros = released(ENGINES[engine], linear_case(3), [5, 6, 7], noise_multiplier=1.0)
    assert torch.equal(flat(empty), flat(zeros))
    assert norm(empty) > 1.0
    never = released(ENGINES[engine], Case(linear_case().module, lambda module, users: 1 / 0), [], noise_multiplier=1.0)
    assert torch.equal(flat(empty), flat(never))


@ENGINE
def test_the_order_of_users_does_not_matter(engine):
    one = released(ENGINES[engine], linear_case(), [0, 1, 2, 3, 4], noise_multiplier=1.0)
    other = released(ENGINES[engine], linear_case(), [3, 1, 4, 0, 2], noise_multiplier=1.0)
    assert largest_gap(one, other) < 1e-12


@ENGINE
def test_terms_after_the_noise_are_added_as_they_are(engine):
    module = nn.Linear(4, 2)
    seen = []

    def proximal():
        seen.append(module.weight.grad.clone())
        module.weight.grad += 7.0

    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    built = build_engine(
        engine, module, optimizer, release_of(noise_multiplier=1.0), max_grad_norm=1.0, chance=Chance.seeded(0)
    )
    before = module.weight.detach().clone()
    built.step(torch.ones(2, 4), lambda users: module(users).sum(1), after_noise=proximal)
    assert torch.allclose(before - module.weight, seen[0] + 7.0, atol=1e-5)


@ENGINE
def test_what_was_executed_is_what_the_release_prices(engine):
    release = release_of(3, noise_multiplier=2.0)
    module = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    built = build_engine(engine, module, optimizer, release, max_grad_norm=1.0, chance=Chance.seeded(0))
    for users in (torch.ones(2, 4), torch.ones(0, 4), torch.full((2, 4), torch.nan)):
        with pytest.raises(FedAugError, match="Nothing may be released"):
            built.executed()
        built.step(users, lambda users: module(users)[:, 0])
    assert built.executed() is release
    assert built._accountant.history == [(2.0, 0.5, 3)]


def test_the_price_is_that_of_opacus_for_the_history_that_its_hook_wrote():
    release = release_of(3, noise_multiplier=2.0)
    _, built, _ = steps(ENGINES["bookkeeping"], linear_case(), [[0], [], [1]], noise_multiplier=2.0)
    accountant = PRVAccountant()
    accountant.history = built._accountant.history
    assert accountant.get_epsilon(1e-5) == pytest.approx(opacus_epsilon([release], 1e-5), rel=1e-9)


@ENGINE
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_noise_other_than_the_release_prices_is_noticed(engine, share):
    # Somebody turns Opacus' own knob between steps: the accountant is told, and nothing may be released.
    module = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    release = release_of(2, noise_multiplier=2.0)
    built = build_engine(engine, module, optimizer, release, max_grad_norm=1.0, chance=Chance.seeded(0))
    built.step(torch.ones(2, 4), lambda users: module(users)[:, 0])
    built._optimizer.noise_multiplier *= share
    built.step(torch.ones(2, 4), lambda users: module(users)[:, 0])
    with pytest.raises(FedAugError, match="Nothing may be released"):
        built.executed()
