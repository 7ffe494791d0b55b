"""Histories are what ten obvious lines of Python would make of the rows, user by user."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.catalogue import Catalogue
from shared.data.histories import Histories
from shared.data.indexing import IndexedUsers, events_of, index_events, index_users
from shared.data.interactions import Coded, Interactions
from shared.data.splits import split_histories, time_cut
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


BEHAVIOURS = ("buy", "return")  # not in the order of the labels below, and one is missing
LABELS = ("view", "return", "buy")
event_row = st.tuples(row, st.sampled_from(LABELS)).map(lambda pair: (*pair[0], pair[1]))


def told(rows, *, timed: bool) -> Interactions:
    """``rows`` of (user, item, institution, second, behaviour)."""
    plain = interactions([r[:4] for r in rows], timed=timed)
    column = pa.array([r[4] for r in rows], pa.string()).dictionary_encode()
    return dataclasses.replace(plain, behaviours=Coded.from_dictionaries([column]))


def both(
    rows, *, timed=True, most=200, by_institution=False, behaviours=BEHAVIOURS
) -> tuple[IndexedUsers, IndexedUsers]:
    """The histories of what was bought or viewed, and the events of the same users."""
    source = told(rows, timed=timed)
    options = {"max_items_per_user": most}
    users = index_users(
        source.counting(None),
        CATALOGUE,
        min_interactions=1,
        outside_catalogue="count",
        by_institution=by_institution,
        **options,
    )
    return users, index_events(source, users, CATALOGUE, behaviours=behaviours, **options)


def events_in(histories: Histories) -> list[list[tuple[str, str]]]:
    assert histories.behaviours is not None
    names = [(CATALOGUE.items[i], BEHAVIOURS[b]) for i, b in zip(histories.items, histories.behaviours, strict=True)]
    return [names[a:b] for a, b in zip(histories.indptr[:-1], histories.indptr[1:], strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(event_row, min_size=1, max_size=25),
    timed=st.booleans(),
    most=st.integers(1, 5),
    by_institution=st.booleans(),
)
def test_events_equal_the_obvious_ones(rows, timed, most, by_institution):
    most = most if timed else 2 * len(CATALOGUE.items)
    if not any(r[1] in CATALOGUE.items and r[4] != "return" for r in rows):
        return  # no users
    users, events = both(rows, timed=timed, most=most, by_institution=by_institution)
    places = [None] * len(users.user_ids) if users.institutions is None else users.institutions
    expected: dict[tuple[str, str | None], list[tuple[str, str]]] = {
        (u, p): [] for u, p in zip(users.user_ids, places, strict=True)
    }
    for user, item, place, _, behaviour in sorted(rows, key=lambda r: r[3] if timed else 0):
        pairs = expected.get((user, place if by_institution else None))
        counts = pairs is not None and item in CATALOGUE.items and behaviour in BEHAVIOURS
        if counts and (item, behaviour) not in pairs:
            pairs.append((item, behaviour))
    assert events_in(events.histories) == [pairs[-most:] for pairs in expected.values()]
    assert events.histories.lengths().max() <= most


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(event_row, min_size=1, max_size=25), timed=st.booleans(), most=st.integers(1, 4))
def test_events_look_the_same_without_the_other_users(rows, timed, most):
    own = [r for r in rows if r[0] == rows[0][0]]
    if not any(r[1] in CATALOGUE.items and r[4] != "return" for r in own):
        return
    alone, (users, among) = both(own, timed=timed, most=most)[1], both(rows, timed=timed, most=most)
    position = list(users.user_ids).index(rows[0][0])
    assert events_in(alone.histories)[0] == events_in(among.histories)[position]


def test_with_one_behaviour_events_are_the_histories():
    rows = [("u", "a", "p", 5, "buy"), ("u", "a", "p", 2, "buy"), ("v", "b", "p", 3, "buy"), ("u", "d", "p", 4, "buy")]
    users, events = both(rows, behaviours=("buy",))
    assert events.histories.items.tolist() == users.histories.items.tolist()
    assert events.histories.timestamps.tolist() == users.histories.timestamps.tolist()
    assert events.counts["repeated events"] == users.counts["repeated interactions"] == 1


def test_events_need_a_column_and_names():
    rows = [("u", "a", "p", 1, "buy"), ("u", "b", "p", 2, "view")]
    users, events = both(rows)
    assert events.counts["rows of another behaviour"] == 1
    source = told(rows, timed=True)
    with pytest.raises(InputError, match=r"data.columns.behaviour"):
        index_events(
            dataclasses.replace(source, behaviours=None), users, CATALOGUE, behaviours=BEHAVIOURS, max_items_per_user=9
        )
    for names in ((), ("buy", "buy")):
        with pytest.raises(InputError, match=r"Name each once"):
            index_events(source, users, CATALOGUE, behaviours=names, max_items_per_user=9)
    with pytest.raises(InputError, match=r"1 of 1 users are not in it"):
        index_events(told([("w", *rows[0][1:])], timed=True), users, CATALOGUE, behaviours=BEHAVIOURS,
                     max_items_per_user=9)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(event_row, min_size=2, max_size=40),
    holdout=st.sampled_from(["users", "last", "time"]),
    seed=st.integers(0, 5),
)
def test_nothing_held_out_is_among_the_events_to_learn_from(rows, holdout, seed):
    """``rows`` are those of up to three users with few items, so that the same item is trained on and held out."""
    if not any(r[1] in CATALOGUE.items and r[4] != "return" for r in rows):
        return
    users, events = both(rows)
    cut = time_cut(users.histories, 0.3) if holdout == "time" else None
    try:
        split = split_histories(
            users.histories, holdout=holdout, holdout_share=0.3, fold_in_share=0.5, rng=np.random.default_rng(seed),
            cut=cut,
        )  # fmt: skip
    except InputError:
        return  # too few users for this split
    trained = train_rows(users.histories, split.train, holdout, cut)
    learnt = events_of(events.histories, split.train, trained, cut=cut)
    for position, user in enumerate(trained):
        kept = set(split.train.row(position).tolist())
        own = events.histories.select([user])
        expected = [
            (item, second)
            for item, second in zip(own.items.tolist(), own.timestamps.tolist(), strict=True)
            if item in kept and (cut is None or second < cut)
        ]
        found = learnt.select([position])
        assert list(zip(found.items.tolist(), found.timestamps.tolist(), strict=True)) == expected


def train_rows(histories: Histories, train: Histories, holdout: str, cut: int | None) -> list[int]:
    """Who is trained on, found by what they did: the split keeps no positions."""
    everyone = range(histories.num_users)
    if holdout == "last":
        return list(everyone)
    if holdout == "time":
        return [u for u in everyone if (histories.select([u]).timestamps < cut).any()]
    found: list[int] = []
    for position in range(train.num_users):
        own = [train.row(position).tolist(), train.select([position]).timestamps.tolist()]
        found.append(
            next(
                u
                for u in everyone
                if u not in found and [histories.row(u).tolist(), histories.select([u]).timestamps.tolist()] == own
            )
        )
    return found


def test_events_must_match_those_trained_on():
    users, events = both([("u", "a", "p", 1, "buy"), ("v", "b", "p", 2, "buy")])
    with pytest.raises(InputError, match=r"Give the row of each training user"):
        events_of(events.histories, users.histories, [0], cut=None)
    untimed = both([("u", "a", "p", 1, "buy")], timed=False)[1].histories
    with pytest.raises(InputError, match=r"cannot be cut at 5"):
        events_of(untimed, untimed, [0], cut=5)
