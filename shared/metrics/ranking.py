"""Score recommendations against everything a user could have been shown."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.errors import InputError, LeakError
from shared.recommenders.base import Fitted
from shared.rng import stream

FloatArray = npt.NDArray[np.float64]

_BATCH_CELLS = 2**22  # scores held at once: 16 MiB of float32


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Quality of one recommender for ``num_users`` test users, over the full catalogue.

    Args:
        k: length of the recommended list.
        ndcg: shape ``(num_users,)``, in [0, 1].
        recall: shape ``(num_users,)``: hits ÷ ``min(k, number of targets)``, in [0, 1].
        coverage: share of the catalogue that at least one user was shown.
    """

    k: int
    ndcg: FloatArray
    recall: FloatArray
    coverage: float

    def metric(self, name: str) -> FloatArray:
        """Per-user values of ``"ndcg@K"`` or ``"recall@K"``.

        Raises:
            InputError: the metric is unknown or its K is not the K that was ranked.
        """
        kind, k = parse_metric(name)
        if k != self.k:
            raise InputError(f"metric {name} needs lists of {k} items; these were ranked to {self.k}.")
        return self.ndcg if kind == "ndcg" else self.recall


def parse_metric(name: str) -> tuple[str, int]:
    """``"ndcg@20"`` becomes ``("ndcg", 20)``.

    Raises:
        InputError: the name is not ``ndcg@K`` or ``recall@K`` with K of at least 1.
    """
    kind, _, digits = name.partition("@")
    if kind not in ("ndcg", "recall") or not digits.isdecimal() or int(digits) < 1:
        raise InputError(f"metric {name!r} is not known. Use ndcg@K or recall@K, for example ndcg@20.")
    return kind, int(digits)


def rank(
    fitted: Fitted, fold_in: Histories, targets: Histories, *, k: int = 20, batch_users: int | None = None
) -> Ranking:
    """Rank the whole catalogue for every user and compare the first ``k`` items with the user's targets.

    Items of the fold-in are never recommended. Equal scores are ordered by a fixed shuffle of the catalogue, because
    the catalogue's own order may be by popularity and would then help a recommender that knows nothing.

    Args:
        fold_in: what is known of each user, ``num_users`` rows.
        targets: what the user did besides, the same rows; at least one item each.
        batch_users: users scored at once; by default as many as keep the scores within 16 MiB.
    Raises:
        InputError: the rows do not match, a user has no target, or a score is not finite.
        LeakError: a target is also in the fold-in.
    Reference:
        Liang et al. 2018, arXiv:1802.05814, section 4.2, for both metrics.
    """
    num_users, num_items = targets.num_users, targets.num_items
    _check(fold_in, targets)
    if batch_users is None:
        batch_users = max(1, _BATCH_CELLS // num_items)
    shuffle = stream(0, "ranking", "ties").permutation(num_items)
    place = np.argsort(shuffle)  # place[item] is the item's column after shuffling
    length = min(k, num_items)
    gains = 1.0 / np.log2(np.arange(2, length + 2))
    best_gain = np.concatenate([[0.0], np.cumsum(gains)])
    ndcg, recall = np.empty(num_users), np.empty(num_users)
    shown = np.zeros(num_items, dtype=bool)
    for start in range(0, num_users, batch_users):
        users = np.arange(start, min(start + batch_users, num_users))
        known, wanted = fold_in.select(users), targets.select(users)
        scores = _finite(fitted.scores(known), len(users), num_items)[:, shuffle]
        scores[_cells(known, place)] = -np.inf
        top = np.argpartition(scores, num_items - length, axis=1)[:, num_items - length :]
        values = np.take_along_axis(scores, top, axis=1)
        top = np.take_along_axis(top, np.lexsort((top, -values), axis=1), axis=1)
        offered = np.isfinite(np.take_along_axis(scores, top, axis=1))
        relevant = np.zeros(scores.shape, dtype=bool)
        relevant[_cells(wanted, place)] = True
        hits = np.take_along_axis(relevant, top, axis=1) & offered
        possible = np.minimum(relevant.sum(axis=1), k)
        ndcg[users] = hits @ gains / best_gain[np.minimum(possible, length)]
        recall[users] = hits.sum(axis=1) / possible
        shown[shuffle[top[offered]]] = True
    return Ranking(k, ndcg, recall, float(shown.mean()))


def _check(fold_in: Histories, targets: Histories) -> None:
    if fold_in.num_users != targets.num_users or fold_in.num_items != targets.num_items:
        raise InputError(
            f"fold-in is {fold_in.num_users} users × {fold_in.num_items} items, targets are"
            f" {targets.num_users} × {targets.num_items}; both must describe the same users and catalogue."
        )
    if targets.num_users == 0:
        raise InputError("no test users to rank for. Hold out more users or lower data.min_interactions.")
    if empty := int((targets.lengths() == 0).sum()):
        raise InputError(f"{empty} of {targets.num_users} test users have no target item. Leave them out of the split.")
    known, wanted = (np.repeat(np.arange(h.num_users), h.lengths()) * h.num_items + h.items for h in (fold_in, targets))
    if shared := len(np.intersect1d(known, wanted)):
        raise LeakError(f"{shared} target item(s) are also in the fold-in of the same user. Split the histories again.")


def _finite(scores: npt.NDArray[np.float32], num_users: int, num_items: int) -> npt.NDArray[np.float32]:
    if scores.shape != (num_users, num_items):
        raise InputError(f"recommender scored {scores.shape}, expected {(num_users, num_items)}: the whole catalogue.")
    if not np.isfinite(scores).all():
        raise InputError(
            "the recommender gave scores that are not finite; its training diverged."
            " Lower recommender.learning_rate or raise recommender.l2."
        )
    return scores


def _cells(histories: Histories, place: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.repeat(np.arange(histories.num_users), histories.lengths()), place[histories.items]
