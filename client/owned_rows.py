"""An owner's file of interactions, read for use at home with a generator it received."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from shared.config import Columns
from shared.data.catalogue import Catalogue
from shared.data.histories import Histories
from shared.data.indexing import IndexedUsers, index_events, index_users
from shared.data.interactions import Interactions
from shared.data.readers import read_interactions
from shared.errors import InputError, LeakError
from shared.generators.card import Generator

TRAIN = "train"
_READABLE = (".parquet", ".pq", ".csv", ".tsv", ".txt", ".inter", ".data", ".dat")


@dataclass(frozen=True, slots=True, eq=False)
class OwnedRows:
    """An owner's rows, and its training users as histories.

    Args:
        rows: all of the file.
        has_split: whether the file says what is held out; the label stands where institutions would.
        is_train: shape ``(num_rows,)``; the others are held out, and in nothing but ``rows``.
        users: training users and their distinct items.
        events: the same users; with behaviours, where the file has them, every (item, behaviour).
        behaviours: names of the codes in ``events``.
    """

    rows: Interactions
    has_split: bool
    is_train: np.ndarray[Any, np.dtype[np.bool_]]
    users: IndexedUsers
    events: Histories
    behaviours: tuple[str, ...]


def read_owned(
    data: Path, generator: Generator, columns: Columns | None = None, *, skip_bad_rows: bool = False
) -> OwnedRows:
    """The rows of ``data``, a Parquet, CSV or RecBole file of an owner, over the items of ``generator``.

    Args:
        columns: what ``data`` calls its columns.
        skip_bad_rows: leave bad rows out, counted, where they are otherwise refused.
    Raises:
        InputError: the data cannot be read, was augmented before, or has no item of the generator.
    """
    columns = columns or Columns()
    header = _header(data)
    has_split = "split" in header
    if "synthetic" in header:
        raise InputError(
            f"{data} has a column synthetic: it was augmented before, and synthetic users must not be taken for real"
            " ones. Give the file it was made from."
        )
    # An institution is a label of every row, which is what the split is here; institutions are not asked for.
    split = columns.model_copy(update={"institution": "split"}) if has_split else columns
    try:
        rows = read_interactions(data, columns=split, skip_bad_rows=skip_bad_rows)
    except InputError as error:
        raise InputError(str(error).replace("institution is missing", "split is missing")) from None
    is_train = _training_rows(rows, data) if has_split else np.ones(rows.num_rows, dtype=bool)
    train = rows.keep(is_train)
    catalogue = Catalogue(generator.item_ids, str(generator.card.catalogue.get("version", "of the generator")))
    outside = catalogue.positions(train.items.labels)[train.items.codes] < 0
    if outside.all():
        raise InputError(
            f"{data}: none of its {train.num_rows:,} rows names one of the generator's {len(generator.item_ids)} items,"
            f" such as {generator.item_ids[0]!r}. Give the data whose catalogue the generator was trained on."
        )
    bound = generator.card.max_items_per_user
    users = index_users(train, catalogue, min_interactions=1, max_items_per_user=bound, outside_catalogue="count")
    if train.behaviours is None:
        return OwnedRows(rows, has_split, is_train, users, users.histories, ())
    # The generator's own names first, in its order: its codes are their places.
    present = train.behaviours.labels.take(pa.array(np.unique(train.behaviours.codes))).to_pylist()
    known = generator.card.behaviours
    names = (*known, *(name for name in present if name not in known))
    events = index_events(train, users, catalogue, behaviours=names, max_items_per_user=bound)
    return OwnedRows(rows, has_split, is_train, users, events.histories, names)


def _header(data: Path) -> list[str]:
    """Names of the columns; none where the reader will say what is wrong."""
    suffix = (data.with_suffix("") if data.suffix == ".gz" else data).suffix.lower()
    if suffix not in _READABLE:
        raise InputError(f"{data}: augment reads Parquet, CSV and RecBole files. Export the table to one of them.")
    try:
        if suffix in (".parquet", ".pq"):
            return list(pyarrow.parquet.read_schema(data).names)
        with pa.input_stream(data) as stream:
            line = stream.read(1 << 20).split(b"\n", 1)[0].decode("utf-8-sig", errors="replace")
    except (OSError, pa.ArrowException):
        return []
    return [re.sub(r":\w+$", "", name.strip().strip('"')) for name in re.split(r"[,;\t|]", line)]


def _training_rows(rows: Interactions, data: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    parts = rows.institutions
    labels = [] if parts is None else parts.labels.to_pylist()
    if parts is None or TRAIN not in labels:
        raise InputError(f"{data}: no row has {TRAIN} in its column split, but {', '.join(labels[:5]) or 'nothing'}.")
    is_train: np.ndarray[Any, np.dtype[np.bool_]] = parts.codes == labels.index(TRAIN)
    used = rows.keep(is_train).institutions
    if used is None or set(used.labels.take(pa.array(np.unique(used.codes))).to_pylist()) != {TRAIN}:
        raise LeakError(f"{data}: rows that are held out were about to be used. Report this as a bug.")
    return is_train


def check_out(out: Path, data: Path) -> None:
    """Raise InputError where ``out`` would overwrite ``data``, or lies in no folder."""
    if out.resolve() == data.resolve() or (out.exists() and data.exists() and out.samefile(data)):
        raise InputError(f"--out {out} would overwrite what is read. Give another path.")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}. Create it first.")
