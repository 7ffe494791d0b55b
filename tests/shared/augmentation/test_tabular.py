"""Noise on features has the spread it was asked for, and leaves the rest of a table as it is."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.augmentation.tabular import FeatureNoise, noisy_table, noisy_values
from shared.errors import InputError


def of_counts(noise_stddev: float, whole: bool) -> FeatureNoise:
    return FeatureNoise(noise_stddev=noise_stddev, low=0.0, whole=whole)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_noise_has_the_promised_spread():
    values = np.linspace(-50, 50, 40_000).reshape(4000, 10)
    added = noisy_values(values, FeatureNoise(noise_stddev=0.5, scale=4.0), rng=rng()) - values
    # The spread of n normals is known to a relative 1/sqrt(2n) = 0.35 %; four of those is 1.4 %.
    tolerance = 4 / np.sqrt(2 * values.size)
    assert added.std() / 2.0 == pytest.approx(1.0, abs=tolerance)
    assert added.mean() / 2.0 == pytest.approx(0.0, abs=4 / np.sqrt(values.size))
    assert added.std() / 1.9 != pytest.approx(1.0, abs=tolerance)  # 5 % too little is caught
    # Independent of one another: the correlation of neighbours is a mean of n products of spread 1.
    assert np.corrcoef(added[:, 0], added[:, 1])[0, 1] == pytest.approx(0.0, abs=4 / np.sqrt(len(values)))


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=20),
    noise_stddev=st.floats(0, 3),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_counts_stay_counts(counts, noise_stddev, whole, seed):
    given_counts = np.array(counts)
    before = given_counts.copy()
    made = noisy_values(given_counts, of_counts(noise_stddev, whole), rng=rng(seed))
    assert made.shape == given_counts.shape
    assert (made >= 0).all()
    assert np.array_equal(given_counts, before)
    assert np.array_equal(made, noisy_values(counts, of_counts(noise_stddev, whole), rng=rng(seed)))
    if whole:
        assert np.array_equal(made, np.rint(made))
    if noise_stddev == 0:
        assert np.array_equal(made, given_counts)


def table() -> pa.Table:
    return pa.table(
        {
            "item_id": ["a", "b", "c", "d"],
            "price": pa.array([1.5, None, 3.0, 100.0], pa.float64()),
            "year": pa.array([1999, 2001, None, 2020], pa.int16()),
            "stock": pa.array([2**63 - 1, 5, 6, 7], pa.int64()),
            "weight": pa.array([0.1, 0.2, 0.3, 0.4], pa.float32()),
        }
    )


def test_a_table_keeps_its_columns_types_and_missing_values():
    noise = {
        "price": FeatureNoise(noise_stddev=1.0, low=0.0, high=50.0),
        "year": FeatureNoise(noise_stddev=2.0),
        "stock": FeatureNoise(noise_stddev=1e6, low=0.0),
    }
    made = noisy_table(table(), noise, rng=rng())
    assert made.schema == table().schema
    assert made.column("item_id") == table().column("item_id")
    assert made.column("weight") == table().column("weight")
    assert made.column("price").to_pylist()[1] is None
    assert made.column("year").to_pylist()[2] is None
    assert made.column("price").to_pylist()[0] != 1.5
    assert made.column("price").to_pylist()[3] == 50.0
    assert min(made.column("stock").to_pylist()) >= 0


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int64(), pa.uint64()])
def test_whole_numbers_stay_within_their_type(kind):
    limits = np.iinfo(kind.to_pandas_dtype())
    ends = pa.table({"x": pa.array([limits.min, limits.max] * 50, kind)})
    made = np.array(noisy_table(ends, {"x": FeatureNoise(noise_stddev=3.0 * limits.max)}, rng=rng())["x"].to_pylist())
    assert made.min() >= limits.min
    assert made.max() <= limits.max
    # No overflow to the other end: what the noise pushed beyond an end stays near it.
    lows, highs = made[::2].astype(float), made[1::2].astype(float)
    assert lows.mean() < highs.mean()


def test_an_empty_table_stays_empty():
    assert noisy_table(table().slice(0, 0), {"year": FeatureNoise(noise_stddev=1.0)}, rng=rng()).num_rows == 0


@pytest.mark.parametrize(
    ("column", "advice"), [("colour", "item_id, price, year"), ("item_id", "Encode it as numbers")]
)
def test_columns_without_numbers_are_named(column, advice):
    with pytest.raises(InputError, match=advice):
        noisy_table(table(), {column: FeatureNoise(noise_stddev=1.0)}, rng=rng())


def test_infinite_values_are_refused_by_column():
    infinite = pa.table({"x": [1.0, float("inf")]})
    with pytest.raises(InputError, match=r"column x.*infinite"):
        noisy_table(infinite, {"x": FeatureNoise(noise_stddev=1.0)}, rng=rng())


@pytest.mark.parametrize(
    ("numbers", "advice"),
    [
        ({"noise_stddev": -1.0}, "0 or more"),
        ({"noise_stddev": float("nan")}, "0 or more"),
        ({"noise_stddev": 1.0, "scale": 0.0}, "above 0"),
        ({"noise_stddev": 1.0, "low": 2.0, "high": 1.0}, "must not lie above"),
    ],
)
def test_noise_that_makes_no_sense_is_refused(numbers, advice):
    with pytest.raises(InputError, match=advice):
        FeatureNoise(**numbers)
