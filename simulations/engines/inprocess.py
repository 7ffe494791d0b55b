"""A federation in one process: Flower's own grid interface, without its services."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# Message() asks this process-wide value whose message it is; Flower's launchers set it, there is
# no public way to.
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_SERVER_NODE, _RUN = 1, 1


class InProcessGrid(Grid):
    """Owners are asked in this process, one after the other; node ``i + 2`` holds partition ``i``.

    Not in threads: arrays are read through ``ast.literal_eval``, whose depth count threads of
    CPython 3.11 corrupt for each other ("AST constructor recursion depth mismatch").

    Args:
        between: called before every exchange, to show progress.
    """

    def __init__(
        self, client_app: ClientApp, *, num_owners: int, run_dir: Path, between: Callable[[], None] = lambda: None
    ) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = _RUN
        TaskIdentity.node_id = _SERVER_NODE
        self._client_app, self._between = client_app, between
        self._contexts = {
            partition + 2: Context(
                run_id=_RUN,
                node_id=partition + 2,
                node_config={"partition-id": partition, "num-partitions": num_owners},
                state=RecordDict(),
                run_config={"run-dir": str(run_dir)},
            )
            for partition in range(num_owners)
        }
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(_RUN)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._between()
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(identity) for identity in message_ids if identity in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        identity = message.metadata.__dict__["_message_id"] = uuid4().hex  # as Flower's grids do
        # A strategy sends every owner the same record, and a handler may change what it was given.
        received = copy.copy(message)
        received.__dict__["_content"] = copy.deepcopy(message.content)
        try:
            reply = self._client_app(received, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            # What Flower does with an exception of a client, its text included.
            reply = Message(Error(code=0, reason=repr(error)), reply_to=message)
        self._replies[identity] = reply
        return identity
