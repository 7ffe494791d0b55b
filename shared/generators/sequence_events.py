"""Users as padded sequences of events, the form that sequence generators train on."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Events:
    """A batch of users, one sequence each, oldest event first; what lies behind a user's last event is padding.

    Args:
        items: int64, shape ``(num_users, num_places)``; 0 in the padding.
        behaviours: codes, int64, the same shape; 0 in the padding.
        gaps: bucket of the time since the event before, the same shape; -1 where it is not known and in the padding.
        lengths: events of each user, int64, shape ``(num_users,)``.
    """

    items: Tensor
    behaviours: Tensor
    gaps: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, kept: Tensor) -> Self:
        """The users where ``kept``, bool of shape ``(num_users,)``, is true."""
        return type(self)(self.items[kept], self.behaviours[kept], self.gaps[kept], self.lengths[kept])

    @property
    def inside(self) -> Tensor:
        """Which places are events, bool of shape ``(num_users, num_places)``."""
        return torch.arange(self.items.shape[1], device=self.items.device) < self.lengths[:, None]

    def window(self, size: int, chance: Chance) -> Self:
        """Up to ``size`` events of each user in a row, from a place drawn for each; all where there are no more.

        What came before a window is not known in it, nor the time since. It is ``size`` places wide whoever is in the
        batch: neither sums nor memory depend on how long others' histories are.
        """
        spare = (self.lengths - size).clamp(min=0)
        share = torch.from_numpy(chance.uniform(len(self))).to(self.items.device)
        first = (share * (spare + 1)).long().minimum(spare)
        places = first[:, None] + torch.arange(size, device=self.items.device)
        lengths = self.lengths.clamp(max=size)
        beyond = torch.arange(size, device=self.items.device) >= lengths[:, None]
        places = places.clamp(max=self.items.shape[1] - 1)
        items, behaviours, gaps = (part.gather(1, places) for part in (self.items, self.behaviours, self.gaps))
        gaps[:, 0] = -1
        return type(self)(
            items.masked_fill(beyond, 0), behaviours.masked_fill(beyond, 0), gaps.masked_fill(beyond, -1), lengths
        )

    def to(self, device: torch.device) -> Self:
        parts = (self.items, self.behaviours, self.gaps, self.lengths)
        return type(self)(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True, slots=True, eq=False)
class EncodedEvents:
    """An owner's users, and the bucket of the time before each interaction, or -1."""

    histories: Histories
    gaps: IntArray

    def batch(self, drawn: IntArray) -> Events:
        """The users at ``drawn``, as wide as the longest of them."""
        lengths = self.histories.lengths()[drawn]
        places = np.arange(max(1, lengths.max(initial=0)))
        inside = places < lengths[:, None]
        where = (self.histories.indptr[:-1][drawn][:, None] + places)[inside]

        def padded(values: npt.NDArray[np.integer], padding: int) -> Tensor:
            rows = np.full(inside.shape, padding, dtype=np.int64)
            rows[inside] = values[where]
            return torch.from_numpy(rows)

        codes = self.histories.behaviours
        return Events(
            padded(self.histories.items, 0),
            torch.zeros(inside.shape, dtype=torch.int64) if codes is None else padded(codes, 0),
            padded(self.gaps, -1),
            torch.from_numpy(lengths),
        )
