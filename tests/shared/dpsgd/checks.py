"""What every engine guarantees, as functions of how it is made: true ones pass, and broken ones must not."""

from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn

from shared.dpsgd.chance import Chance
from shared.errors import RefusedError
from tests.shared.dpsgd.models import numbers, refilled
from tests.shared.dpsgd.normality import correlations
from tests.shared.dpsgd.stepping import (
    Case,
    MakeEngine,
    by_hand,
    difference,
    largest_gap,
    norm,
    release_of,
    released,
    steps,
)

# Positions of users. Those from FAKES on are no users: rows that a generator made up.
ORDINARY, OPPOSITE, ALIGNED, NOTHING, NOT_A_NUMBER, FAKES = range(8), 8, 9, 10, 11, 20
NUM_ROWS = 40


def users_case(*, deep: bool) -> Case:
    """Users on one line: ordinary ones, and three who are a hundred times as large, or nothing, or no number."""
    draw = numbers(4, torch.float64)
    direction = draw(6)
    rows = direction.repeat(NUM_ROWS, 1)
    rows[list(ORDINARY)] += 0.1 * draw(8, 6)
    for position, factor in ((OPPOSITE, -100.0), (ALIGNED, 100.0), (NOTHING, 0.0), (NOT_A_NUMBER, torch.nan)):
        rows[position] = factor * direction
    rows[FAKES:] = 100.0 * direction
    layers = [nn.Linear(6, 5), nn.Linear(5, 3)] if deep else [nn.Linear(6, 3, bias=False)]
    scales = 20.0 * (rows.norm(dim=1) != 0)
    return Case(
        refilled(nn.Sequential(*layers), draw), lambda module, users: scales[users] * module(rows[users]).sum(1)
    )


def largest_move(make: MakeEngine) -> float:
    """The most that one user, added to a batch, moves the sum, in clips."""
    most = 0.0
    for deep in (False, True):
        case = users_case(deep=deep)
        for batch in ([], [0], list(ORDINARY)):
            without = released(make, case, batch, max_grad_norm=0.5)
            for user in (0, OPPOSITE, ALIGNED):
                moved = difference(released(make, case, [*batch, user], max_grad_norm=0.5), without)
                most = max(most, norm(moved) / 0.5)
    return most


def check_one_user_moves_the_sum_by_at_most_the_clip(make: MakeEngine) -> None:
    assert largest_move(make) <= 1 + 1e-9  # float64


def check_the_sum_is_that_of_a_loop(make: MakeEngine) -> None:
    draw = numbers(5, torch.float64)
    rows, scales = draw(8, 6), 10.0 ** draw(8)
    module = refilled(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)), draw)
    case = Case(module, lambda module, users: scales[users] * module(rows[users]).square().sum(1))
    expected, largest = by_hand(case, range(8))
    assert largest_gap(released(make, case, range(8)), expected) <= 1e-12 * largest


def check_every_number_gets_the_promised_noise_in_every_step(make: MakeEngine) -> None:
    used, unused = nn.Linear(4, 2), nn.Linear(300, 200)
    case = Case(nn.ModuleList([used, unused]), lambda module, users: 0.0 * module[0](torch.ones(len(users), 4)).sum(1))
    # Steps with users, without any, and with users again.
    sums, _, _ = steps(make, case, [[0, 1], [], [2]], max_grad_norm=0.5, noise_multiplier=2.0)
    assert len(sums) == 3
    for step in sums:
        values = step["1.weight"]
        # The spread of 60,000 normals is known to 0.3 %; four of those.
        assert float(values.std()) == pytest.approx(1.0, abs=4 / sqrt(2 * values.numel()))
        assert all((values != 0).all() for values in step.values())


def check_noise_is_fresh(make: MakeEngine) -> None:
    case = Case(nn.Linear(100, 200), lambda module, users: 0.0 * module(torch.ones(len(users), 100)).sum(1))
    sums, _, _ = steps(make, case, [[0], [], [0], [0]], noise_multiplier=1.0)
    assert len(sums) == 4
    noise = [step["weight"].numpy().ravel() for step in sums]
    halves = [half for values in noise for half in np.split(values, 2)]
    for position, one in enumerate(halves):
        for other in halves[:position]:
            assert max(map(abs, correlations(one, other))) < 5.5


def check_the_divisor_is_public(make: MakeEngine) -> None:
    case = users_case(deep=True)
    alone = released(make, case, [0, 1], noise_multiplier=1.0)
    crowd = released(make, case, [0, NOTHING, 1, NOTHING], noise_multiplier=1.0)
    assert largest_gap(alone, crowd) < 1e-12
    halved = released(make, case, [0, 1], noise_multiplier=1.0, max_users=40)
    assert largest_gap(alone, halved) < 1e-12  # of sums: the step itself is half as long


def check_users_who_are_not_finite_count_as_zero(make: MakeEngine) -> None:
    case = users_case(deep=True)
    (among,), built, module = steps(make, case, [[0, NOT_A_NUMBER, 1]])
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert largest_gap(among, released(make, case, [0, 1])) < 1e-12
    assert built.num_zeroed == 1


def check_a_shared_weight_is_counted_or_refused(make: MakeEngine) -> None:
    # One weight in two layers, whose gradients add up: the norm of the sum is up to twice each one's.
    pair = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)]).double()
    pair[1].weight = pair[0].weight
    rows = numbers(6, torch.float64)(3, 4) * 100
    case = Case(pair, lambda module, users: (module[0](rows[users]) + module[1](rows[users])).sum(1))
    try:
        moved = norm(released(make, case, [0]))
    except (RefusedError, NotImplementedError):  # the latter by Opacus' ghost clipping
        return
    assert moved <= 1 + 1e-9


def check_no_step_beyond_the_release(make: MakeEngine) -> None:
    module = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    built = make(module, optimizer, release_of(2), max_grad_norm=1.0, chance=Chance.seeded(0))
    for _ in range(2):
        built.step(torch.ones(1, 4), lambda users: module(users)[:, 0])
    assert built.executed() == release_of(2)
    before = module.weight.detach().clone()
    try:
        built.step(torch.ones(1, 4), lambda users: module(users)[:, 0])
    except RefusedError:
        assert torch.equal(module.weight, before)
        return
    raise AssertionError("a third step of two was taken")


def check_an_optimizer_remembers_noised_gradients(make: MakeEngine) -> None:
    module = nn.Linear(100, 200, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
    release = release_of(noise_multiplier=2.0, max_users=2)
    built = make(module, optimizer, release, max_grad_norm=1.0, chance=Chance.seeded(0))
    built.step(torch.zeros(3, 100), lambda users: module(users).sum(1))
    remembered = optimizer.state[module.weight]["momentum_buffer"]
    assert float(remembered.std()) == pytest.approx(2.0, rel=4 / sqrt(2 * 20_000))


CHECKS = tuple(value for name, value in list(globals().items()) if name.startswith("check_"))
