"""Synthetic rows on disk: traced, whole or not there at all, the same in every format."""

import dataclasses

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from shared.augmentation.lineage import encode_table, synthetic_table, synthetic_tables, write_tables
from shared.augmentation.synthesis import synthesise_users
from shared.config import Columns
from shared.data.histories import Histories
from shared.data.readers import read_interactions
from shared.errors import InputError
from tests.shared.generators.test_multvae import SPEC, model

ITEMS = [f"sku-{number}" for number in range(SPEC.num_items)]
FORMS = {"parquet": "parquet", "csv": "csv", "recbole": "inter"}


def drawn(num_users=7):
    return synthesise_users(model(), num_users=num_users, items_per_user=5, max_items_per_user=20, seed=0)


def table_of(histories, items=ITEMS, *, exportable=True, behaviours=()):
    return synthetic_table(
        histories, items, generator_id="0123456789abcdef", exportable=exportable, behaviours=behaviours
    )


def tables_of(*blocks):
    return synthetic_tables(blocks, ITEMS, generator_id="0123456789abcdef", exportable=True)


def with_events(histories):
    places = np.arange(histories.num_interactions)
    return dataclasses.replace(histories, timestamps=1_500_000_000 + places, behaviours=(places % 2).astype(np.int8))


@pytest.mark.parametrize("exportable", [True, False])
def test_every_row_carries_its_lineage(exportable):
    histories = drawn()
    content = encode_table(table_of(histories, exportable=exportable), "parquet")
    rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    assert len(rows) == histories.num_interactions
    assert {row["lineage"] for row in rows} == {"exportable" if exportable else "internal"}
    assert {row["generator_id"] for row in rows} == {"0123456789abcdef"}
    assert all(row["synthetic"] is True for row in rows)
    assert [row["item_id"] for row in rows] == [ITEMS[item] for item in histories.items]
    owners = np.repeat(np.arange(7), histories.lengths())
    assert [row["user_id"] for row in rows] == [f"synthetic-01234567-{user:09d}" for user in owners]


def test_parquet_files_have_plain_texts():
    schema = pyarrow.parquet.read_schema(pyarrow.BufferReader(encode_table(table_of(drawn()), "parquet")))
    assert schema.names == ["user_id", "item_id", "synthetic", "generator_id", "lineage"]
    assert {str(schema.field(name).type) for name in ("user_id", "item_id", "generator_id", "lineage")} == {"string"}


def test_users_are_numbered_through_all_blocks():
    tables = list(tables_of(drawn(7), drawn(5), drawn(9)))
    names = [name for table in tables for name in dict.fromkeys(table["user_id"].to_pylist())]
    assert names == [f"synthetic-01234567-{user:09d}" for user in range(21)]


def test_a_million_names_are_in_the_order_of_their_numbers():
    many = Histories(np.arange(1_000_002), np.zeros(1_000_001, np.int32), SPEC.num_items)
    names = table_of(many)["user_id"].chunk(0).dictionary.to_numpy(zero_copy_only=False)
    assert (names[:-1] < names[1:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_every_format_reads_back_as_it_was_drawn(tmp_path, form):
    blocks = [with_events(drawn(7)), with_events(drawn(5))]
    tables = synthetic_tables(blocks, ITEMS, generator_id="f" * 16, exportable=True, behaviours=("view", "purchase"))
    path = tmp_path / f"users.{FORMS[form]}"
    write_tables(path, tables, form)
    found = read_interactions(path, columns=Columns())
    owners = np.concatenate(
        [np.repeat(np.arange(7), blocks[0].lengths()), 7 + np.repeat(np.arange(5), blocks[1].lengths())]
    )
    items = np.concatenate([block.items for block in blocks])
    labels, codes = found.users.labels.to_pylist(), found.users.codes
    assert [labels[code] for code in codes] == [f"synthetic-ffffffff-{user:09d}" for user in owners]
    labels, codes = found.items.labels.to_pylist(), found.items.codes
    assert [labels[code] for code in codes] == [ITEMS[item] for item in items]
    assert found.timestamps is not None
    assert found.timestamps.tolist() == [stamp for block in blocks for stamp in block.timestamps.tolist()]


def test_behaviours_have_their_names():
    table = table_of(with_events(drawn()), behaviours=("view", "purchase"))
    assert table.column_names[:4] == ["user_id", "item_id", "timestamp", "behaviour"]
    assert table["behaviour"].to_pylist()[:3] == ["view", "purchase", "view"]
    with pytest.raises(InputError, match="names of all"):
        table_of(with_events(drawn()), behaviours=("view",))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_and_one_table_give_the_same_rows(tmp_path, form):
    parts = [drawn(7), drawn(5)]
    write_tables(tmp_path / "file", tables_of(*parts), form)
    whole = encode_table(table_of(Histories.concatenate(parts)), form)
    content = (tmp_path / "file").read_bytes()
    if form == "parquet":
        content, whole = (pyarrow.parquet.read_table(pyarrow.BufferReader(one)).to_pylist() for one in (content, whole))
        assert pyarrow.parquet.ParquetFile(tmp_path / "file").num_row_groups == 2  # so a block was held at a time
    assert content == whole


def test_recbole_names_its_types():
    lines = encode_table(table_of(with_events(drawn()), behaviours=("view", "buy")), "recbole").decode().splitlines()
    assert lines[0].split("\t")[:4] == ["user_id:token", "item_id:token", "timestamp:float", "behaviour:token"]
    assert len(lines) == drawn().num_interactions + 1


@pytest.mark.parametrize("odd", ["a\tb", "a\nb", "a\rb"])
def test_item_ids_that_recbole_cannot_hold_are_named(odd):
    items = [*ITEMS[:-1], odd]
    with pytest.raises(InputError, match=r"tab or line break.*Use csv"):
        encode_table(table_of(drawn(), items), "recbole")
    assert encode_table(table_of(drawn(), items), "csv")


def test_other_ids_stand_in_recbole_as_they_are():
    items = [f'"{name}", é' for name in ITEMS]
    lines = encode_table(table_of(drawn(), items), "recbole").decode().splitlines()
    assert lines[1].split("\t")[1] in items


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_the_old_file(tmp_path, form):
    path = tmp_path / "users"
    path.write_text("old")
    path.with_name("users.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"No space left.*the same seed gives the same users"):
        write_tables(path, tables_of(*[drawn(500)] * 40), form)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["users"]


@pytest.mark.parametrize("form", FORMS)
def test_a_crash_in_between_leaves_the_old_file(tmp_path, form):
    def broken():
        yield table_of(drawn())
        assert (tmp_path / "users.partial").exists()
        raise MemoryError

    path = tmp_path / "users"
    path.write_text("old")
    with pytest.raises(MemoryError):
        write_tables(path, broken(), form)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["users"]


def test_folders_that_cannot_be_written_to_are_named(tmp_path):
    for path, reason in ((tmp_path / "no" / "users", "there is no folder"), (tmp_path, "that is a folder")):
        with pytest.raises(InputError, match=reason):
            write_tables(path, tables_of(drawn()), "csv")
