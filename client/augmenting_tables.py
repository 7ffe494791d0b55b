"""Write a plain table with noised copies of its rows beside them, each with its class."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from client.owned_rows import check_out
from shared.augmentation.lineage import INTERNAL, write_tables
from shared.augmentation.tabular import FeatureNoise, noisy_table
from shared.errors import InputError
from shared.rng import stream

_ADDED = ("synthetic", "lineage")
_PARQUET = (".parquet", ".pq")


def augment_table(
    data: Path, out: Path, noise: dict[str, FeatureNoise], *, copies: int, form: Literal["parquet", "csv"], seed: int
) -> dict[str, Any]:
    """Write to ``out`` the rows of ``data`` and ``copies`` of them with noise: counts, attributes of items, context.

    Args:
        data: Parquet or CSV file of any columns; never changed.
        noise: by column of numbers.
        seed: of the noise, which is augmentation and protects nobody.
    Returns: ``out`` and ``rows`` by kind.
    Guarantee:
        Every row is ``internal``: a copy is its row and public noise.
    Raises:
        InputError: the table cannot be read or lacks a column, or ``out`` is ``data``.
    """
    check_out(out, data)
    real = _read(data, noise)
    if clash := [name for name in _ADDED if name in real.column_names]:
        raise InputError(
            f"{data} has a column {clash[0]} already: it was augmented before. Give the file it came from."
        )
    parts = [_marked(real, synthetic=False)]
    for number in range(copies):
        parts.append(_marked(noisy_table(real, noise, rng=stream(seed, "augment-table", number)), synthetic=True))
    write_tables(out, parts, form)
    return {"out": str(out), "rows": {"real": real.num_rows, "synthetic": copies * real.num_rows}, "lineage": INTERNAL}


def read_noise(texts: Sequence[str]) -> dict[str, FeatureNoise]:
    """Read ``column:stddev`` texts, or ``column:stddev:low`` with a lower bound; InputError for any other form."""
    noise = {}
    for text in texts:
        name, *numbers = text.split(":")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        if not name or len(values) not in (1, 2):
            raise InputError(
                f"--noise {text!r:.80}: expected COLUMN:STDDEV or COLUMN:STDDEV:LOW, in the column's own unit, such as"
                " age:2.5 or views:2:0."
            )
        noise[name] = FeatureNoise(noise_stddev=values[0], low=values[1] if len(values) == 2 else -math.inf)
    return noise


def _read(data: Path, noised: Collection[str]) -> pa.Table:
    try:
        if data.suffix.lower() in _PARQUET:
            return pyarrow.parquet.read_table(data)
        # Only what gets noise is read as numbers: an id of 007 stays one.
        header = pyarrow.csv.open_csv(data).schema.names
        texts = {name: pa.string() for name in header if name not in noised}
        return pyarrow.csv.read_csv(data, convert_options=pyarrow.csv.ConvertOptions(column_types=texts))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{data}: not readable as Parquet or CSV ({error}).") from None


def _marked(table: pa.Table, *, synthetic: bool) -> pa.Table:
    marks = pa.array(np.full(table.num_rows, synthetic))
    return table.append_column("synthetic", marks).append_column("lineage", pa.array([INTERNAL] * table.num_rows))
