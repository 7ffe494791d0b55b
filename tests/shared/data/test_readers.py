"""Every source gives the same interactions, and every bad row is named or counted."""

import datetime
import gzip
import os
import sqlite3
import subprocess
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.config import Columns
from shared.data.interactions import Interactions
from shared.data.readers import read_interactions
from shared.errors import InputError

ROWS = [("ann", 'Who\'s "Afraid", Virginia?', 30), ("bob", "7", 10), ("ann", "7", 20)]


def rows_of(read: Interactions) -> list[tuple[str, str, int]]:
    users, items = read.users.labels.to_pylist(), read.items.labels.to_pylist()
    assert users == sorted(users)
    assert items == sorted(items)
    stamps = [None] * read.num_rows if read.timestamps is None else read.timestamps.tolist()
    return [(users[u], items[i], t) for u, i, t in zip(read.users.codes, read.items.codes, stamps, strict=True)]


def read(path: Path | str, text: str | None = None, **options: object) -> Interactions:
    if text is not None:
        Path(path).write_text(text, encoding="utf-8", newline="")
    return read_interactions(path, columns=options.pop("columns", Columns()), **options)  # type: ignore[arg-type]


def write_parquet(path: Path) -> None:
    users, items, stamps = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": stamps}), path)


def write_csv(path: Path) -> None:
    lines = [f'{u},"{i.replace(chr(34), chr(34) * 2)}",{t}\n' for u, i, t in ROWS]
    path.write_text("user_id,item_id,timestamp\n" + "".join(lines))


def write_gz(path: Path) -> None:
    write_csv(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_inter(path: Path) -> None:
    lines = [f"{u}\t{i}\t{float(t)}\n" for u, i, t in ROWS]
    path.write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(lines))


def write_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE events (user_id TEXT, item_id TEXT, timestamp INTEGER)")
        connection.executemany("INSERT INTO events VALUES (?, ?, ?)", ROWS)


def write_duckdb(path: Path) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE events (user_id TEXT, item_id TEXT, timestamp BIGINT)")
        connection.executemany("INSERT INTO events VALUES (?, ?, ?)", ROWS)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", write_parquet),
        ("a.csv", write_csv),
        ("a [1] b's.csv", write_csv),
        ("a.csv.gz", write_gz),
        ("a.inter", write_inter),
        ("a.sqlite", write_sqlite),
        ("a.db", write_duckdb),
    ],
)
def test_all_sources_give_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert rows_of(read(tmp_path / name)) == ROWS


@pytest.mark.parametrize(("name", "mark"), [("u.data", "\t"), ("ratings.dat", "::")])
def test_movielens_files_have_no_header(tmp_path, name, mark):
    text = "".join(mark.join(row) + "\n" for row in [("1", "12", "5", "900"), ("10", "3", "1", "800")])
    assert rows_of(read(tmp_path / name, text)) == [("1", "12", 900), ("10", "3", 800)]


def test_integer_and_text_ids_are_the_same_user(tmp_path):
    pq.write_table(pa.table({"user_id": [2, 10, 2], "item_id": [1.0, 2.0, 3.0]}), tmp_path / "a.parquet")
    from_text = read(tmp_path / "a.csv", "user_id,item_id\n2,1\n10,2\n2,3\n")
    assert (
        rows_of(read(tmp_path / "a.parquet"))
        == rows_of(from_text)
        == [("2", "1", None), ("10", "2", None), ("2", "3", None)]
    )


def test_typed_times_become_epoch_seconds(tmp_path):
    when = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    pq.write_table(pa.table({"user_id": [1], "item_id": [1], "timestamp": [when]}), tmp_path / "a.parquet")
    assert rows_of(read(tmp_path / "a.parquet")) == [("1", "1", 1577836800)]


def test_columns_are_mapped_and_delimiters_found(tmp_path):
    columns = Columns(user_id="userId", item_id="movieId", timestamp="when")
    found = read(tmp_path / "a.csv", "\ufeffuserId;movieId;when\n1;2;3\n", columns=columns)
    assert rows_of(found) == [("1", "2", 3)]


