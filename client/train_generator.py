"""Train the generator on an owner's users for one round; touch nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from shared.config import EngineName
from shared.data.histories import Histories
from shared.devices import choose_device
from shared.dpsgd.chance import Chance
from shared.dpsgd.engine import Users
from shared.dpsgd.engines import build_engine
from shared.dpsgd.sampling import draw_users
from shared.errors import InputError
from shared.generators.base import Weights
from shared.generators.family import GeneratorSpec, model_from
from shared.privacy.releases import DpSgdRelease, Release
from shared.wire.plan import RoundPlan


@dataclass(frozen=True, slots=True)
class TrainedRound:
    """The result of a round. ``weights`` are the release; everything else is private and stays at the owner.

    Args:
        release: what was executed, by Opacus' accountant; None without privacy.
        loss: mean over the rows of all batches, users and a GAN's fakes; no number where there was none.
        num_zeroed: rows that counted as zero because their loss or gradient was not finite, over all steps.
    """

    weights: Weights
    release: Release | None
    loss: float
    num_zeroed: int


def train_generator(
    weights: Weights,
    histories: Histories,
    spec: GeneratorSpec,
    plan: RoundPlan,
    *,
    noise_seed: int | None,
    owner: str,
    engine: EngineName = "bookkeeping",
    device: str = "cpu",
) -> TrainedRound:
    """Run the steps of ``plan`` from ``weights`` on the owner's users.

    Args:
        weights: all of the generator's, also those that stay at home; so are the trained ones.
        noise_seed: makes sampling, noise, dropout and latent draws repeatable, and so *not private*; None draws all of
            them from keys of the operating system.
        owner: names the owner's streams of chance.
        engine: how gradients are clipped by user; the result is the same up to rounding.
    Guarantee:
        With a release, every number in the result is covered by it. The same seed gives the same
        bits on one device, whatever else runs on the machine.
    Raises:
        InputError: the owner has more users than the public ``max_users``, weights do not fit, or training left the
            finite numbers, which takes a plan out of all proportion; nothing is released then.
    """
    with _one_thread():
        place = choose_device(device, key="dpsgd.device")
        model = model_from(spec, weights).to(place)
        model.train()
        trainer = _Trainer(
            model.private_part, plan, engine, chance=chance_for(noise_seed, owner, "noise", plan.server_round)
        )
        sampling = chance_for(noise_seed, owner, "sampling", plan.server_round)
        drawing = chance_for(noise_seed, owner, "latent", plan.server_round)
        apart = chance_for(noise_seed, owner, "apart-from-users", plan.server_round)
        encoded, losses = model.encode(histories), []
        for step in range(plan.num_steps):
            share_done = plan.share_done(step)
            drawn = draw_users(
                histories.num_users,
                sample_rate=plan.sample_rate,
                max_batch=plan.release.max_batch if plan.release else None,
                max_users=plan.max_users,
                chance=sampling,
            )
            users = encoded.batch(drawn).to(place)
            losses.append(trainer.step(users, partial(model.loss, share_done=share_done, chance=drawing)))
            model.after_step(learning_rate=plan.learning_rate, share_done=share_done, chance=apart)
        trained = {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items()}
    if not all(np.isfinite(value).all() for value in trained.values()):
        raise InputError(
            f"round {plan.server_round}: training left the finite numbers, so nothing was released."
            f" Lower federation.client_learning_rate (now {plan.learning_rate:g})."
        )
    counted = [values for values in losses if len(values)]
    loss = float(torch.cat(counted).mean()) if counted else float("nan")
    return TrainedRound(trained, trainer.executed(), loss, trainer.num_zeroed)


class _Trainer:
    """SGD steps, private where the plan has a release."""

    def __init__(self, model: nn.Module, plan: RoundPlan, engine: EngineName, *, chance: Chance) -> None:
        self._plan = plan
        self._received = [(p, p.detach().clone()) for p in model.parameters()] if plan.proximal_mu else []
        self._optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate)
        self._private = (
            build_engine(engine, model, self._optimizer, plan.release, max_grad_norm=plan.max_grad_norm, chance=chance)
            if plan.release is not None
            else None
        )

    def step(self, users: Users, losses: Callable[[Users], torch.Tensor]) -> torch.Tensor:
        if self._private is not None:
            return self._private.step(users, losses, after_noise=self._pull)
        self._optimizer.zero_grad()
        loss_per_user = losses(users)
        (loss_per_user.sum() / (self._plan.sample_rate * self._plan.max_users)).backward()  # type: ignore[no-untyped-call]
        self._pull()
        self._optimizer.step()
        return loss_per_user.detach()

    def executed(self) -> DpSgdRelease | None:
        return self._private.executed() if self._private is not None else None

    @property
    def num_zeroed(self) -> int:
        return self._private.num_zeroed if self._private is not None else 0

    def _pull(self) -> None:
        # FedProx (Li et al. 2020, arXiv:1812.06127): looks at weights alone, so it comes after the
        # noise and costs nothing.
        for parameter, received in self._received:
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - received, alpha=self._plan.proximal_mu)


def chance_for(seed: int | None, *names: str | int) -> Chance:
    """A stream of its own for ``names``; from a key of the operating system where there is no seed."""
    return Chance.secret() if seed is None else Chance.seeded(seed, *names)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Sums over several threads depend on how many there are; engines give clients different numbers.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
