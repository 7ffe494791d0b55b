"""Say of every synthetic row where it came from and where it may go."""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from shared.data.histories import Histories
from shared.errors import InputError
from shared.files import replacing

EXPORTABLE, INTERNAL = "exportable", "internal"

Form = Literal["parquet", "csv", "recbole"]

_RECBOLE_TYPES = {"timestamp": "float"}
_LINES_AT_ONCE = 1 << 16


def synthetic_tables(
    blocks: Iterable[Histories],
    item_ids: Sequence[str],
    *,
    generator_id: str,
    exportable: bool,
    behaviours: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """One table for each block of users, one row per synthetic interaction: who, what, and its lineage.

    Columns: ``user_id`` (``synthetic-…``, numbered through all blocks, so unique within a generator and seed, and in
    the order of its digits up to a thousand million users), ``item_id``, ``timestamp`` and ``behaviour`` where the
    histories have them, then ``synthetic`` (true), ``generator_id``, ``lineage`` (``exportable`` or ``internal``).
    Texts are dictionaries.

    Args:
        behaviours: names of the codes in ``Histories.behaviours``.
    Raises:
        InputError: a code has no name.
    """
    items, names = pa.array(list(item_ids), pa.string()), pa.array(list(behaviours), pa.string())
    lineage = EXPORTABLE if exportable else INTERNAL
    first = 0
    for histories in blocks:
        rows, numbers = histories.num_interactions, range(first, first + histories.num_users)
        users = pa.array([f"synthetic-{generator_id[:8]}-{number:09d}" for number in numbers], pa.string())
        columns: dict[str, Any] = {
            "user_id": _coded(np.repeat(np.arange(histories.num_users, dtype=np.int32), histories.lengths()), users),
            "item_id": _coded(histories.items, items),
        }
        if histories.timestamps is not None:
            columns["timestamp"] = pa.array(histories.timestamps)
        if histories.behaviours is not None:
            if rows and int(histories.behaviours.max()) >= len(names):
                raise InputError(
                    f"the generator draws behaviour {int(histories.behaviours.max())}, and {len(names)} behaviour(s)"
                    " have names. Give the names of all, in the order in which the generator was trained."
                )
            columns["behaviour"] = _coded(histories.behaviours.astype(np.int32), names)
        columns["synthetic"] = pa.array(np.ones(rows, dtype=bool))
        columns["generator_id"] = _coded(np.zeros(rows, np.int32), pa.array([generator_id]))
        columns["lineage"] = _coded(np.zeros(rows, np.int32), pa.array([lineage]))
        yield pa.table(columns)
        first += histories.num_users


def synthetic_table(
    histories: Histories,
    item_ids: Sequence[str],
    *,
    generator_id: str,
    exportable: bool,
    behaviours: Sequence[str] = (),
) -> pa.Table:
    """The only one of :func:`synthetic_tables` for a single block."""
    return next(
        synthetic_tables([histories], item_ids, generator_id=generator_id, exportable=exportable, behaviours=behaviours)
    )


def encode_table(table: pa.Table, form: Form) -> bytes:
    """The content of a file that holds ``table``.

    Raises:
        InputError: RecBole's format cannot hold an item id with a tab or a line break.
    """
    content = io.BytesIO()
    _write_tables(content, [table], form)
    return content.getvalue()


def write_tables(path: Path, tables: Iterable[pa.Table], form: Form) -> None:
    """Write ``tables``, one or more of one schema, into one file while they are made; memory holds one at a time.

    Guarantee:
        ``path`` is the old file or the whole new one, never a part: rows go to a ``.partial`` beside it first.
    Raises:
        InputError: there is no such folder, the disk is full, or RecBole's format cannot hold an id.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"cannot write {path}: {what}. Name a file in a folder that exists.")
    try:
        with replacing(path) as file:
            _write_tables(file, tables, form)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Nothing was half-written; make room or choose another"
            " folder, then ask again: the same seed gives the same users."
        ) from None


def _coded(codes: Any, texts: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), texts)


def _write_tables(file: BinaryIO, tables: Iterable[pa.Table], form: Form) -> None:
    every = iter(tables)
    first = next(every)
    rest = chain([first], every)
    if form == "recbole":
        types = (_RECBOLE_TYPES.get(name, "token") for name in first.column_names)
        header = "\t".join(f"{name}:{kind}" for name, kind in zip(first.column_names, types, strict=True))
        file.write(f"{header}\n".encode())
        for table in rest:
            _check_for_recbole(table)
            for rows in table.to_batches(max_chunksize=_LINES_AT_ONCE):
                lines = pc.binary_join_element_wise(*(column.cast(pa.string()) for column in rows.columns), "\t")
                file.write("\n".join([*lines.to_pylist(), ""]).encode())
        return
    plain = pa.schema([(field.name, _plain(field.type)) for field in first.schema])
    if form == "csv":
        with pyarrow.csv.CSVWriter(file, plain) as writer:
            for table in rest:
                writer.write_table(table.cast(plain))
        return
    # Without Arrow's own schema a reader sees texts, not how they were coded.
    with pyarrow.parquet.ParquetWriter(file, first.schema, compression="zstd", store_schema=False) as writer:
        for table in rest:
            writer.write_table(table)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_for_recbole(table: pa.Table) -> None:
    for column in table.columns:
        if not pa.types.is_dictionary(column.type):
            continue
        for texts in (chunk.dictionary for chunk in column.chunks):
            odd = texts.filter(pc.match_substring_regex(texts, "[\t\n\r]"))
            if len(odd):
                raise InputError(
                    f"item id {odd[0].as_py()!r} has a tab or line break, which .inter files cannot hold. Use csv."
                )