def test_empty_optional_columns_are_absent(tmp_path):
    found = read(tmp_path / "a.csv", "user_id,item_id,timestamp,behaviour,institution\n1,2,,,\n1,3,,,\n")
    assert found.timestamps is None
    assert found.behaviours is None
    assert found.institutions is None


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (",2,3,4", "user_id is missing"),
        ("NaN,2,3,4", "user_id is missing"),
        ("1,null,3,4", "item_id is missing"),
        ("1,2,yesterday,4", "timestamp is not a number"),
        ("1,2,nan,4", "timestamp is NaN or infinite"),
        ("1,2,-1,4", "timestamp is negative"),
        ("1,2,1577836800000,4", "milliseconds"),
        ("1,2,,4", "timestamp is missing, though other rows have one"),
        ("1,2,3,good", "rating is not a number"),
        ("1,2,3,inf", "rating is NaN or infinite"),
        ("1,2,3,-0.5", "rating is negative"),
        ("7,7,7,1", "repeats an earlier row"),
    ],
)
def test_a_bad_row_is_refused_with_its_number_or_counted(tmp_path, cells, reason):
    text = f"user_id,item_id,timestamp,rating\n7,7,7,1\n8,8,8,2\n{cells}\n9,9,9,3\n"
    with pytest.raises(InputError, match=r"a\.csv, row 3: .*" + reason) as refused:
        read(tmp_path / "a.csv", text)
    assert "1 of 4 rows" in str(refused.value)
    assert "--skip-bad-rows" in str(refused.value)
    kept = read(tmp_path / "a.csv", skip_bad_rows=True)
    assert rows_of(kept) == [("7", "7", 7), ("8", "8", 8), ("9", "9", 9)]
    assert [(reason in key, n) for key, n in kept.skipped.items()] == [(True, 1)]


def test_broken_lines_are_refused_with_their_line_or_counted(tmp_path):
    text = 'user_id,item_id\n1,2\n3\n4,5,6\n7,"8\n'
    with pytest.raises(InputError, match=r"line 3: the line is broken \(missing columns\)\. 3 of 4 rows"):
        read(tmp_path / "a.csv", text)
    kept = read(tmp_path / "a.csv", skip_bad_rows=True)
    assert rows_of(kept) == [("1", "2", None)]
    assert sum(kept.skipped.values()) == 3


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"user_id,item_id\n1,2\n1,caf\xe9\n")
    with pytest.raises(InputError, match=r"line 3: the line is broken .invalid encoding"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(("name", "mark"), [("u.data", "\t"), ("ratings.dat", "::")])
def test_movielens_ids_must_be_numbers(tmp_path, name, mark):
    text = mark.join(["1", "2", "3", "4"]) + "\n" + mark.join(["1", "x2", "3", "5"]) + "\n"
    with pytest.raises(InputError, match=f"{name}, row 2: item_id is not a whole number"):
        read(tmp_path / name, text)


def test_missing_and_fractional_ids_of_a_float_column_are_bad_rows(tmp_path):
    pq.write_table(
        pa.table({"user_id": [1.0, None, float("nan"), 2.5, float("inf")], "item_id": [1] * 5}), tmp_path / "a.parquet"
    )
    kept = read(tmp_path / "a.parquet", skip_bad_rows=True)
    assert kept.num_rows == 1
    assert kept.skipped == {"user_id is missing": 2, "user_id is not a whole number": 2}


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("a.csv", "", r"is empty \(0 bytes\)"),
        ("a.csv", "user_id,item_id\n", "has no rows"),
        ("u.data", "\n", "has no rows|cannot be used"),
        ("a.csv", "user,item\n1,2\n", "--set data.columns.user_id=user"),
        ("a.csv", "1,2\n3,4\n", "first line looks like data"),
        ("a.csv", "user_id,item_id,user_id\n1,2,3\n", "not readable as csv"),
        ("a.inter", "user_id\titem_id\n1\t2\n", "user_id:token"),
        ("a.parquet", "user_id,item_id\n1,2\n", "not readable as parquet"),
        ("a.xlsx", "user_id,item_id\n1,2\n", "Set data.format"),
        ("a.sqlite", "user_id,item_id\n1,2\n", "not readable as sql"),
    ],
)
def test_unusable_files_say_what_to_do(tmp_path, name, text, advice):
    with pytest.raises(InputError, match=advice) as refused:
        read(tmp_path / name, text)
    assert name in str(refused.value)


