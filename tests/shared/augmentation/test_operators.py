"""Operators change as much as they say, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.augmentation.neighbours import neighbour_table
from shared.augmentation.operators import Operators, add_items, transform
from shared.data.histories import Histories
from shared.errors import InputError

NUM_ITEMS = 30
NAMES = ("crop", "mask", "reorder", "insert", "substitute")


def histories(seed: int, *, num_users: int = 12, longest: int = 15, behaviours: bool = True) -> Histories:
    """Users of different items, some with none; times rise, and tell the place; behaviours tell the item."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(NUM_ITEMS, size=rng.integers(0, longest), replace=False) for _ in range(num_users)]
    return Histories.from_rows(
        rows,
        NUM_ITEMS,
        timestamps=[np.arange(len(row)) * 10 for row in rows],
        behaviours=[row % 7 for row in rows] if behaviours else None,
    )


def all_neighbours() -> np.ndarray:
    """Everybody's neighbours are the five items that follow it in the catalogue."""
    return ((np.arange(NUM_ITEMS)[:, None] + np.arange(1, 6)) % NUM_ITEMS).astype(np.int32)


def applied(users: Histories, name: str, strength: float, seed: int = 0) -> Histories:
    operators = Operators.parse([f"{name}:{strength}"])
    return transform(users, operators, rng=np.random.default_rng(seed), neighbours=all_neighbours())


def is_within(touched: int, strength: float, length: int) -> bool:
    """s·length but for less than one."""
    return abs(touched - strength * length) < 1 + 1e-9


def is_subsequence(short, long) -> bool:
    rest = iter(long)
    return all(item in rest for item in short)


seeds = st.integers(0, 10_000)
strengths = st.floats(0.01, 1.0)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, strength=strengths, name=st.sampled_from(NAMES))
def test_whatever_is_done_the_result_is_a_history(seed, strength, name):
    users = histories(seed)
    before = [array.copy() for array in (users.indptr, users.items, users.timestamps, users.behaviours)]
    made, again = applied(users, name, strength, seed), applied(users, name, strength, seed)
    assert made.num_users == users.num_users
    assert ((made.lengths() > 0) == (users.lengths() > 0)).all()
    for user in range(users.num_users):
        row = made.row(user)
        assert len(set(row)) == len(row)
        assert ((row >= 0) & (row < NUM_ITEMS)).all()
        assert (np.diff(made.timestamps[made.indptr[user] : made.indptr[user + 1]]) >= 0).all()
    for ours, theirs in zip((made.indptr, made.items, made.timestamps, made.behaviours), before, strict=True):
        assert ours.dtype == theirs.dtype
    for ours, theirs in zip((made.items, made.timestamps), (again.items, again.timestamps), strict=True):
        assert np.array_equal(ours, theirs)
    for ours, theirs in zip((users.indptr, users.items, users.timestamps, users.behaviours), before, strict=True):
        assert np.array_equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, strength=strengths)
def test_crop_keeps_a_contiguous_part(seed, strength):
    users = histories(seed)
    made = applied(users, "crop", strength, seed)
    for user, length in enumerate(users.lengths()):
        row, kept = users.row(user).tolist(), made.row(user).tolist()
        assert any(row[start : start + len(kept)] == kept for start in range(length - len(kept) + 1))
        assert len(kept) == min(length, 1) or is_within(length - len(kept), strength, length)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, strength=strengths)
def test_mask_drops_items_and_moves_none(seed, strength):
    users = histories(seed)
    made = applied(users, "mask", strength, seed)
    for user, length in enumerate(users.lengths()):
        assert is_subsequence(made.row(user), users.row(user))
        assert len(made.row(user)) == min(length, 1) or is_within(length - len(made.row(user)), strength, length)
    assert np.array_equal(made.behaviours, made.items % 7)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, strength=strengths)
def test_reorder_shuffles_one_window_and_leaves_times_where_they_are(seed, strength):
    users = histories(seed)
    made = applied(users, "reorder", strength, seed)
    assert np.array_equal(made.timestamps, users.timestamps)
    assert np.array_equal(made.behaviours, made.items % 7)  # a behaviour goes with its item
    for user, length in enumerate(users.lengths()):
        assert sorted(made.row(user)) == sorted(users.row(user))
        moved = np.flatnonzero(made.row(user) != users.row(user))
        if len(moved):
            assert moved[-1] - moved[0] + 1 < strength * length + 1


