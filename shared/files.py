"""Write a file so that a crash leaves the old one or the new one, never half of one."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` and wait until the disk has it.

    Raises:
        InputError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise InputError(
            f"cannot write {len(content):,} bytes to {path}: {error.strerror or error}. Nothing was half-written;"
            " make room or choose another folder, then resume the run."
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` when the block ends, once the disk has it.

    Guarantee:
        ``path`` is the old file or the whole new one. Where the block raises, nothing is left of the new one.
    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON by :func:`write_atomically`."""
    write_atomically(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """``value`` with infinity as the text ``"inf"``: JSON has none, and readers in other languages refuse Python's."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return "inf" if isinstance(value, float) and value == float("inf") else value


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    # Without this the new name may be lost with the power, although the content is on the disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
