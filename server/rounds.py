"""Run the rounds of a plan, each from the last one's checkpoint."""

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from server.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from server.hello import TooFewOwners, greet
from server.lock import run_lock
from server.plan import FederationPlan
from server.receipts import keep_receipts
from server.replies import for_strategy, read_replies
from server.sketches import add_up, arrays_to_send, begin
from server.strategies import build_strategy, restore, strategy_state, to_float32
from shared.errors import InputError
from shared.generators.base import Weights
from shared.generators.family import initial_weights
from shared.wire.arrays import travelling_only
from shared.wire.messages import JOB, WEIGHTS, TrainJob, TrainReply


def run_rounds(grid: Grid, run_dir: Path) -> None:
    """Run what ``run_dir/plan.json`` asks and ``run_dir/checkpoints`` has not yet.

    Guarantee:
        With seeded noise the last checkpoint is the same, bit for bit, however often the run was
        killed and resumed and in whatever order replies arrived.
    Raises:
        RefusedError: an owner's budget or policy says no; the last checkpoint stays.
        TooFewOwners: fewer than ``min_owners`` answered within the deadline.
        InputError: plan, checkpoint, disk or a reply are not as they must be.
    """
    plan = FederationPlan.load(run_dir)
    with run_lock(run_dir):
        latest = load_checkpoint(run_dir, plan_digest=plan.digest)
        if latest is None:
            weights: Weights = travelling_only(plan.spec, initial_weights(plan.spec, plan.seed))
            latest = Checkpoint(server_round=0, weights=weights, strategy_state={}, figures=())
            save_checkpoint(run_dir, latest, plan_digest=plan.digest, num_rounds=plan.num_rounds)
        if latest.server_round == plan.num_rounds:
            return
        strategy = build_strategy(plan)
        restore(strategy, dict(latest.strategy_state), list(latest.weights))
        owners = greet(grid, plan)
        while latest.server_round < plan.num_rounds:
            latest = _run_round(grid, run_dir, plan, strategy, latest, owners)
            save_checkpoint(run_dir, latest, plan_digest=plan.digest, num_rounds=plan.num_rounds)


def latest_checkpoint(run_dir: Path) -> tuple[int, Weights] | None:
    """The last finished round and its weights, averaged over the rounds where the plan says so; None before round 1.

    Raises:
        InputError: the run folder's plan or checkpoints cannot be used.
    """
    found = load_checkpoint(run_dir, plan_digest=FederationPlan.load(run_dir).digest)
    if found is None or found.server_round == 0:
        return None
    return found.server_round, dict(found.average or found.weights)


def _run_round(
    grid: Grid, run_dir: Path, plan: FederationPlan, strategy: FedAvg, latest: Checkpoint, owners: dict[int, str]
) -> Checkpoint:
    started = time.monotonic()
    server_round = latest.server_round + 1
    is_sketch = server_round <= len(plan.terms.sketches)
    job = TrainJob(
        run_id=plan.run_id,
        weights=arrays_to_send(plan, latest.statistics, server_round) if is_sketch else dict(latest.weights),
        spec=plan.spec,
        plan=replace(plan.terms, server_round=server_round),
        catalogue_hash=plan.catalogue_hash,
        noise_seed=plan.noise_seed,
        collect_metrics=plan.collect_metrics,
    )
    replies = read_replies(_send(grid, plan, strategy, job, owners), plan, job, owners)
    if len(replies) < plan.min_owners:
        raise TooFewOwners(len(replies), plan, doing=f"answered round {server_round}")
    told = [reply for reply, _ in replies]
    if is_sketch:
        found = _after_sketch(run_dir, plan, latest, told, server_round)
    else:
        weights = _aggregate(strategy, server_round, [for_strategy(*reply, plan) for reply in replies])
        found = replace(
            latest,
            weights=weights,
            strategy_state=strategy_state(strategy, list(weights)),
            average=_averaged(plan, latest, weights, server_round),
        )
    figures = _figures(told, server_round, plan, seconds=time.monotonic() - started)
    keep_receipts(run_dir, told)
    return replace(found, server_round=server_round, figures=(*latest.figures, figures))


def _after_sketch(
    run_dir: Path, plan: FederationPlan, latest: Checkpoint, replies: list[TrainReply], server_round: int
) -> Checkpoint:
    statistics = add_up(latest.statistics, replies, server_round)
    if server_round < len(plan.terms.sketches):
        return replace(latest, statistics=statistics)
    return replace(latest, weights=begin(run_dir, plan, statistics, len(replies)), statistics={})


def _send(
    grid: Grid, plan: FederationPlan, strategy: FedAvg, job: TrainJob, owners: dict[int, str]
) -> Iterable[Message]:
    """The answers to ``job`` of all ``owners``."""
    server_round = job.plan.server_round
    if job.plan.sketch is None:
        roster = cast(Grid, _Roster(owners))
        messages = list(strategy.configure_train(server_round, job.to_arrays(), job.to_config(), roster))
    else:
        # Not by the strategy: it would take what a sketch brings for weights.
        config = job.to_config()
        config["server-round"] = server_round
        content = RecordDict({WEIGHTS: job.to_arrays(), JOB: config})
        messages = [Message(content, node, MessageType.TRAIN) for node in sorted(owners)]
    return grid.send_and_receive(messages, timeout=plan.deadline_seconds)


def _averaged(
    plan: FederationPlan, latest: Checkpoint, weights: Weights, server_round: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The exponential average of the weights over the rounds: a function of releases, and so free."""
    if plan.average_decay == 0:
        return {}
    before = latest.average or latest.weights
    # Young averages forget faster, or the first weights would stay in them for a whole run.
    done = server_round - len(plan.terms.sketches)
    kept = np.float32(min(plan.average_decay, done / (done + 9)))
    return {name: kept * before[name] + (1 - kept) * values for name, values in weights.items()}


class _Roster:
    """All that a strategy asks of a grid: who is there. Fixed, because strategies wait for ever for who is not."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = sorted(nodes)

    def get_node_ids(self) -> list[int]:
        return self._nodes


def _aggregate(strategy: FedAvg, server_round: int, replies: list[Message]) -> Weights:
    record, _ = strategy.aggregate_train(server_round, replies)
    weights = to_float32(record if record is not None else ArrayRecord())
    if not weights or not all(np.isfinite(values).all() for values in weights.values()):
        raise InputError(
            f"round {server_round}: the aggregate is not finite, so it was not kept. Lower"
            " federation.server_learning_rate and start a new run."
        )
    return weights


def _figures(replies: list[TrainReply], server_round: int, plan: FederationPlan, *, seconds: float) -> dict[str, Any]:
    present = {reply.owner for reply in replies}
    figures: dict[str, Any] = {
        "server_round": server_round,
        "seconds": round(seconds, 3),
        "num_owners": len(replies),
        "missing": sorted(set(plan.owners) - present),
    }
    if plan.collect_metrics:
        users = np.array([reply.simulation_only["num_users"] for reply in replies])
        zeroed = sum(int(reply.simulation_only["zeroed_users"]) for reply in replies)
        losses = np.array([reply.simulation_only["loss"] for reply in replies])
        seen = np.isfinite(losses) & (users > 0)  # an owner whose draws were all empty has no loss
        mean = float(np.average(losses[seen], weights=users[seen])) if seen.any() else None
        figures["simulation_only"] = {"loss": mean, "num_users": int(users.sum()), "zeroed_users": zeroed}
    return figures
