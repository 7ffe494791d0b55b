"""Let into the average only what an owner was asked for."""

from collections.abc import Iterable

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from server.plan import FederationPlan
from server.strategies import PUBLIC_WEIGHT
from shared.errors import InputError, RefusedError
from shared.wire.arrays import answered_shapes
from shared.wire.messages import WEIGHTS, OwnerFailed, TrainJob, TrainReply


def read_replies(
    messages: Iterable[Message], plan: FederationPlan, job: TrainJob, owners: dict[int, str]
) -> list[tuple[TrainReply, Message]]:
    """The replies to ``job``, checked and in the order of owners' names.

    In the order of names, because a sum of floats depends on its order and replies arrive in any.
    Nodes that only reported a transport error are left out; the round records them as missing.

    Raises:
        RefusedError, InputError, OwnerFailed: an owner said no, or sent what was not asked for.
    """
    read: dict[str, tuple[TrainReply, Message]] = {}
    server_round = job.plan.server_round
    for message in messages:
        if message.has_error():
            continue
        owner = owners.get(message.metadata.src_node_id)
        if owner is None or owner in read:
            raise InputError(
                f"round {server_round}: a reply from {owner or 'a node that never said hello'} was not expected."
            )
        try:
            reply = TrainReply.from_record(message.content, metrics_expected=plan.collect_metrics)
        except (OwnerFailed, RefusedError, InputError) as failure:
            raise type(failure)(f"round {server_round}, {owner}: {failure}") from None
        _check(reply, job, owner=owner)
        read[owner] = reply, message
    return [read[owner] for owner in sorted(read)]


def for_strategy(reply: TrainReply, message: Message, plan: FederationPlan) -> Message:
    """The reply as a strategy averages it: its weights, and the public number it counts by."""
    weight = MetricRecord({PUBLIC_WEIGHT: float(plan.weights.get(reply.owner, 1.0))})
    message.content = RecordDict({WEIGHTS: message.content.array_records[WEIGHTS], "weight": weight})
    return message


def _check(reply: TrainReply, job: TrainJob, *, owner: str) -> None:
    terms, server_round, declared = job.plan, job.plan.server_round, answered_shapes(job)
    where = f"round {server_round}: the reply of {owner}"
    if reply.owner != owner:
        raise InputError(f"{where} is signed {reply.owner!r}.")
    if reply.server_round != server_round:
        raise InputError(f"{where} answers round {reply.server_round}.")
    if reply.release != terms.round_release:
        raise InputError(f"{where} charged {reply.release}, the plan asked for {terms.round_release}.")
    if reply.receipt is None or not reply.receipt.is_signed():
        raise InputError(f"{where} has no receipt that its owner signed.")
    if list(reply.weights) != list(declared):
        raise InputError(f"{where} has the arrays {sorted(reply.weights)[:3]}…, expected {sorted(declared)[:3]}….")
    for name, values in reply.weights.items():
        if (values.shape, values.dtype) != (declared[name], np.dtype(np.float32)):
            raise InputError(f"{where}: {name} is {values.dtype} {values.shape}, expected float32 {declared[name]}.")
        if not np.isfinite(values).all():
            raise InputError(f"{where}: {name} holds a number that is not finite; nothing was averaged.")
