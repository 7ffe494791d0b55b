"""The price of releases: golden numbers, composition, and three accountants that must agree."""

import dataclasses
import json
import math

import numpy as np
import pytest
from dp_accounting import TruncatedSubsampledGaussianDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from shared.errors import FedAugError, InputError
from shared.privacy import accounting
from shared.privacy.accounting import (
    are_priced,
    certified_epsilon,
    default_delta,
    epsilon,
    opacus_epsilon,
    rdp_epsilon,
    steps_of,
)
from shared.privacy.calibration import calibrate, default_max_batch
from shared.privacy.releases import DpSgdRelease, GaussianRelease

DELTA = 1500**-1.1


def release(noise_multiplier: float = 2.0, sample_rate: float = 0.05, num_steps: int = 400, **more) -> DpSgdRelease:
    run = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "num_steps": num_steps, "max_users": 1500}
    return DpSgdRelease(**{**run, **more})


def statistic(noise_multiplier: float) -> GaussianRelease:
    return GaussianRelease(statistic="popularity", noise_multiplier=noise_multiplier, max_users=1500)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Of one Gaussian mechanism, exactly (Balle & Wang 2018, arXiv:1805.06530, theorem 8)."""
    mean = 1 / noise_multiplier

    def excess(spent: float) -> float:
        lost = stats.norm.cdf(mean / 2 - spent / mean) - math.exp(spent + stats.norm.logcdf(-mean / 2 - spent / mean))
        return lost - delta

    return optimize.brentq(excess, 0, mean**2 / 2 + 40 * mean, xtol=1e-12) if excess(0) > 0 else 0.0


def truncated_epsilon(one: DpSgdRelease, delta: float, num_users: int) -> float:
    """By dp-accounting's own event (arXiv:2508.15089), for an owner known to hold ``num_users``."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    event = TruncatedSubsampledGaussianDpEvent(num_users, one.sample_rate, one.max_batch, one.noise_multiplier)
    accountant.compose(event, one.num_steps)
    return accountant.get_epsilon(delta)


def true_delta(one: DpSgdRelease, spent: float, num_users: int) -> float:
    """Of one step whose user adds +1 and whose other ``num_users - 1`` add -1 each: by enumeration, on a fine grid."""
    line = np.arange(
        -one.max_users - 12 * one.noise_multiplier, 3 + 12 * one.noise_multiplier, one.noise_multiplier / 200
    )
    without, with_user = np.zeros_like(line), np.zeros_like(line)
    for others in range(num_users):
        chance = stats.binom.pmf(others, num_users - 1, one.sample_rate)
        batch = min(others, one.max_batch)
        absent = stats.norm.pdf(line, -batch, one.noise_multiplier)
        if others < one.max_batch:
            kept, present = 1.0, stats.norm.pdf(line, 1 - batch, one.noise_multiplier)
        else:  # one of them gives way
            kept, present = batch / (others + 1), stats.norm.pdf(line, 2 - batch, one.noise_multiplier)
        drawn = one.sample_rate * kept
        without += chance * absent
        with_user += chance * ((1 - drawn) * absent + drawn * present)
    apart = [np.maximum(a - math.exp(spent) * b, 0).sum() for a, b in ((without, with_user), (with_user, without))]
    return max(apart) * (line[1] - line[0])


def independent_epsilon(releases: list[DpSgdRelease], delta: float) -> float:
    """Privacy loss distributions built mechanism by mechanism, one step at a time composed."""
    total = privacy_loss_distribution.identity(value_discretization_interval=1e-3)
    for one in releases:
        step = privacy_loss_distribution.from_gaussian_mechanism(
            one.noise_multiplier, sampling_prob=one.sample_rate, value_discretization_interval=1e-3
        )
        total = total.compose(step.self_compose(one.num_steps))
    return total.get_epsilon_for_delta(delta)


