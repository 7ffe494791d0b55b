"""Users drawn from the prior: inside the catalogue, repeatable, distributed as the decoder says."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.augmentation.lineage import encode_table, synthetic_table
from shared.augmentation.synthesis import synthesise_users
from shared.errors import InputError
from tests.shared.generators.test_multvae import SPEC, model


@given(users=st.integers(1, 60), mean=st.integers(1, 20), bound=st.integers(20, 60), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_histories_keep_every_bound(users, mean, bound, seed):
    drawn = synthesise_users(model(), num_users=users, items_per_user=mean, max_items_per_user=bound, seed=seed)
    assert drawn.num_users == users
    lengths = drawn.lengths()
    assert lengths.min() >= 1
    assert lengths.max() <= min(bound, SPEC.num_items)
    assert all(len(set(drawn.row(user))) == lengths[user] for user in range(users))


def test_the_same_seed_draws_the_same_users():
    one, again, other = (
        synthesise_users(model(), num_users=40, items_per_user=5, max_items_per_user=20, seed=seed)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one.items, again.items)
    assert not np.array_equal(one.items[:50], other.items[:50])


def test_items_are_drawn_in_proportion_to_the_decoder():
    one = model()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
        one.to_logits.bias[0] = float(np.log(9.0)) / SPEC.popularity_scale
    drawn = synthesise_users(one, num_users=4000, items_per_user=1, max_items_per_user=20, seed=0)
    expected = 9.0 / (9.0 + SPEC.num_items - 1)
    # One item each, so a share of n draws: four standard errors.
    tolerance = 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert np.mean(drawn.items == 0) == pytest.approx(expected, abs=tolerance)


def test_impossible_lengths_are_refused():
    with pytest.raises(InputError, match="between 1 and the bound"):
        synthesise_users(model(), num_users=5, items_per_user=30, max_items_per_user=20, seed=0)


@pytest.mark.parametrize("exportable", [True, False])
def test_every_row_carries_its_lineage(exportable):
    drawn = synthesise_users(model(), num_users=7, items_per_user=5, max_items_per_user=20, seed=0)
    items = [f"sku-{number}" for number in range(SPEC.num_items)]
    table = synthetic_table(drawn, items, generator_id="0123456789abcdef", exportable=exportable)
    rows = pyarrow.parquet.read_table(pyarrow.BufferReader(encode_table(table, "parquet"))).to_pylist()
    assert len(rows) == drawn.num_interactions
    assert {row["lineage"] for row in rows} == {"exportable" if exportable else "internal"}
    assert {row["generator_id"] for row in rows} == {"0123456789abcdef"}
    assert all(row["synthetic"] for row in rows)
    assert [row["item_id"] for row in rows] == [items[item] for item in drawn.items]


def test_other_formats_can_be_read_back():
    drawn = synthesise_users(model(), num_users=3, items_per_user=5, max_items_per_user=20, seed=0)
    table = synthetic_table(drawn, [str(n) for n in range(SPEC.num_items)], generator_id="f" * 16, exportable=True)
    lines = encode_table(table, "recbole").decode().splitlines()
    assert lines[0].split("\t")[:2] == ["user_id:token", "item_id:token"]
    assert len(lines) == drawn.num_interactions + 1 == len(encode_table(table, "csv").splitlines())


def test_item_ids_that_recbole_cannot_hold_are_named():
    drawn = synthesise_users(model(), num_users=3, items_per_user=5, max_items_per_user=20, seed=0)
    items = [f"a\tb{number}" for number in range(SPEC.num_items)]
    with pytest.raises(InputError, match="tab or line break"):
        encode_table(synthetic_table(drawn, items, generator_id="f" * 16, exportable=True), "recbole")
