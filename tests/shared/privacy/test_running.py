"""The running total is what pricing all releases at once would be, in whatever order they came."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InputError
from shared.privacy.accounting import epsilon
from shared.privacy.releases import DpSgdRelease, GaussianRelease, Release
from shared.privacy.running import RunningCost


def rounds(noise_multiplier: float, sample_rate: float = 0.05, num_steps: int = 20, **more) -> DpSgdRelease:
    return DpSgdRelease(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, num_steps=num_steps, max_users=1500, **more
    )


def statistic(noise_multiplier: float, name: str = "popularity") -> GaussianRelease:
    return GaussianRelease(statistic=name, noise_multiplier=noise_multiplier, max_users=1500)


KINDS: tuple[Release, ...] = (
    rounds(3.0),
    rounds(5.0, 0.2),
    rounds(4.0, num_steps=7, max_batch=100),
    statistic(30.0),
    statistic(12.0, "co-occurrence sketch"),
)


def total(releases: list[Release]) -> RunningCost:
    spent = RunningCost()
    for release in releases:
        spent.add(release)
    return spent


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True),
    picks=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12),
    delta=st.sampled_from([1e-3, 1e-6, 1e-9]),
)
@settings(max_examples=25, deadline=None)
def test_a_running_total_is_the_price_of_all_releases(kinds, picks, delta):
    spent, releases = RunningCost(), []
    for pick, is_asked in picks:
        more = kinds[pick % len(kinds)]
        foreseen = spent.epsilon_with([more], delta) if is_asked else None
        spent.add(more)
        releases.append(more)
        if is_asked:
            assert spent.epsilon(delta) == pytest.approx(foreseen, abs=1e-6)
    at_once = epsilon(releases, delta)
    assert at_once - 1e-6 <= spent.epsilon(delta) <= at_once + 1e-3 * (1 + at_once)
    assert total(releases[::-1]).epsilon(delta) == pytest.approx(at_once, abs=1e-6)


def test_what_if_adds_nothing_and_foresees_what_adding_brings():
    spent = total([KINDS[0], KINDS[3]])
    before = spent.epsilon(1e-6)
    run = [KINDS[1], KINDS[1], KINDS[4]]
    foreseen = spent.epsilon_with(run, 1e-6)
    assert spent.epsilon(1e-6) == before < foreseen
    assert spent.epsilon_with(run[:1], 1e-6) < spent.epsilon_with(run[:2], 1e-6) < foreseen
    for release in run:
        spent.add(release)
    assert spent.epsilon(1e-6) == pytest.approx(foreseen, abs=1e-6)


def test_several_times_are_as_many_copies():
    spent, run = total([KINDS[0]]), [KINDS[2], KINDS[3]]
    assert spent.epsilon_with(run, 1e-6, times=3) == pytest.approx(spent.epsilon_with(run * 3, 1e-6), abs=1e-9)
    assert spent.epsilon_with(run, 1e-6, times=0) == spent.epsilon_with([], 1e-6) == spent.epsilon(1e-6)


def test_a_total_asked_after_every_addition_stays_close():
    # Each composition takes up to 5e-16 out of delta for its upper tail. Were they never composed anew, 300 would
    # raise this epsilon by 1.3e-4, and a ledger that lives long would drift without end.
    spent, releases = RunningCost(), []
    for number in range(300):
        releases.append(statistic(20.0 if number % 2 else 30.0))
        spent.add(releases[-1])
        spent.epsilon(1e-10)
    assert spent.epsilon(1e-10) == pytest.approx(epsilon(releases, 1e-10), abs=3e-5)


@pytest.mark.parametrize("worthless", [None, rounds(0.01), rounds(0.1, 1.0, 10**6)])
def test_a_release_without_privacy_makes_it_infinite_from_then_on(worthless):
    spent = total([KINDS[0]])
    assert spent.epsilon_with([KINDS[0], worthless], 1e-6) == math.inf
    assert spent.epsilon(1e-6) < math.inf  # only asked
    spent.add(worthless)
    assert spent.epsilon(1e-6) == spent.epsilon_with([], 1e-6) == math.inf
    spent.add(KINDS[0])
    assert spent.epsilon(1e-6) == spent.copy().epsilon(1e-6) == math.inf


def test_nothing_costs_nothing():
    spent = RunningCost()
    assert spent.epsilon(1e-6) == spent.epsilon_with([], 1e-6) == 0.0
    assert spent.epsilon_with([KINDS[2]], 1e-6) == epsilon([KINDS[2]], 1e-6)


def test_a_copy_goes_its_own_way():
    spent = total([KINDS[0], KINDS[3]])
    before = spent.epsilon(1e-6)
    other = spent.copy()
    assert other.epsilon(1e-6) == before
    other.add(KINDS[4])
    assert spent.epsilon(1e-6) == before < other.epsilon(1e-6)
    spent.add(KINDS[4])
    assert spent.epsilon(1e-6) == other.epsilon(1e-6)


def test_one_total_has_a_price_at_every_delta():
    spent = total([KINDS[0]] * 5)
    assert spent.epsilon(1e-4) < spent.epsilon(1e-6)
    assert spent.epsilon(1e-6) == epsilon([KINDS[0]] * 5, 1e-6)


@pytest.mark.parametrize("delta", [0.0, 1.0, float("nan")])
def test_delta_must_be_a_probability(delta):
    for spent in (RunningCost(), total([None]), total([KINDS[0]])):
        with pytest.raises(InputError, match="between 0 and 1"):
            spent.epsilon(delta)
