"""Say of every synthetic row where it came from and where it may go."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from shared.data.histories import Histories
from shared.errors import InputError

EXPORTABLE, INTERNAL = "exportable", "internal"


def synthetic_table(histories: Histories, item_ids: Sequence[str], *, generator_id: str, exportable: bool) -> pa.Table:
    """One row per synthetic interaction: who, what, and its lineage.

    Columns: ``user_id`` (``synthetic-…``, unique within a generator and seed), ``item_id``, and
    ``synthetic`` (true), ``generator_id``, ``lineage`` (``exportable`` or ``internal``).
    """
    users = np.repeat(np.arange(histories.num_users), histories.lengths())
    names = pa.array([f"synthetic-{generator_id[:8]}-{user:06d}" for user in range(histories.num_users)])
    rows = len(histories.items)
    return pa.table(
        {
            "user_id": names.take(pa.array(users)),
            "item_id": pa.array(list(item_ids)).take(pa.array(histories.items)),
            "synthetic": pa.array(np.ones(rows, dtype=bool)),
            "generator_id": pa.array([generator_id]).take(pa.array(np.zeros(rows, dtype=np.int64))),
            "lineage": pa.array([EXPORTABLE if exportable else INTERNAL]).take(
                pa.array(np.zeros(rows, dtype=np.int64))
            ),
        }
    )


def encode_table(table: pa.Table, form: Literal["parquet", "csv", "recbole"]) -> bytes:
    """The content of a file that holds ``table``.

    Raises:
        InputError: RecBole's format cannot hold an item id with a tab or a line break.
    """
    if form == "recbole":
        return _recbole(table).encode()
    sink = pa.BufferOutputStream()
    if form == "parquet":
        pyarrow.parquet.write_table(table, sink, compression="zstd")
    else:
        pyarrow.csv.write_csv(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _recbole(table: pa.Table) -> str:
    lines = ["\t".join(f"{name}:token" for name in table.column_names)]
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        fields = [str(field) for field in row]
        if any("\t" in field or "\n" in field for field in fields):
            raise InputError(f"item id {fields[1]!r} has a tab or line break, which .inter files cannot hold. Use csv.")
        lines.append("\t".join(fields))
    return "\n".join(lines) + "\n"
