"""Histories carry everything known of an interaction through whatever is done with them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.histories import Histories
from shared.errors import InputError

NUM_ITEMS = 7
EDGES = (1, 10, 100)

event = st.tuples(st.integers(0, NUM_ITEMS - 1), st.integers(0, 300), st.integers(0, 2))
users = st.lists(st.lists(event, max_size=6), min_size=1, max_size=5)


def histories_of(rows, *, timed: bool = True, told: bool = True) -> Histories:
    ordered = [sorted(row, key=lambda e: e[1]) for row in rows]
    return Histories.from_rows(
        [[item for item, _, _ in row] for row in ordered],
        NUM_ITEMS,
        timestamps=[[second for _, second, _ in row] for row in ordered] if timed else None,
        behaviours=[[code for _, _, code in row] for row in ordered] if told else None,
    )


def rows_of(histories: Histories) -> list[list[tuple[int, ...]]]:
    """Each user's interactions with all that is known of them."""
    known = [part for part in (histories.items, histories.timestamps, histories.behaviours) if part is not None]
    whole = list(zip(*(part.tolist() for part in known), strict=True))
    return [whole[a:b] for a, b in zip(histories.indptr[:-1], histories.indptr[1:], strict=True)]


@settings(max_examples=100, deadline=None)
@given(rows=users, others=users, timed=st.booleans(), told=st.booleans(), data=st.data())
def test_what_is_known_of_an_interaction_goes_where_it_goes(rows, others, timed, told, data):
    one, two = (histories_of(part, timed=timed, told=told) for part in (rows, others))
    both = Histories.concatenate([one, two])
    assert rows_of(both) == rows_of(one) + rows_of(two)
    chosen = data.draw(st.lists(st.integers(0, both.num_users - 1), max_size=6))
    assert rows_of(both.select(chosen)) == [rows_of(both)[user] for user in chosen]
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(both.items), max_size=len(both.items))), dtype=bool)
    flags = iter(mask.tolist())
    assert rows_of(both.keep(mask)) == [[e for e in row if next(flags)] for row in rows_of(both)]
    count = data.draw(st.integers(1, 4))
    assert rows_of(both.newest(count)) == [row[-count:] for row in rows_of(both)]
    for part in (both, both.select(chosen), both.keep(mask), both.newest(count)):
        assert (part.timestamps is not None, part.behaviours is not None) == (timed, told)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_saved_and_loaded_is_unchanged(tmp_path, timed, told):
    made = histories_of([[(3, 5, 1), (1, 9, 0)], [], [(2, 4, 2)]], timed=timed, told=told)
    made.save(tmp_path / "users.npz")
    loaded = Histories.load(tmp_path / "users.npz")
    assert rows_of(loaded) == rows_of(made)
    assert (loaded.timestamps is not None, loaded.behaviours is not None) == (timed, told)
    assert loaded.num_items == NUM_ITEMS
    if loaded.behaviours is not None:
        assert loaded.behaviours.dtype == np.int8


def test_a_file_of_an_older_version_still_loads(tmp_path: Path):
    # As it was written before there were behaviours: these three arrays, and perhaps timestamps.
    np.savez(tmp_path / "old.npz", indptr=np.array([0, 2]), items=np.array([1, 2], dtype=np.int32), num_items=3)
    loaded = Histories.load(tmp_path / "old.npz")
    assert loaded.row(0).tolist() == [1, 2]
    assert loaded.behaviours is None


def test_parts_without_behaviours_leave_none():
    told, untold = histories_of([[(1, 2, 0)]]), histories_of([[(1, 2, 0)]], told=False)
    assert Histories.concatenate([told, untold]).behaviours is None


@pytest.mark.parametrize(
    "codes",
    [np.array([0], dtype=np.int8), np.array([0, -1], dtype=np.int8), np.array([0, 1], dtype=np.int64)],
    ids=["too few", "negative", "wide"],
)
def test_codes_that_are_none_are_refused(codes):
    with pytest.raises(InputError, match=r"one behaviour code per interaction, int8 from 0"):
        Histories(np.array([0, 2]), np.array([1, 2], dtype=np.int32), 3, None, codes)


@settings(max_examples=100, deadline=None)
@given(rows=users)
def test_gaps_fall_into_buckets_as_the_slow_loop_says(rows):
    histories = histories_of(rows)
    expected = []
    for row in rows_of(histories):
        for place, (_, second, _) in enumerate(row):
            gap = second - row[place - 1][1]
            expected.append(-1 if place == 0 else 0 if gap < 1 else 1 if gap < 10 else 2)
    assert histories.gap_buckets(EDGES).tolist() == expected


def test_without_time_there_are_no_gaps():
    assert histories_of([[(1, 2, 0), (2, 3, 0)]], timed=False).gap_buckets(EDGES).tolist() == [-1, -1]
    assert histories_of([[(1, 2, 0), (2, 3, 0)]]).gap_buckets(()).tolist() == [-1, -1]
