"""An augmented file holds every real row unchanged, says of each row what it is, and never reads what is held out."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from client.augmenting import Recipe, augment
from shared.augmentation.operators import Operators
from shared.config import Columns
from shared.data.readers import read_interactions
from shared.errors import InputError, RefusedError
from shared.generators.card import save_generator
from shared.generators.family import initial_weights
from tests.shared.generators.test_card import ITEMS, card
from tests.shared.generators.test_multvae import SPEC

MODES = ("new-users", "tail", "densify", "operators")


def recipe(mode: str, **changes) -> Recipe:
    operators = Operators.parse(["mask:0.3", "insert:0.3"]) if mode == "operators" else None
    values = {"users": 40, "items_per_user": 5, "operators": operators}
    if mode == "densify":
        values |= {"shorter_than": 6, "added": 2}
    return Recipe(mode=mode, **{**values, **changes})


@pytest.fixture
def generator(tmp_path) -> Path:
    save_generator(tmp_path / "generator", initial_weights(SPEC, 1), card(), ITEMS)
    return tmp_path / "generator"


def real_rows(
    *, seed: int = 0, timed: bool = True, behaviours: bool = False, split: bool = False, held_seed: int = 0
) -> pa.Table:
    """Thirty training users; with ``split`` ten more, and rows of ten of the others, that are held out."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(30):
        for item in rng.choice(SPEC.num_items, size=rng.integers(2, 8), replace=False):
            rows.append((f"u{user:02d}", ITEMS[item], int(rng.integers(1000, 9000)), "bought", "train"))
    if split:
        rng = np.random.default_rng(1000 + held_seed)
        for user in range(20, 40):
            for item in rng.choice(SPEC.num_items, size=3, replace=False):
                part = "test" if user % 2 else "valid"
                rows.append((f"u{user:02d}", ITEMS[item], int(rng.integers(9001, 9999)), "bought", part))
    if behaviours:
        rows += [(user, item, stamp, "viewed", part) for user, item, stamp, _, part in rows[::3]]
    names = ["user_id", "item_id", "timestamp", "behaviour", "split"]
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    unwanted = [
        *([] if timed else ["timestamp"]),
        *([] if behaviours else ["behaviour"]),
        *([] if split else ["split"]),
    ]
    return table.drop_columns(unwanted)


def stored(tmp_path: Path, table: pa.Table, name: str = "data.parquet") -> Path:
    path = tmp_path / name
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


def rows_of(table: pa.Table, columns: list[str]) -> Counter:
    return Counter(tuple(row[name] for name in columns) for row in table.to_pylist())


def made(tmp_path: Path, generator: Path, table: pa.Table, wish: Recipe, **changes) -> tuple[dict, pa.Table]:
    out = tmp_path / "out.parquet"
    result = augment(stored(tmp_path, table), generator, out, wish, **{"form": "parquet", "seed": 0, **changes})
    return result, pyarrow.parquet.read_table(out)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("timed", "behaviours", "split"), [(True, True, True), (False, False, False)])
def test_real_rows_are_there_unchanged_and_synthetic_ones_are_marked(
    tmp_path, generator, mode, timed, behaviours, split
):
    table = real_rows(timed=timed, behaviours=behaviours, split=split)
    result, written = made(tmp_path, generator, table, recipe(mode))
    assert written.column_names == [*table.column_names, "synthetic", "generator_id", "lineage"]
    is_synthetic = np.array(written.column("synthetic").to_pylist())
    real, added = written.filter(pa.array(~is_synthetic)), written.filter(pa.array(is_synthetic))
    assert rows_of(real, table.column_names) == rows_of(table, table.column_names)
    assert set(real.column("lineage").to_pylist()) == {"internal"}
    assert set(real.column("generator_id").to_pylist()) == {""}
    assert set(added.column("generator_id").to_pylist()) == {result["generator_id"]}
    by_generator_alone = mode in ("new-users", "tail")
    assert set(added.column("lineage").to_pylist()) == {"exportable" if by_generator_alone else "internal"}
    assert set(added.column("item_id").to_pylist()) <= set(ITEMS)
    assert result["rows"]["synthetic"] == added.num_rows > 0
    assert result["lineage"]["exportable"] == (added.num_rows if by_generator_alone else 0)
    if split:
        assert set(added.column("split").to_pylist()) == {"train"}
        assert result["rows"]["held out"] == sum(part != "train" for part in table.column("split").to_pylist()) > 0
    no_user = {name for name in added.column("user_id").to_pylist() if name.startswith("synthetic-")}
    if mode == "densify":
        assert not no_user
        assert set(added.column("user_id").to_pylist()) <= {f"u{user:02d}" for user in range(30)}
    else:
        assert no_user == set(added.column("user_id").to_pylist())
        assert len(no_user) == (30 if mode == "operators" else 40)