@pytest.mark.parametrize(("epochs", "published"), [(100, 1.26), (400, 2.55)])
def test_dp_sgd_is_not_worse_than_abadi_2016(epochs, published):
    # Figure 2: q=0.01, sigma=4, delta=1e-5. Today's conversion is tighter, but not by half.
    spent = epsilon([release(4.0, 0.01, 100 * epochs)], 1e-5)
    assert 0.5 * published < spent <= published


def test_rounds_compose_and_never_reset():
    per_round = [release(num_steps=20)] * 20
    after = [epsilon(per_round[:rounds], 1e-5) for rounds in (1, 5, 20)]
    assert after[0] < after[1] < after[2]
    assert after[2] == pytest.approx(epsilon([release(num_steps=400)], 1e-5), abs=1e-9)


@given(
    noise=st.floats(1.0, 8.0),
    rate=st.floats(0.02, 0.5),
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=3),
)
@settings(max_examples=8, deadline=None)
def test_the_sum_equals_an_independent_composition(noise, rate, steps):
    releases = [release(noise, rate, count) for count in steps]
    releases.append(release(2 * noise, rate, steps[0]))
    # Both round losses up to the same grid; what remains is the order of floating-point sums.
    assert epsilon(releases, 1e-5) == pytest.approx(independent_epsilon(releases, 1e-5), abs=2e-3)


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(0.7, 0.01, 1), (0.8, 0.05, 400), (1.3, 0.2, 100), (20.0, 0.01, 10), (3.5, 1.0, 40)]
)
def test_the_two_accountants_agree_wherever_plans_lie(noise, rate, steps):
    releases = [release(noise, rate, steps)]
    assert certified_epsilon(releases, 1e-5) == epsilon(releases, 1e-5)


@given(noises=st.lists(st.floats(2.0, 60.0), min_size=1, max_size=5), delta=st.sampled_from([1e-3, 1e-6, 1e-9]))
@settings(max_examples=15, deadline=None)
def test_statistics_cost_what_one_gaussian_with_their_signal_costs(noises, delta):
    # Signals of independent Gaussians add up in squares, so there is a closed form for any number of them.
    exact = gaussian_epsilon(sum(noise**-2 for noise in noises) ** -0.5, delta)
    assert exact <= epsilon([statistic(noise) for noise in noises], delta) <= exact + 0.006


def test_a_statistic_costs_what_a_full_batch_costs():
    assert epsilon([statistic(3.0)] * 4, 1e-6) == epsilon([release(3.0, 1.0, 4)], 1e-6)
    assert certified_epsilon([statistic(20.0), release()], DELTA) == epsilon([statistic(20.0), release()], DELTA)


@pytest.mark.parametrize(("num_steps", "delta"), [(10_000, 1e-12), (10_000, 2e-11), (200_000, 1e-9), (1000, 1e-12)])
def test_sums_of_floats_never_take_epsilon_below_the_truth(num_steps, delta):
    # Left as they come out of the Fourier transform, the first would be 7.21 where the truth is 7.24.
    spent = epsilon([release(100.0, 1.0, num_steps)], delta)
    assert spent >= gaussian_epsilon(100.0 / num_steps**0.5, delta)
    assert math.isinf(spent) == (5e-16 * num_steps > delta)


@pytest.mark.parametrize(
    ("noise", "rate"), [(0.1, 1.0), (0.1, 0.01), (0.1, 1e-5), (0.3, 0.2), (1.0, 0.1), (2.0, 0.05), (8.0, 1.0)]
)
def test_prices_are_infinite_only_where_the_mean_loss_is_in_the_thousands(noise, rate):
    def loss(noised: float) -> float:
        present = rate * stats.norm.pdf(noised, 1, noise) + (1 - rate) * stats.norm.pdf(noised, 0, noise)
        return present * np.logaddexp(
            math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (noised - 0.5) / noise**2
        )

    mean, _ = integrate.quad(loss, -9 * noise, 1 + 9 * noise, points=[0, 1], limit=500)
    for times, priced in ((0.99, True), (2.5, False)):
        steps = {kind: math.ceil(times * 1000 / mean) for kind in steps_of([release(noise, rate)])}
        assert are_priced(steps) == priced


