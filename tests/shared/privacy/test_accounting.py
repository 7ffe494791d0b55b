"""The price of releases: golden numbers, composition, and two accountants that must agree."""

import dataclasses

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import FedAugError, InputError
from shared.privacy import accounting
from shared.privacy.accounting import certified_epsilon, default_delta, epsilon, opacus_epsilon
from shared.privacy.calibration import calibrate
from shared.privacy.releases import DpSgdRelease


def release(noise_multiplier: float = 2.0, sample_rate: float = 0.05, num_steps: int = 400) -> DpSgdRelease:
    return DpSgdRelease(noise_multiplier=noise_multiplier, sample_rate=sample_rate, num_steps=num_steps, max_users=1500)


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


def test_a_wrong_accountant_is_noticed(monkeypatch):
    monkeypatch.setattr(accounting, "epsilon", lambda releases, delta: 0.95 * epsilon(releases, delta))
    with pytest.raises(FedAugError, match="accountants disagree"):
        certified_epsilon([release(1.0)], 1e-5)


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0, 30.0])
def test_calibrated_noise_buys_the_target_and_hardly_more(target):
    bought = calibrate(target_epsilon=target, delta=1e-5, sample_rate=0.2, num_steps=100, max_users=500)
    less = dataclasses.replace(bought, noise_multiplier=bought.noise_multiplier * 0.99)
    assert epsilon([bought], 1e-5) <= target < epsilon([less], 1e-5)


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
        {"num_steps": 0},
        {"max_users": 0},
        {"mechanism": "laplace"},
    ],
)
def test_a_release_that_means_nothing_cannot_be_built(change):
    with pytest.raises(InputError, match="release:"):
        DpSgdRelease.from_dict({**release().to_dict(), **change})


def test_a_release_survives_json_and_refuses_unknown_fields():
    assert DpSgdRelease.from_dict(release().to_dict()) == release()
    with pytest.raises(InputError, match="sigma"):
        DpSgdRelease.from_dict({**release().to_dict(), "sigma": 1.0})
