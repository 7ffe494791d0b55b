"""Plain tables beside noised copies of their rows: marked, in place, never overwritten."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from client.augmenting_tables import augment_table, read_noise
from shared.errors import InputError

ROWS = 2000


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "counts.parquet"
    views = np.full(ROWS, 100)
    pyarrow.parquet.write_table(pa.table({"user": np.arange(ROWS), "views": views, "price": np.full(ROWS, 2.0)}), path)
    return path


def written(data, noise, **options):
    out = data.parent / "noisy.parquet"
    told = augment_table(data, out, read_noise(noise), **{"copies": 1, "form": "parquet", "seed": 0, **options})
    return told, pyarrow.parquet.read_table(out)


def test_real_rows_stay_and_copies_have_the_noise_asked_for(data):
    told, table = written(data, ["views:5", "price:0.5"], copies=2)
    assert told["rows"] == {"real": ROWS, "synthetic": 2 * ROWS}
    synthetic = np.array(table["synthetic"])
    real = table.filter(pa.array(~synthetic)).drop_columns(["synthetic", "lineage"])
    assert real.equals(pyarrow.parquet.read_table(data))
    copies = table.filter(pa.array(synthetic))
    # 4,000 normals know their spread to a relative 1/sqrt(8,000) = 1.1 %; four of those, and 1/12 for whole counts.
    assert np.std(np.array(copies["price"])) == pytest.approx(0.5, rel=0.045)
    assert np.std(np.array(copies["views"])) == pytest.approx(np.sqrt(25 + 1 / 12), rel=0.045)
    assert np.array_equal(np.array(copies["user"]), np.tile(np.arange(ROWS), 2))
    assert set(table["lineage"].to_pylist()) == {"internal"}


def test_the_same_seed_writes_the_same_rows_and_copies_differ(data):
    one, again, other = (written(data, ["price:1"], copies=2, seed=seed)[1] for seed in (1, 1, 2))
    assert one.equals(again)
    assert not one.equals(other)
    prices = np.array(one["price"])
    assert not np.array_equal(prices[ROWS : 2 * ROWS], prices[2 * ROWS :])


def test_csv_goes_in_and_out(data):
    path = data.with_suffix(".csv")
    pyarrow.csv.write_csv(pyarrow.parquet.read_table(data), path)
    out = data.parent / "noisy.csv"
    augment_table(path, out, read_noise(["views:1"]), copies=1, form="csv", seed=0)
    assert pyarrow.csv.read_csv(out).num_rows == 2 * ROWS


def test_a_lower_bound_holds(data):
    _, table = written(data, ["price:5:0"])
    assert min(table["price"].to_pylist()) == 0


def test_ids_that_look_like_numbers_stay_as_they_are(data):
    path = data.with_suffix(".csv")
    path.write_text("user,views\n007,1\n010,2\n")
    out = data.parent / "noisy.parquet"
    augment_table(path, out, read_noise(["views:0"]), copies=1, form="parquet", seed=0)
    assert pyarrow.parquet.read_table(out)["user"].to_pylist() == ["007", "010"] * 2


@pytest.mark.parametrize("text", ["views", "views:", ":2", "views:much", "views:1:0:2"])
def test_noise_of_another_form_is_refused(text):
    with pytest.raises(InputError, match="expected COLUMN:STDDEV"):
        read_noise([text])


def test_what_cannot_be_used_is_refused_and_nothing_is_written(data):
    with pytest.raises(InputError, match="no column age; the table has user, views, price"):
        written(data, ["age:1"])
    with pytest.raises(InputError, match="would overwrite"):
        augment_table(data, data, read_noise(["views:1"]), copies=1, form="parquet", seed=0)
    with pytest.raises(InputError, match="not readable"):
        augment_table(data.parent / "none.csv", data.parent / "o.csv", {}, copies=1, form="csv", seed=0)
    with pytest.raises(InputError, match="0 or more"):
        read_noise(["views:-1"])
    assert not (data.parent / "noisy.parquet").exists()
    _, table = written(data, ["views:1"])
    again = data.parent / "again.parquet"
    pyarrow.parquet.write_table(table, again)
    with pytest.raises(InputError, match="augmented before"):
        written(again, ["views:1"])
