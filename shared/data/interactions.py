"""User-item events as integer codes, the checked form of every source."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import InputError

Codes = npt.NDArray[np.int32]

# What these words name is the undoing of an interaction, so they count only when asked for by name.
UNDOING = frozenset({"return", "returned", "refund", "refunded", "cancel", "cancelled", "canceled"})


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A text column as codes into its sorted distinct labels.

    Args:
        codes: shape ``(num_rows,)``, int32.
        labels: Arrow string array in byte order; one may have lost its last row to a filter.
    """

    codes: Codes
    labels: Any

    @classmethod
    def from_dictionaries(cls, parts: Sequence[Any]) -> "Coded":
        """Join Arrow dictionary arrays of text or integers; integers become their decimal text, nulls code 0."""
        # combine_chunks needs one dictionary, which unify_dictionaries makes without touching the rows twice.
        whole = pa.chunked_array(parts).unify_dictionaries().combine_chunks()
        labels = whole.dictionary.cast(pa.string())
        order = pc.sort_indices(labels).to_numpy()
        position = np.empty(len(order), dtype=np.int32)
        position[order] = np.arange(len(order), dtype=np.int32)
        return cls(position[whole.indices.fill_null(0).to_numpy()], labels.take(pa.array(order)))


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """The usable rows of one source, in its order.

    Args:
        source: the name shown in messages, without credentials.
        users, items: identifiers as text, coded; ``1`` read from an integer column and ``"1"`` are the same.
        timestamps: shape ``(num_rows,)``, int64 epoch seconds, or None where the source has none.
        behaviours, institutions: coded, or None where the source has none.
        skipped: rows left out, by reason; empty unless skipping was asked for or behaviours were chosen.
    """

    source: str
    users: Coded
    items: Coded
    timestamps: npt.NDArray[np.int64] | None = None
    behaviours: Coded | None = None
    institutions: Coded | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.users.codes)

    def counting(self, behaviours: tuple[str, ...] | None) -> "Interactions":
        """Only the rows whose behaviour counts as an interaction; the others are counted in ``skipped``.

        Args:
            behaviours: the names that count, or None for every one that is not a return, refund or
                cancellation. A return does not take its purchase back: the user did choose the item.
        Raises:
            InputError: a name does not occur, or nothing is left.
        """
        if self.behaviours is None:
            if behaviours:
                raise InputError(
                    f"{self.source}: data.behaviours names {', '.join(behaviours)}, but there is no behaviour column."
                    " Map it with data.columns.behaviour, or leave data.behaviours out."
                )
            return self
        labels: list[str] = self.behaviours.labels.to_pylist()
        if behaviours is None:
            wanted = np.array([label.strip().lower() not in UNDOING for label in labels], dtype=bool)
        else:
            unknown = sorted(set(behaviours) - set(labels))
            if unknown:
                raise InputError(
                    f"{self.source}: no row has behaviour {', '.join(unknown)}; the file has {', '.join(labels)}."
                    " Name the ones that count in data.behaviours."
                )
            wanted = np.array([label in behaviours for label in labels], dtype=bool)
        if wanted.all():
            return self
        rows = np.bincount(self.behaviours.codes, minlength=len(labels))
        left_out = {f"behaviour {labels[i]!r} does not count": int(rows[i]) for i in np.flatnonzero(~wanted) if rows[i]}
        kept = self.keep(wanted[self.behaviours.codes])
        if kept.num_rows == 0:
            raise InputError(
                f"{self.source}: none of its behaviours ({', '.join(labels)}) counts as an interaction."
                " Name the ones that do in data.behaviours."
            )
        return replace(kept, skipped={**self.skipped, **left_out})

    def keep(self, mask: npt.NDArray[np.bool_]) -> "Interactions":
        """The rows where ``mask`` is true; what they leave behind is not counted."""

        def part(column: Coded | None) -> Coded | None:
            return None if column is None else Coded(column.codes[mask], column.labels)

        return replace(
            self,
            users=Coded(self.users.codes[mask], self.users.labels),
            items=Coded(self.items.codes[mask], self.items.labels),
            timestamps=None if self.timestamps is None else self.timestamps[mask],
            behaviours=part(self.behaviours),
            institutions=part(self.institutions),
        )
