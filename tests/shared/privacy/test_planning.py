"""What can be afforded: against golden compositions and against trying them one by one."""

import math
from dataclasses import replace

import pytest

from shared.errors import InputError
from shared.privacy.accounting import epsilon
from shared.privacy.calibration import default_max_batch
from shared.privacy.planning import MOST_RUNS, affordable_rounds, affordable_runs, least_noise, plan_grid
from shared.privacy.releases import DpSgdRelease, GaussianRelease
from shared.privacy.running import RunningCost

DELTA = 1500**-1.1
RUN = DpSgdRelease(noise_multiplier=2.0, sample_rate=0.05, num_steps=400, max_users=1500)
ROUND = replace(RUN, num_steps=20)
SKETCH = GaussianRelease(statistic="co-occurrence sketch", noise_multiplier=20.0, max_users=1500)
# shared/reference/opacus.md 6.3: this many such runs together cost this much, by privacy loss distributions.
PUBLISHED = [(1, 1.710), (2, 2.542), (5, 4.367), (10, 6.679), (20, 10.388)]


def total(*releases) -> RunningCost:
    spent = RunningCost()
    for release in releases:
        spent.add(release)
    return spent


@pytest.mark.parametrize(("runs", "published"), PUBLISHED)
def test_runs_cost_together_what_is_published(runs, published):
    spent = total(*[ROUND] * 20 * runs)
    # Published from a grid ten times as fine; ours lies above it, by at most 0.002 here.
    assert published - 5e-4 <= spent.epsilon(DELTA) <= published + 2e-3
    assert RunningCost().epsilon_with([ROUND] * 20, DELTA, times=runs) == pytest.approx(spent.epsilon(DELTA), abs=1e-9)


@pytest.mark.parametrize(("runs", "published"), PUBLISHED)
def test_as_many_runs_are_affordable_as_the_published_price_allows(runs, published):
    for ceiling, fitting in ((published + 2e-3, runs), (published - 2e-3, runs - 1)):
        assert affordable_runs(RunningCost(), [RUN], delta=DELTA, ceiling=ceiling) == fitting
        left = affordable_runs(total(RUN), [RUN], delta=DELTA, ceiling=ceiling)
        assert left == max(0, fitting - 1)  # one is spent already
        rounds = affordable_rounds(RunningCost(), ROUND, delta=DELTA, ceiling=ceiling, most=1000)
        assert 20 * fitting <= rounds < 20 * (fitting + 1)


@pytest.mark.parametrize("ceiling", [0.7, 1.2, 1.9, 2.6])
@pytest.mark.parametrize("before", [(), (SKETCH,), (ROUND, SKETCH, ROUND)])
def test_searching_finds_what_counting_finds(before, ceiling):
    run = [ROUND, ROUND, SKETCH]
    spent, counted = total(*before), 0
    while epsilon([*before, *run * (counted + 1)], DELTA) <= ceiling:
        counted += 1
    assert affordable_runs(spent, run, delta=DELTA, ceiling=ceiling) == counted
    assert spent.epsilon(DELTA) == total(*before).epsilon(DELTA)  # nothing was added


def test_the_search_ends_somewhere():
    faint = GaussianRelease(statistic="popularity", noise_multiplier=4000.0, max_users=1500)
    assert affordable_runs(RunningCost(), [faint], delta=DELTA, ceiling=5.0) == MOST_RUNS
    assert affordable_runs(RunningCost(), [RUN], delta=DELTA, ceiling=math.inf) == MOST_RUNS
    assert affordable_rounds(RunningCost(), ROUND, delta=DELTA, ceiling=1.710 + 2e-3, most=13) == 13
    assert affordable_rounds(RunningCost(), ROUND, delta=DELTA, ceiling=1.710 + 2e-3, most=0) == 0


@pytest.mark.parametrize("spent", [total(RUN, RUN), total(None)])
def test_nothing_is_affordable_above_the_ceiling(spent):
    assert affordable_runs(spent, [RUN], delta=DELTA, ceiling=2.0) == 0
    assert affordable_runs(spent, [], delta=DELTA, ceiling=2.0) == 0
    assert affordable_rounds(spent, ROUND, delta=DELTA, ceiling=2.0, most=100) == 0
    assert least_noise(spent, RUN, delta=DELTA, ceiling=2.0) is None


