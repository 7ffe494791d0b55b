"""Normals from random words, by Box & Muller 1958, compiled: three times as fast as array operations."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

# Below so many of its 2^31 steps the radius needs more bits, or normals would end at 6.6 standard deviations.
RARE = 1 << 13

_F = np.float32
_U = np.uint32


def normals(words: Words, values: npt.NDArray[Any], *, stddev: float, uniform: Any) -> None:
    """Overwrite ``values``, float32 or float64 of shape ``(2 * pairs,)``, with normals of mean 0.

    Args:
        words: shape ``(2 * pairs,)``: the radius of each pair from the first half, its angle from the second.
        uniform: gives so many numbers strictly between 0 and 1, for the rare radii that 31 bits cannot tell apart;
            normals reach 10.7 standard deviations.
    """
    pairs = len(words) // 2
    in_float32 = values.dtype == np.float32
    if in_float32 and _compiled(words, values, np.empty(pairs, _F), _F(stddev)) >= RARE:
        return
    steps = words[:pairs] & _U(0x7FFFFFFF)
    again = np.flatnonzero(steps < RARE) if in_float32 else np.arange(pairs)
    steps, rare = steps[again], steps[again] < RARE
    within = np.full(len(again), 0.5)
    within[rare] = uniform(int(rare.sum()))
    radius = stddev * np.sqrt(-2.0 * np.log((steps + within) * 2.0**-31))
    angle = words[pairs:][again].view(np.int32) * (np.pi * 2.0**-31)
    values[again], values[pairs + again] = radius * np.cos(angle), radius * np.sin(angle)


def _in_float32(words: Words, values: npt.NDArray[np.float32], radius: npt.NDArray[np.float32], stddev: Any) -> Any:
    """Every pair in single precision; the smallest step of a radius, so that the caller knows of rare ones.

    The logarithm, sine and cosine are the polynomials of Moshier's Cephes library in single precision, written in
    loops that a compiler turns into vector instructions.
    """
    pairs = len(words) // 2
    bits = radius.view(np.int32)
    least = np.int32(0x7FFFFFFF)
    for i in range(pairs):
        step = np.int32(words[i] & _U(0x7FFFFFFF))
        least = min(least, step)
        radius[i] = _F(step) + _F(0.5)
    for i in range(pairs):
        # radius = mantissa * 2^exponent, the mantissa between sqrt(1/2) and sqrt(2).
        exponent = (bits[i] - np.int32(0x3F3504F3)) >> np.int32(23)
        bits[i] -= exponent << np.int32(23)
        values[i] = _F(exponent - np.int32(31))
    for i in range(pairs):
        x = radius[i] - _F(1.0)
        square = x * x
        p = _F(7.0376836292e-2)
        p = p * x + _F(-1.1514610310e-1)
        p = p * x + _F(1.1676998740e-1)
        p = p * x + _F(-1.2420140846e-1)
        p = p * x + _F(1.4249322787e-1)
        p = p * x + _F(-1.6668057665e-1)
        p = p * x + _F(2.0000714765e-1)
        p = p * x + _F(-2.4999993993e-1)
        p = p * x + _F(3.3333331174e-1)
        logarithm = x + (p * x * square - _F(0.5) * square) + values[i] * _F(0.69314718056)
        radius[i] = stddev * np.sqrt(_F(-2.0) * logarithm)
    for i in range(pairs):
        # The nearest quarter turn, and what is left of the angle between -pi/4 and pi/4.
        turned = (words[pairs + i] + _U(0x20000000)) & _U(0xFFFFFFFF)
        quarter = np.int32(turned >> _U(30))
        rest = _F(np.int32(turned & _U(0x3FFFFFFF)) - np.int32(0x20000000)) * _F(1.4629180792671596e-09)
        square = rest * rest
        p = (_F(-1.9515295891e-4) * square + _F(8.3321608736e-3)) * square + _F(-1.6666654611e-1)
        sine = p * square * rest + rest
        p = (_F(2.443315711809948e-5) * square + _F(-1.388731625493765e-3)) * square + _F(4.166664568298827e-2)
        cosine = p * square * square - _F(0.5) * square + _F(1.0)
        swapped = (quarter & np.int32(1)) != 0
        along = sine if swapped else cosine
        across = cosine if swapped else sine
        along = -along if (quarter == 1 or quarter == 2) else along  # a set would not vectorise
        across = -across if quarter >= 2 else across
        values[i] = radius[i] * along
        values[pairs + i] = radius[i] * across
    return least


def _compile() -> Any:
    try:
        return numba.njit(_in_float32, cache=True, fastmath=True, boundscheck=False, error_model="numpy")
    except RuntimeError:  # neither the installation nor a home can be written to: compiled anew in each process
        return numba.njit(_in_float32, fastmath=True, boundscheck=False, error_model="numpy")


_compiled = _compile()