@settings(max_examples=60, deadline=None)
@given(seed=seeds, strength=strengths)
def test_insert_puts_similar_new_items_behind_others(seed, strength):
    users = histories(seed)
    made = applied(users, "insert", strength, seed)
    for user, length in enumerate(users.lengths()):
        old, new = users.row(user).tolist(), made.row(user).tolist()
        assert [item for item in new if item in old] == old
        added = [place for place, item in enumerate(new) if item not in old]
        assert len(added) < strength * length + 1
        start = made.indptr[user]
        for place in added:
            assert (new[place] - new[place - 1]) % NUM_ITEMS <= 5
            for column in (made.timestamps, made.behaviours):
                assert column[start + place] == column[start + place - 1]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, strength=strengths)
def test_substitute_replaces_in_place_by_similar_new_items(seed, strength):
    users = histories(seed)
    made = applied(users, "substitute", strength, seed)
    assert np.array_equal(made.indptr, users.indptr)
    assert np.array_equal(made.timestamps, users.timestamps)
    assert np.array_equal(made.behaviours, users.behaviours)
    changed = made.items != users.items
    assert ((made.items - users.items)[changed] % NUM_ITEMS <= 5).all()
    for user, length in enumerate(users.lengths()):
        assert changed[users.indptr[user] : users.indptr[user + 1]].sum() < strength * length + 1
        assert not set(made.row(user)[made.row(user) != users.row(user)]) & set(users.row(user))


@pytest.mark.parametrize(("name", "length"), [("crop", 7), ("mask", 7), ("insert", 7), ("substitute", 7)])
def test_the_mean_share_is_exact_also_for_short_histories(name, length):
    num_users, strength = 4000, 0.25
    users = Histories.from_rows([np.arange(0, 4 * length, 4)] * num_users, NUM_ITEMS)
    made = applied(users, name, strength)
    if name == "substitute":
        touched = (made.items != users.items).sum() / num_users
    else:
        touched = abs(made.num_interactions - users.num_interactions) / num_users
    # 1.75 of 7 is 1 or 2: a coin of chance 3/4 each; four standard errors.
    tolerance = 4 * np.sqrt(0.75 * 0.25 / num_users)
    assert touched == pytest.approx(strength * length, abs=tolerance)
    assert tolerance < 0.25  # rounding down (1) or to the nearest (2) would be seen


@pytest.mark.parametrize("name", ["crop", "mask", "reorder", "insert", "substitute"])
def test_every_place_can_be_touched(name):
    users = Histories.from_rows([[0, 6, 12, 18, 24]] * 2000, NUM_ITEMS)
    made = applied(users, name, 0.4)
    if name == "reorder":
        touched = (made.items != users.items).reshape(2000, 5).mean(axis=0)
        # A window of two at four starts, swapped half the time: an end is in one of the four, an inner place in two.
        assert touched == pytest.approx([0.125, 0.25, 0.25, 0.25, 0.125], abs=4 * np.sqrt(0.25 * 0.75 / 2000))
        return
    if name == "insert":
        share = np.array([np.isin(made.items, range(item + 1, item + 6)).sum() for item in (0, 6, 12, 18, 24)]) / 2000
    elif name == "substitute":
        share = (made.items != users.items).reshape(2000, 5).mean(axis=0)
    else:
        share = 1 - np.array([(made.items == item).sum() for item in (0, 6, 12, 18, 24)]) / 2000
    # Two of five places; of three left by a crop, the ends of the history are in one of three parts.
    expected = [2 / 3, 1 / 3, 0, 1 / 3, 2 / 3] if name == "crop" else [0.4] * 5
    assert share == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 2000))


