"""Keep two servers out of one run folder."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import InputError

_WAIT_SECONDS = 30.0


@contextmanager
def run_lock(run_dir: Path, *, wait_seconds: float = _WAIT_SECONDS) -> Iterator[None]:
    """Hold ``run_dir`` for as long as the block runs; the kernel lets go when the process dies, however it dies.

    Raises:
        InputError: another server still holds it after ``wait_seconds``.
    """
    path = run_dir / "server.lock"
    with path.open("a+", encoding="utf-8") as file:
        give_up = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    file.seek(0)
                    raise InputError(
                        f"{run_dir} is in use by another server ({file.read().strip() or 'unknown process'}). Wait for"
                        " it, or stop that process, then resume the run."
                    ) from None
                time.sleep(0.2)
        # For whoever finds it held: which process, and since when.
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "started": time.time()}))
        file.flush()
        yield