def test_an_absurd_plan_is_priced_at_once():
    assert epsilon([release(0.1, 1.0, 10**6)], 1e-6) == math.inf
    assert certified_epsilon([release(0.1, 1.0, 10**6, max_batch=75)], 1e-6) == math.inf
    assert rdp_epsilon([release(1e-300, 1.0, 1)], 1e-6) == math.inf


@pytest.mark.parametrize(("runs", "published"), [(1, 1.936), (2, 2.855), (5, 4.856), (10, 7.375), (20, 11.391)])
def test_the_renyi_bound_is_the_published_one(runs, published):
    # By Opacus' Rényi accountant, whose orders lie elsewhere.
    assert rdp_epsilon([release()] * runs, DELTA) == pytest.approx(published, rel=3e-3)


@pytest.mark.parametrize("noise", [1000.0, 100.0, 10.0, 1.0, 0.1])
def test_the_renyi_bound_does_not_saturate(noise):
    exact = gaussian_epsilon(noise, 1e-5)
    assert exact < rdp_epsilon([statistic(noise)], 1e-5) < 1.25 * exact


def test_the_renyi_bound_comes_without_warnings(caplog):
    assert rdp_epsilon([release(0.3, 0.2, 100)], 1e-5) > epsilon([release(0.3, 0.2, 100)], 1e-5)
    assert not caplog.records


def test_an_epsilon_above_its_renyi_bound_is_noticed(monkeypatch):
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda releases, delta: 0.95 * epsilon(releases, delta))
    with pytest.raises(FedAugError, match="above its Rényi bound"):
        certified_epsilon([release(1.1)], 1e-5)


def test_a_wrong_accountant_is_noticed(monkeypatch):
    monkeypatch.setattr(accounting, "epsilon", lambda releases, delta: 0.95 * epsilon(releases, delta))
    with pytest.raises(FedAugError, match="accountants disagree"):
        certified_epsilon([release(1.0)], 1e-5)


@pytest.mark.parametrize(
    ("max_users", "max_batch", "published"), [(1500, 82, 3.72), (1500, 93, 2.01), (1500, 112, 1.71), (2000, 112, 3.00)]
)
def test_a_cap_costs_what_dp_accounting_says_or_little_more(max_users, max_batch, published):
    # dp-accounting 0.6's event for an owner who holds max_users; ours covers all smaller ones as well.
    capped = release(max_users=max_users, max_batch=max_batch)
    assert truncated_epsilon(capped, DELTA, max_users) == pytest.approx(published, abs=0.005)
    assert published - 0.005 < epsilon([capped], DELTA) < 1.07 * published
    assert certified_epsilon([capped], DELTA) == epsilon([capped], DELTA)


def test_capped_batches_priced_as_plain_poisson_would_report_too_little():
    capped = release(max_users=2000, max_batch=112)
    assert epsilon([dataclasses.replace(capped, max_batch=None)], DELTA) == pytest.approx(1.71, abs=0.005)
    assert epsilon([capped], DELTA) > 3.0


