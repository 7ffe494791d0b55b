"""How like the real users synthetic ones are, measured against how like each other real users are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from shared.data.histories import Histories
from shared.errors import InputError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_VALIDATION_SHARE = 0.2
_STRENGTHS = tuple(float(2**k) for k in range(-2, 15))
_PRIOR_COUNTS = (0.01, 0.1, 1.0)


class Closeness(NamedTuple):
    """Distance of synthetic users from real ones, and its ceiling: that of as many other real users."""

    distance: float
    ceiling: float


def fidelity(
    real: Histories,
    synthetic: Histories,
    *,
    gap_edges: Sequence[int] = (),
    num_splits: int = 10,
    rng: np.random.Generator,
) -> dict[str, Closeness]:
    """Distances between distributions, each in [0, 1].

    ``popularity`` of items and ``bigrams`` of an item and the next: Jensen–Shannon distance, base 2. ``lengths`` of
    histories, ``gaps`` (buckets between ``gap_edges`` of the time since the interaction before), ``behaviours`` and
    ``transitions`` of a behaviour to the next: total variation. What either side does not have is left out.

    A distance between samples is above zero even where nothing differs, so each has a ceiling of the same size: real
    users are halved at random ``num_splits`` times, one half is compared with the other and with as many synthetic
    users, and both distances are averaged.

    Raises:
        InputError: there are fewer than two real users or no synthetic one, or the catalogues differ.
    Reference:
        Lin 1991, doi:10.1109/18.61115.
    """
    half = min(real.num_users // 2, synthetic.num_users)
    if half == 0 or real.num_items != synthetic.num_items:
        raise InputError(
            f"fidelity: {real.num_users} real users of {real.num_items} items against {synthetic.num_users} synthetic"
            f" ones of {synthetic.num_items}. Give two real users and a synthetic one at least, in one catalogue."
        )
    found: dict[str, list[Closeness]] = {}
    for _ in range(num_splits):
        order = rng.permutation(real.num_users)
        ours, others = real.select(order[:half]), real.select(order[half : 2 * half])
        drawn = synthetic.select(rng.permutation(synthetic.num_users)[:half])
        ceilings = _distances(ours, others, gap_edges)
        for name, distance in _distances(ours, drawn, gap_edges).items():
            found.setdefault(name, []).append(Closeness(distance, ceilings[name]))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    return {name: Closeness(float(distance), float(ceiling)) for name, (distance, ceiling) in means.items()}


def markov_log_likelihood(train: Histories, test: Histories, *, occurrences: int = 1, seed: int = 0) -> FloatArray:
    """Log-probability of each item of ``test`` under a first-order Markov chain, shape ``(test.num_interactions,)``.

    The chain's counts are drawn towards popularity, ``p(j | i) ∝ count(i, j) + strength · popularity(j)``, and
    popularity towards the uniform distribution; both strengths are chosen on a fifth of the training users. A first
    item has its own counts. An item that happened ``occurrences`` times cannot follow, and the rest shares its part.

    Args:
        occurrences: how often an item may happen in a history: the number of behaviours.
        seed: draws the fifth.
    Reference:
        MacKay & Peto 1995, doi:10.1017/S1351324900000218, for the interpolation.
    """
    order = np.random.default_rng([seed, train.num_users]).permutation(train.num_users)
    num_validation = max(1, round(_VALIDATION_SHARE * train.num_users))
    validation, rest = train.select(order[:num_validation]), train.select(order[num_validation:])
    known = _Counted.of(rest, validation, occurrences)
    grid = [(strength, prior) for strength in _STRENGTHS for prior in _PRIOR_COUNTS]
    best = max(grid, key=lambda choice: float(known.log_likelihood(*choice).mean()))
    return _Counted.of(train, test, occurrences).log_likelihood(*best)


class _Counted(NamedTuple):
    """All that a chain's probability of each place depends on, whatever the strengths; arrays are one per place.

    ``pair`` and ``single`` count the place's item after the one before, and anywhere; ``pairs_out`` and ``singles_out``
    count the ``num_out`` items that cannot follow; ``total`` counts whatever came after the item before.
    """

    pair: FloatArray
    total: FloatArray
    pairs_out: FloatArray
    single: FloatArray
    singles_out: FloatArray
    num_out: FloatArray
    num_interactions: int
    num_items: int

    @classmethod
    def of(cls, train: Histories, test: Histories, occurrences: int) -> "_Counted":
        size = train.num_items
        counts = sp.csr_matrix((np.ones(train.num_interactions), (_before(train), train.items)), shape=(size + 1, size))
        singles: FloatArray = np.bincount(train.items, minlength=size).astype(np.float64)
        before = _before(test)
        places, gone = _gone(test, occurrences)
        pairs_out = np.asarray(counts[before[places], gone]).ravel()
        return cls(
            np.asarray(counts[before, test.items]).ravel(),
            np.asarray(counts.sum(axis=1)).ravel()[before],
            np.bincount(places, weights=pairs_out, minlength=test.num_interactions).astype(np.float64),
            singles[test.items],
            np.bincount(places, weights=singles[gone], minlength=test.num_interactions).astype(np.float64),
            np.bincount(places, minlength=test.num_interactions).astype(np.float64),
            train.num_interactions,
            size,
        )

    def log_likelihood(self, strength: float, prior: float) -> FloatArray:
        scale = strength / (self.num_interactions + prior * self.num_items)
        likely = self.pair + scale * (self.single + prior)
        possible = self.total + strength - self.pairs_out - scale * (self.singles_out + prior * self.num_out)
        logarithms: FloatArray = np.log(likely / possible)
        return logarithms


def _before(histories: Histories) -> IntArray:
    """The item before each place, and ``num_items`` before a user's first."""
    before = np.concatenate([[histories.num_items], histories.items[:-1].astype(np.int64)])[: len(histories.items)]
    before[histories.indptr[:-1][histories.lengths() > 0]] = histories.num_items
    return before


