"""Noise for several releases at once: as little as the target allows, and no less."""

import pytest

from shared.errors import InputError
from shared.privacy.accounting import certified_epsilon, epsilon
from shared.privacy.calibration import calibrate, calibrate_statistics

DELTA = 1e-5
SKETCH = {"popularity": 3.0, "cooccurrence": 1.0}


@pytest.mark.parametrize("target", [0.5, 4.0, 20.0])
def test_statistics_cost_together_just_what_they_may(target):
    releases = calibrate_statistics(SKETCH, target_epsilon=target, delta=DELTA, max_users=500)
    assert [release.statistic for release in releases] == list(SKETCH)
    # Three digits stay of a multiplier that is rounded up in the fourth, and epsilon falls hardly faster than it.
    assert 0.99 * target < certified_epsilon(releases, DELTA) <= target
    popularity, cooccurrence = (release.noise_multiplier for release in releases)
    assert popularity == pytest.approx(3 * cooccurrence, rel=2e-3)


def test_one_gaussian_release_needs_the_analytic_noise():
    # Balle & Wang 2018, arXiv:1805.06530, section 5: the least noise at epsilon 1, delta 1e-5 is 3.7306 sensitivities.
    (release,) = calibrate_statistics({"both": 1.0}, target_epsilon=1.0, delta=DELTA, max_users=500)
    assert release.noise_multiplier == pytest.approx(3.7306, rel=2e-3)


def test_training_beside_a_sketch_is_priced_with_it():
    run = {"delta": DELTA, "sample_rate": 0.2, "num_steps": 100, "max_users": 600}
    sketch = calibrate_statistics(SKETCH, target_epsilon=4.0, delta=DELTA, max_users=600)
    alone = calibrate(target_epsilon=8.0, **run)
    beside = calibrate(target_epsilon=8.0, **run, beside=sketch)
    assert 7.9 < epsilon([*sketch, beside], DELTA) <= 8.0
    assert beside.noise_multiplier > 1.1 * alone.noise_multiplier
    # Each within its own part of epsilon would be far too much noise: losses add up by their squares.
    apart = calibrate(target_epsilon=4.0, **run)
    assert beside.noise_multiplier < 0.8 * apart.noise_multiplier


def test_a_sketch_that_leaves_nothing_says_what_to_change():
    sketch = calibrate_statistics(SKETCH, target_epsilon=4.0, delta=DELTA, max_users=600)
    with pytest.raises(InputError, match=r"a smaller privacy.sketch_share"):
        calibrate(target_epsilon=3.9, delta=DELTA, sample_rate=0.2, num_steps=100, max_users=600, beside=sketch)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_targets_that_are_none_are_refused(target):
    with pytest.raises(InputError, match="finite and greater than 0"):
        calibrate_statistics(SKETCH, target_epsilon=target, delta=DELTA, max_users=500)
