"""The source of the noise: normal, white, and nobody else's."""

import copy
import multiprocessing
import os
import pickle
from math import sqrt

import numpy as np
import pytest
import torch

from shared.dpsgd import box_muller
from shared.dpsgd import chance as chance_module
from shared.dpsgd.chance import Chance
from tests.shared.dpsgd.normality import correlations, kolmogorov, moments, tail

CHUNK = chance_module._CHUNK
NUM_DRAWS = 4 * CHUNK
# Seeds are fixed for the seeded stream, not for the secret one: all its checks together exceed this many standard
# errors less than once in 100,000 runs.
LIMIT = 5.5


def normals(chance: Chance, count: int, dtype: torch.dtype = torch.float32, stddev: float = 1.0) -> np.ndarray:
    values = torch.empty(count, dtype=dtype)
    chance.fill_normal(values, stddev=stddev)
    return values.double().numpy()


@pytest.fixture(scope="module", params=["secret", "seeded", "seeded float64"])
def draws(request):
    chance = Chance.secret() if request.param == "secret" else Chance.seeded(1, "noise")
    return normals(chance, NUM_DRAWS, torch.float64 if "float64" in request.param else torch.float32)


def test_moments_are_those_of_a_standard_normal(draws):
    assert max(map(abs, moments(draws))) < LIMIT
    assert max(map(abs, moments(0.99 * draws))) > LIMIT  # one percent too little is caught


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0, 4.0])
def test_tails_are_those_of_a_standard_normal(draws, bound):
    assert abs(tail(draws, bound)) < LIMIT


def test_the_distribution_is_the_normal_one(draws):
    # 2 exp(-2 x^2) is 1e-5 at 2.5.
    assert kolmogorov(draws) < 2.5
    assert kolmogorov(0.98 * draws) > 2.5
    assert kolmogorov(np.round(draws, 1)) > 2.5


