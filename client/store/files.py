"""Give a finished file its name, where no file has it yet."""

import os
from pathlib import Path


def publish(finished: Path, path: Path) -> None:
    """Make ``finished`` available as ``path`` at one instant, on the disk; ``finished`` keeps its own name too.

    A rename would replace a file that somebody made in the meantime; a link does not.

    Raises:
        FileExistsError: there is one already, and it is as it was.
        OSError: the folder cannot be written.
    """
    os.link(finished, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
