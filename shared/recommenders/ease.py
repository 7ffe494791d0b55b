"""Recommend by a ridge regression of every item on all others, in closed form."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse as sp
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.base import Schedule, synthetic_user_weight

Matrix = npt.NDArray[np.float32]

_TOO_SMALL = "the penalty is too small for single precision: the system cannot be solved. Raise recommender.l2."
_CACHE_BYTES = 3 * 2**30
_CACHE_SETS = 2  # a study goes to and fro between a private and a non-private set


@dataclass(frozen=True, slots=True, eq=False)
class Ease:
    """EASE on the binary co-occurrence of real users plus weighted synthetic ones.

    The penalty is a share of the real training mass: ``λ = l2 × real interactions``. A share carries over from
    a fold to all users, and it makes what depends on the synthetic users alone the same for every owner, so that
    a simulation computes it once (:class:`_SyntheticInverses`).

    Args:
        l2: shares that tuning may choose from; :meth:`fit` uses the first.
    Reference:
        Steck 2019, arXiv:1905.03375, equations 7 and 8.
    """

    l2: tuple[float, ...]
    _inverses: "_SyntheticInverses" = field(default_factory=lambda: _SyntheticInverses(_CACHE_BYTES), repr=False)

    @property
    def name(self) -> str:
        return "ease"

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        return ("constant",)

    def variants(self) -> tuple[Self, ...]:
        return tuple(type(self)((share,), self._inverses) for share in self.l2)

    def fit(
        self,
        real: Histories,
        synthetic: Histories | None = None,
        *,
        weight: float = 0.0,
        schedule: Schedule = "constant",
        seed: int,
    ) -> "FittedEase":
        """Solve for ``P = (Σ x xᵀ + λ I)⁻¹``; ``seed`` changes nothing, there is no chance in it."""
        if schedule not in self.schedules:
            raise InputError(
                f"EASE is solved in one step, so schedule={schedule!r} has no time to happen. Use constant, or"
                " recommender.kind=multvae or sasrec."
            )
        with _one_blas_thread():
            return self._fit(real, synthetic, weight)

    def fit_variants(
        self,
        real: Histories,
        synthetic: Histories | None = None,
        *,
        weight: float = 0.0,
        schedule: Schedule = "constant",
        seed: int,
    ) -> Iterator["FittedEase"]:
        # One at a time: a model may be as large as the catalogue squared.
        return (v.fit(real, synthetic, weight=weight, schedule=schedule, seed=seed) for v in self.variants())

    def _fit(self, real: Histories, synthetic: Histories | None, weight: float) -> "FittedEase":
        user_weight = synthetic_user_weight(real, synthetic, weight)
        if real.num_interactions == 0:
            raise InputError("no real interactions to train on. Give this owner users or lower data.min_interactions.")
        penalty = self.l2[0] * real.num_interactions
        rows = real.to_csr()
        few_users = 2 * real.num_users <= real.num_items
        if few_users:
            base = self._inverses.get(synthetic, user_weight / penalty) if synthetic is not None and weight else None
            return _low_rank(base, rows, penalty)
        gram = _gram(real)
        if synthetic is not None and weight:
            gram += np.float32(user_weight) * self._inverses.gram(synthetic)
        return FittedEase(_inverse(gram, 1.0 / penalty), None)


@dataclass(frozen=True, slots=True, eq=False)
class FittedEase:
    """``λP = base − halfᵀ half``, of which scores need products and the diagonal only.

    Args:
        base: symmetric, shape ``(num_items, num_items)``; None stands for the identity.
        half: shape ``(num_users, num_items)``; None where ``base`` is all there is.
    """

    base: Matrix | None
    half: Matrix | None

    def scores(self, fold_in: Histories) -> Matrix:
        """``x B`` with ``B = I − P diag(P)⁻¹``: an item is never a reason for itself."""
        with _one_blas_thread():
            return self._scores(fold_in.to_csr())

    def _scores(self, known: sp.csr_matrix) -> Matrix:
        diagonal = self.diagonal()
        if known.shape[1] != len(diagonal):
            raise InputError(f"fold-in has {known.shape[1]} items; this model was trained on {len(diagonal)}.")
        scores = known.toarray()
        projected: Matrix = scores.copy() if self.base is None else _sparse_times(known, self.base)
        if self.half is not None:
            projected -= _sparse_times(known, self.half.T) @ self.half
        scores -= projected / diagonal
        return np.asarray(scores, dtype=np.float32)

    def diagonal(self) -> Matrix:
        """The diagonal of ``λP``, shape ``(num_items,)``."""
        if self.half is None:
            assert self.base is not None
            return np.asarray(self.base.diagonal(), dtype=np.float32)
        ones = np.ones(self.half.shape[1], dtype=np.float32) if self.base is None else self.base.diagonal()
        return np.asarray(ones - np.einsum("ui,ui->i", self.half, self.half), dtype=np.float32)


class _SyntheticInverses:
    """``(I + ratio × synthetic Gram)⁻¹`` for the newest synthetic sets, as many as fit.

    An owner's own users then cost a system of *their* size (Woodbury), not one of the catalogue's size. When full, what
    is there stays: owners ask in the same order, and the oldest would be forgotten just before it is asked for again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._grams: OrderedDict[int, tuple[Histories, Matrix]] = OrderedDict()
        self._inverses: dict[tuple[int, float], Matrix] = {}

    def gram(self, synthetic: Histories) -> Matrix:
        key = id(synthetic)  # safe: the entry holds the histories, so that no other object gets this id
        if key not in self._grams:
            while len(self._grams) >= _CACHE_SETS:
                dropped, _ = self._grams.popitem(last=False)
                for stale in [pair for pair in self._inverses if pair[0] == dropped]:
                    del self._inverses[stale]
            self._grams[key] = (synthetic, _gram(synthetic))
        self._grams.move_to_end(key)
        return self._grams[key][1]

    def get(self, synthetic: Histories, ratio: float) -> Matrix:
        gram = self.gram(synthetic)
        key = (id(synthetic), float(f"{ratio:.9g}"))  # owners' ratios differ by float rounding only
        if key in self._inverses:
            return self._inverses[key]
        inverse = _inverse(gram, key[1])
        if (len(self._inverses) + 1) * gram.nbytes <= self._max_bytes:
            self._inverses[key] = inverse
        return inverse


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _one_blas_thread() -> AbstractContextManager[Any]:
    # OpenBLAS threads wait for each other by spinning: on two busy cores a factorisation took 50 times as long with two
    # threads as with one (2.4 s against 0.05 s at 2,000 items). One thread also makes the sums the same everywhere.
    limit: AbstractContextManager[Any] = _blas().limit(limits=1, user_api="blas")
    return limit


