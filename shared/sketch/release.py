"""What is known of all users once the noised sums of their owners are added up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from shared.errors import InputError
from shared.files import write_atomically
from shared.generators.base import IntArray
from shared.sketch.eigenpairs import largest_eigenpairs
from shared.sketch.statistic import COOCCURRENCE, LENGTHS, POPULARITY, SCALES, sensitivity, sketch_shapes
from shared.sketch.terms import SketchTerms

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Sums = Mapping[str, Floats]

_LARGEST_RANK = 256

# An item nobody was seen with may be new or hidden by noise: it keeps this part of an average item's share.
_LEAST_SHARE = 0.02

# The largest eigenvalue of pure noise exceeds its edge by this many Tracy-Widom units one time in 200 (β = 1).
_EDGE_MARGIN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sketch:
    """Statistics of the users of all owners, with the noise of their releases taken out as far as it can be.

    Args:
        num_users: released count of users with a history, at least 1.
        popularity: shape ``(num_items,)``, positive, adding up to 1: each item's part of ``Σ x / √n``.
        length_edges: lower ends of the buckets of history lengths.
        length_shares: of users in each bucket, adding up to 1.
        head: rising positions of the items whose co-occurrence was released, shape ``(head_items,)``; empty if none.
        vectors: orthonormal columns of shape ``(head_items, rank)``, with
        values: falling and positive: ``vectors · diag(values) · vectorsᵀ`` estimates ``Σ x xᵀ / n`` over all users,
            beside its diagonal.
        noise_stddev: of one number of the co-occurrence as it was summed; 0 where it was exact.
    """

    num_users: float
    popularity: Floats
    length_edges: tuple[int, ...]
    length_shares: Floats
    head: IntArray
    vectors: Matrix
    values: Floats
    noise_stddev: float

    @property
    def rank(self) -> int:
        """Directions of the co-occurrence that stand out of the noise."""
        return len(self.values)


def choose_head(popularity: npt.NDArray[np.floating], head_items: int) -> IntArray:
    """Rising positions of the ``head_items`` most popular items by a released sum; the first of equals."""
    ranked = np.argsort(-np.asarray(popularity), kind="stable")[:head_items]
    return np.sort(ranked).astype(np.int64)


def read_sketch(sums: Sequence[Sums], terms: Sequence[SketchTerms], *, num_owners: int, num_items: int) -> Sketch:
    """Read what ``num_owners`` owners released, each sum added over all of them.

    Args:
        sums: of each release its arrays by name, float64, in the order of ``terms``.
        terms: what they are sums of, as :func:`shared.sketch.statistic.plan_sketches` plans them.
    Guarantee:
        Post-processing: a function of the released sums and of public numbers.
    Raises:
        InputError: an array is missing, is not of its shape or is not finite, or there is no popularity.
    """
    if len(sums) != len(terms) or not terms or POPULARITY not in SCALES[terms[0].statistic]:
        raise InputError(
            f"sketch: {len(sums)} sums for {len(terms)} releases, of which the first must tell popularity."
        )
    for values, asked in zip(sums, terms, strict=True):
        for name, shape in sketch_shapes(asked, num_items).items():
            if name not in values or values[name].shape != shape or not np.isfinite(values[name]).all():
                raise InputError(f"sketch: the sum {name!r} is missing, is not of shape {shape} or is not finite.")
    first, last = terms[0], terms[-1]
    head, vectors, strengths, stddev = np.empty(0, np.int64), np.empty((0, 0), np.float32), np.empty(0), 0.0
    if COOCCURRENCE in SCALES[last.statistic]:
        head = choose_head(sums[0][POPULARITY], last.head_items)
        stddev = _stddev(last, num_owners)
        square = _square(sums[-1][COOCCURRENCE], last.head_items)
        vectors, strengths = _denoised(square, noise=stddev / np.sqrt(2.0))
    counts = sums[0][LENGTHS] / SCALES[first.statistic][LENGTHS]
    shares = np.maximum(_to_shares(sums[0][POPULARITY]), _LEAST_SHARE / num_items)
    return Sketch(
        num_users=max(1.0, float(counts.sum())),
        popularity=shares / shares.sum(),
        length_edges=first.length_edges,
        length_shares=_to_shares(counts),
        head=head,
        vectors=vectors,
        values=strengths,
        noise_stddev=stddev,
    )


def save_sketch(path: Path, sketch: Sketch) -> None:
    """Write a ``.safetensors`` file; a crash leaves the old file or the new one, never half of one."""
    arrays = {
        "num_users": np.array([sketch.num_users]),
        "popularity": sketch.popularity,
        "length_edges": np.array(sketch.length_edges),
        "length_shares": sketch.length_shares,
        "head": sketch.head,
        "vectors": np.ascontiguousarray(sketch.vectors),
        "values": sketch.values,
        "noise_stddev": np.array([sketch.noise_stddev]),
    }
    write_atomically(path, safetensors.numpy.save(arrays))


def _stddev(terms: SketchTerms, num_owners: int) -> float:
    if terms.release is None:
        return 0.0
    return float(np.sqrt(num_owners)) * terms.release.noise_multiplier * sensitivity(terms)


def _to_shares(values: Floats) -> Floats:
    """The distribution nearest to ``values`` ÷ their total.

    Cutting at 0 alone would add up the noise of all that is rare. Taking the same from all until the total is right
    does not: the projection onto the simplex (Duchi et al. 2008, ICML).
    """
    total = float(values.sum())
    if total <= 0:
        return np.full(len(values), 1.0 / len(values))
    falling = np.sort(values)[::-1]
    excess = (np.cumsum(falling) - total) / np.arange(1, len(values) + 1)
    taken = excess[np.flatnonzero(falling > excess)[-1]]
    kept = np.maximum(values - taken, 0.0)
    shares: Floats = kept / kept.sum()
    return shares


def _square(triangle: Floats, size: int) -> Matrix:
    square = np.zeros((size, size), dtype=np.float32)
    start = 0
    for row in range(size):
        square[row, row:] = triangle[start : start + size - row]
        start += size - row
    # Halves of what was scaled by √2 on either side, the diagonal as it was.
    square *= np.float32(np.sqrt(0.5))
    square[np.diag_indices(size)] *= np.float32(np.sqrt(0.5))
    square += square.T
    return square


def _denoised(square: Matrix, *, noise: float) -> tuple[Matrix, Floats]:
    """The eigenvectors that stand out of noise of stddev ``noise`` beside the diagonal, and what noise left of them.

    Noise moves an eigenvalue ``θ`` to ``λ = θ + noise² M / θ`` and turns its vector away by ``cos² = 1 - noise² M /
    θ²``, for a symmetric matrix of size ``M`` and ``θ`` above ``noise √M``. The matrix nearest in squared error gives
    the vectors that are seen the weight ``θ cos²``.

    Reference:
        Baik, Ben Arous & Péché 2005, Ann. Probab. 33; Benaych-Georges & Nadakuditi 2011, arXiv:0910.2120;
        Gavish & Donoho 2017, arXiv:1405.7511, for the weight.
    """
    size = len(square)
    bulk = noise * np.sqrt(size)
    values, vectors = largest_eigenpairs(square, min(_LARGEST_RANK, size))
    if not len(values):
        return np.empty((size, 0), np.float32), np.empty(0)
    edge = 2.0 * bulk + _EDGE_MARGIN * noise * size ** (-1 / 6)
    standing = values > max(edge, 1e-6 * values[0])
    values, vectors = values[standing], vectors[:, standing]
    true = 0.5 * (values + np.sqrt(values**2 - 4.0 * bulk**2))
    largest = np.abs(vectors).argmax(axis=0)
    # An eigenvector's sign is nobody's choice: the largest entry becomes positive.
    signs = np.sign(vectors[largest, np.arange(len(values))])
    return (vectors * signs).astype(np.float32), true - bulk**2 / true