@pytest.mark.parametrize("lag", [1, 2, 7, CHUNK // 2, CHUNK, 2 * CHUNK])
def test_draws_do_not_follow_from_each_other(draws, lag):
    assert max(map(abs, correlations(draws[:-lag], draws[lag:]))) < LIMIT


def test_dependence_would_be_seen(draws):
    # Pairs from one radius that came with the wrong angles: uncorrelated, but not independent.
    angles = np.random.default_rng(0).uniform(0, np.pi / 4, len(draws))
    assert max(map(abs, correlations(draws * np.cos(angles), draws * np.sin(angles)))) > LIMIT


@pytest.mark.parametrize("count", [0, 1, 2, 3, CHUNK // 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_number_is_written_whatever_the_size(count, dtype):
    values = torch.full((count + 2,), torch.nan, dtype=dtype)
    Chance.seeded(1).fill_normal(values[1:-1], stddev=2.0)
    assert torch.isnan(values[[0, -1]]).all()
    written = values[1:-1].double().numpy()
    assert np.isfinite(written).all()
    # In float32 a few of so many are the same number; a part that was written twice would be half of them.
    assert len(np.unique(written)) >= 0.99 * count
    if count > 100:
        assert written.std() == pytest.approx(2.0, rel=5 / sqrt(2 * count))


def test_shapes_are_filled_and_strided_memory_is_refused():
    matrix = torch.zeros(300, 40)
    Chance.seeded(1).fill_normal(matrix, stddev=1.0)
    assert np.array_equal(matrix.double().numpy().ravel(), normals(Chance.seeded(1), 12_000))
    with pytest.raises(RuntimeError, match="view"):
        Chance.seeded(1).fill_normal(matrix.t(), stddev=1.0)


def test_the_spread_is_a_factor():
    for stddev in (1e-12, 1e-3, 7.0, 1e12):
        expected = stddev * normals(Chance.seeded(1), 1000)
        assert np.allclose(normals(Chance.seeded(1), 1000, stddev=stddev), expected, rtol=1e-5, atol=1e-7 * stddev)


class Patched(Chance):
    """Whose key stream is these words for the normals, over and over, and these bytes, or the seed's, for the rest."""

    def __init__(self, words: list[int], rest: bytes | None = None) -> None:
        super().__init__(bytes(32))
        self.words, self.rest = np.array(words, dtype=np.int32), rest

    def _stream(self):
        return self

    def update_into(self, data, buffer):
        count = len(data) // 4
        buffer[: 4 * count] = np.resize(self.words, count).tobytes()

    def update(self, data):
        if self.rest is None:
            return super()._stream().update(data)
        return (self.rest * len(data))[: len(data)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rest", [b"\x00", b"\xff", None])
@pytest.mark.parametrize("word", [0, -1, 1, 2**31 - 1, -(2**31), 8191, 8192, -8192])
def test_the_rarest_words_give_finite_numbers(word, rest, dtype):
    drawn = normals(Patched([word], rest), 1001, dtype)
    assert np.isfinite(drawn).all()
    # 31 bits of the word and 53 of a uniform: the radius ends at sqrt(2 * 84 * log 2).
    assert np.abs(drawn).max() <= 10.8


def test_the_tail_goes_on_where_31_bits_end():
    # The smallest step of the radius, 2^-31, is 6.6 standard deviations out. Within it 52 bits more decide.
    drawn = normals(Patched([0]), CHUNK)
    radius = np.hypot(drawn[: CHUNK // 2], drawn[CHUNK // 2 :])
    assert radius.min() > 6.5
    assert radius.max() > 8.0
    assert len(np.unique(radius)) > 0.9 * CHUNK / 2


def test_the_tail_goes_on_evenly():
    # exp(-r^2 / 2) is uniform, on the smallest steps too: five words, each with its share of what lies about it.
    drawn = normals(Patched([0, 1, 2, 3, 4]), CHUNK, torch.float64)
    steps = np.exp(-0.5 * (drawn[: CHUNK // 2] ** 2 + drawn[CHUNK // 2 :] ** 2)) * 2.0**31
    shares = np.histogram(steps, bins=5, range=(0, 5.0))[0] / len(steps)
    assert shares == pytest.approx(0.2, abs=5 * sqrt(0.2 * 0.8 / len(steps)))


def test_the_steps_of_the_tail_join_those_before_it():
    # Of the words about where the extra bits begin, larger ones give smaller radii, and all are near each other.
    edge = box_muller.RARE
    words = list(range(edge - 50, edge + 50))
    drawn = normals(Patched(words), 2 * len(words), torch.float64)
    radius = np.hypot(drawn[: len(words)], drawn[len(words) :])
    assert np.all(np.diff(radius[::2]) < 0)
    assert radius.max() - radius.min() < 0.01


@pytest.mark.parametrize("rest", [b"\x00", b"\xff"])
def test_uniforms_stay_inside_their_interval(rest):
    value = Patched([0], rest).uniform(1)[0]
    assert 0.0 < value < 1.0


def test_uniforms_are_uniform():
    drawn = Chance.seeded(1, "sampling").uniform(NUM_DRAWS)
    ranks = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    # The largest gap of the distribution functions: 2 exp(-2 x^2) is 1e-5 at x = 2.5.
    assert np.max(np.abs(np.sort(drawn) - ranks)) * sqrt(NUM_DRAWS) < 2.5
    centred = (drawn - 0.5) * sqrt(12)
    assert abs(np.mean(centred[:-1] * centred[1:])) * sqrt(NUM_DRAWS) < LIMIT


def test_a_seed_repeats_and_names_and_seeds_part_streams():
    def first(*seed):
        return tuple(normals(Chance.seeded(*seed), 9)), tuple(Chance.seeded(*seed).uniform(9))

    assert first(1, "a") == first(1, "a")
    streams = [first(1, "a"), first(2, "a"), first(1, "b"), first(1, "a", 0), first(1 + 2**32, "a"), first(-1, "a")]
    for kind in range(2):
        assert len({one[kind] for one in streams}) == len(streams)


def test_a_stream_never_repeats_itself():
    chance = Chance.seeded(1)
    fills = [normals(chance, 1000, torch.float64) for _ in range(3)]
    assert len(np.unique(fills)) == 3000
    assert len(np.unique([chance.uniform(1000) for _ in range(3)])) == 3000


def test_secrets_are_never_the_same():
    one, other = Chance.secret(), Chance.secret()
    # Of 1000 float32 normals against 1000 some may be equal by rounding, never a tenth.
    assert np.isin(normals(one, 1000), normals(other, 1000)).mean() < 0.1
    assert not np.isin(one.uniform(1000), other.uniform(1000)).any()


@pytest.mark.parametrize("chance", [Chance.secret(), Chance.seeded(1)])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps, lambda chance: copy.deepcopy([chance])])
def test_a_stream_is_never_copied_or_stored(chance, duplicate):
    with pytest.raises(TypeError, match="make another one where it is needed"):
        duplicate(chance)
    chance.uniform(1)
    with pytest.raises(TypeError, match="make another one where it is needed"):
        duplicate(chance)


def test_a_secret_holds_no_key_that_somebody_could_read():
    secret = Chance.secret()
    normals(secret, 10)
    assert not [value for value in vars(secret).values() if isinstance(value, bytes) and len(value) == 32]


def in_a_child(draw) -> np.ndarray:
    """What ``draw`` gives in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, np.asarray(draw()).tobytes())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    drawn = np.frombuffer(os.read(reading, 1 << 16), dtype=np.float64)
    os.close(reading)
    assert len(drawn)
    return drawn


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("draw", [lambda chance: chance.uniform(50), lambda chance: normals(chance, 50, torch.float64)])
def test_forked_processes_never_share_a_secret_stream(draw, used_before):
    secret = Chance.secret()
    if used_before:
        draw(secret)
    children = [in_a_child(lambda: draw(secret)) for _ in range(2)]
    grandchild = in_a_child(lambda: (draw(secret), in_a_child(lambda: draw(secret)))[1])
    after = [draw(secret) for _ in range(5)]  # long enough to come to where a child would have been
    streams = [*children, grandchild, *after]
    for position, one in enumerate(streams):
        assert len(one) == 50
        for other in streams[:position]:
            assert not np.isin(one, other).any()


def test_a_process_of_multiprocessing_does_not_share_it_either():
    secret = Chance.secret()
    before = secret.uniform(20)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(secret.uniform(20)))
    process.start()
    theirs = queue.get()
    process.join()
    assert not np.isin(theirs, [*before, *secret.uniform(20)]).any()
    # A spawned one would need a copy, which there is not.
    with pytest.raises(TypeError, match="make another one where it is needed"):
        multiprocessing.get_context("spawn").Process(target=print, args=(secret,)).start()


def test_a_seeded_stream_goes_on_in_a_child_as_in_its_parent():
    # Repeatable is all that a seeded stream promises.
    chance = Chance.seeded(1)
    chance.uniform(3)
    assert np.array_equal(in_a_child(lambda: chance.uniform(5)), chance.uniform(5))