def _low_rank(base: Matrix | None, rows: sp.csr_matrix, penalty: float) -> FittedEase:
    # λ(λI + λ·synthetic + XᵀX)⁻¹ = M − (XM)ᵀ (λI + X M Xᵀ)⁻¹ (XM) with M = (I + synthetic)⁻¹; LLᵀ is the middle.
    products = rows.toarray() if base is None else _sparse_times(rows, base)
    system = _sparse_times(rows, products.T)
    system[np.diag_indices_from(system)] += np.float32(penalty)
    try:
        factor = scipy.linalg.cholesky(system, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        raise InputError(_TOO_SMALL) from None
    # Solved from the right and transposed, so that BLAS reads the rows where they lie.
    half = scipy.linalg.blas.strsm(1.0, factor, products.T, side=1, lower=1, trans_a=1, overwrite_b=1).T
    return FittedEase(base, half)


def _gram(histories: Histories) -> Matrix:
    rows = histories.to_csr()
    return np.asarray((rows.T @ rows).toarray(), dtype=np.float32)


def _inverse(gram: Matrix, ratio: float) -> Matrix:
    """``(I + ratio × gram)⁻¹`` in single precision, symmetric."""
    system = np.float32(ratio) * gram
    system[np.diag_indices_from(system)] += np.float32(1.0)
    factor, failed = scipy.linalg.lapack.spotrf(system.T, lower=0, overwrite_a=1)
    if failed:
        raise InputError(_TOO_SMALL)
    inverse, _ = scipy.linalg.lapack.spotri(factor, lower=0, overwrite_c=1)
    upper = np.triu(inverse)
    upper += np.triu(inverse, 1).T
    return np.ascontiguousarray(upper, dtype=np.float32)


def _sparse_times(rows: sp.csr_matrix, dense: Matrix) -> Matrix:
    return np.ascontiguousarray(rows @ dense, dtype=np.float32)