def test_missing_file_and_mapped_column(tmp_path):
    with pytest.raises(InputError, match=r"no file at .*Check data.path"):
        read(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"folder"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"no column when"):
        read(tmp_path / "a.csv", "user_id,item_id,timestamp\n1,2,3\n", columns=Columns(timestamp="when"))


def test_several_tables_need_a_name(tmp_path):
    write_sqlite(tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("CREATE VIEW latest AS SELECT * FROM events WHERE timestamp > 15")
    with pytest.raises(InputError, match=r"several tables: events, latest. Name one in data.table"):
        read(tmp_path / "a.db")
    with pytest.raises(InputError, match=r"no table or view old"):
        read(tmp_path / "a.db", table="old")
    assert len(rows_of(read(tmp_path / "a.db", table="latest"))) == 2


def test_returns_do_not_count_unless_named(tmp_path):
    text = "user_id,item_id,behaviour\n1,2,purchase\n1,3,Return\n1,4,view\n"
    found = read(tmp_path / "a.csv", text)
    counted = found.counting(None)
    assert [item for _, item, _ in rows_of(counted)] == ["2", "4"]
    assert counted.skipped == {"behaviour 'Return' does not count": 1}
    assert [item for _, item, _ in rows_of(found.counting(("Return",)))] == ["3"]
    with pytest.raises(InputError, match=r"no row has behaviour click; the file has Return, purchase, view"):
        found.counting(("click",))


cell = st.sampled_from(["1", "2", "", "nan", "x", "-3", "inf", "1e3"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(cell, cell, cell, cell), min_size=1, max_size=12))
def test_rows_and_skipped_add_up(tmp_path, rows):
    good = ("5", "5", "5", "5")
    text = "user_id,item_id,timestamp,rating\n" + "".join(",".join(row) + "\n" for row in [good, *rows])
    kept = read(tmp_path / "a.csv", text, skip_bad_rows=True)
    assert rows_of(kept)[0] == ("5", "5", 5)
    assert kept.num_rows + sum(kept.skipped.values()) == 1 + len(rows)


def test_a_source_of_bad_rows_only_is_refused_even_when_skipping(tmp_path):
    with pytest.raises(InputError, match=r"none of its 2 rows can be used \(2 x user_id is missing\)"):
        read(tmp_path / "a.csv", "user_id,item_id\n,1\n,2\n", skip_bad_rows=True)


def test_a_postgres_url_hides_its_password_and_says_how_to_get_the_reader():
    with duckdb.connect() as connection:
        installed = connection.execute(
            "SELECT installed FROM duckdb_extensions() WHERE extension_name = 'postgres_scanner'"
        ).fetchone()
    if installed and installed[0]:
        pytest.skip("DuckDB's postgres extension is installed")
    with pytest.raises(InputError) as refused:
        read(Path("postgresql://ann:secret@127.0.0.1:1/shop"))
    assert "secret" not in str(refused.value)


@pytest.mark.postgres
@pytest.mark.skipif("FEDAUG_TEST_POSTGRES" not in os.environ, reason="FEDAUG_TEST_POSTGRES names no server")
def test_postgres_gives_the_same_rows():
    url = os.environ["FEDAUG_TEST_POSTGRES"]
    values = ", ".join("('{}', '{}', {})".format(u, i.replace("'", "''"), t) for u, i, t in ROWS)
    script = (
        "DROP TABLE IF EXISTS fedaug_events;"
        " CREATE TABLE fedaug_events (user_id text, item_id text, timestamp bigint);"
        f" INSERT INTO fedaug_events VALUES {values};"
    )
    subprocess.run(["psql", url, "-q", "-c", script], check=True)
    try:
        assert rows_of(read(url, table="fedaug_events")) == ROWS
    finally:
        subprocess.run(["psql", url, "-q", "-c", "DROP TABLE fedaug_events"], check=True)


def test_codes_are_lean(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found.users.codes.dtype == found.items.codes.dtype == np.int32