def test_nobody_is_given_what_it_has_and_two_never_get_the_same():
    users = Histories.from_rows([[0, 1], [0, 2], [29, 0]], NUM_ITEMS)
    table = np.full((NUM_ITEMS, 2), -1, dtype=np.int32)
    table[0, 0], table[1, 0], table[2, 0], table[29, 0] = 1, 3, 1, 28
    rng = np.random.default_rng(0)
    made = transform(users, Operators.parse(["insert:1"]), rng=rng, neighbours=table)
    # Of the first user 0 finds only 1, which is there; of the second 0 and 2 both want 1, and the earlier gets it.
    assert [made.row(user).tolist() for user in range(3)] == [[0, 1, 3], [0, 1, 2], [29, 28, 0, 1]]


def test_no_more_neighbours_stands_in_nobodys_way():
    # The last item of one user and "none" of the next would be the same key: user × items − 1.
    users = Histories.from_rows([[3], [5]], 6)
    table = np.array([[1], [2], [3], [5], [0], [-1]], dtype=np.int32)
    for seed in range(5):
        made = transform(users, Operators.parse(["substitute:1"]), rng=np.random.default_rng(seed), neighbours=table)
        assert made.items.tolist() == [5, 5]


def test_items_are_added_in_the_order_given():
    users = Histories.from_rows([[4, 5], [6]], NUM_ITEMS, timestamps=[[10, 20], [30]])
    made = add_items(users, np.array([7, 8, 9], np.int32), after=np.array([2, 0, 2]))
    assert [made.row(user).tolist() for user in range(2)] == [[4, 8, 5], [6, 7, 9]]
    assert made.timestamps.tolist() == [10, 10, 20, 30, 30, 30]


def test_steps_follow_each_other():
    users = histories(3)
    both = transform(users, Operators.parse(["mask:0.5", "crop:0.5"]), rng=np.random.default_rng(1))
    rng = np.random.default_rng(1)
    one = transform(users, Operators.parse(["mask:0.5"]), rng=rng)
    two = transform(one, Operators.parse(["crop:0.5"]), rng=rng)
    assert np.array_equal(both.items, two.items)
    assert both.num_interactions < one.num_interactions


@pytest.mark.parametrize(
    ("texts", "advice"),
    [
        ([], "none given"),
        (["swap:0.2"], "choose from crop, mask"),
        (["mask"], "NAME:STRENGTH"),
        (["mask:much"], "NAME:STRENGTH"),
        (["mask:0"], "above 0"),
        (["mask:1.5"], "up to 1"),
        (["mask:nan"], "up to 1"),
    ],
)
def test_operators_that_make_no_sense_are_refused(texts, advice):
    with pytest.raises(InputError, match=advice):
        Operators.parse(texts)


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        (None, "Compute one"),
        (np.zeros((NUM_ITEMS - 1, 2), np.int32), "one row for each item"),
        (np.full((NUM_ITEMS, 2), NUM_ITEMS, np.int32), "public catalogue"),
    ],
)
def test_a_table_of_similar_items_that_does_not_fit_is_refused(table, advice):
    with pytest.raises(InputError, match=advice):
        transform(histories(0), Operators.parse(["insert:0.5"]), rng=np.random.default_rng(0), neighbours=table)


def test_neighbours_are_what_the_obvious_loops_find():
    users = histories(5, num_users=40, behaviours=False)
    table = neighbour_table(users, num_neighbours=6)
    sets = [{user for user in range(40) if item in users.row(user)} for item in range(NUM_ITEMS)]
    for item in range(NUM_ITEMS):
        cosine = {
            other: len(sets[item] & sets[other]) / np.sqrt(len(sets[item]) * len(sets[other]))
            for other in range(NUM_ITEMS)
            if other != item and sets[item] & sets[other]
        }
        best = sorted(cosine.values(), reverse=True)[:6]
        found = [int(other) for other in table[item] if other >= 0]
        assert len(set(found)) == len(found) == len(best)
        assert [cosine[other] for other in found] == pytest.approx(best)
        assert (table[item][len(found) :] == -1).all()


def test_more_neighbours_than_items_are_refused():
    with pytest.raises(InputError, match=f"1 to {NUM_ITEMS - 1}"):
        neighbour_table(histories(0), num_neighbours=NUM_ITEMS)
