"""Keep two agents out of one owner's folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import InputError, RefusedError
from shared.lock import file_lock


@contextmanager
def agent_lock(directory: Path, *, timeout_seconds: float) -> Iterator[None]:
    """Hold an owner's ``directory`` while one request is answered.

    The ledger alone would charge two agents correctly; but both would train, and the second would overwrite the reply
    of the first.

    Raises:
        RefusedError: another agent still holds it after ``timeout_seconds``; nothing was charged.
        InputError: the lock cannot be written.
    """

    def held(holder: str) -> RefusedError:
        return RefusedError(
            f"{directory} is in use by another agent ({holder}). One data set has one agent: wait for that request, or"
            " stop that process, then ask again."
        )

    path = directory / "agent.lock"
    try:
        path.touch()
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}): give the agent's user a folder it may write to, then"
            " start the agent again."
        ) from None
    with file_lock(path, timeout_seconds=timeout_seconds, held=held):
        yield