@given(
    noise=st.floats(0.8, 4.0),
    rate=st.floats(0.05, 1.0),
    steps=st.integers(1, 100),
    max_users=st.integers(2, 300),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_no_owner_within_max_users_pays_more_than_is_reported(noise, rate, steps, max_users, data):
    capped = release(noise, rate, steps, max_users=max_users, max_batch=data.draw(st.integers(1, max_users)))
    num_users = data.draw(st.integers(1, max_users))
    reported = epsilon([capped], 1e-5)
    tolerance = 1e-6 * (1 + reported)  # sums of floating-point numbers, nothing else
    assert truncated_epsilon(capped, 1e-5, num_users) <= reported + tolerance
    assert epsilon([dataclasses.replace(capped, max_batch=None)], 1e-5) <= reported + tolerance
    assert epsilon([dataclasses.replace(capped, max_users=max_users + 1)], 1e-5) >= reported - tolerance


def test_a_generous_max_users_hides_nothing():
    # Taken at max_users, dp-accounting's event asks less of a federation that declares more.
    capped = release(max_users=100_000, max_batch=112)
    assert truncated_epsilon(capped, DELTA, 100_000) < 0.2
    assert 6.9 < truncated_epsilon(capped, DELTA, 2500) < epsilon([capped], DELTA)


@given(
    noise=st.floats(0.5, 2.0),
    rate=st.floats(0.1, 1.0),
    max_users=st.integers(2, 6),
    delta=st.floats(1e-4, 0.3),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_epsilon_covers_one_step_enumerated(noise, rate, max_users, delta, data):
    capped = release(noise, rate, 1, max_users=max_users, max_batch=data.draw(st.integers(1, max_users)))
    spent = epsilon([capped], delta)
    for num_users in range(1, max_users + 1):
        # The integrand has a kink, where a sum over a grid errs by its step squared / 8 times the change of slope:
        # (noise / 200)^2 / 8 times at most 0.25 / noise^2 is 8e-7.
        assert true_delta(capped, spent, num_users) <= delta + 1e-6


def test_the_enumeration_notices_a_cap_that_is_not_priced():
    capped = release(1.0, 1.0, 1, max_users=6, max_batch=5)
    unpriced = epsilon([dataclasses.replace(capped, max_batch=None)], 1e-3)
    assert true_delta(capped, unpriced, num_users=6) > 50e-3
    assert true_delta(capped, unpriced, num_users=5) == pytest.approx(1e-3, rel=0.01)  # five never exceed it


def test_capped_rounds_compose_and_different_caps_stay_apart():
    tight, loose, more_users = release(max_batch=82), release(max_batch=93), release(max_batch=93, max_users=1600)
    quarters = [dataclasses.replace(tight, num_steps=100)] * 4
    assert epsilon(quarters, DELTA) == pytest.approx(epsilon([tight], DELTA), abs=1e-9)
    both = epsilon([tight, loose], DELTA)
    assert epsilon([loose, loose], DELTA) + 0.1 < both < epsilon([tight, tight], DELTA) - 0.1
    assert epsilon([loose, loose], DELTA) + 0.1 < epsilon([loose, more_users], DELTA)
    assert epsilon([tight, loose], DELTA) == pytest.approx(epsilon([loose, tight], DELTA), abs=1e-9)


def test_opacus_knows_no_caps():
    assert opacus_epsilon([release(max_batch=82)], DELTA) == opacus_epsilon([release()], DELTA)


@pytest.mark.parametrize(("max_batch", "wrong"), [(82, 0.4), (112, 0.98), (140, 1.02)])
def test_a_wrong_price_of_a_cap_is_noticed(monkeypatch, max_batch, wrong):
    def mistaken(releases, delta):
        return epsilon(releases, delta) * (1.0 if releases[0].max_batch is None else wrong)

    monkeypatch.setattr(accounting, "epsilon", mistaken)
    with pytest.raises(FedAugError, match="with capped batches must lie between"):
        certified_epsilon([release(num_steps=401, max_batch=max_batch)], DELTA)


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0, 30.0])
def test_calibrated_noise_buys_the_target_and_hardly_more(target):
    bought = calibrate(target_epsilon=target, delta=1e-5, sample_rate=0.2, num_steps=100, max_users=500)
    less = dataclasses.replace(bought, noise_multiplier=bought.noise_multiplier * 0.99)
    assert epsilon([bought], 1e-5) <= target < epsilon([less], 1e-5)


@pytest.mark.parametrize("max_batch", [100, 110, 150])
def test_noise_is_calibrated_on_the_cap_as_well(max_batch):
    plan = {"target_epsilon": 3.0, "delta": 1e-5, "sample_rate": 0.2, "num_steps": 100, "max_users": 500}
    bought, uncapped = calibrate(**plan, max_batch=max_batch), calibrate(**plan)
    less = dataclasses.replace(bought, noise_multiplier=bought.noise_multiplier * 0.99)
    assert bought.max_batch == max_batch
    assert epsilon([bought], 1e-5) <= 3.0 < epsilon([less], 1e-5)
    assert bought.noise_multiplier >= uncapped.noise_multiplier
    if max_batch == 100:  # the expected batch: half of all steps are tight
        assert bought.noise_multiplier > 1.5 * uncapped.noise_multiplier


