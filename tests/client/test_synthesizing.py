"""Users written from a generator's folder: refused, marked and favoured as asked."""

import dataclasses
import math
from itertools import product

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from client.synthesizing import export_obstacles, read_segment, synthesize
from shared.augmentation.synthesis import Condition
from shared.errors import InputError, RefusedError
from shared.generators.card import TUNED_AT_HOME, save_generator
from shared.generators.family import initial_weights
from shared.generators.lengths import LengthShares
from shared.privacy.noise import NO_NOISE, SEEDED_NOISE
from tests.shared.generators.test_card import ITEMS, card
from tests.shared.generators.test_multvae import SPEC

ASSUMED = {**card().catalogue, "source": "assumed public"}


@pytest.fixture
def folder(tmp_path):
    return a_generator(tmp_path, card())


def a_generator(tmp_path, one):
    save_generator(tmp_path / "generator", initial_weights(SPEC, 5), one, ITEMS)
    return tmp_path / "generator"


def written(folder, name="users.parquet", *, users=50, **changes):
    out = folder.parent / name
    options = {"form": "parquet", "items_per_user": 5, "seed": 0, **changes}
    return synthesize(folder, users, out, **options), out


def items_of(out):
    return np.array(pyarrow.parquet.read_table(out)["item_id"].to_pylist())


def test_what_was_written_is_told(folder, capsys):
    result, out = written(folder, export=True)
    table = pyarrow.parquet.read_table(out)
    assert result == {
        "out": str(out),
        "users": 50,
        "interactions": table.num_rows,
        "generator_id": table["generator_id"][0].as_py(),
        "lineage": "exportable",
    }
    assert len(set(table["user_id"].to_pylist())) == 50
    assert set(table["lineage"].to_pylist()) == {"exportable"}
    assert capsys.readouterr() == ("", "")


def test_the_same_seed_writes_the_same_file(folder):
    contents = [written(folder, f"{number}", seed=seed)[1].read_bytes() for number, seed in enumerate((3, 3, 4))]
    assert contents[0] == contents[1] != contents[2]


def test_the_generators_bound_holds(folder):
    _, out = written(folder, items_per_user=1000)
    counts = np.unique(pyarrow.parquet.read_table(out)["user_id"].to_pylist(), return_counts=True)[1]
    assert counts.max() == card().max_items_per_user


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"noise": SEEDED_NOISE}, "Its noise is seeded.*real owners"),
        ({"noise": NO_NOISE, "epsilon": math.inf}, "trained without privacy.*finite privacy.epsilon"),
        ({"epsilon": math.inf}, "trained without privacy"),
        ({"noise": TUNED_AT_HOME}, "own users taught it.*as it was received"),
        ({"noise": TUNED_AT_HOME, "epsilon": math.inf}, "own users taught it.*as it was received"),
        ({"noise": "ours"}, "'ours'.*version of fedaug"),
        ({"catalogue": ASSUMED}, "catalogue was read off.*data.catalogue"),
        ({"catalogue": ASSUMED, "noise": SEEDED_NOISE}, "seeded.*catalogue was read off"),
    ],
)
def test_what_must_stay_is_not_exported(tmp_path, capsys, changes, reason):
    folder = a_generator(tmp_path, dataclasses.replace(card(), **changes))
    with pytest.raises(RefusedError, match=f"(?s){reason}.*Without --export") as refused:
        written(folder, export=True)
    assert refused.value.exit_code == 3
    assert not (tmp_path / "users.parquet").exists()

    result, out = written(folder)
    assert result["lineage"] == "internal"
    assert set(pyarrow.parquet.read_table(out)["lineage"].to_pylist()) == {"internal"}
    assert "must not leave" in capsys.readouterr().err


def test_there_is_an_obstacle_exactly_where_the_card_says_so():
    cards = [
        dataclasses.replace(card(), noise=noise, epsilon=epsilon, catalogue=catalogue)
        for noise, epsilon, catalogue in product(
            ("local", SEEDED_NOISE, NO_NOISE, TUNED_AT_HOME, "Local", ""),
            (8.0, math.inf, math.nan),
            (card().catalogue, ASSUMED),
        )
    ]
    assert [not export_obstacles(one) for one in cards] == [one.exportable for one in cards]
    assert sum(one.exportable for one in cards) == 1


def test_lengths_of_the_card_and_conditions_are_passed_on(folder, tmp_path):
    _, out = written(
        a_generator(tmp_path / "long", dataclasses.replace(card(), lengths=LengthShares((7, 8), (1.0, 0.0))))
    )
    assert len(items_of(out)) == 7 * 50
    _, out = written(folder, condition=Condition(max_length=1))
    assert len(items_of(out)) == 50


def attributes(
    folder, text="item_id,attribute\nitem 3,noir\nitem 4,noir\nitem 4,comedy\nitem 4,noir\nelsewhere,opera\n"
):
    path = folder.parent / "genres.csv"
    path.write_text(text)
    return path


def test_a_segment_is_favoured(tmp_path):
    weights = initial_weights(SPEC, 5)
    weights["to_logits.weight"] *= 5  # users differ in what they like far more than by chance
    folder = tmp_path / "generator"
    save_generator(folder, weights, card(), ITEMS)
    plain = np.mean(np.isin(items_of(written(folder, users=4000)[1]), ["item 3", "item 4"]))
    _, out = written(folder, users=4000, segment=(attributes(folder), "noir"))
    # Fewer than 20,000 interactions in clusters of five: four standard errors of a share stay below 0.015.
    assert np.mean(np.isin(items_of(out), ["item 3", "item 4"])) > plain + 0.015


def test_segments_are_positions_in_the_catalogue(folder):
    path = attributes(folder)
    assert read_segment(path, "noir", ITEMS) == (3, 4)
    assert read_segment(path, "comedy", ITEMS) == (4,)
    table = pyarrow.table({"attribute": ["noir", None], "item_id": ["item 7", "item 8"], "year": [1950, 1960]})
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"))
    assert read_segment(path.with_suffix(".parquet"), "noir", ITEMS) == (7,)


def test_ids_of_digits_stay_text(folder):
    assert read_segment(attributes(folder, "item_id,attribute\n007,1\n7,2\n"), "1", ["7", "007"]) == (1,)


def test_attributes_that_no_item_has_are_refused_with_those_that_exist(folder):
    with pytest.raises(InputError, match=r"'jazz' is no attribute there.*comedy, noir$"):
        written(folder, segment=(attributes(folder), "jazz"))
    with pytest.raises(InputError, match=r"'opera' has items, but none of the generator's.*comedy, noir$"):
        read_segment(attributes(folder), "opera", ITEMS)
    with pytest.raises(InputError, match="are the item ids those of the catalogue"):
        read_segment(attributes(folder), "noir", ["other"])
    many = "item_id,attribute\n" + "".join(f"item 1,tag {number:02d}\n" for number in range(50))
    with pytest.raises(InputError, match=r"tag 19, … \(50 in all\)$"):
        read_segment(attributes(folder, many), "jazz", ITEMS)


@pytest.mark.parametrize("text", ["", "item_id,genre\nitem 1,noir\n", "item_id,attribute\nitem 1\n"])
def test_files_that_are_no_table_of_attributes_are_refused(folder, text):
    with pytest.raises(InputError, match="columns item_id and attribute"):
        read_segment(attributes(folder, text), "noir", ITEMS)
    with pytest.raises(InputError, match="columns item_id and attribute"):
        read_segment(folder.parent / "missing.parquet", "noir", ITEMS)