@pytest.mark.parametrize("max_batch", [None, 112])
@pytest.mark.parametrize("ceiling", [2.0, 2.4])
def test_the_least_noise_fits_and_hardly_less_does(ceiling, max_batch):
    spent, asked = total(RUN), replace(RUN, max_batch=max_batch)
    offered = least_noise(spent, asked, delta=DELTA, ceiling=ceiling)
    less = replace(offered, noise_multiplier=offered.noise_multiplier * 0.997)
    assert spent.epsilon_with([offered], DELTA) <= ceiling < spent.epsilon_with([less], DELTA)
    assert offered == replace(asked, noise_multiplier=float(f"{offered.noise_multiplier:.4g}"))


def test_what_fits_needs_no_more_noise():
    assert least_noise(total(RUN), RUN, delta=DELTA, ceiling=2.6) == RUN
    assert least_noise(RunningCost(), RUN, delta=DELTA, ceiling=math.inf) == RUN


def test_noise_beyond_reason_is_not_offered():
    spent = total(RUN)
    assert least_noise(spent, RUN, delta=DELTA, ceiling=spent.epsilon(DELTA) + 1e-5) is None
    assert least_noise(RunningCost(), replace(RUN, noise_multiplier=5000.0), delta=DELTA, ceiling=1e-6) is None
    # From a stranger's noise of nearly none, the search arrives all the same.
    assert (
        least_noise(RunningCost(), replace(RUN, noise_multiplier=1e-9), delta=DELTA, ceiling=1.72).noise_multiplier < 2
    )


def test_a_grid_prices_every_plan():
    spent = total(RUN)
    grid = plan_grid(
        spent=spent,
        delta=DELTA,
        ceiling=2.3,
        rounds=[10, 20],
        noise_multipliers=[2.0, 4.0],
        sample_rates=[0.02, 0.05],
        max_users=1500,
        local_steps=20,
    )
    assert [(one.noise_multiplier, one.sample_rate, one.rounds) for one in grid] == [
        (noise, rate, rounds) for noise in (2.0, 4.0) for rate in (0.02, 0.05) for rounds in (10, 20)
    ]
    assert {one.fits for one in grid} == {True, False}
    for one in grid:
        run = DpSgdRelease(
            noise_multiplier=one.noise_multiplier,
            sample_rate=one.sample_rate,
            num_steps=20 * one.rounds,
            max_users=1500,
            max_batch=one.max_batch,
        )
        assert one.max_batch == default_max_batch(
            max_users=1500, sample_rate=one.sample_rate, num_steps=run.num_steps, delta=DELTA
        )
        assert one.epsilon_alone == epsilon([run], DELTA)
        assert one.epsilon_after == pytest.approx(epsilon([RUN, run], DELTA), abs=1e-6)
        assert one.fits == (one.epsilon_after <= 2.3)
        assert one.epsilon_after < one.epsilon_alone + spent.epsilon(DELTA)
    by_plan = {(one.noise_multiplier, one.sample_rate, one.rounds): one.epsilon_after for one in grid}
    for (noise, rate, rounds), after in by_plan.items():  # more rounds, more users a step or less noise cost more
        dearer = [(noise, rate, 20), (noise, 0.05, rounds), (2.0, rate, rounds)]
        assert all(by_plan[plan] > after for plan in dearer if plan != (noise, rate, rounds))


def test_a_grid_over_a_spent_budget_fits_nowhere():
    plans = {"rounds": [10], "noise_multipliers": [4.0], "sample_rates": [0.02], "max_users": 1500}
    [point] = plan_grid(spent=total(None), delta=DELTA, ceiling=8.0, **plans)
    assert point.epsilon_alone < 8.0 < point.epsilon_after == math.inf
    assert not point.fits


@pytest.mark.parametrize(
    "change", [{"rounds": [0]}, {"noise_multipliers": [0.0]}, {"sample_rates": [1.5]}, {"delta": 0}]
)
def test_a_grid_of_impossible_plans_is_refused(change):
    plans = {"rounds": [10], "noise_multipliers": [4.0], "sample_rates": [0.02], "max_users": 1500, "delta": DELTA}
    with pytest.raises(InputError):
        plan_grid(spent=RunningCost(), ceiling=8.0, **{**plans, **change})


@pytest.mark.parametrize("ceiling", [0.0, -1.0, float("nan")])
def test_a_ceiling_is_above_0(ceiling):
    with pytest.raises(InputError, match="ceiling on epsilon must be greater than 0"):
        affordable_runs(RunningCost(), [RUN], delta=DELTA, ceiling=ceiling)
    with pytest.raises(InputError, match="ceiling on epsilon must be greater than 0"):
        least_noise(RunningCost(), RUN, delta=DELTA, ceiling=ceiling)
