"""The public list of items that gives every model of a federation the same axes."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from shared.data.interactions import Interactions
from shared.errors import InputError
from shared.files import write_atomically

CatalogueSource = Literal["public", "assumed public"]


@dataclass(frozen=True)
class Catalogue:
    """Item ids in a fixed order; a model's item ``i`` is ``items[i]``.

    Args:
        items: distinct, non-empty ids.
        version: the name its publisher gave this list.
        source: ``assumed public`` where the list was computed from users' data, which only a simulation may do.
    Raises:
        InputError: there are no items, or one is empty or repeated.
    """

    items: tuple[str, ...]
    version: str
    source: CatalogueSource = "public"

    def __post_init__(self) -> None:
        if not self.items:
            raise InputError(f"catalogue {self.version}: no items. A catalogue names every item that may occur.")
        if "" in self.items:
            row = self.items.index("") + 1
            raise InputError(f"catalogue {self.version}, row {row}: the item id is empty. Remove the row.")
        repeats = len(self.items) - len(set(self.items))
        if repeats:
            first_row = {item: row for row, item in reversed(list(enumerate(self.items, 1)))}
            row = next(row for row, item in enumerate(self.items, 1) if first_row[item] < row)
            raise InputError(
                f"catalogue {self.version}: {repeats} repeated item id(s), the first in row {row}."
                " Each item may stand once: its row is its place in every model."
            )

    @property
    def num_items(self) -> int:
        return len(self.items)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the version and the ids in order; equal hashes mean models may be exchanged."""
        text = json.dumps([self.version, *self.items], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def positions(self, ids: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Catalogue position of each id of an Arrow string array; -1 outside."""
        found = pc.index_in(ids, value_set=pa.array(self.items, pa.string()))
        positions: np.ndarray[Any, np.dtype[np.int32]] = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
        return positions

    def save(self, path: Path) -> None:
        """Write JSON that :meth:`load` reads; a crash leaves the old file or the new one."""
        content = {"version": self.version, "source": self.source, "sha256": self.hash, "items": self.items}
        write_atomically(path, (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Read JSON written by :meth:`save`, a text file with one id per line, or a CSV or Parquet column ``item_id``.

        The version is the one in the JSON file, else the file's name without its suffix.

        Raises:
            InputError: the file is missing, not one of these, or its hash does not fit its items.
        """
        try:
            match path.suffix.lower():
                case ".json":
                    return _from_json(path)
                case ".parquet" | ".pq":
                    table = pyarrow.parquet.read_table(path)
                case ".csv":
                    # Ids stay text: "007" is not 7.
                    options = pyarrow.csv.ConvertOptions(
                        column_types={"item_id": pa.string()}, include_columns=["item_id"]
                    )
                    table = pyarrow.csv.read_csv(path, convert_options=options)
                case _:
                    lines = path.read_text(encoding="utf-8-sig").splitlines()
                    return cls(tuple(lines), path.stem)
        except FileNotFoundError:
            raise InputError(
                f"no catalogue at {path}. Give the public item list in data.catalogue, or leave it empty in a"
                " simulation to take the items seen in the data."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are ValueErrors and KeyErrors
            raise InputError(f"{path}: not a catalogue: {str(error).splitlines()[0]}. {_EXPECTED}") from None
        if "item_id" not in table.column_names:
            raise InputError(f"{path}: no column item_id; it has {', '.join(table.column_names)}. {_EXPECTED}")
        column = table.column("item_id").cast(pa.string()).fill_null("")
        return cls(tuple(column.to_pylist()), path.stem)


_EXPECTED = "Expected one id per line, or a CSV or Parquet file with a column item_id, or JSON written by fedaug."


def _from_json(path: Path) -> Catalogue:
    content = json.loads(path.read_text(encoding="utf-8"))
    catalogue = Catalogue(tuple(map(str, content["items"])), str(content["version"]), content.get("source", "public"))
    if content.get("sha256", catalogue.hash) != catalogue.hash:
        raise InputError(
            f"{path}: its items hash to {catalogue.hash[:12]}..., but it says {content['sha256'][:12]}...: the file was"
            " edited. Get it again from its publisher, or publish it as a new version without a sha256."
        )
    return catalogue


def catalogue_from(interactions: Interactions, *, top_items: int | None) -> Catalogue:
    """The items seen, or the ``top_items`` that most users used (ties: the smaller id), in the order of their ids.

    Looks across users, so it is for simulations: the result is marked ``assumed public``. The order carries no
    popularity.
    """
    items, width = interactions.items.codes, len(interactions.items.labels)
    chosen = np.flatnonzero(np.bincount(items, minlength=width))
    if top_items is not None and top_items < len(chosen):
        # Sorting and comparing neighbours: twenty times as fast as np.unique on ten million rows.
        pairs = np.sort(interactions.users.codes.astype(np.int64) * width + items)
        distinct = np.concatenate([pairs[:1], pairs[1:][pairs[1:] != pairs[:-1]]])
        popularity = np.bincount(distinct % width, minlength=width)
        chosen = np.sort(chosen[np.argsort(-popularity[chosen], kind="stable")[:top_items]])
    ids: Iterable[str] = interactions.items.labels.take(pa.array(chosen)).to_pylist()
    name = Path(interactions.source).stem
    version = f"{name}-seen" if top_items is None else f"{name}-top-{top_items}"
    return Catalogue(tuple(ids), version, "assumed public")
