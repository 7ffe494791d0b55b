"""A batch of users as sparse sets of items."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bags:
    """One set of items per user, in compressed rows.

    Args:
        items: item positions of all users one after the other, int64, shape ``(num_entries,)``; strictly increasing
            within a user.
        starts: where each user begins in ``items``, int64, shape ``(num_users,)``.
    """

    items: Tensor
    starts: Tensor

    @classmethod
    def from_rows(cls, matrix: sp.csr_matrix, rows: npt.NDArray[np.int64]) -> Self:
        """The users at ``rows`` of a matrix of shape ``(all_users, num_items)`` whose stored entries are the items."""
        first, last = matrix.indptr[rows], matrix.indptr[rows + 1]
        lengths = (last - first).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        entries = np.repeat(first - starts, lengths) + np.arange(lengths.sum())
        return cls(torch.from_numpy(matrix.indices[entries].astype(np.int64)), torch.from_numpy(starts))

    @classmethod
    def from_dense(cls, multi_hot: Tensor) -> Self:
        """The users of a matrix of shape ``(num_users, num_items)``, their items where it is not zero."""
        users, items = torch.nonzero(multi_hot, as_tuple=True)
        lengths = torch.bincount(users, minlength=len(multi_hot))
        return cls(items, lengths.cumsum(0) - lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, kept: Tensor) -> Self:
        """The users where ``kept``, bool of shape ``(num_users,)``, is true."""
        lengths = self.lengths[kept]
        return type(self)(self.items[kept[self.users]], lengths.cumsum(0) - lengths)

    @property
    def lengths(self) -> Tensor:
        """Items of each user, int64, shape ``(num_users,)``."""
        return lengths_of(self.starts, len(self.items))

    @property
    def users(self) -> Tensor:
        """The user of each entry of ``items``, int64, shape ``(num_entries,)``."""
        return users_of(self.starts, len(self.items))

    def to(self, device: torch.device) -> Self:
        return type(self)(self.items.to(device, non_blocking=True), self.starts.to(device, non_blocking=True))


def lengths_of(starts: Tensor, num_entries: int) -> Tensor:
    """Entries of each user, given where each begins."""
    return torch.diff(starts, append=starts.new_full((1,), num_entries))


def users_of(starts: Tensor, num_entries: int) -> Tensor:
    """The user of each entry, given where each user begins."""
    users = torch.arange(len(starts), device=starts.device)
    return torch.repeat_interleave(users, lengths_of(starts, num_entries), output_size=num_entries)
