"""How far numbers are from independent standard normals, each as a multiple of what chance explains."""

from math import erfc, sqrt

import numpy as np
from scipy.special import ndtr


def moments(draws: np.ndarray) -> list[float]:
    """The first four moments, in standard errors: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n)."""
    expected = [(0, 1.0), (1, sqrt(2)), (0, sqrt(15)), (3, sqrt(96))]
    root = sqrt(len(draws))
    return [float(np.mean(draws**power) - mean) / spread * root for power, (mean, spread) in enumerate(expected, 1)]


def tail(draws: np.ndarray, bound: float) -> float:
    """The share beyond ``bound`` on either side, in standard errors."""
    expected = erfc(bound / sqrt(2))
    return float(np.mean(np.abs(draws) > bound) - expected) / sqrt(expected * (1 - expected) / len(draws))


def kolmogorov(draws: np.ndarray) -> float:
    """Largest gap of the distribution functions times sqrt(n); above x with probability 2 exp(-2 x^2)."""
    ranks = np.arange(len(draws) + 1) / len(draws)
    levels = ndtr(np.sort(draws))
    return float(max(np.max(ranks[1:] - levels), np.max(levels - ranks[:-1]))) * sqrt(len(draws))


def correlations(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Of the draws, of their squares, and of each with the other's square, in standard errors."""
    root = sqrt(len(one))
    squares = (one**2 - 1) / sqrt(2), (other**2 - 1) / sqrt(2)
    return [
        float(np.mean(left * right)) * root
        for left, right in ((one, other), squares, (one, squares[1]), (squares[0], other))
    ]
