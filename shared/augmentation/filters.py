"""Leave out synthetic users that repeat others, or that make no sense."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from shared.augmentation.tracing import Traced, derive
from shared.data.histories import Histories
from shared.errors import InputError

_USERS_AT_ONCE = 256

Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


def novel(synthetic: Traced[Histories], *, max_similarity: float) -> Traced[Histories]:
    """Without each user who is more like an earlier one than ``max_similarity``.

    Similarity is Jaccard's: items of both ÷ items of either. Takes time in proportion to the square of the users.

    Guarantee:
        No two of those left are more alike than ``max_similarity``, and the first user stays. The class stays.
    Raises:
        InputError: ``max_similarity`` is not in [0, 1).
    """
    _check_similarity(max_similarity)

    def keep(histories: Histories) -> Histories:
        repeats = [
            # Every earlier user counts, also one who was left out: so that users need not wait for each other.
            (jaccard * (np.arange(histories.num_users) < users[:, None])).max(axis=1) > max_similarity
            for users, jaccard in _jaccard(histories, histories)
        ]
        return histories.select(~np.concatenate([np.empty(0, dtype=bool), *repeats]))

    return derive(keep, synthetic)


def unlike(synthetic: Traced[Histories], others: Traced[Histories], *, max_similarity: float) -> Traced[Histories]:
    """Without the users who are more like one of ``others`` than ``max_similarity`` (Jaccard's, as in :func:`novel`).

    Against ``private`` real users the result is internal: who was left out tells something of them.

    Raises:
        InputError: ``max_similarity`` is not in [0, 1), or the catalogues differ.
    """
    _check_similarity(max_similarity)

    def keep(histories: Histories, known: Histories) -> Histories:
        _check_catalogue(histories, known)
        if known.num_users == 0:
            return histories
        repeats = [jaccard.max(axis=1) > max_similarity for _, jaccard in _jaccard(histories, known)]
        return histories.select(~np.concatenate([np.empty(0, dtype=bool), *repeats]))

    return derive(keep, synthetic, others)


def coherent(synthetic: Traced[Histories], *, min_lift: float) -> Traced[Histories]:
    """The users whose items go together, among all the other users, ``min_lift`` times as often as by chance or more.

    Users of whom nothing can be said (see :func:`lifts`) stay. The class stays: no other users are looked at.

    Args:
        min_lift: a public number; 1 is chance.
    Raises:
        InputError: ``min_lift`` is negative or NaN.
    """
    if not min_lift >= 0:
        raise InputError(f"filters: min_lift={min_lift} must be 0 or more; 1 is chance.")
    return derive(lambda histories: histories.select(~(lifts(histories) < min_lift)), synthetic)


def lifts(histories: Histories) -> FloatArray:
    """How much oftener two items of a user are used together by the others than if users chose them independently.

    Over the pairs of different items of a user: Σ cosine(i, j) ÷ Σ √(share(i) share(j)), where cosine is
    together(i, j) ÷ √(uses(i) uses(j)), a share is uses ÷ users, and the user itself is not counted in any of these. A
    pair's cosine ÷ √(share share) is its lift; the weights keep rare items from drowning the rest.

    Returns: shape ``(num_users,)``, NaN where fewer than two items of a user are used by others.
    """
    rows = histories.to_csr()
    others = np.asarray(rows.sum(axis=0), dtype=np.float64).ravel() - 1.0  # for whoever has the item
    shares = np.maximum(others, 0.0) / max(histories.num_users - 1, 1)
    scale = np.where(others > 0, 1.0 / np.sqrt(np.maximum(others, 1.0)), 0.0)
    # x C xᵀ = |x D Xᵀ|² with C the cosines and D the scale: no matrix of items by items is made.
    squares = np.zeros(histories.num_users)
    for users, products in _products((rows @ sp.diags_array(scale)).tocsr(), rows):
        products[np.arange(len(users)), users] = 0.0
        squares[users] = np.square(products, dtype=np.float64).sum(axis=1)
    known = rows @ (others > 0).astype(np.float64)
    expected = (rows @ np.sqrt(shares)) ** 2 - rows @ shares
    with np.errstate(divide="ignore", invalid="ignore"):
        # Each known item's cosine with itself is 1.
        found: FloatArray = np.where(known >= 2, (squares - known) / expected, np.nan)
    return found


def _jaccard(
    histories: Histories, others: Histories
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Positions of a block of users, and their similarity to all ``others``; two empty histories have none."""
    rows, known = histories.to_csr(), others.to_csr()
    sizes, known_sizes = np.diff(rows.indptr), np.diff(known.indptr)
    for users, both in _products(rows, known):
        either = sizes[users, None] + known_sizes - both
        yield users, both / np.maximum(either, 1.0, dtype=np.float32)


def _products(
    rows: sp.csr_matrix, others: sp.csr_matrix
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """``rows @ othersᵀ`` by blocks of rows, dense."""
    columns = others.T.tocsr()
    for start in range(0, rows.shape[0], _USERS_AT_ONCE):
        block = rows[start : start + _USERS_AT_ONCE]
        yield np.arange(start, start + block.shape[0]), (block @ columns).toarray()


def _check_similarity(max_similarity: float) -> None:
    if not 0 <= max_similarity < 1:
        raise InputError(
            f"filters: max_similarity={max_similarity} must lie in [0, 1): at 1 nobody is left out, which is the same"
            " as no filter."
        )


def _check_catalogue(histories: Histories, others: Histories) -> None:
    if histories.num_items != others.num_items:
        raise InputError(
            f"filters: users over {histories.num_items} items cannot be compared with users over {others.num_items}."
        )
