"""Learn which owners are there, and that they mean the same by the same numbers."""

import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.plan import FederationPlan
from shared.errors import InputError
from shared.wire.messages import WIRE_VERSION, CatalogueMismatch, Hello


class TooFewOwners(InputError):
    """Fewer owners answered within the deadline than the plan needs."""

    def __init__(self, present: int, plan: FederationPlan, *, doing: str) -> None:
        super().__init__(
            f"{present} of {len(plan.owners)} owners {doing} within deadline_seconds={plan.deadline_seconds:g}; the run"
            f" needs min_owners={plan.min_owners}. Start the missing owners, or raise federation.deadline_seconds, then"
            " resume the run."
        )


def greet(grid: Grid, plan: FederationPlan) -> dict[int, str]:
    """The owners that said hello: name by node id.

    Raises:
        TooFewOwners: fewer than ``min_owners`` within the deadline.
        CatalogueMismatch: an owner's item positions mean other items.
        InputError: an owner is unknown, there twice, of another version, or cannot train the generator.
    """
    deadline = time.monotonic() + plan.deadline_seconds
    while len(nodes := sorted(grid.get_node_ids())) < len(plan.owners) and time.monotonic() < deadline:
        time.sleep(0.1)
    if len(nodes) < plan.min_owners:
        raise TooFewOwners(len(nodes), plan, doing="connected")
    question = RecordDict({"question": ConfigRecord({"wire": WIRE_VERSION})})
    messages = [Message(question, node, "query.hello") for node in nodes]
    replies = grid.send_and_receive(messages, timeout=max(1.0, deadline - time.monotonic()))
    owners: dict[int, str] = {}
    for reply in replies:
        if reply.has_error():
            continue
        hello = Hello.from_record(reply.content)
        _check(hello, plan, known=owners)
        owners[reply.metadata.src_node_id] = hello.owner
    if len(owners) < plan.min_owners:
        raise TooFewOwners(len(owners), plan, doing="said hello")
    return owners


def _check(hello: Hello, plan: FederationPlan, *, known: dict[int, str]) -> None:
    if hello.owner not in plan.owners:
        raise InputError(f"{hello.owner!r} said hello but is not among the plan's {len(plan.owners)} owners.")
    if hello.owner in known.values():
        raise InputError(f"two nodes say they are {hello.owner!r}; each owner runs one agent.")
    if hello.versions.get("wire") != WIRE_VERSION:
        raise InputError(
            f"{hello.owner} speaks message version {hello.versions.get('wire')!r}, the server {WIRE_VERSION!r}."
            " Install the same release of fedaug on both."
        )
    if hello.catalogue_hash != plan.catalogue_hash:
        raise CatalogueMismatch(hello.owner, server_hash=plan.catalogue_hash, owner_hash=hello.catalogue_hash)
    if plan.spec.kind not in hello.capabilities:
        raise InputError(f"{hello.owner} cannot train a {plan.spec.kind!r} generator, only {hello.capabilities}.")
