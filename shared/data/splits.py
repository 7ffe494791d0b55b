"""Hold data out for evaluation so that none of it can reach training."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.errors import InputError, LeakError

Holdout = Literal["users", "last", "time"]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """What models learn from, what they are shown of each test user, and what they must then rank high.

    Args:
        train: histories to train on.
        fold_in, targets: the same test users, row for row; both rows of a user are non-empty.
        train_users: rows of ``train`` in the histories that were split; None where the parts were made by hand.
    Raises:
        LeakError: a user's target is also in its fold-in.
    """

    train: Histories
    fold_in: Histories
    targets: Histories
    train_users: IntArray | None = None

    def __post_init__(self) -> None:
        if self.fold_in.num_users != self.targets.num_users:
            raise LeakError(
                f"fold-in has {self.fold_in.num_users} users and targets {self.targets.num_users}: rows must be the"
                " same users. Split the histories again."
            )
        shared = np.intersect1d(_keys(self.fold_in), _keys(self.targets)).size
        if shared:
            raise LeakError(f"{shared} target(s) are in the fold-in of their own user. Split the histories again.")


def split_histories(
    histories: Histories,
    *,
    holdout: Holdout,
    holdout_share: float,
    fold_in_share: float,
    rng: np.random.Generator,
    cut: int | None = None,
    testable: npt.NDArray[np.bool_] | None = None,
) -> Split:
    """Split by ``holdout``; every result has passed :func:`assert_no_leak`.

    ``users``: a ``holdout_share`` of the users with two or more items is tested and never trained on; each
    shows a random ``fold_in_share`` of its history and is asked for the rest, one item at least on each side
    (strong generalisation, Liang et al. 2018, arXiv:1802.05814). Only ``testable`` users are drawn, all by default.
    ``last``: everyone with two or more items is asked for its last one; the rest is trained on and shown.
    ``time``: what happened before ``cut`` is trained on; who has interactions on both sides shows the earlier and
    is asked for the later. One cut must serve all owners; by default it leaves the newest ``holdout_share`` of
    these interactions after it.

    Raises:
        InputError: too few users for the split, or no timestamps for ``time``.
        LeakError: a guard failed.
    """
    if holdout == "users":
        return _by_users(histories, holdout_share, fold_in_share, rng, testable)
    if holdout == "last":
        return _by_last(histories)
    return _by_time(histories, time_cut(histories, holdout_share) if cut is None else cut)


def time_cut(histories: Histories, holdout_share: float) -> int:
    """The second from which on the newest ``holdout_share`` of the interactions happened.

    Raises:
        InputError: the histories have no timestamps.
    """
    if histories.timestamps is None:
        raise InputError(
            'study.holdout = "time" needs a timestamp for every interaction, and this data has none.'
            ' Map the column with data.columns.timestamp, or choose study.holdout = "users".'
        )
    return int(np.quantile(histories.timestamps, 1 - holdout_share, method="higher"))


def assert_no_leak(split: Split, train_users: IntArray, test_users: IntArray, *, cut: int | None = None) -> None:
    """Guard a split made of rows ``train_users`` and ``test_users`` of one set of histories.

    Raises:
        LeakError: a target was trained on by its own user; or, given ``cut``, something trained on or shown
            happened at or after it, or a target before it.
    """
    # Only a user in both can leak a target; two users may well have the same item.
    _, in_train, in_test = np.intersect1d(train_users, test_users, return_indices=True)
    trained = np.intersect1d(_keys(split.train.select(in_train)), _keys(split.targets.select(in_test))).size
    if trained:
        raise LeakError(f"{trained} target(s) are in the training history of their own user. Split again.")
    if cut is None:
        return
    for name, part, early in (
        ("train", split.train, True),
        ("fold-in", split.fold_in, True),
        ("targets", split.targets, False),
    ):
        if part.timestamps is None:
            raise LeakError(f"{name}: no timestamps, so the cut at {cut} cannot be checked. Keep them.")
        wrong = int(((part.timestamps < cut) != early).sum())
        if wrong:
            raise LeakError(f"{name}: {wrong} interaction(s) on the wrong side of the cut at {cut}. Split again.")


def assert_users_disjoint(train_users: IntArray, test_users: IntArray) -> None:
    """Guard held-out users.

    Raises:
        LeakError: a test user is among the training users.
    """
    shared = np.intersect1d(train_users, test_users).size
    if shared:
        raise LeakError(f"{shared} test user(s) are among the {len(train_users)} training users. Split again.")


def _by_users(
    histories: Histories,
    holdout_share: float,
    fold_in_share: float,
    rng: np.random.Generator,
    testable: npt.NDArray[np.bool_] | None,
) -> Split:
    eligible = np.flatnonzero((histories.lengths() >= 2) & (True if testable is None else testable))
    if len(eligible) == 0 or histories.num_users < 2:
        raise InputError(
            f"holding out users needs 2 users, one of them with 2 or more items; there are {histories.num_users} users,"
            f" {len(eligible)} of them with 2 or more items and at no other owner. Use fewer owners or lower"
            " data.min_interactions."
        )
    num_test = min(max(1, round(holdout_share * len(eligible))), histories.num_users - 1)
    test_users = np.sort(rng.permutation(eligible)[:num_test])
    train_users = np.setdiff1d(np.arange(histories.num_users), test_users)
    tested = histories.select(test_users)
    split = Split(histories.select(train_users), *show_part(tested, fold_in_share, rng=rng), train_users)
    assert_users_disjoint(train_users, test_users)
    assert_no_leak(split, train_users, test_users)
    return split


def _by_last(histories: Histories) -> Split:
    lengths = histories.lengths()
    test_users = np.flatnonzero(lengths >= 2)
    if len(test_users) == 0:
        raise InputError('study.holdout = "last" needs a user with 2 or more items; there is none.')
    is_last = (histories.places() == np.repeat(lengths, lengths) - 1) & (np.repeat(lengths, lengths) >= 2)
    train = histories.keep(~is_last)
    everyone = np.arange(histories.num_users)
    split = Split(train, train.select(test_users), histories.keep(is_last).select(test_users), everyone)
    assert_no_leak(split, everyone, test_users)
    return split


def _by_time(histories: Histories, cut: int) -> Split:
    if histories.timestamps is None:
        time_cut(histories, 0.5)  # raises with the advice
    before = np.asarray(histories.timestamps) < cut
    early, late = histories.keep(before), histories.keep(~before)
    test_users = np.flatnonzero((early.lengths() > 0) & (late.lengths() > 0))
    train_users = np.flatnonzero(early.lengths() > 0)
    if len(test_users) == 0:
        raise InputError(
            f"no user has interactions both before and after the cut at {cut} (epoch seconds)."
            ' Use another study.holdout_share, fewer owners, or study.holdout = "users".'
        )
    split = Split(early.select(train_users), early.select(test_users), late.select(test_users), train_users)
    assert_no_leak(split, train_users, test_users, cut=cut)
    return split


def show_part(histories: Histories, share: float, *, rng: np.random.Generator | None) -> tuple[Histories, Histories]:
    """Each history in two parts, one item at least in each: a ``share`` that is shown, and the hidden rest.

    Args:
        histories: of two or more items each.
        rng: draws which items are shown; None shows the oldest.
    """
    lengths = histories.lengths()
    num_shown = np.clip(np.rint(share * lengths), 1, lengths - 1).astype(np.int64)
    place = histories.places()
    if rng is not None:
        users = np.repeat(np.arange(histories.num_users), lengths)
        order = np.lexsort((rng.random(len(users)), users))
        place = np.empty(len(users), dtype=np.int64)
        place[order] = histories.places()
    shown = place < np.repeat(num_shown, lengths)
    return histories.keep(shown), histories.keep(~shown)


def _keys(histories: Histories) -> IntArray:
    """One number per (row, item)."""
    rows = np.repeat(np.arange(histories.num_users), histories.lengths())
    return rows * histories.num_items + histories.items
