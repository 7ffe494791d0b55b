"""The largest eigenvalues of a symmetric matrix, in a time that does not depend on what is in it."""

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

_DENSE_UP_TO = 600
# Nearly equal eigenvalues, as of a matrix whose rank is below what is asked for, would be told apart for hours.
_MOST_RESTARTS = 30


def largest_eigenpairs(square: Matrix, count: int) -> tuple[Floats, npt.NDArray[np.floating]]:
    """Up to ``count`` of the largest eigenvalues of ``square``, falling, with orthonormal eigenvectors as columns.

    Fewer where the others cannot be told apart in reasonable time: they are then close to one another.
    """
    if len(square) <= max(_DENSE_UP_TO, count + 1):
        values, vectors = scipy.linalg.eigh(square.astype(np.float64))
    else:
        # A start of our own: by default it comes from global chance.
        start = np.full(len(square), len(square) ** -0.5, dtype=np.float32)
        try:
            values, vectors = eigsh(square, k=count, which="LA", v0=start, tol=1e-4, maxiter=_MOST_RESTARTS)
        except ArpackNoConvergence as found:
            values, vectors = found.eigenvalues, found.eigenvectors
    falling = np.argsort(-values)[:count]
    return values[falling].astype(np.float64), vectors[:, falling]
