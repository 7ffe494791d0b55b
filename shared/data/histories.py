"""Users' item histories in compressed sparse rows, the one form in which models see data."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from shared.errors import InputError
from shared.files import write_atomically

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Histories:
    """``num_users`` histories over a public catalogue of ``num_items`` items.

    Args:
        indptr: shape ``(num_users + 1,)``, int64: user ``u`` owns ``items[indptr[u]:indptr[u + 1]]``.
        items: shape ``(num_interactions,)``, int32 catalogue positions, oldest first within a user.
        num_items: size of the public catalogue.
        timestamps: shape ``(num_interactions,)``, int64 epoch seconds, or None where time is unknown.
    Raises:
        InputError: the arrays do not describe histories inside the catalogue.
    """

    indptr: IntArray
    items: npt.NDArray[np.int32]
    num_items: int
    timestamps: IntArray | None = None

    def __post_init__(self) -> None:
        pointers, items = self.indptr, self.items
        if pointers.ndim != 1 or len(pointers) == 0 or pointers[0] != 0 or pointers[-1] != len(items):
            raise InputError("histories: indptr must start at 0 and end at the number of interactions")
        if (np.diff(pointers) < 0).any():
            raise InputError("histories: indptr must not decrease")
        if len(items) and (items.min() < 0 or items.max() >= self.num_items):
            raise InputError(f"histories: items must lie in 0..{self.num_items - 1}, the public catalogue")
        if self.timestamps is not None and self.timestamps.shape != items.shape:
            raise InputError("histories: one timestamp per interaction, or none at all")

    @classmethod
    def from_rows(cls, rows: Sequence[npt.ArrayLike], num_items: int) -> Self:
        """Histories from one sequence of item positions per user."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        lengths = np.array([len(row) for row in arrays], dtype=np.int64)
        items = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), items, num_items)

    @classmethod
    def concatenate(cls, parts: Sequence["Histories"]) -> Self:
        """All users of ``parts``, in order; timestamps are kept where every part has them."""
        offsets = np.cumsum([0, *(len(part.items) for part in parts)])
        pointers = [part.indptr[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
        stamps = [part.timestamps for part in parts if part.timestamps is not None]
        return cls(
            np.concatenate([[0], *pointers]).astype(np.int64),
            np.concatenate([np.empty(0, np.int32), *(part.items for part in parts)]).astype(np.int32),
            parts[0].num_items,
            np.concatenate(stamps) if stamps and len(stamps) == len(parts) else None,
        )

    @property
    def num_users(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_interactions(self) -> int:
        return len(self.items)

    def lengths(self) -> IntArray:
        """Interactions per user, shape ``(num_users,)``."""
        return np.diff(self.indptr)

    def row(self, user: int) -> npt.NDArray[np.int32]:
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def select(self, users: npt.ArrayLike) -> "Histories":
        """The histories of ``users`` (positions or a boolean mask), in the order given."""
        chosen = np.asarray(users)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        lengths = self.lengths()[chosen]
        pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        where = np.repeat(self.indptr[chosen] - pointers[:-1], lengths) + np.arange(pointers[-1])
        return Histories(
            pointers,
            self.items[where],
            self.num_items,
            None if self.timestamps is None else self.timestamps[where],
        )

    def keep(self, mask: npt.NDArray[np.bool_]) -> "Histories":
        """The interactions where ``mask`` is true; every user stays, perhaps with an empty history."""
        kept = np.concatenate([[0], np.cumsum(mask)])[self.indptr]
        return Histories(
            kept.astype(np.int64),
            self.items[mask],
            self.num_items,
            None if self.timestamps is None else self.timestamps[mask],
        )

    def to_csr(self) -> sp.csr_matrix:
        """Binary float32 matrix of shape ``(num_users, num_items)``; a repeated item counts once."""
        ones = np.ones(len(self.items), dtype=np.float32)
        matrix = sp.csr_matrix((ones, self.items.copy(), self.indptr.copy()), shape=(self.num_users, self.num_items))
        matrix.sum_duplicates()
        matrix.data[:] = 1.0
        return matrix

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file; a crash leaves the old file or the new one, never half of one."""
        arrays = {"indptr": self.indptr, "items": self.items, "num_items": np.int64(self.num_items)}
        if self.timestamps is not None:
            arrays["timestamps"] = self.timestamps
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]  # the stub forgets arrays by name
        write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or is not one of ours.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                stamps = stored.get("timestamps")
                return cls(stored["indptr"], stored["items"], int(stored["num_items"]), stamps)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not a histories file ({error}). Prepare the run again.") from None
