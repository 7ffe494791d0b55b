"""Build an engine by its name."""

import torch
from torch import nn

from shared.config import EngineName
from shared.dpsgd.bookkeeping import BookKeepingDpSgd
from shared.dpsgd.chance import Chance
from shared.dpsgd.engine import DpSgd
from shared.dpsgd.opacus_engines import GhostDpSgd, HooksDpSgd
from shared.privacy.releases import DpSgdRelease

ENGINES: dict[EngineName, type[DpSgd]] = {
    "bookkeeping": BookKeepingDpSgd,
    "ghost": GhostDpSgd,
    "hooks": HooksDpSgd,
}


def build_engine(
    name: EngineName,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    release: DpSgdRelease,
    *,
    max_grad_norm: float,
    chance: Chance,
) -> DpSgd:
    """The engine called ``name``; all give the same sums and, from the same chance, the same noise."""
    return ENGINES[name](module, optimizer, release, max_grad_norm=max_grad_norm, chance=chance)