def _gone(histories: Histories, occurrences: int) -> tuple[IntArray, IntArray]:
    """Places and items that happened ``occurrences`` times before them; what did happen is never among them."""
    places, gone = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for user in range(histories.num_users):
        row = histories.row(user).astype(np.int64)
        last = np.array([np.sum(row[:place] == item) == occurrences - 1 for place, item in enumerate(row)], dtype=bool)
        later, earlier = np.nonzero(np.tri(len(row), k=-1, dtype=bool) & last & (row[:, None] != row))
        places.append(histories.indptr[user] + later)
        gone.append(row[earlier])
    return np.concatenate(places), np.concatenate(gone)


def _distances(one: Histories, other: Histories, gap_edges: Sequence[int]) -> dict[str, float]:
    size = one.num_items
    distances = {
        "popularity": _jensen_shannon(one.items, other.items),
        "lengths": _total_variation(one.lengths(), other.lengths()),
        "bigrams": _jensen_shannon(*(_steps(part.items, part, size) for part in (one, other))),
    }
    if gap_edges and one.timestamps is not None and other.timestamps is not None:
        buckets = [part.gap_buckets(gap_edges) for part in (one, other)]
        distances["gaps"] = _total_variation(*(found[found >= 0] for found in buckets))
    if one.behaviours is not None and other.behaviours is not None:
        distances["behaviours"] = _total_variation(one.behaviours, other.behaviours)
        steps = (_steps(part.behaviours, part, 128) for part in (one, other) if part.behaviours is not None)
        distances["transitions"] = _total_variation(*steps)
    return distances


def _steps(codes: npt.NDArray[np.integer], histories: Histories, size: int) -> IntArray:
    """One number for each code and the next one of the same user."""
    later = np.ones(len(codes), dtype=bool)
    later[histories.indptr[:-1][histories.lengths() > 0]] = False
    return codes[np.flatnonzero(later) - 1].astype(np.int64) * size + codes[later]


def _shares(one: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> tuple[FloatArray, FloatArray]:
    """How often each value occurs in either, as shares."""
    values, where = np.unique(np.concatenate([one, other]), return_inverse=True)
    first, second = (np.bincount(part, minlength=len(values)) for part in (where[: len(one)], where[len(one) :]))
    return first / max(1, len(one)), second / max(1, len(other))


def _total_variation(one: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> float:
    first, second = _shares(one, other)
    return float(np.abs(first - second).sum() / 2)


def _jensen_shannon(one: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> float:
    first, second = _shares(one, other)
    middle = (first + second) / 2
    divergence = 0.0
    for shares in (first, second):
        some = shares > 0
        divergence += float((shares[some] * np.log2(shares[some] / middle[some])).sum()) / 2
    return float(np.sqrt(max(0.0, divergence)))