@pytest.mark.parametrize("mode", MODES)
def test_held_out_rows_change_nothing_but_themselves(tmp_path, generator, mode):
    wish = recipe(mode, **({"max_similarity": 0.4, "weight": 0.3} if mode == "new-users" else {}))
    files = [
        made(tmp_path, generator, real_rows(split=True, behaviours=True, held_seed=seed), wish)[1] for seed in (0, 1)
    ]
    added = [written.filter(written.column("synthetic")) for written in files]
    assert added[0].equals(added[1])
    assert not files[0].equals(files[1])
    other = made(tmp_path, generator, real_rows(split=True, behaviours=True, seed=7), wish)[1]
    changes = not other.filter(other.column("synthetic")).equals(added[0])
    assert changes is (mode != "tail")  # what is private to training users does: the test can see a change


@pytest.mark.parametrize("form", ["parquet", "csv", "recbole"])
@pytest.mark.parametrize("mode", MODES)
def test_what_was_written_can_be_read(tmp_path, generator, mode, form):
    out = tmp_path / f"out.{'inter' if form == 'recbole' else form}"
    data = stored(tmp_path, real_rows(behaviours=True), "data.csv")
    result = augment(data, generator, out, recipe(mode), form=form, seed=0)
    again = read_interactions(out, columns=Columns())
    assert again.num_rows == result["rows"]["real"] + result["rows"]["synthetic"]
    assert again.timestamps is not None
    labels = set(again.behaviours.labels.to_pylist())
    assert labels == {"bought", "viewed"} | ({"interaction"} if mode in ("new-users", "tail") else set())


def test_new_users_without_times_come_before_everybody_real(tmp_path, generator):
    _, written = made(tmp_path, generator, real_rows(), recipe("new-users"))
    for name in set(written.filter(written.column("synthetic")).column("user_id").to_pylist()):
        stamps = [row["timestamp"] for row in written.to_pylist() if row["user_id"] == name]
        assert stamps == list(range(len(stamps)))


@pytest.mark.parametrize("changes", [{"max_similarity": 0.5}, {"weight": 0.3}])
def test_users_chosen_by_real_ones_are_internal(tmp_path, generator, changes):
    result, written = made(tmp_path, generator, real_rows(), recipe("new-users", **changes))
    assert result["lineage"]["exportable"] == 0
    if "weight" in changes:
        assert result["rows"]["synthetic"] <= 0.3 * result["rows"]["real"]
    assert any(written.column("synthetic").to_pylist())


def test_users_chosen_among_themselves_may_still_leave(tmp_path, generator):
    plain, _ = made(tmp_path, generator, real_rows(), recipe("new-users"))
    result, _ = made(tmp_path, generator, real_rows(), recipe("new-users", min_lift=1.0))
    assert 0 < result["rows"]["synthetic"] < plain["rows"]["synthetic"]
    assert result["lineage"]["exportable"] == result["rows"]["synthetic"]


def test_operators_alone_name_no_generator(tmp_path, generator):
    _, written = made(tmp_path, generator, real_rows(), recipe("operators", operators=Operators.parse(["crop:0.4"])))
    assert set(written.column("generator_id").to_pylist()) == {"", "operators"}


