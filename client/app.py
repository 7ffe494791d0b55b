"""Pass Flower's messages to the owner, and nothing but its answer back."""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.owner import Owner
from shared.errors import FedAugError, InputError
from shared.wire.messages import OwnerFailed, TrainJob, refusal_record

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    return _reply(message, lambda: _owner(context).hello().to_record())


@app.train()
def train(message: Message, context: Context) -> Message:
    return _reply(message, lambda: _owner(context).answer(TrainJob.from_record(message.content)).to_record())


def _reply(message: Message, answer: Callable[[], RecordDict]) -> Message:
    # Flower sends the text of any exception to the server, and text can quote data: only our own
    # errors, which name parameters and totals, may speak.
    try:
        content = answer()
    except FedAugError as error:
        content = refusal_record(error)
    except Exception:
        logging.getLogger("fedaug.client").exception("an unexpected error; the server is told only that there was one")
        content = refusal_record(
            OwnerFailed("an owner's program failed; its own log says why, nothing left the owner.")
        )
    return Message(content, reply_to=message)


def _owner(context: Context) -> Owner:
    """The owner this node speaks for; what the node was started with decides, never the run's configuration."""
    node = context.node_config
    if "data-path" in node or "owner" in node:
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
