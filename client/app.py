"""Pass Flower's messages to the owner, and nothing but its answer back."""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.egress import public_words
from client.owner import Owner
from shared.errors import FedAugError, InputError
from shared.wire.messages import TrainJob, refusal_record

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    return _reply(message, context, lambda owner: owner.hello().to_record())


@app.train()
def train(message: Message, context: Context) -> Message:
    return _reply(message, context, lambda owner: owner.record(TrainJob.from_record(message.content)))


def _reply(message: Message, context: Context, answer: Callable[[Owner], RecordDict]) -> Message:
    # Flower sends the text of any exception to the server, and text can quote data: a deployed owner answers with a
    # rule's name or a code, and only its own log says more.
    simulated = not _is_deployed(context)
    try:
        content = answer(_owner(context))
    except Exception as error:
        logging.getLogger("fedaug.client").error("nothing was released: %s", error, exc_info=_unless_ours(error))
        content = refusal_record(public_words(error, simulated=simulated))
    return Message(content, reply_to=message)


def _unless_ours(error: Exception) -> Exception | None:
    return None if isinstance(error, FedAugError) else error


def _is_deployed(context: Context) -> bool:
    return "data-path" in context.node_config or "owner" in context.node_config


def _owner(context: Context) -> Owner:
    """The owner this node speaks for; what the node was started with decides, never the run's configuration."""
    node = context.node_config
    if _is_deployed(context):
        if "data-path" not in node or "owner" not in node:
            raise InputError("this agent needs both owner and data-path in its node configuration.")
        return Owner(name=str(node["owner"]), directory=Path(str(node["data-path"])), simulated=False)
    if "partition-id" not in node or not context.run_config.get("run-dir"):
        raise InputError("this node has neither an owner and data-path nor a simulation's partition-id and run-dir.")
    folders = sorted(Path(str(context.run_config["run-dir"])).glob("owners/*/train.npz"))
    partition, num_partitions = int(node["partition-id"]), int(node.get("num-partitions", len(folders)))
    if len(folders) != num_partitions:
        raise InputError(f"the run folder holds {len(folders)} owners, the simulation has {num_partitions} nodes.")
    directory = folders[partition].parent
    return Owner(name=directory.name, directory=directory, simulated=True)
