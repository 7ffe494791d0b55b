"""Releases of statistics: what cannot be built, and what survives JSON."""

import json

import pytest

from shared.errors import InputError
from shared.privacy.releases import DpSgdRelease, GaussianRelease, release_from_dict

SKETCH = GaussianRelease(statistic="co-occurrence sketch", noise_multiplier=20.0, max_users=1500)
ROUND = DpSgdRelease(noise_multiplier=2.0, sample_rate=0.05, num_steps=20, max_users=1500, max_batch=112)


def test_a_statistic_is_written_with_every_key_of_a_release():
    assert SKETCH.to_dict() == {
        "statistic": "co-occurrence sketch",
        "mechanism": "gaussian",
        "noise_multiplier": 20.0,
        "sample_rate": 1.0,
        "num_steps": 1,
        "max_batch": None,
        "max_users": 1500,
    }
    assert set(ROUND.to_dict()) <= set(SKETCH.to_dict())


@pytest.mark.parametrize("release", [SKETCH, ROUND])
def test_a_release_is_read_back_as_what_it_was(release):
    there_and_back = json.loads(json.dumps(release.to_dict()))
    assert release_from_dict(there_and_back) == release
    assert type(release).from_dict(there_and_back) == release
    with pytest.raises(InputError, match="sigma"):
        release_from_dict({**release.to_dict(), "sigma": 1.0})


@pytest.mark.parametrize(
    "change",
    [
        {"statistic": ""},
        {"statistic": "  "},
        {"statistic": "x" * 101},
        {"statistic": "two\nlines"},
        {"statistic": "\x1b[2J"},
        {"statistic": "\ud800"},
        {"statistic": 7},
        {"statistic": None},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"noise_multiplier": "2.0"},
        {"noise_multiplier": True},
        {"noise_multiplier": 10**400},
        {"max_users": 0},
        {"max_users": True},
        {"max_users": 1500.0},
        {"max_users": 2**54},
        {"sample_rate": 0.5},
        {"sample_rate": True},
        {"sample_rate": None},
        {"num_steps": 2},
        {"num_steps": True},
        {"max_batch": 112},
        {"mechanism": "dp_sgd_poisson"},
    ],
)
def test_a_statistic_that_means_nothing_cannot_be_built(change):
    with pytest.raises(InputError, match="release:"):
        GaussianRelease.from_dict({**SKETCH.to_dict(), **change})


@pytest.mark.parametrize("missing", ["statistic", "noise_multiplier", "max_users"])
def test_a_statistic_needs_all_that_prices_it(missing):
    values = SKETCH.to_dict()
    del values[missing]
    with pytest.raises(InputError, match=missing):
        release_from_dict(values)


@pytest.mark.parametrize("mechanism", ["laplace", None, ["gaussian"], {}, 1])
def test_an_unknown_mechanism_is_named(mechanism):
    with pytest.raises(InputError, match="unknown mechanism") as refused:
        release_from_dict({**SKETCH.to_dict(), "mechanism": mechanism})
    assert repr(mechanism) in str(refused.value)


@pytest.mark.parametrize("values", [None, [], "gaussian", 1])
def test_what_is_no_release_at_all_is_refused(values):
    with pytest.raises(InputError, match="fields by name"):
        release_from_dict(values)
    with pytest.raises(InputError, match="release:"):
        GaussianRelease.from_dict(values)
