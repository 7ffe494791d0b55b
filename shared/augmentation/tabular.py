"""Add Gaussian noise to numbers beside the histories: counts of behaviours, attributes of items, context."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import InputError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureNoise:
    """Noise on one feature, in public numbers.

    Args:
        noise_stddev: standard deviation, in units of ``scale``.
        scale: what ``noise_stddev`` is relative to, in the feature's own unit: 1 leaves it absolute. A *public*
            number; a spread read off the users would make the noise say something of them.
        low, high: results are clipped to these.
        whole: results are rounded to whole numbers.
    Raises:
        InputError: a number is not finite or negative, or ``low`` lies above ``high``.
    """

    noise_stddev: float
    scale: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_stddev) and self.noise_stddev >= 0):
            raise InputError(f"feature noise: noise_stddev must be 0 or more, not {self.noise_stddev}.")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"feature noise: scale must be above 0, not {self.scale}.")
        if not self.low <= self.high:
            raise InputError(f"feature noise: low={self.low:g} must not lie above high={self.high:g}.")


def noisy_values(values: npt.ArrayLike, noise: FeatureNoise, *, rng: np.random.Generator) -> FloatArray:
    """``values`` plus independent Gaussian noise, then clipped, then rounded; float64 of the same shape.

    This is augmentation, not privacy: nothing bounds what one user adds to ``values``, the noise is not charged to any
    ledger, and the result is as private as ``values``.

    Args:
        values: finite numbers of any shape; NaN stands for a missing one and stays NaN.
        rng: fresh randomness; it protects nobody.
    Guarantee:
        Where nothing is clipped or rounded, result − values has mean 0 and standard deviation
        ``noise_stddev × scale``. The input is unchanged.
    Raises:
        InputError: a value is infinite.
    """
    exact = np.asarray(values, dtype=np.float64)
    if np.isinf(exact).any():
        raise InputError("feature noise: a value is infinite. Leave it out or mark it missing (NaN).")
    noisy = np.clip(exact + rng.normal(0.0, noise.noise_stddev * noise.scale, exact.shape), noise.low, noise.high)
    return np.rint(noisy) if noise.whole else noisy


def noisy_table(table: pa.Table, noise: Mapping[str, FeatureNoise], *, rng: np.random.Generator) -> pa.Table:
    """``table`` with :func:`noisy_values` in the columns that ``noise`` names: counts of behaviours (with
    ``low=0``), attributes of items, features of a context.

    A column keeps its place and its type; one of whole numbers is rounded whatever its noise says, and clipped to what
    its type holds. A missing value stays missing.

    Raises:
        InputError: a column is absent or not of numbers, or holds an infinite value.
    """
    for name, one in noise.items():
        if name not in table.column_names:
            raise InputError(f"feature noise: no column {name}; the table has {', '.join(table.column_names)}.")
        table = table.set_column(
            table.column_names.index(name), table.field(name), _noisy_column(name, table.column(name), one, rng)
        )
    return table


def _noisy_column(name: str, column: Any, noise: FeatureNoise, rng: np.random.Generator) -> Any:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(
            f"feature noise: column {name} holds {kind}, not numbers. Encode it as numbers, or leave it out."
        )
    missing = column.is_null().to_numpy()
    try:
        noisy = noisy_values(column.cast(pa.float64(), safe=False).to_numpy(), noise, rng=rng)
    except InputError as error:
        raise InputError(f"column {name}: {error}") from None
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        # The nearest float to the largest 64-bit number lies above it, so the one below is taken.
        noisy = np.clip(
            np.rint(noisy), limits.min, np.nextafter(float(limits.max), 0) if kind.bit_width == 64 else limits.max
        )
        return pa.array(np.where(missing, 0, noisy).astype(kind.to_pandas_dtype()), kind, mask=missing)
    return pa.array(noisy.astype(kind.to_pandas_dtype()), kind, mask=missing)
