"""Keep an account of what reached an owner's agent, what it decided, and what left it; never of the data."""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shared.errors import InputError
from shared.files import finite

Event = Literal["message", "decision", "release", "error"]

_LONGEST_TEXT = 200
_LONGEST_LIST = 16  # the shape of an array, not the history of a user
_LONGEST_DICT = 1000  # the arrays of a generator
_DEEPEST = 3
_LARGEST_LINE = 64 * 2**10


class SecurityLog:
    """JSON lines in ``security.jsonl``, older ones in ``security.1.jsonl`` and so on.

    Args:
        max_bytes: of one file; then another is begun.
        num_files: that are kept, the one being written among them.
    """

    def __init__(self, directory: Path, *, max_bytes: int = 8 * 2**20, num_files: int = 8) -> None:
        self._directory, self._max_bytes, self._num_files = directory, max_bytes, num_files

    def write(self, event: Event, **fields: object) -> None:
        """Append one line: the UTC time, the event and ``fields``.

        Several processes may do so at once; lines are never mixed.

        Args:
            fields: numbers, texts of up to 200 characters, and short lists and dicts of these. Infinity is written
                as ``"inf"``, control characters are escaped.
        Raises:
            ValueError: a field is anything else, and so may be data.
            InputError: the line cannot be written. What it was to account for must not happen.
        """
        reserved = {"time", "event"} & set(fields)
        if reserved:
            raise ValueError(f"{sorted(reserved)} are the log's own")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": time, "event": event, **_checked_dict(fields, depth=0)}
        line = (json.dumps(finite(entry), allow_nan=False) + "\n").encode("ascii")
        if len(line) > _LARGEST_LINE:
            raise ValueError(f"a line of {len(line):,} bytes; the log takes {_LARGEST_LINE:,}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._make_room(len(line))
                self._append(line)
        except OSError as error:
            raise InputError(
                f"cannot write to the security log {self._path(0)} ({error.strerror or error}): nothing is released"
                " without its log. Make room, or give the agent's user the right to write there."
            ) from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Everything still kept, oldest first; a line torn by a power cut is left out."""
        for number in reversed(range(self._num_files)):
            try:
                text = self._path(number).read_text(encoding="ascii", errors="replace")
            except FileNotFoundError:
                continue
            for line in text.splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def _append(self, line: bytes) -> None:
        path = self._path(0)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # a power cut or a full disk tore the last line; this one stays whole
            if os.write(file, line) != len(line):
                raise OSError("the disk is full")
        finally:
            os.close(file)

    def _make_room(self, num_bytes: int) -> None:
        current = self._path(0)
        size = current.stat().st_size if current.exists() else 0
        if not size or size + num_bytes <= self._max_bytes:
            return
        for number in reversed(range(self._num_files - 1)):
            if self._path(number).exists():
                self._path(number).replace(self._path(number + 1))
        if self._num_files == 1:
            current.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._directory / "security.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, number: int) -> Path:
        return self._directory / (f"security.{number}.jsonl" if number else "security.jsonl")


def described(weights: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    """What the log says of arrays: their bytes, and each one's shape, dtype and L2 norm."""
    return {
        "num_bytes": sum(values.nbytes for values in weights.values()),
        "shapes": {name: list(values.shape) for name, values in weights.items()},
        "dtypes": {name: str(values.dtype) for name, values in weights.items()},
        "l2_norms": {name: _norm(values) for name, values in weights.items()},
    }


def _norm(values: npt.NDArray[np.float32]) -> float:
    flat = values.ravel()
    # Summed in double precision without a copy in it: a generator may fill half the memory.
    return math.sqrt(float(np.einsum("i,i->", flat, flat, dtype=np.float64)))


def _checked(value: object, *, depth: int) -> object:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        # Larger whole numbers could spell anything.
        if value != value or (isinstance(value, int) and abs(value) >= 2**63) or value == -math.inf:
            raise ValueError("a number for the log must be below 2**63 and not NaN")
        return value
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise ValueError(f"a text of {len(value):,} characters; the log takes {_LONGEST_TEXT}")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value)
    if isinstance(value, list | tuple) and depth < _DEEPEST and len(value) <= _LONGEST_LIST:
        return [_checked(inner, depth=depth + 1) for inner in value]
    if isinstance(value, Mapping) and depth < _DEEPEST and len(value) <= _LONGEST_DICT:
        return _checked_dict(value, depth=depth + 1)
    raise ValueError(f"the log takes numbers, short texts, and short lists and dicts of these; not {type(value)}")


def _checked_dict(values: Mapping[str, object], *, depth: int) -> dict[str, object]:
    if not all(isinstance(name, str) for name in values):
        raise ValueError("names in the log must be text")
    return {str(_checked(name, depth=depth)): _checked(inner, depth=depth) for name, inner in values.items()}
