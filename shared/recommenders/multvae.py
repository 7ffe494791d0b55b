"""Recommend by a variational autoencoder of whole histories, trained at home without privacy."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.base import Schedule, own_chance, synthetic_user_weight
from shared.recommenders.epochs import TrainedInEpochs, share_of_weight
from shared.rng import stream

_BATCH_USERS = 32  # owners have hundreds of users: larger batches leave too few steps
_DROPOUT = 0.5
_KL_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class MultVae(TrainedInEpochs):
    """Mult-VAE; a synthetic user's loss is multiplied by its weight.

    It sees real users and never leaves home, unlike the generator, which is another model.

    Args:
        hidden_size: width of the one hidden layer on each side; the latent has half of it.
        epochs: passes over the *real* users, whatever the weight.
    Reference:
        Liang et al. 2018, arXiv:1802.05814, with its KL weight of 0.2 reached half-way.
    """

    @property
    def name(self) -> str:
        return "multvae"

    def _train(
        self,
        real: Histories,
        synthetic: Histories | None,
        *,
        weight: float,
        schedule: Schedule,
        seed: int,
        stops: Sequence[int],
    ) -> list["FittedMultVae"]:
        user_weight = synthetic_user_weight(real, synthetic, weight)
        if real.num_interactions == 0:
            raise InputError("no real interactions to train on. Give this owner users or lower data.min_interactions.")
        rows = real.to_csr()
        others = synthetic.to_csr() if synthetic is not None and weight else None
        mass = 0.0 if others is None else user_weight * others.shape[0] / rows.shape[0]
        rng = stream(seed, "multvae", "batches")
        num_steps = self.epochs * -(-rows.shape[0] // _BATCH_USERS)
        fitted = []
        with own_chance(seed, "multvae", self.device):
            model = _Network(self.num_items, self.hidden_size).to(self.device)
            optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
            step = 0
            for epoch in range(1, stops[-1] + 1):
                order = rng.permutation(rows.shape[0])
                for start in range(0, len(order), _BATCH_USERS):
                    kl_weight = _KL_WEIGHT * min(1.0, 2 * step / num_steps)
                    batch = _dense(rows[order[start : start + _BATCH_USERS]], self.device)
                    loss = model.losses(batch, kl_weight).mean()
                    if others is not None:
                        # A fresh sample of synthetic users stands for all; more are drawn where they weigh more.
                        share = share_of_weight(schedule, step / num_steps) * mass
                        drawn = rng.integers(others.shape[0], size=_BATCH_USERS * max(1, round(share)))
                        loss = loss + share * model.losses(_dense(others[drawn], self.device), kl_weight).mean()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                if epoch in stops:
                    fitted.append(FittedMultVae(copy.deepcopy(model).eval(), self.device))
        return fitted


@dataclass(frozen=True, slots=True, eq=False)
class FittedMultVae:
    """A trained Mult-VAE."""

    model: "_Network"
    device: torch.device

    @torch.no_grad()
    def scores(self, fold_in: Histories) -> npt.NDArray[np.float32]:
        """Logits at the mean of each user's latent."""
        mean, _ = self.model.encode(_dense(fold_in.to_csr(), self.device))
        return np.asarray(self.model.decoder(mean).cpu().numpy(), dtype=np.float32)


class _Network(nn.Module):
    def __init__(self, num_items: int, hidden_size: int) -> None:
        super().__init__()
        latent_size = max(1, hidden_size // 2)
        self.encoder = nn.Sequential(
            nn.Linear(num_items, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 2 * latent_size)
        )
        self.decoder = nn.Sequential(nn.Linear(latent_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, num_items))
        self.dropout = nn.Dropout(_DROPOUT)

    def encode(self, histories: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(self.dropout(nn.functional.normalize(histories))).chunk(2, dim=1)
        return mean, log_variance

    def losses(self, histories: Tensor, kl_weight: float) -> Tensor:
        """Negative evidence bound with the KL term weighted, shape ``(num_users,)``."""
        mean, log_variance = self.encode(histories)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        likelihood = (nn.functional.log_softmax(self.decoder(latent), dim=1) * histories).sum(dim=1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
        return kl_weight * divergence - likelihood


def _dense(rows: sp.csr_matrix, device: torch.device) -> Tensor:
    return torch.from_numpy(rows.toarray()).to(device)
