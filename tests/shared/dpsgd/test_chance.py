"""The source of the noise: normal, white, and nobody else's."""

import os
from math import erfc, sqrt

import numpy as np
import pytest

from shared.dpsgd.chance import Chance

NUM_DRAWS = 400_000


@pytest.fixture(scope="module", params=["secret", "seeded"])
def draws(request):
    chance = Chance.secret() if request.param == "secret" else Chance.seeded(1, "noise")
    return chance.normal(NUM_DRAWS)


def test_moments_are_those_of_a_standard_normal(draws):
    # Four standard errors each: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
    for power, (expected, spread) in enumerate([(0, 1), (1, sqrt(2)), (0, sqrt(15)), (3, sqrt(96))], start=1):
        assert np.mean(draws**power) == pytest.approx(expected, abs=4 * spread / sqrt(NUM_DRAWS))


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0, 4.0])
def test_tails_are_those_of_a_standard_normal(draws, bound):
    expected = erfc(bound / sqrt(2))
    tolerance = 4 * sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert np.mean(np.abs(draws) > bound) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("lag", [1, 2, 7, NUM_DRAWS // 2])
def test_draws_do_not_follow_from_each_other(draws, lag):
    pairs = NUM_DRAWS - lag
    for values in (draws, draws**2 - 1):
        scale = np.mean(values**2)
        assert abs(np.mean(values[:-lag] * values[lag:])) < 4.5 * scale / sqrt(pairs)


def test_uniforms_stay_inside_their_interval():
    for word in (0, 2**64 - 1):
        value = Chance(lambda count, word=word: np.full(count, word, dtype=np.uint64)).uniform(1)[0]
        assert 0.0 < value < 1.0
    assert np.isfinite(Chance(lambda count: np.zeros(count, dtype=np.uint64)).normal(3)).all()


def test_a_seed_repeats_and_secrets_never_do():
    assert np.array_equal(Chance.seeded(1, "a").normal(9), Chance.seeded(1, "a").normal(9))
    assert not np.array_equal(Chance.seeded(1, "a").normal(9), Chance.seeded(1 + 2**32, "a").normal(9))
    secret = Chance.secret()
    assert not np.array_equal(secret.normal(9), secret.normal(9))


def test_a_forked_child_has_noise_of_its_own():
    secret = Chance.secret()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, secret.normal(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reading, 64), dtype=np.float64)
    assert not np.isin(theirs, secret.normal(4)).any()