def test_a_generator_that_must_stay_home_makes_internal_rows(tmp_path):
    not_private = dataclasses.replace(card(), epsilon=float("inf"))
    save_generator(tmp_path / "generator", initial_weights(SPEC, 1), not_private, ITEMS)
    result, _ = made(tmp_path, tmp_path / "generator", real_rows(), recipe("new-users"))
    assert result["lineage"]["exportable"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_export_is_refused_and_says_how_else(tmp_path, generator, mode):
    with pytest.raises(RefusedError, match=r"real users.*fedaug synthesize") as refusal:
        made(tmp_path, generator, real_rows(), recipe(mode), export=True)
    assert refusal.value.exit_code == 3
    assert not (tmp_path / "out.parquet").exists()


def test_unknown_items_are_counted_and_carried(tmp_path, generator):
    strange = pa.table({"user_id": ["u00", "stranger"], "item_id": ["unknown", "unknown"], "timestamp": [5, 6]})
    result, written = made(tmp_path, generator, pa.concat_tables([real_rows(), strange]), recipe("densify"))
    assert result["left_out"]["rows outside the catalogue"] == 2
    assert written.column("item_id").to_pylist().count("unknown") == 2


def test_the_same_seed_writes_the_same_file(tmp_path, generator):
    contents = []
    for seed in (1, 1, 2):
        made(tmp_path, generator, real_rows(), recipe("densify"), seed=seed)
        contents.append((tmp_path / "out.parquet").read_bytes())
    assert contents[0] == contents[1] != contents[2]


# --- bad input -----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, generator: Path, data: Path, out: Path | None = None, **changes) -> str:
    before = data.read_bytes() if data.exists() else b""
    with pytest.raises(InputError) as error:
        augment(
            data,
            generator,
            out or tmp_path / "out.csv",
            recipe("new-users"),
            **{"form": "csv", "seed": 0, **changes},
        )
    assert (data.read_bytes() if data.exists() else b"") == before
    assert not (tmp_path / "out.csv").exists()
    return str(error.value)


def test_nothing_that_is_read_is_overwritten(tmp_path, generator):
    data = stored(tmp_path, real_rows())
    linked, hard = tmp_path / "linked.parquet", tmp_path / "hard.parquet"
    linked.symlink_to(data)
    hard.hardlink_to(data)
    for out in (data, tmp_path / "generator" / ".." / "data.parquet", linked, hard, generator / "card.json"):
        assert "Give another path" in refused(tmp_path, generator, data, out)
    assert "no folder" in refused(tmp_path, generator, data, tmp_path / "nowhere" / "out.csv")


def test_bad_files_are_told_apart(tmp_path, generator):
    def file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    assert "no file at" in refused(tmp_path, generator, tmp_path / "missing.csv")
    assert "is empty (0 bytes)" in refused(tmp_path, generator, file("a.csv", ""))
    assert "has no rows" in refused(tmp_path, generator, file("b.csv", "user_id,item_id\n"))
    assert "no column item_id" in refused(tmp_path, generator, file("c.csv", "user_id,thing\n1,2\n"))
    assert "not readable" in refused(tmp_path, generator, file("d.parquet", "nonsense"))
    assert "Parquet, CSV and RecBole" in refused(tmp_path, generator, file("e.sqlite", "x"))
    assert "item 0" in refused(tmp_path, generator, file("f.csv", "user_id,item_id\n1,sku-9\n"))
    assert "no generator there" in refused(tmp_path, tmp_path / "none", stored(tmp_path, real_rows()))


def test_what_was_augmented_before_is_refused(tmp_path, generator):
    made(tmp_path, generator, real_rows(), recipe("new-users"))
    assert "augmented before" in refused(tmp_path, generator, tmp_path / "out.parquet")


@pytest.mark.parametrize("name", ["data.csv", "data.inter"])
def test_splits_of_text_files_are_seen(tmp_path, generator, name):
    tab = "\t" if name.endswith("inter") else ","
    header = tab.join(
        ["user_id:token", "item_id:token", "split:token"] if tab == "\t" else ["user_id", "item_id", "split"]
    )
    rows = [("a", "item 1", "train"), ("a", "item 2", "train"), ("a", "item 3", "test")]
    data = tmp_path / name
    data.write_text("\n".join([header, *(tab.join(row) for row in rows)]) + "\n")
    result = augment(data, generator, tmp_path / "out.parquet", recipe("new-users"), form="parquet", seed=0)
    assert result["rows"]["real"] == 2
    assert result["rows"]["held out"] == 1


def test_a_split_that_is_unclear_is_refused(tmp_path, generator):
    data = tmp_path / "data.csv"
    data.write_text("user_id,item_id,split\n1,item 1,fit\n1,item 2,test\n")
    assert "no row has train in its column split, but fit, test" in refused(tmp_path, generator, data)
    data.write_text("user_id,item_id,split\n1,item 1,train\n1,item 2,\n")
    assert "split is missing" in refused(tmp_path, generator, data)


@pytest.mark.parametrize(
    ("wish", "advice"),
    [
        ({"mode": "more"}, "choose from new-users, tail"),
        ({"mode": "operators"}, "are needed with mode operators"),
        ({"mode": "densify", "operators": Operators.parse(["mask:0.5"])}, "belong to no other mode"),
        ({"mode": "densify", "weight": 0.5}, "mode densify makes none"),
    ],
)
def test_wishes_that_do_not_go_together_are_refused(wish, advice):
    with pytest.raises(InputError, match=advice):
        Recipe(**wish)


def test_a_wish_of_another_mode_is_refused():
    for mode, wish in (("new-users", {"tail": 0.3}), ("tail", {"added": 2}), ("operators", {"shorter_than": 3})):
        operators = Operators.parse(["mask:0.2"]) if mode == "operators" else None
        with pytest.raises(InputError, match="belongs to mode"):
            Recipe(mode=mode, operators=operators, **wish)
