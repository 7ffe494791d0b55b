"""The compiled normals against ten obvious lines in float64."""

import numpy as np
import pytest

from shared.dpsgd.box_muller import RARE, normals

WITHIN = 0.25  # what the uniform numbers of these tests are


def obvious(words: np.ndarray, stddev: float) -> np.ndarray:
    """The same normals from the same words; a radius of float32 has its step rounded to 24 bits, and no more."""
    pairs = len(words) // 2
    steps = (words[:pairs] & 0x7FFFFFFF).astype(np.float64)
    rounded = (steps.astype(np.float32) + np.float32(0.5)).astype(np.float64)
    uniform = np.where(steps < RARE, steps + WITHIN, rounded) * 2.0**-31
    angle = words[pairs:].astype(np.float64) * 2.0**-32 * 2.0 * np.pi
    radius = stddev * np.sqrt(-2.0 * np.log(uniform))
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def compiled(words: np.ndarray, stddev: float, dtype: type = np.float32) -> np.ndarray:
    values = np.full(len(words), np.nan, dtype=dtype)
    normals(words, values, stddev=stddev, uniform=lambda count: np.full(count, WITHIN))
    return values.astype(np.float64)


RANDOM = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
# Where a mantissa, an exponent or a quarter turn begins, the smallest and the largest, with either sign bit.
EDGES = np.unique(
    np.array(
        [
            (sign + base + off) % 2**32
            for sign in (0, 2**31)
            for base in (0, RARE, 2**23, 2**24, 2**29, 2**30, 3 * 2**29, 1518500250, 2**31 - 1, 2**31 - 64)
            for off in range(-3, 4)
        ]
    )
).astype(np.uint32)
RADII, ANGLES = (grid.ravel() for grid in np.meshgrid(EDGES, EDGES))


@pytest.mark.parametrize("stddev", [1.0, 1e-6, 300.0])
@pytest.mark.parametrize("words", [RANDOM, np.concatenate([RADII, ANGLES])], ids=["random", "edges"])
def test_single_precision_keeps_its_digits(words, stddev):
    # A few roundings of the radius, which is at most 10.8 standard deviations; where it is nearly 0, a logarithm near
    # 0 is known to 1e-7 of itself at best, and 3e-4 standard deviations are its smallest step anyway.
    gap = np.abs(compiled(words, stddev) - obvious(words, stddev))
    assert gap.max() < 1e-6 * stddev
    assert np.isfinite(compiled(words, stddev)).all()


def test_double_precision_uses_all_bits():
    pairs = len(RANDOM) // 2
    steps = (RANDOM[:pairs] & 0x7FFFFFFF).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((steps + np.where(steps < RARE, WITHIN, 0.5)) * 2.0**-31))
    angle = RANDOM[pairs:] * 2.0**-32 * 2.0 * np.pi
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    assert np.allclose(compiled(RANDOM, 1.0, np.float64), expected, rtol=0, atol=1e-12)


def test_few_words_give_what_many_do():
    # The loops are compiled for vectors and finish the rest one by one.
    pairs = 37
    radii, angles = RANDOM[:pairs], RANDOM[-pairs:]
    together = compiled(np.concatenate([radii, angles]), 1.0).reshape(2, pairs)
    for position in range(pairs):
        alone = compiled(np.array([radii[position], angles[position]]), 1.0)
        assert np.allclose(alone, together[:, position], rtol=1e-5, atol=1e-6)


def test_only_rare_radii_ask_for_more_bits():
    asked = []

    def uniform(count):
        asked.append(count)
        return np.full(count, 0.5)

    ordinary = np.array([RARE, RARE + 2**31, 2**31 - 1, 0], dtype=np.uint32)
    rare = np.array([RARE - 1, 0, 2**31, 2**30, 1, 2, 3, 4], dtype=np.uint32)
    normals(ordinary, np.empty(4, np.float32), stddev=1.0, uniform=uniform)
    assert sum(asked) == 0
    normals(rare, np.empty(8, np.float32), stddev=1.0, uniform=uniform)
    assert sum(asked) == 3
