"""What an owner releases of all its users at once: sums to which each of them adds a vector of bounded norm."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.errors import InputError
from shared.generators.base import IntArray, Weights
from shared.sketch.terms import SketchTerms

Floats = npt.NDArray[np.float64]

POPULARITY, LENGTHS, COOCCURRENCE = "popularity", "lengths", "cooccurrence"

# The largest norm that one user adds to each array: public, and the price of one array's precision in noise on the
# others. Lengths are a few shares of all users, popularity is far above the noise wherever co-occurrence is of use:
# beside the latter the two make its noise 5 % larger, together.
SCALES: Mapping[str, Mapping[str, float]] = {
    "popularity": {POPULARITY: 1.0, LENGTHS: 0.3},
    "cooccurrence": {COOCCURRENCE: 1.0},
    "both": {POPULARITY: 0.3, LENGTHS: 0.1, COOCCURRENCE: 1.0},
}

# Popularity as a release of its own only chooses the head and sets the bias: at three times the noise multiplier it
# costs a ninth as much, since Gaussian mechanisms compose by the sum of 1 / noise_multiplier².
_POPULARITY_NOISE = 3.0

# Steps of about √2: what a generator needs of a length is its size, and every bucket takes the same noise.
_LENGTH_EDGES = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724)

_ROWS_AT_ONCE = 256


def plan_sketches(num_items: int, *, head_items: int) -> tuple[SketchTerms, ...]:
    """Terms of the releases that a run begins with, still without a price.

    One release of ``both`` where the head is the whole catalogue; else ``popularity``, which tells the head, and then
    its ``cooccurrence``.

    Args:
        head_items: most items whose co-occurrence is released.
    """
    head = min(head_items, num_items)
    statistics = ("both",) if head == num_items else ("popularity", "cooccurrence")
    return tuple(
        SketchTerms(statistic=statistic, head_items=head, length_edges=_LENGTH_EDGES, release=None)  # type: ignore[arg-type]
        for statistic in statistics
    )


def relative_noise(terms: SketchTerms) -> float:
    """Noise multiplier of a release ÷ that of the co-occurrence in the same plan."""
    return _POPULARITY_NOISE if terms.statistic == "popularity" else 1.0


def sensitivity(terms: SketchTerms) -> float:
    """L2 bound on what one user adds to the concatenated arrays of a release: the norm of their scales."""
    return math.hypot(*SCALES[terms.statistic].values())


def sketch_shapes(terms: SketchTerms, num_items: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of a release, in their order.

    Raises:
        InputError: the head does not fit the catalogue.
    """
    _check_head(terms, num_items)
    head = terms.head_items
    sizes = {POPULARITY: num_items, LENGTHS: len(terms.length_edges), COOCCURRENCE: head * (head + 1) // 2}
    return {name: (sizes[name],) for name in SCALES[terms.statistic]}


def compute_sketch(histories: Histories, terms: SketchTerms, *, head: IntArray | None, chance: Chance) -> Weights:
    """One owner's release: sums over its users, with noise where the terms have a release.

    With ``x`` the user's items as a vector of zeros and ones, ``n = |x|`` items, a repeated item counted once, a user
    adds ``scale`` times

    - ``popularity``: ``x / √n``, shape ``(num_items,)``;
    - ``lengths``: a one at the bucket of ``n``, shape ``(len(length_edges),)``;
    - ``cooccurrence``: ``x xᵀ / n`` with ``x`` and ``n`` those of the head, as its upper triangle row by row with all
      beside the diagonal times ``√2``, shape ``(head_items · (head_items + 1) / 2,)``;

    and nothing where ``n = 0``.

    Args:
        head: rising positions of the head's items, shape ``(head_items,)``; None where it is the whole catalogue.
        chance: of the noise.
    Returns:
        float32 arrays, in the order of :func:`sketch_shapes`.
    Guarantee:
        For any histories and any head, one more user moves the noiseless arrays, seen as one vector, by at most
        :func:`sensitivity`: ``|x / √n| = √(n / n) = 1``, a one is 1, and the triangle has ``n`` squares of ``1 / n``
        and ``n (n - 1) / 2`` of ``√2 / n``, which add up to ``(n + n (n - 1)) / n² = 1``. So each array moves by its
        scale or not at all, however long the history is. Every number gets normal noise of ``noise_multiplier ×
        sensitivity``, which is the Gaussian mechanism that the release prices.
    Raises:
        InputError: the head is not what the terms say.
    """
    shapes = sketch_shapes(terms, histories.num_items)
    if COOCCURRENCE in shapes and head is None and terms.head_items != histories.num_items:
        raise InputError(f"sketch: the co-occurrence of {terms.head_items} items needs to know which; name the head.")
    stddev = 0.0 if terms.release is None else terms.release.noise_multiplier * sensitivity(terms)
    rows = histories.to_csr().astype(np.float64)
    lengths = np.diff(rows.indptr)
    sums: dict[str, Iterator[Floats]] = {
        POPULARITY: iter([np.asarray(rows.T @ _inverse_root(lengths)).ravel()]),
        LENGTHS: iter([_count_lengths(lengths, terms.length_edges)]),
        COOCCURRENCE: _triangle(rows if head is None else rows[:, _checked(head, terms, histories.num_items)]),
    }
    scales = SCALES[terms.statistic]
    return {name: _noised(sums[name], shape[0], scales[name], stddev, chance) for name, shape in shapes.items()}


def _noised(
    pieces: Iterator[Floats], size: int, scale: float, stddev: float, chance: Chance
) -> npt.NDArray[np.float32]:
    # Summed in float64 and noised before rounding: what single precision makes of it is post-processing.
    released = np.empty(size, dtype=np.float32)
    start = 0
    for piece in pieces:
        values = scale * piece
        if stddev > 0:
            noise = torch.empty(len(values), dtype=torch.float64)
            chance.fill_normal(noise, stddev=stddev)
            values += noise.numpy()
        released[start : start + len(values)] = values
        start += len(values)
    assert start == size
    return released


def _count_lengths(lengths: npt.NDArray[np.int32], edges: tuple[int, ...]) -> Floats:
    buckets = np.searchsorted(np.asarray(edges), lengths[lengths > 0], side="right") - 1
    return np.bincount(buckets, minlength=len(edges)).astype(np.float64)


def _triangle(rows: sp.csr_matrix) -> Iterator[Floats]:
    """The scaled triangle of ``Σ x xᵀ / n``, some rows at a time: the square is never held."""
    head = rows.shape[1]
    by_item = (sp.diags(_inverse_root(np.diff(rows.indptr))) @ rows).tocsc()
    for start in range(0, head, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, head)
        block = np.sqrt(2.0) * (by_item[:, start:stop].T @ by_item[:, start:]).toarray()
        block[np.arange(stop - start), np.arange(stop - start)] /= np.sqrt(2.0)
        yield np.concatenate([row[place:] for place, row in enumerate(block)])


def _inverse_root(lengths: npt.NDArray[np.int32]) -> Floats:
    return 1.0 / np.sqrt(np.maximum(lengths, 1))


def _checked(head: IntArray, terms: SketchTerms, num_items: int) -> IntArray:
    rising = len(head) == terms.head_items and (np.diff(head) > 0).all()
    # An item named twice would count twice, and break the bound on what a user adds.
    if not (rising and head[0] >= 0 and head[-1] < num_items):
        raise InputError(
            f"sketch: the head must name {terms.head_items} different items of {num_items}, in rising order;"
            f" it has {len(head)} entries. The server is of another version, or its message was changed."
        )
    return head


def _check_head(terms: SketchTerms, num_items: int) -> None:
    whole = terms.statistic == "both"
    if terms.head_items > num_items or (whole and terms.head_items != num_items):
        raise InputError(
            f"sketch: a head of {terms.head_items} items does not fit a catalogue of {num_items}"
            + (", which it must be as a whole." if whole else ".")
        )
