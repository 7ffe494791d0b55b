"""Recommend the next item of a sequence with Cornac's SASRec."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cornac.data import SequentialDataset
from cornac.models.sasrec.sasrec import SASRecModel
from cornac.models.seq_utils import session_seq_iter
from cornac.models.seq_utils.losses import ce_loss

from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.base import Schedule, own_chance, synthetic_user_weight
from shared.recommenders.epochs import TrainedInEpochs, share_of_weight
from shared.rng import stream

_MAX_LENGTH = 50
_BATCH_USERS = 256

# As in Cornac's own trainer, which takes no weights and keeps no model but the last.
_BATCH_PREFIXES = 512
_NEGATIVES, _NEGATIVES_EXPONENT = 2048, 0.5
_BETAS = (0.9, 0.98)


@dataclass(frozen=True, slots=True)
class SasRec(TrainedInEpochs):
    """Self-attention over the newest items of a history, in the order given.

    Every epoch samples synthetic users anew until their interactions are ``weight`` times the real ones, each at most
    once more than any other. Items of a synthetic history have the order in which they were drawn, which is no order
    in time.

    Args:
        hidden_size: of the item embedding.
        epochs: passes over real and sampled synthetic users.
    Reference:
        Kang & McAuley 2018, arXiv:1808.09781; sampled softmax after Klenitskiy & Vasilev 2023, arXiv:2309.07602.
    """

    @property
    def name(self) -> str:
        return "sasrec"

    def _train(
        self,
        real: Histories,
        synthetic: Histories | None,
        *,
        weight: float,
        schedule: Schedule,
        seed: int,
        stops: Sequence[int],
    ) -> list["FittedSasRec"]:
        synthetic_user_weight(real, synthetic, weight)  # refuses what cannot be trained on
        everyone = [real] if synthetic is None or not weight else [real, synthetic]
        longest = max(int(users.lengths().max(initial=0)) for users in everyone)
        if real.num_interactions == 0 or longest < 2:
            raise InputError(
                "no history has two items, so there is no next item to learn. Use another recommender.kind."
            )
        length = min(longest, _MAX_LENGTH)
        chosen, batches = stream(seed, "sasrec", "synthetic"), stream(seed, "sasrec", "batches")
        fitted = []
        with own_chance(seed, "sasrec", self.device):
            network = SASRecModel(self.num_items, self.hidden_size, length, use_biases=False, device=str(self.device))
            optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate, betas=_BETAS)
            for epoch in range(stops[-1]):
                users = real
                if synthetic is not None and weight:
                    mass = share_of_weight(schedule, epoch / self.epochs) * weight * real.num_interactions
                    users = Histories.concatenate([real, synthetic.select(sample_users(synthetic, mass, rng=chosen))])
                self._train_epoch(network, optimizer, users, length, batches)
                if epoch + 1 in stops:
                    kept = copy.deepcopy(network).eval()
                    fitted.append(FittedSasRec(kept, self.num_items, length, self.device))
        return fitted

    def _train_epoch(
        self,
        network: Any,
        optimizer: torch.optim.Optimizer,
        users: Histories,
        length: int,
        rng: np.random.Generator,
    ) -> None:
        for _, histories, items in session_seq_iter(
            _sessions(users), self.num_items, _BATCH_PREFIXES, length, _NEGATIVES, _NEGATIVES_EXPONENT, rng
        ):
            shown, wanted = torch.from_numpy(histories).to(self.device), torch.from_numpy(items).to(self.device)
            # A history's own next item is in its own column; the others are other histories' or drawn by popularity.
            ce_loss(network(None, shown, wanted)).backward()
            optimizer.step()
            optimizer.zero_grad()


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
