"""Train the generator on an owner's users for one round; touch nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from shared.data.histories import Histories
from shared.dpsgd.ghost import GhostDpSgd
from shared.errors import FedAugError, InputError
from shared.generators.multvae import GeneratorSpec, MultVAE, Weights, kl_weight_at, model_from
from shared.rng import stream, torch_stream
from shared.wire.plan import RoundPlan


@dataclass(frozen=True, slots=True)
class TrainedRound:
    """The result of a round. ``weights`` are the release; ``loss`` is private and stays at the owner."""

    weights: Weights
    loss: float


def train_generator(
    weights: Weights,
    histories: Histories,
    spec: GeneratorSpec,
    plan: RoundPlan,
    *,
    noise_seed: int | None,
    owner: str,
) -> TrainedRound:
    """Run the steps of ``plan`` from ``weights`` on the owner's users.

    Args:
        noise_seed: makes sampling and noise repeatable, and so *not private*; None draws both from
            the operating system's entropy.
        owner: names the owner's streams of chance.
    Guarantee:
        With a release, every number in the result is covered by it. The same seed gives the same
        bits, whatever else runs on the machine.
    Raises:
        InputError: the owner has more users than the public ``max_users``, or weights do not fit.
        FedAugError: training left the finite numbers; nothing may be released.
    """
    if histories.num_users > plan.max_users:
        raise InputError(
            f"this owner holds more users than the public bound max_users={plan.max_users}: its normaliser"
            " would no longer cover them. Declare a larger privacy.max_users."
        )
    with _one_thread():
        model = model_from(spec, weights)
        trainer = _Trainer(model, plan, noise=_torch_generator(noise_seed, owner, "noise", plan.server_round))
        sampling = (
            np.random.default_rng() if noise_seed is None else stream(noise_seed, owner, "sampling", plan.server_round)
        )
        drawing = _torch_generator(noise_seed, owner, "latent", plan.server_round)
        matrix, losses = histories.to_csr(), []
        for step in range(plan.num_steps):
            done = (plan.server_round - 1) * plan.num_steps + step
            kl_weight = kl_weight_at(spec, share_done=done / (plan.num_rounds * plan.num_steps))
            loss = model.loss(_draw(matrix, plan.sample_rate, sampling), kl_weight=kl_weight, generator=drawing)
            trainer.step(loss)
            losses.append(loss.detach())
        trained = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    if not all(np.isfinite(value).all() for value in trained.values()):
        raise FedAugError(
            f"round {plan.server_round}: training left the finite numbers, so nothing was released."
            f" Lower federation.client_learning_rate (now {plan.learning_rate:g})."
        )
    return TrainedRound(trained, float(torch.cat(losses).mean()) if sum(map(len, losses)) else float("nan"))


class _Trainer:
    """SGD steps, private where the plan has a release."""

    def __init__(self, model: MultVAE, plan: RoundPlan, *, noise: torch.Generator) -> None:
        self._plan = plan
        self._received = [(p, p.detach().clone()) for p in model.parameters()] if plan.proximal_mu else []
        self._optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate)
        self._private = (
            GhostDpSgd(model, self._optimizer, plan.release, max_grad_norm=plan.max_grad_norm, noise=noise)
            if plan.release is not None
            else None
        )

    def step(self, loss_per_user: torch.Tensor) -> None:
        if self._private is not None:
            self._private.step(loss_per_user, after_noise=self._pull)
            return
        self._optimizer.zero_grad()
        (loss_per_user.sum() / (self._plan.sample_rate * self._plan.max_users)).backward()  # type: ignore[no-untyped-call]
        self._pull()
        self._optimizer.step()

    def _pull(self) -> None:
        # FedProx (Li et al. 2020, arXiv:1812.06127): looks at weights alone, so it comes after the
        # noise and costs nothing.
        for parameter, received in self._received:
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - received, alpha=self._plan.proximal_mu)


def _draw(matrix: sp.csr_matrix, sample_rate: float, rng: np.random.Generator) -> torch.Tensor:
    chosen = np.flatnonzero(rng.random(matrix.shape[0]) < sample_rate)
    return torch.from_numpy(matrix[chosen].toarray())


def _torch_generator(seed: int | None, *names: str | int) -> torch.Generator:
    if seed is not None:
        return torch_stream(seed, *names)
    generator = torch.Generator()
    generator.seed()  # from the operating system, a new one each time
    return generator


@contextmanager
def _one_thread() -> Iterator[None]:
    # Sums over several threads depend on how many there are; engines give clients different numbers.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
