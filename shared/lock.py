"""Keep a second process out of what one process works on."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import FedAugError


@contextmanager
def file_lock(path: Path, *, timeout_seconds: float, held: Callable[[str], FedAugError]) -> Iterator[None]:
    """Hold ``path`` for as long as the block runs; the kernel lets go when the process dies, however it dies.

    Args:
        held: the error to raise where another process still holds it after ``timeout_seconds``, made from what that
            process wrote about itself: its pid and when it started to hold.
    """
    with path.open("a+", encoding="utf-8") as file:
        give_up = time.monotonic() + timeout_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    file.seek(0)
                    raise held(file.read().strip() or "unknown process") from None
                time.sleep(min(0.2, max(timeout_seconds, 0.01)))
        # For whoever finds it held: which process, and since when.
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "started": time.time()}))
        file.flush()
        yield
