"""Recommend the next item of a sequence with Cornac's SASRec."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from cornac.data import SequentialDataset
from cornac.models import SASRec

from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.base import own_chance, synthetic_user_weight
from shared.rng import stream

_MAX_LENGTH = 50
_BATCH_USERS = 256


@dataclass(frozen=True, slots=True)
class SasRec:
    """Self-attention over the newest items of a history, in the order given.

    Cornac's trainer takes no weights, so synthetic users are sampled until their interactions are ``weight`` times
    the real ones, each at most once more than any other. Items of a synthetic history have the order in which they
    were drawn, which is no order in time.

    Args:
        hidden_size: of the item embedding.
        epochs: passes over real and sampled synthetic users.
    Reference:
        Kang & McAuley 2018, arXiv:1808.09781; sampled softmax after Klenitskiy & Vasilev 2023, arXiv:2309.07602.
    """

    num_items: int
    hidden_size: int
    epochs: int
    learning_rate: float
    device: torch.device

    @property
    def name(self) -> str:
        return "sasrec"

    def variants(self) -> tuple[Self, ...]:
        return (self,)

    def fit(
        self, real: Histories, synthetic: Histories | None = None, *, weight: float = 0.0, seed: int
    ) -> "FittedSasRec":
        synthetic_user_weight(real, synthetic, weight)  # refuses what cannot be trained on
        users = real
        if synthetic is not None and weight:
            mass = weight * real.num_interactions
            drawn = sample_users(synthetic, mass, rng=stream(seed, "sasrec", "synthetic"))
            users = Histories.concatenate([real, synthetic.select(drawn)])
        if not (users.lengths() >= 2).any():
            raise InputError(
                "no history has two items, so there is no next item to learn. Use another recommender.kind."
            )
        length = int(min(users.lengths().max(), _MAX_LENGTH))
        model = SASRec(
            embedding_dim=self.hidden_size,
            loss="ce",
            max_len=length,
            n_epochs=self.epochs,
            learning_rate=self.learning_rate,
            device=str(self.device),
            seed=stream(seed, "sasrec", "model").integers(2**31),
        )
        with own_chance(seed, "sasrec", self.device):
            model.fit(_sessions(users))
        return FittedSasRec(model.model.eval(), self.num_items, length, self.device)


@dataclass(frozen=True, slots=True, eq=False)
class FittedSasRec:
    """A trained SASRec."""

    network: Any
    num_items: int
    max_length: int
    device: torch.device

    def scores(self, fold_in: Histories) -> npt.NDArray[np.float32]:
        """Scores of the item that follows each history; all alike where the history is empty."""
        scores = np.zeros((fold_in.num_users, self.num_items), dtype=np.float32)
        known = np.flatnonzero(fold_in.lengths())
        padded = _newest(fold_in, self.max_length, padding=self.num_items)
        for start in range(0, len(known), _BATCH_USERS):
            users = known[start : start + _BATCH_USERS]
            batch = torch.from_numpy(padded[users]).to(self.device)
            scores[users] = self.network.predict(None, batch).reshape(len(users), self.num_items)
        return scores


def sample_users(histories: Histories, mass: float, *, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Users whose interactions add up to ``mass``, as nearly as whole users can; everyone once before anyone twice."""
    passes = int(mass // histories.num_interactions) + 1
    order = np.concatenate([rng.permutation(histories.num_users) for _ in range(passes)])
    total = np.cumsum(histories.lengths()[order])
    # A user is in if half of it or more fits.
    before = np.concatenate([[0], total[:-1]])
    chosen: npt.NDArray[np.int64] = order[(total + before) / 2 <= mass]
    return chosen


def _sessions(users: Histories) -> SequentialDataset:
    owner = np.repeat(np.arange(users.num_users), users.lengths())
    catalogue = OrderedDict((item, item) for item in range(users.num_items))
    everyone = OrderedDict((user, user) for user in range(users.num_users))
    return SequentialDataset(
        num_users=users.num_users,
        num_sessions=len(np.unique(owner)),
        num_items=users.num_items,
        uid_map=everyone,
        sid_map=everyone,
        iid_map=catalogue,
        uir_tuple=(owner, users.items.astype(np.int64), np.ones(len(owner))),
        session_indices=owner,
    )


def _newest(histories: Histories, length: int, *, padding: int) -> npt.NDArray[np.int64]:
    padded = np.full((histories.num_users, length), padding, dtype=np.int64)
    for user in range(histories.num_users):
        items = histories.row(user)[-length:]
        padded[user, length - len(items) :] = items
    return padded
