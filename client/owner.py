"""Answer a server's requests within the owner's own policy."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from client.approvals import Proposal, require_approval
from client.data import digest_of, training_histories
from client.egress import check_egress
from client.policy import Policy
from client.rules import Refusal, Spending, check_budget, check_request, shown
from client.security_log import SecurityLog, described
from client.state import KEY, LEDGER
from client.store.home_weights import load_home_weights, save_home_weights
from client.store.keys import OwnerKey
from client.store.lifetime import Charged, LifetimeLedger
from client.store.lock import agent_lock
from client.store.replies import load_reply, save_reply
from client.train_generator import TrainedRound, chance_for, train_generator
from shared.code import code_hash, versions
from shared.data.histories import Histories
from shared.errors import FedAugError, RefusedError
from shared.generators.base import Weights
from shared.generators.family import weight_shapes
from shared.privacy.chain import Charge
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE, SEEDED_NOISE, NoiseKind
from shared.privacy.planning import affordable_rounds, least_noise
from shared.privacy.releases import DpSgdRelease, Release
from shared.privacy.running import RunningCost
from shared.sketch.statistic import compute_sketch
from shared.wire.arrays import HEAD
from shared.wire.messages import WIRE_VERSION, Hello, TrainJob, TrainReply
from shared.wire.plan import RoundPlan

# How long a second agent of the same data waits for the first to answer before it refuses.
_WAIT_SECONDS = 600.0

Counts = tuple[tuple[Release | None, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A data owner as its folder describes it: ``train.npz``, ``policy.toml``, ``ledger.sqlite``, ``owner.key``.

    Args:
        simulated: the node was started by a simulation; only where the policy says so too are seeded noise and private
            figures allowed.
    """

    name: str
    directory: Path
    simulated: bool

    def hello(self) -> Hello:
        policy = Policy.load(self.directory)
        return Hello(
            owner=self.name,
            catalogue_hash=policy.catalogue_hash,
            versions={"wire": WIRE_VERSION, "flwr": version("flwr"), "torch": version("torch")},
            capabilities=policy.allowed.generators,
        )

    def record(self, job: TrainJob) -> RecordDict:
        """:meth:`answer`, checked on its way out: exactly what leaves the owner.

        Raises:
            FedAugError: the request was refused, or the reply holds what was not declared; nothing leaves then.
        """
        log = SecurityLog(self.directory)
        where = {"run": shown(job.run_id), "server_round": job.plan.server_round}
        log.write("message", **where, job=job.digest, num_bytes=sum(v.nbytes for v in job.weights.values()))
        try:
            reply = self.answer(job)
            record = check_egress(reply, job, owner=self.name, simulated=self.simulated)
        except Refusal as refusal:
            log.write(
                "decision",
                **where,
                decision="refused",
                rule=refusal.rule,
                asked=refusal.asked,
                allowed=refusal.allowed,
            )
            raise
        except FedAugError as error:
            log.write("decision", **where, decision="refused", rule=type(error).__name__)
            raise
        except Exception as error:
            log.write("error", **where, decision="failed", kind=type(error).__name__)
            raise
        log.write("release", **where, entry=reply.receipt.number if reply.receipt else 0, **described(reply.weights))
        return record

    def answer(self, job: TrainJob) -> TrainReply:
        """Train one round, charged first, or repeat the reply already given to the same request.

        Guarantee:
            Whatever leaves was on the ledger before training began. The same request is answered
            with the same bytes; where that reply is lost and its noise was secret, training
            again is another release and charged as one. No rule looks at the data.
        Raises:
            RefusedError: the policy or the budget says no; nothing was charged.
            InputError: catalogue, data, ledger or disk are not as they must be.
        """
        with agent_lock(self.directory, timeout_seconds=_WAIT_SECONDS):
            policy = Policy.load(self.directory)
            check_request(
                job,
                policy,
                today=datetime.now(UTC).date(),
                code_hash=code_hash(),
                num_owners=job.plan.num_owners,
                simulated=self.simulated,
            )
            key = OwnerKey.load(self.directory / KEY)
            with LifetimeLedger(self.directory / LEDGER, key=key, data_source=policy.data_source) as ledger:
                return self._answer(job, policy, key, ledger)

    def _answer(self, job: TrainJob, policy: Policy, key: OwnerKey, ledger: LifetimeLedger) -> TrainReply:
        run_id, server_round = job.run_id, job.plan.server_round
        before = ledger.latest(run_id, server_round)
        if before is not None and before.reserve.job_digest != job.digest:
            raise RefusedError(
                f"{self.name} was asked something else for round {server_round} of run {shown(run_id)} before."
                " Answering both would release more than was charged; start a new run."
            )
        if before is not None and before.commit is not None:
            kept = load_reply(self.directory, job)
            if kept is not None:
                return kept if kept.receipt else self._keep(job, replace(kept, receipt=ledger.receipt()))
        histories = training_histories(self.directory, policy, num_items=job.spec.num_items)
        self._require_approval(job, policy, ledger)
        home = self._home_weights(job)
        number = self._charge(job, policy, key, ledger, histories, before)
        trained = self._train(job, histories, policy, home)
        reply = self._reply(job, trained, histories)
        self._keep(job, reply)
        receipt = ledger.commit(
            number,
            executed=trained.release,
            zeroed_users=trained.num_zeroed,
            reply_digest=_digest(reply),
        )
        return self._keep(job, replace(reply, receipt=receipt))

    def _home_weights(self, job: TrainJob) -> Weights:
        """What this owner keeps of the generator, read before anything is charged for."""
        if job.plan.sketch is not None:
            return {}
        first_round = len(job.plan.sketches) + 1
        before = job.plan.server_round
        return load_home_weights(self.directory, job.run_id, job.spec, before_round=before, first_round=first_round)

    def _charge(
        self,
        job: TrainJob,
        policy: Policy,
        key: OwnerKey,
        ledger: LifetimeLedger,
        histories: Histories,
        before: Charged | None,
    ) -> int:
        """Reserve the release, fsynced: a crash may charge a round nobody saw, but never miss one."""
        if before is not None and before.reserve.noise != LOCAL_NOISE:
            return before.number  # repeating seeded noise repeats the release, which is on the ledger already
        charge = Charge(
            run_id=job.run_id,
            server_round=job.plan.server_round,
            release=job.plan.round_release,
            noise=_noise_of(job),
            job_digest=job.digest,
            policy_hash=policy.digest,
            code_hash=code_hash(),
            versions=versions(),
            fingerprint=key.fingerprint_of(digest_of(histories)),
        )
        return ledger.reserve(charge, allow=partial(_refuse_over_budget, job, policy, ledger))

    def _require_approval(self, job: TrainJob, policy: Policy, ledger: LifetimeLedger) -> None:
        if policy.simulated:
            return
        delta = policy.ceilings.delta
        proposal = Proposal.of(
            job,
            now=datetime.now(UTC),
            delta=delta,
            # What was charged, not what this request says of earlier rounds: terms may change on the way.
            epsilon_of_run=_epsilon(
                tuple((release, 1) for release in ledger.releases_of(job.run_id)), job.plan.rest_of_run, delta
            ),
            epsilon_after=_epsilon(tuple(ledger.spent().items()), job.plan.rest_of_run, delta),
        )
        require_approval(self.directory, proposal, policy)

    def _train(self, job: TrainJob, histories: Histories, policy: Policy, home: Weights) -> TrainedRound:
        if job.plan.sketch is not None:
            return self._sketch(job, histories)
        trained = train_generator(
            {name: {**job.weights, **home}[name] for name in weight_shapes(job.spec)},
            histories,
            job.spec,
            job.plan,
            noise_seed=job.noise_seed,
            owner=self.name,
            engine=policy.dpsgd.engine,
            device=policy.dpsgd.device,
        )
        if trained.release != job.plan.release:
            raise FedAugError(
                f"{self.name} charged {job.plan.release} for round {job.plan.server_round} but executed"
                f" {trained.release}. Nothing was released; report this as a bug."
            )
        if home:
            save_home_weights(
                self.directory,
                job.run_id,
                {name: trained.weights[name] for name in home},
                server_round=job.plan.server_round,
            )
            return replace(trained, weights={name: trained.weights[name] for name in job.weights})
        return trained

    def _sketch(self, job: TrainJob, histories: Histories) -> TrainedRound:
        terms = job.plan.sketch
        assert terms is not None
        statistic = compute_sketch(
            histories,
            terms,
            head=np.flatnonzero(job.weights[HEAD]) if HEAD in job.weights else None,
            chance=chance_for(job.noise_seed, self.name, "sketch", job.plan.server_round),
        )
        return TrainedRound(statistic, terms.release, float("nan"), 0)

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
            receipt=None,
            simulation_only=private if self.simulated and job.collect_metrics else {},
        )

    def _keep(self, job: TrainJob, reply: TrainReply) -> TrainReply:
        save_reply(self.directory, job, reply)
        return reply


