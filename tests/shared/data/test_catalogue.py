"""A catalogue is a fixed order of ids with a hash that notices any change."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config import Columns
from shared.data.catalogue import Catalogue, catalogue_from
from shared.data.readers import read_interactions
from shared.errors import InputError


def test_hash_follows_order_ids_and_version():
    hashes = {
        Catalogue(("a", "b"), "1").hash,
        Catalogue(("b", "a"), "1").hash,
        Catalogue(("a", "b"), "2").hash,
        Catalogue(("ab",), "1").hash,
        Catalogue(('a","b',), "1").hash,
    }
    assert len(hashes) == 5
    assert Catalogue(("a", "b"), "1").hash == Catalogue(("a", "b"), "1", "assumed public").hash


def test_hash_is_the_one_published():
    # printf '["1","a","ü"]' | sha256sum
    assert Catalogue(("a", "ü"), "1").hash == "cfffbb8694dbe353c001a9f10430baf1b4bb40843d29581697e1e14272afecda"


def test_saved_and_loaded_is_unchanged(tmp_path):
    catalogue = Catalogue(("b", "ä\n", '"'), "v1", "assumed public")
    catalogue.save(tmp_path / "c.json")
    assert Catalogue.load(tmp_path / "c.json") == catalogue
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_an_edited_file_is_noticed(tmp_path):
    Catalogue(("a", "b"), "v1").save(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    content["items"].reverse()
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the file was edited"):
        Catalogue.load(tmp_path / "c.json")


def test_lists_of_ids_load_as_text(tmp_path):
    (tmp_path / "books.txt").write_text("007\n8\n")
    (tmp_path / "books.csv").write_text("title,item_id\nx,007\ny,8\n")
    pq.write_table(pa.table({"item_id": ["007", "8"]}), tmp_path / "books.parquet")
    for suffix in ("txt", "csv", "parquet"):
        assert Catalogue.load(tmp_path / f"books.{suffix}") == Catalogue(("007", "8"), "books")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "", "no items"),
        ("c.txt", "a\n\nb\n", "row 2: the item id is empty"),
        ("c.txt", "a\nb\na\n", r"1 repeated item id\(s\), the first in row 3"),
        ("c.csv", "id\na\n", "item_id"),
        ("c.parquet", "a\n", "not a catalogue"),
        ("c.json", "{", "not a catalogue"),
        ("c.json", '{"items": ["a"]}', "not a catalogue"),
    ],
)
def test_unusable_lists_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        Catalogue.load(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"data.catalogue"):
        Catalogue.load(tmp_path / "c.json")


def test_top_items_count_users_and_keep_no_popularity_order(tmp_path):
    path = tmp_path / "a.csv"
    # b: 3 users; a: 1 user five times; c and d: 2 users each, the tie goes to c.
    rows = ["1,b", "2,b", "3,b", *(f"1,a,{t}" for t in range(5)), "1,d", "2,d", "1,c", "2,c"]
    rows = [row if row.count(",") == 2 else f"{row},9" for row in rows]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    interactions = read_interactions(path, columns=Columns())
    assert catalogue_from(interactions, top_items=None).items == ("a", "b", "c", "d")
    top = catalogue_from(interactions, top_items=2)
    assert top.items == ("b", "c")
    assert top.source == "assumed public"
