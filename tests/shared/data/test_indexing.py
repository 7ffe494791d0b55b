"""Histories are what ten obvious lines of Python would make of the rows, user by user."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.catalogue import Catalogue
from shared.data.indexing import IndexedUsers, index_users
from shared.data.interactions import Coded, Interactions
from shared.errors import InputError

CATALOGUE = Catalogue(tuple("dbac"), "letters-v1")  # not in the order of the ids


def interactions(rows, *, timed: bool) -> Interactions:
    def coded(values) -> Coded:
        return Coded.from_dictionaries([pa.array(values, pa.string()).dictionary_encode()])

    users, items, places, stamps = zip(*rows, strict=True)
    return Interactions(
        source="generated",
        users=coded(users),
        items=coded(items),
        timestamps=np.array(stamps, dtype=np.int64) if timed else None,
        institutions=coded(places),
    )


def index(rows, *, timed=True, least=1, most=200, outside="count", by_institution=False) -> IndexedUsers:
    return index_users(
        interactions(rows, timed=timed),
        CATALOGUE,
        min_interactions=least,
        max_items_per_user=most,
        outside_catalogue=outside,
        by_institution=by_institution,
    )


def obvious(rows, *, timed, least, most, by_institution):
    """The slow oracle; for histories without time that do not exceed the bound."""
    histories: dict[tuple[str, ...], list[str]] = {}
    for user, item, place, _ in sorted(rows, key=lambda row: row[3] if timed else 0):
        if item in CATALOGUE.items:
            history = histories.setdefault((user, place) if by_institution else (user,), [])
            if item not in history:
                history.append(item)
    return {key: history[-most:] for key, history in sorted(histories.items()) if len(history) >= least}


row = st.tuples(st.sampled_from("uvw"), st.sampled_from("abcdxy"), st.sampled_from("pq"), st.integers(0, 5))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(row, min_size=1, max_size=25),
    timed=st.booleans(),
    least=st.integers(1, 3),
    most=st.integers(1, 4),
    by_institution=st.booleans(),
)
def test_histories_equal_the_obvious_ones(rows, timed, least, most, by_institution):
    most = most if timed else len(CATALOGUE.items)
    expected = obvious(rows, timed=timed, least=least, most=most, by_institution=by_institution)
    if not expected:
        with pytest.raises(InputError, match=r"Lower data.min_interactions"):
            index(rows, timed=timed, least=least, most=most, by_institution=by_institution)
        return
    users = index(rows, timed=timed, least=least, most=most, by_institution=by_institution)
    places = users.institutions if by_institution else None
    keys = [(u,) if places is None else (u, places[i]) for i, u in enumerate(users.user_ids)]
    found = {key: [CATALOGUE.items[i] for i in users.histories.row(n)] for n, key in enumerate(keys)}
    assert found == expected
    assert keys == sorted(keys)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=25), timed=st.booleans(), most=st.integers(1, 4))
def test_a_user_looks_the_same_without_the_others(rows, timed, most):
    own = [r for r in rows if r[0] == rows[0][0]]
    if not any(r[1] in CATALOGUE.items for r in own):
        return
    alone, among = index(own, timed=timed, most=most), index(rows, timed=timed, most=most)
    position = list(among.user_ids).index(rows[0][0])
    assert alone.histories.row(0).tolist() == among.histories.row(position).tolist()
    assert among.histories.lengths().max() <= most


def test_the_bound_without_time_is_no_habit_of_the_file():
    items = tuple(f"i{n:03}" for n in range(400))
    rows = [(f"u{user}", item, "p", 0) for user in range(50) for item in items]
    users = index_users(
        interactions(rows, timed=False),
        Catalogue(items, "many"),
        min_interactions=1,
        max_items_per_user=100,
        outside_catalogue="refuse",
    )
    assert (users.histories.lengths() == 100).all()
    # Each item is kept by 50 x 1/4 users; a binomial's standard deviation is 3.06, five of them 15.3.
    kept = np.bincount(users.histories.items, minlength=400)
    assert abs(kept - 12.5).max() < 15.3
    assert (np.diff(users.histories.row(0)) > 0).all()  # the order of the source survives
    assert users.counts["interactions over 100 items per user"] == 50 * 300


def test_items_outside_are_refused_with_an_example_or_counted():
    rows = [("u", "a", "p", 1), ("u", "x", "p", 2), ("v", "y", "p", 3), ("v", "x", "p", 4)]
    with pytest.raises(InputError, match=r"3 of 4 rows name 2 item\(s\) outside catalogue letters-v1 .*'x'") as refused:
        index(rows, outside="refuse")
    assert "data.outside_catalogue=count" in str(refused.value)
    users = index(rows)
    assert list(users.user_ids) == ["u"]
    assert users.counts["rows outside the catalogue"] == 3
    assert users.counts["users without an item in the catalogue"] == 1


def test_repeats_and_short_users_are_counted():
    rows = [("u", "a", "p", 5), ("u", "a", "p", 2), ("u", "b", "p", 3), ("v", "a", "p", 1)]
    users = index(rows, least=2)
    assert users.counts["repeated interactions"] == 1
    assert users.counts["users with fewer than 2 items"] == 1
    assert users.histories.timestamps is not None
    assert users.histories.timestamps.tolist() == [2, 3]  # the first occurrence, not the last


def test_institutions_are_needed_to_split_by_them():
    part = interactions([("u", "a", "p", 1)], timed=True)
    without = Interactions(source=str(Path("a.csv")), users=part.users, items=part.items)
    with pytest.raises(InputError, match=r"data.columns.institution"):
        index_users(
            without, CATALOGUE, min_interactions=1, max_items_per_user=9, outside_catalogue="count", by_institution=True
        )
