"""Answer a server's requests within the owner's own policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from client.store.ledger import Charge, Ledger
from client.store.policy import Policy
from client.store.replies import load_reply, save_reply
from client.train_generator import TrainedRound, train_generator
from shared.data.histories import Histories
from shared.errors import BudgetExceeded, FedAugError, InputError, RefusedError
from shared.privacy.accounting import epsilon
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE, SEEDED_NOISE, NoiseKind
from shared.privacy.releases import DpSgdRelease
from shared.wire.messages import WIRE_VERSION, CatalogueMismatch, Hello, TrainJob, TrainReply


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A data owner as its folder describes it: ``train.npz``, ``policy.json``, ``ledger.sqlite``, ``replies/``.

    Args:
        simulated: the node was started by a simulation; only where the policy says so too are seeded noise and private
            figures allowed.
    """

    name: str
    directory: Path
    simulated: bool

    def hello(self) -> Hello:
        return Hello(
            owner=self.name,
            catalogue_hash=Policy.load(self.directory).catalogue_hash,
            versions={"wire": WIRE_VERSION, "flwr": version("flwr"), "torch": version("torch")},
            capabilities=("vae",),
        )

    def answer(self, job: TrainJob) -> TrainReply:
        """Train one round, charged first, or repeat the reply already given to the same request.

        Guarantee:
            Whatever leaves was on the ledger before training began. The same request is answered
            with the same bytes; where that reply is lost and its noise was secret, training
            again is another release and charged as one.
        Raises:
            RefusedError: the policy or the budget says no; nothing was charged.
            InputError: catalogue, data, ledger or disk are not as they must be.
        """
        policy = Policy.load(self.directory)
        self._refuse_what_policy_forbids(job, policy)
        histories = self._histories(job, policy)
        run_id, server_round = job.run_id, job.plan.server_round
        with Ledger(self.directory / "ledger.sqlite") as ledger:
            before = ledger.latest(run_id, server_round)
            if before is not None and before.job_digest != job.digest:
                raise RefusedError(
                    f"{self.name} was asked something else for round {server_round} of run {run_id!r} before. Answering"
                    " both would release more than was charged; start a new run."
                )
            if before is not None and before.status == "committed":
                kept = load_reply(self.directory, job)
                if kept is not None:
                    return kept
            # Charged before training: a crash may count a round nobody saw, but never miss one.
            # Repeating seeded noise repeats the release, which is on the ledger already.
            if before is None or before.noise == LOCAL_NOISE:
                charge = Charge(
                    run_id=run_id,
                    server_round=server_round,
                    release=job.plan.release,
                    job_digest=job.digest,
                    noise=_noise_of(job),
                )
                ledger.reserve(charge, allow=lambda releases: self._refuse_over_budget(releases, policy, server_round))
            trained = self._train(job, histories, policy)
            reply = self._reply(job, trained, histories)
            save_reply(self.directory, job, reply)
            ledger.commit(run_id, server_round, zeroed_users=trained.num_zeroed)
        return reply

    def _histories(self, job: TrainJob, policy: Policy) -> Histories:
        histories = Histories.load(self.directory / "train.npz")
        if histories.num_users > policy.max_users:
            raise RefusedError(
                f"{self.name} has more users than max_users={policy.max_users} of its own policy.json: raise it there,"
                " tell the server, and start a new run."
            )
        if histories.num_items != job.spec.num_items:
            raise InputError(
                f"{self.name} indexed its histories over {histories.num_items} items, the generator has"
                f" {job.spec.num_items}: index them again with the catalogue of this run."
            )
        return histories

    def _train(self, job: TrainJob, histories: Histories, policy: Policy) -> TrainedRound:
        trained = train_generator(
            job.weights,
            histories,
            job.spec,
            job.plan,
            noise_seed=job.noise_seed,
            owner=self.name,
            engine=policy.dpsgd_engine,
            device=policy.dpsgd_device,
        )
        if trained.release != job.plan.release:
            raise FedAugError(
                f"{self.name} charged {job.plan.release} for round {job.plan.server_round} but executed"
                f" {trained.release}. Nothing was released; report this as a bug."
            )
        return trained

    def _reply(self, job: TrainJob, trained: TrainedRound, histories: Histories) -> TrainReply:
        private = {
            "loss": trained.loss,
            "num_users": float(histories.num_users),
            "zeroed_users": float(trained.num_zeroed),
        }
        return TrainReply(
            owner=self.name,
            server_round=job.plan.server_round,
            weights=trained.weights,
            release=trained.release,
            simulation_only=private if self.simulated and job.collect_metrics else {},
        )

    def _refuse_what_policy_forbids(self, job: TrainJob, policy: Policy) -> None:
        if self.simulated and not policy.simulated:
            raise RefusedError(
                f"{self.name}'s policy.json is not a simulation's. Start a real owner's node with its owner and"
                " data-path."
            )
        if job.plan.max_users != policy.max_users:
            raise RefusedError(
                f"{self.name} declares max_users={policy.max_users}, the plan says {job.plan.max_users}. Plan with the"
                " owner's number."
            )
        if not self.simulated and job.noise_seed is not None:
            raise RefusedError(
                f"{self.name} refuses seeded noise: who knows the seed can subtract it. Seeds are for simulations;"
                " start the run without one."
            )
        if not self.simulated and job.collect_metrics:
            raise RefusedError(
                f"{self.name} keeps losses and user counts at home. Only a simulation may collect them; start the run"
                " without."
            )
        if job.plan.release is None and (policy.epsilon is not None or not self.simulated):
            raise RefusedError(
                f"{self.name} promised its users epsilon={policy.epsilon}, but round {job.plan.server_round} has no"
                " noise. Plan the rounds with a finite privacy.epsilon."
            )
        if policy.epsilon is None and not self.simulated:
            raise RefusedError(f"{self.name} has no epsilon in its policy.json; a deployed owner needs a ceiling.")
        if job.catalogue_hash != policy.catalogue_hash:
            raise CatalogueMismatch(self.name, server_hash=job.catalogue_hash, owner_hash=policy.catalogue_hash)

    def _refuse_over_budget(self, releases: Sequence[DpSgdRelease | None], policy: Policy, server_round: int) -> None:
        """Raise unless ``releases``, the last of them the one asked for, fit the policy."""
        if policy.epsilon is None:
            return
        total = spent(tuple(releases), policy.delta)
        if total > policy.epsilon:
            before = spent(tuple(releases[:-1]), policy.delta)
            raise BudgetExceeded(
                f"round {server_round} would bring {self.name} to epsilon={total:.3f} at delta={policy.delta:g}; it"
                f" promised {policy.epsilon:g} and has spent {before:.3f}. Keep the last generator and stop, or plan"
                " rounds with more noise."
            )


def _noise_of(job: TrainJob) -> NoiseKind:
    if job.plan.release is None:
        return NO_NOISE
    return LOCAL_NOISE if job.noise_seed is None else SEEDED_NOISE


@lru_cache(maxsize=256)
def spent(releases: tuple[DpSgdRelease | None, ...], delta: float) -> float:
    """Epsilon of a ledger's releases together; infinite where one had no noise."""
    if any(release is None for release in releases):
        return math.inf
    return epsilon([release for release in releases if release is not None], delta)
