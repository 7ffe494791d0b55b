"""Turn interactions into bounded histories over the public catalogue."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.data.catalogue import Catalogue
from shared.data.histories import Histories
from shared.data.interactions import Interactions
from shared.errors import InputError

IntArray = npt.NDArray[np.int64]

_MOST_BEHAVIOURS = 127  # codes are int8


@dataclass(frozen=True, slots=True, eq=False)
class IndexedUsers:
    """Histories with the identities behind their rows.

    Args:
        histories: one row per user, or per user of an institution, in the order of their ids.
        user_ids: shape ``(num_users,)``, text; never leaves the owner.
        institutions: shape ``(num_users,)``, text, or None where they were not asked for.
        counts: what was left out on the way, by reason.
    """

    histories: Histories
    user_ids: npt.NDArray[np.object_]
    institutions: npt.NDArray[np.object_] | None
    counts: dict[str, int]


def index_users(
    interactions: Interactions,
    catalogue: Catalogue,
    *,
    min_interactions: int,
    max_items_per_user: int,
    outside_catalogue: Literal["refuse", "count"],
    by_institution: bool = False,
) -> IndexedUsers:
    """Histories of distinct items, oldest first; without timestamps in the order of the source.

    A user's repeated item counts once, at its first occurrence. Users with fewer than ``min_interactions``
    distinct items are left out. Of a longer history ``max_items_per_user`` items stay: the newest, or without
    timestamps a choice by a hash of that user's id and the item's place.

    Args:
        by_institution: make a row of each (user, institution) pair, as separate owners would; who visits two
            institutions is then two users, and composes over both.
    Guarantee:
        A user's row depends on that user's interactions and on public parameters only.
    Raises:
        InputError: items lie outside the catalogue and are refused, or no user is left.
    """
    users, owners, places = _rows_of(interactions, by_institution)
    position = catalogue.positions(interactions.items.labels)
    items, stamps = position[interactions.items.codes], interactions.timestamps
    counts = {"rows outside the catalogue": int((items < 0).sum())}
    if counts["rows outside the catalogue"]:
        if outside_catalogue == "refuse":
            raise InputError(_outside(interactions, catalogue, position, counts["rows outside the catalogue"]))
        inside = items >= 0
        users, items = users[inside], items[inside]
        stamps = None if stamps is None else stamps[inside]

    first = _first_occurrences(users, items, stamps, catalogue.num_items)
    counts["repeated interactions"] = len(users) - len(first)
    users, items = users[first], items[first]
    stamps = None if stamps is None else stamps[first]

    lengths = np.bincount(users, minlength=len(owners))
    enough = lengths >= min_interactions
    seen = lengths > 0
    counts[f"users with fewer than {min_interactions} items"] = int((seen & ~enough).sum())
    # Who has nothing in the catalogue is a user below the minimum too, and was counted in rows above.
    counts["users without an item in the catalogue"] = int((~seen).sum())
    if not enough.any():
        raise InputError(
            f"{interactions.source}: none of {len(owners)} users has {min_interactions} different items in catalogue"
            f" {catalogue.version} (the longest history has {lengths.max(initial=0)}). Lower data.min_interactions."
        )
    ids = _texts(interactions.users.labels, owners)
    stays = _within_bound(users, items, stamps, lengths, ids, max_items_per_user)
    counts[f"interactions over {max_items_per_user} items per user"] = int((~stays & enough[users]).sum())
    stays &= enough[users]
    items, lengths = items[stays], np.bincount(users[stays], minlength=len(owners))[enough]
    histories = Histories(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items,
        catalogue.num_items,
        None if stamps is None else stamps[stays],
    )
    labels = None
    if places is not None and interactions.institutions is not None:
        labels = _texts(interactions.institutions.labels, places[enough])
    return IndexedUsers(histories, ids[enough], labels, counts)


def index_events(
    interactions: Interactions,
    users: IndexedUsers,
    catalogue: Catalogue,
    *,
    behaviours: Sequence[str],
    max_items_per_user: int,
) -> IndexedUsers:
    """Every (item, behaviour) pair of ``users``, row for row, in time order; without timestamps in the source's.

    A pair that repeats counts once, at its first occurrence, as an item does in :func:`index_users`: with one
    behaviour the events are the histories themselves, and what someone buys every week does not crowd everything else
    out of the bound. Of more than ``max_items_per_user`` pairs the newest stay, or without timestamps a choice by a
    hash of that user's id and the pair.

    Args:
        interactions: all rows, also of behaviours that the histories of ``users`` do not count, such as returns.
        users: of the same source; says whose events are wanted, and whether apart for each institution.
        behaviours: the public list of names; a name's place is its code. Rows with others are left out, counted.
    Guarantee:
        A user's row depends on that user's interactions and on public parameters only, and has at most
        ``max_items_per_user`` events.
    Raises:
        InputError: the source has no behaviours or not these users, or a name occurs twice.
    """
    names = list(behaviours)
    if interactions.behaviours is None:
        raise InputError(
            f"{interactions.source}: no behaviour column, so there are no events to tell apart. Map it with"
            " data.columns.behaviour, or train on the histories."
        )
    if not 1 <= len(set(names)) == len(names) <= _MOST_BEHAVIOURS:
        raise InputError(
            f"events need from 1 to {_MOST_BEHAVIOURS} different names of behaviours, not {names}. Name each once."
        )
    rows = _rows_among(interactions, users)
    items = catalogue.positions(interactions.items.labels)[interactions.items.codes]
    codes = _positions(interactions.behaviours.labels, pa.array(names, pa.string()))[interactions.behaviours.codes]
    stamps = interactions.timestamps
    wanted = (rows >= 0) & (items >= 0) & (codes >= 0)
    counts = {"rows of another behaviour": int(((rows >= 0) & (items >= 0) & (codes < 0)).sum())}
    rows, pairs = rows[wanted], items[wanted] * np.int64(len(names)) + codes[wanted]
    stamps = None if stamps is None else stamps[wanted]

    first = _first_occurrences(rows, pairs, stamps, catalogue.num_items * len(names))
    counts["repeated events"] = len(rows) - len(first)
    rows, pairs = rows[first], pairs[first]
    stamps = None if stamps is None else stamps[first]
    lengths = np.bincount(rows, minlength=len(users.user_ids))
    stays = _within_bound(rows, pairs, stamps, lengths, users.user_ids, max_items_per_user)
    counts[f"events over {max_items_per_user} per user"] = int((~stays).sum())
    events = Histories(
        np.concatenate([[0], np.cumsum(np.bincount(rows[stays], minlength=len(lengths)))]).astype(np.int64),
        (pairs[stays] // len(names)).astype(np.int32),
        catalogue.num_items,
        None if stamps is None else stamps[stays],
        (pairs[stays] % len(names)).astype(np.int8),
    )
    return IndexedUsers(events, users.user_ids, users.institutions, counts)


def events_of(events: Histories, train: Histories, rows: npt.ArrayLike, *, cut: int | None) -> Histories:
    """The events that a generator may learn from when models are trained on ``train``.

    Args:
        events: of all users, as :func:`index_events` makes them.
        train: what is trained on, shape ``(len(rows),)`` users; held-out items are not in it.
        rows: position in ``events`` of each user of ``train``.
        cut: second from which on everything is held out; None where items alone tell.
    Guarantee:
        An event stays only if its item is in the training history of its own user, and it happened before ``cut``.
    Raises:
        InputError: the two do not belong together, or there is a cut and no time.
    """
    chosen = events.select(rows)
    if chosen.num_users != train.num_users or chosen.num_items != train.num_items:
        raise InputError(
            f"events of {chosen.num_users} users × {chosen.num_items} items do not match training histories of"
            f" {train.num_users} × {train.num_items}. Give the row of each training user, in order."
        )
    keys, trained = (
        np.repeat(np.arange(part.num_users), part.lengths()) * part.num_items + part.items for part in (chosen, train)
    )
    stays = np.isin(keys, trained)
    if cut is not None:
        if chosen.timestamps is None:
            raise InputError(f"events without timestamps cannot be cut at {cut}. Map data.columns.timestamp.")
        stays &= chosen.timestamps < cut
    return chosen.keep(stays)


def _rows_among(interactions: Interactions, users: IndexedUsers) -> IntArray:
    """For each interaction the row of ``users`` that it belongs to, or -1."""
    keys = _positions(pa.array(users.user_ids, pa.string()), interactions.users.labels)
    asked = interactions.users.codes.astype(np.int64)
    known = keys >= 0
    if users.institutions is not None and interactions.institutions is not None:
        width = len(interactions.institutions.labels)
        places = _positions(pa.array(users.institutions, pa.string()), interactions.institutions.labels)
        keys, asked = keys * width + places, asked * width + interactions.institutions.codes
        known &= places >= 0
    elif users.institutions is not None:
        known[:] = False
    if not known.all():
        raise InputError(
            f"{interactions.source}: {int((~known).sum())} of {len(known)} users are not in it, so their events cannot"
            " be found. Index users and events of one source."
        )
    # Keys ascend: rows are in the order of their ids, and labels in byte order.
    found = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[found] == asked, found, -1)


def _positions(texts: Any, among: Any) -> IntArray:
    """The position of each of ``texts`` in ``among``, or -1."""
    found: IntArray = pc.fill_null(pc.index_in(texts, among), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _rows_of(interactions: Interactions, by_institution: bool) -> tuple[IntArray, IntArray, IntArray | None]:
    """For each interaction its row; for each row its user's label and its institution's."""
    codes = interactions.users.codes
    if not by_institution:
        present, rows = _ranked(codes, len(interactions.users.labels))
        return rows, present, None
    if interactions.institutions is None:
        raise InputError(
            f"{interactions.source}: no institution column, so users cannot be split by institution."
            " Map it with data.columns.institution, or choose data.split = random."
        )
    width = len(interactions.institutions.labels)
    pairs = codes.astype(np.int64) * width + interactions.institutions.codes
    present, rows = _ranked(pairs, len(interactions.users.labels) * width)
    return rows, present // width, present % width


def _ranked(codes: npt.NDArray[Any], num_labels: int) -> tuple[IntArray, IntArray]:
    """The codes that occur, ascending, and each code's rank among them."""
    occurs = np.zeros(num_labels, dtype=bool)
    occurs[codes] = True
    rank = np.cumsum(occurs, dtype=np.int32) - 1
    return np.flatnonzero(occurs), rank[codes].astype(np.int64)


