"""Turn interactions into bounded histories over the public catalogue."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.data.catalogue import Catalogue
from shared.data.histories import Histories
from shared.data.interactions import Interactions
from shared.errors import InputError

IntArray = npt.NDArray[np.int64]


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
    users: IntArray, items: npt.NDArray[np.int32], stamps: IntArray | None, num_items: int
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
    items: npt.NDArray[np.int32],
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
