"""Users' item histories in compressed sparse rows, the one form in which models see data."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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
        behaviours: shape ``(num_interactions,)``, int8 codes into a public list of names that is kept elsewhere, or
            None where there is only one way to interact.
    Raises:
        InputError: the arrays do not describe histories inside the catalogue.
    """

    indptr: IntArray
    items: npt.NDArray[np.int32]
    num_items: int
    timestamps: IntArray | None = None
    behaviours: npt.NDArray[np.int8] | None = None

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
        codes = self.behaviours
        if codes is not None and (codes.shape != items.shape or codes.dtype != np.int8 or (codes < 0).any()):
            raise InputError("histories: one behaviour code per interaction, int8 from 0, or none at all")

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[npt.ArrayLike],
        num_items: int,
        *,
        timestamps: Sequence[npt.ArrayLike] | None = None,
        behaviours: Sequence[npt.ArrayLike] | None = None,
    ) -> Self:
        """Histories from one sequence of item positions per user, and such sequences of what else is known."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        lengths = np.array([len(row) for row in arrays], dtype=np.int64)
        return cls(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([np.empty(0, np.int32), *arrays]),
            num_items,
            None if timestamps is None else np.concatenate([np.empty(0, np.int64), *timestamps]).astype(np.int64),
            None if behaviours is None else np.concatenate([np.empty(0, np.int8), *behaviours]).astype(np.int8),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Histories"]) -> Self:
        """All users of ``parts``, in order; timestamps and behaviours are kept where every part has them."""
        offsets = np.cumsum([0, *(len(part.items) for part in parts)])
        pointers = [part.indptr[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
        stamps = [part.timestamps for part in parts if part.timestamps is not None]
        codes = [part.behaviours for part in parts if part.behaviours is not None]
        return cls(
            np.concatenate([[0], *pointers]).astype(np.int64),
            np.concatenate([np.empty(0, np.int32), *(part.items for part in parts)]).astype(np.int32),
            parts[0].num_items,
            np.concatenate(stamps) if stamps and len(stamps) == len(parts) else None,
            np.concatenate(codes) if codes and len(codes) == len(parts) else None,
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
        return self._taken(pointers, where)

    def keep(self, mask: npt.NDArray[np.bool_]) -> "Histories":
        """The interactions where ``mask`` is true; every user stays, perhaps with an empty history."""
        kept = np.concatenate([[0], np.cumsum(mask)])[self.indptr]
        return self._taken(kept.astype(np.int64), mask)

    def places(self) -> IntArray:
        """Each interaction's place in its user's history, from 0, shape ``(num_interactions,)``."""
        return np.arange(self.num_interactions) - np.repeat(self.indptr[:-1], self.lengths())

    def newest(self, count: int) -> "Histories":
        """The last ``count`` interactions of each user; every user stays."""
        return self.keep(np.repeat(self.indptr[1:], self.lengths()) - np.arange(self.num_interactions) <= count)

    def gap_buckets(self, edges: Sequence[int]) -> IntArray:
        """The bucket of the time since the user's interaction before, shape ``(num_interactions,)``.

        Bucket ``k`` holds gaps from ``edges[k - 1]`` (from 0 for the first) to below ``edges[k]``, in seconds, and the
        last one all longer gaps too. It is -1 where there is no gap: at a user's first interaction, without timestamps,
        and without edges.
        """
        buckets = np.full(self.num_interactions, -1, dtype=np.int64)
        if self.timestamps is None or not edges or not self.num_interactions:
            return buckets
        later = np.ones(self.num_interactions, dtype=bool)
        later[self.indptr[:-1][self.lengths() > 0]] = False
        gaps = np.diff(self.timestamps, prepend=self.timestamps[0])[later]
        buckets[later] = np.minimum(np.searchsorted(np.array(edges), gaps, side="right"), len(edges) - 1)
        return buckets

    def _taken(self, indptr: IntArray, where: npt.NDArray[Any]) -> "Histories":
        """Rows at ``indptr`` of the interactions at ``where``, positions or a mask, with all that is known of each."""
        return Histories(
            indptr,
            self.items[where],
            self.num_items,
            None if self.timestamps is None else self.timestamps[where],
            None if self.behaviours is None else self.behaviours[where],
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
        if self.behaviours is not None:
            arrays["behaviours"] = self.behaviours
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
                return cls(
                    stored["indptr"],
                    stored["items"],
                    int(stored["num_items"]),
                    stored.get("timestamps"),
                    stored.get("behaviours"),
                )
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not a histories file ({error}). Prepare the run again.") from None