def _first_occurrences(
    users: IntArray, items: npt.NDArray[Any], stamps: IntArray | None, num_items: int
) -> npt.NDArray[np.intp]:
    """Positions of each pair's first row, ordered by user, then time, then place in the source."""
    pairs = users * num_items + items
    order = np.argsort(pairs, kind="stable") if stamps is None else np.lexsort((stamps, pairs))
    ordered = pairs[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    first = np.sort(order[is_first])
    by_user = np.argsort(users[first], kind="stable") if stamps is None else np.lexsort((stamps[first], users[first]))
    return first[by_user]


def _within_bound(
    users: IntArray,
    items: npt.NDArray[Any],
    stamps: IntArray | None,
    lengths: IntArray,
    ids: npt.NDArray[np.object_],
    max_items_per_user: int,
) -> npt.NDArray[np.bool_]:
    """Which interactions stay when each user keeps at most ``max_items_per_user``; rows are grouped by user."""
    ends = np.cumsum(lengths)
    if stamps is not None:
        return ends[users] - np.arange(len(users)) <= max_items_per_user
    stays = np.ones(len(users), dtype=bool)
    for user in np.flatnonzero(lengths > max_items_per_user):  # few: users over the bound, not rows
        rows = slice(ends[user] - lengths[user], ends[user])
        key = np.frombuffer(hashlib.sha256(str(ids[user]).encode()).digest()[:8], dtype="<u8")
        scores = _mixed(items[rows].astype(np.uint64) ^ key)
        stays[rows] = False
        stays[rows.start + np.argsort(scores)[:max_items_per_user]] = True
    return stays


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection that leaves no order behind."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _texts(labels: Any, codes: IntArray) -> npt.NDArray[np.object_]:
    texts: npt.NDArray[np.object_] = labels.take(pa.array(codes)).to_numpy(zero_copy_only=False)
    return texts


def _outside(interactions: Interactions, catalogue: Catalogue, position: Any, num_rows: int) -> str:
    occurs = np.bincount(interactions.items.codes, minlength=len(position)) > 0
    strangers = np.flatnonzero(occurs & (position < 0))
    return (
        f"{interactions.source}: {num_rows} of {interactions.num_rows} rows name {len(strangers)} item(s) outside"
        f" catalogue {catalogue.version} ({catalogue.num_items} items), for example"
        f" {interactions.items.labels[int(strangers[0])].as_py()!r}. Publish a catalogue that has them, or leave such"
        " rows out, counted, with --set data.outside_catalogue=count."
    )
