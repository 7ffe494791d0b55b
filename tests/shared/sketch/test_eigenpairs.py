"""The largest eigenvalues: right where they differ, and never an endless search where they do not."""

import time

import numpy as np
import pytest

from shared.sketch.eigenpairs import largest_eigenpairs


@pytest.mark.parametrize("size", [300, 900])
def test_they_are_those_of_the_whole_decomposition(size):
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((size, 40)) * 1.2 ** -np.arange(40)
    square = (factor @ factor.T).astype(np.float32)
    values, vectors = largest_eigenpairs(square, 10)
    assert values == pytest.approx(np.linalg.eigvalsh(square.astype(np.float64))[::-1][:10], rel=1e-3)
    assert np.allclose(vectors.T @ vectors, np.eye(10), atol=1e-3)
    assert np.allclose(square @ vectors, vectors * values, atol=1e-2 * values[0])


def test_more_than_the_rank_holds_are_not_searched_for_long():
    # One direction and rounding: 64 eigenvalues of the rest can hardly be told apart.
    rng = np.random.default_rng(1)
    direction = rng.standard_normal(2000).astype(np.float32)
    square = np.outer(direction, direction) + 1e-7 * np.ones((2000, 2000), dtype=np.float32)
    started = time.process_time()
    values, vectors = largest_eigenpairs(square.astype(np.float32), 64)
    assert len(values) == vectors.shape[1] <= 64
    assert time.process_time() - started < 120  # an endless search would be caught, not a slow machine
    if len(values):
        assert values[0] == pytest.approx(float(direction @ direction), rel=1e-3)
