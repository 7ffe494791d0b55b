"""Keep two servers out of one run folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import InputError
from shared.lock import file_lock

_WAIT_SECONDS = 30.0


@contextmanager
def run_lock(run_dir: Path, *, wait_seconds: float = _WAIT_SECONDS) -> Iterator[None]:
    """Hold ``run_dir`` for as long as the block runs; the kernel lets go when the process dies, however it dies.

    Raises:
        InputError: another server still holds it after ``wait_seconds``.
    """

    def held(holder: str) -> InputError:
        return InputError(
            f"{run_dir} is in use by another server ({holder}). Wait for it, or stop that process, then resume the run."
        )

    with file_lock(run_dir / "server.lock", timeout_seconds=wait_seconds, held=held):
        yield