def _refuse_over_budget(
    job: TrainJob, policy: Policy, ledger: LifetimeLedger, spent: Mapping[Release | None, int]
) -> None:
    """Raise unless what is spent, this round and the rounds still to come fit the policy: a run that cannot end within
    the budget is refused before it trains anything.
    """
    rest, ceilings = job.plan.rest_of_run, policy.ceilings
    life: Counts = tuple(spent.items())
    run: Counts = ()
    if ceilings.epsilon_per_run is not None:
        run = tuple((release, 1) for release in ledger.releases_of(job.run_id))
    if ceilings.epsilon is None and ceilings.epsilon_per_run is None:
        return

    def spending(counts: Counts) -> Spending:
        before, after = (_epsilon(counts, more, ceilings.delta) for more in ((), rest))
        return Spending(before=before, after=after)

    check_budget(
        policy,
        life=spending(life),
        run=spending(run),
        alternative=lambda: _alternative(job.plan, policy, _cost(life)),
    )


def _alternative(plan: RoundPlan, policy: Policy, spent: RunningCost) -> str | None:
    """What would still fit below the ceiling for life, in words."""
    ceiling, release, rest = policy.ceilings.epsilon, plan.release, plan.rest_of_run[-1]
    if plan.sketch is not None:
        return "More noise in the sketch: a smaller privacy.epsilon or privacy.sketch_share may fit"
    if ceiling is None or release is None or not isinstance(rest, DpSgdRelease):
        return None
    to_come = plan.rounds_to_come
    more = affordable_rounds(spent, release, delta=policy.ceilings.delta, ceiling=ceiling, most=to_come)
    noisier = least_noise(spent, rest, delta=policy.ceilings.delta, ceiling=ceiling)
    with_noise = f", or all with noise_multiplier {noisier.noise_multiplier:.4g}" if noisier is not None else ""
    return f"Of the {to_come} round(s) to come, {more} would fit{with_noise}"


@lru_cache(maxsize=256)  # simulated owners spend alike
def _epsilon(counts: Counts, more: tuple[Release | None, ...], delta: float) -> float:
    return _cost(counts).epsilon_with(more, delta)


@lru_cache(maxsize=8)
def _cost(counts: Counts) -> RunningCost:
    cost = RunningCost()
    for release, count in counts:
        cost.add(release, times=count)
    return cost


def _noise_of(job: TrainJob) -> NoiseKind:
    if job.plan.round_release is None:
        return NO_NOISE
    return LOCAL_NOISE if job.noise_seed is None else SEEDED_NOISE


def _digest(reply: TrainReply) -> str:
    content = hashlib.sha256()
    for name, values in reply.weights.items():
        content.update(f"{name}\0{values.shape}\0".encode())
        content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()