@pytest.mark.parametrize(
    ("max_users", "sample_rate", "num_steps", "target"),
    [(200, 0.01, 2000, 10.0), (1500, 0.05, 400, 1.0), (100_000, 0.2, 20, 10.0), (40, 0.5, 100, 3.0)],
)
def test_the_default_cap_does_not_move_epsilon(max_users, sample_rate, num_steps, target):
    delta = default_delta(10_000)
    plan = {"sample_rate": sample_rate, "num_steps": num_steps, "max_users": max_users}
    bought = calibrate(target_epsilon=target, delta=delta, **plan)
    max_batch = default_max_batch(**plan, delta=delta)
    capped = dataclasses.replace(bought, max_batch=max_batch)
    assert certified_epsilon([capped], delta) == pytest.approx(epsilon([bought], delta), abs=1e-3)
    # The smallest: one less would be tight more often than in a thousandth of delta.
    tight = [stats.binom.sf(cap - 1, max_users - 1, sample_rate) for cap in (max_batch - 1, max_batch)]
    assert tight[1] <= 1e-3 * delta / num_steps
    assert max_batch == max_users or tight[0] > 1e-3 * delta / num_steps


@pytest.mark.parametrize(("max_users", "sample_rate"), [(1, 0.05), (1, 1.0), (500, 1.0), (3, 0.9)])
def test_the_default_cap_never_exceeds_max_users(max_users, sample_rate):
    cap = default_max_batch(max_users=max_users, sample_rate=sample_rate, num_steps=10, delta=1e-5)
    assert cap == max_users
    assert epsilon([release(2.0, sample_rate, 10, max_users=max_users, max_batch=cap)], 1e-5) == epsilon(
        [release(2.0, sample_rate, 10)], 1e-5
    )


@pytest.mark.parametrize("target", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_targets_are_refused(target):
    with pytest.raises(InputError, match="finite and greater than 0"):
        calibrate(target_epsilon=target, delta=1e-5, sample_rate=0.2, num_steps=10, max_users=10)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_delta_must_be_a_probability(delta):
    with pytest.raises(InputError, match="between 0 and 1"):
        epsilon([release()], delta)


def test_no_release_costs_nothing():
    assert epsilon([], 1e-5) == opacus_epsilon([], 1e-5) == 0.0


def test_default_delta_is_below_one_over_the_federation():
    assert default_delta(10_000) == pytest.approx(10_000**-1.1)
    with pytest.raises(InputError, match="at least 2 users"):
        default_delta(1)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"noise_multiplier": "2.0"},
        {"noise_multiplier": 10**400},
        {"num_steps": 0},
        {"num_steps": True},
        {"num_steps": 2.0},
        {"num_steps": 10**30},
        {"max_users": 0},
        {"max_users": True},
        {"max_users": "1500"},
        {"max_batch": 0},
        {"max_batch": True},
        {"max_batch": 112.0},
        {"mechanism": "laplace"},
    ],
)
def test_a_release_that_means_nothing_cannot_be_built(change):
    with pytest.raises(InputError, match="release:"):
        DpSgdRelease.from_dict({**release().to_dict(), **change})


def test_a_cap_above_max_users_is_refused_with_the_cap_to_use():
    with pytest.raises(InputError, match="Use max_batch=1500, or none"):
        release(max_batch=1501)
    assert release(max_batch=1500).expected_batch == release().expected_batch


@pytest.mark.parametrize("max_batch", [None, 112])
def test_a_release_survives_json_and_refuses_unknown_fields(max_batch):
    there_and_back = json.loads(json.dumps(release(max_batch=max_batch).to_dict()))
    assert DpSgdRelease.from_dict(there_and_back) == release(max_batch=max_batch)
    with pytest.raises(InputError, match="sigma"):
        DpSgdRelease.from_dict({**release().to_dict(), "sigma": 1.0})
