"""The file a ledger is kept in: its tables, and how it is opened so that what was written stays written."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from shared.errors import InputError

# `entries` is the ledger. The others are what the entries add up to, kept so that no charge need read them all;
# verification counts them again.
TABLES = {
    "entries": "CREATE TABLE entries (number INTEGER PRIMARY KEY, body BLOB NOT NULL, hash BLOB NOT NULL) STRICT",
    "head": (
        "CREATE TABLE head (only INTEGER PRIMARY KEY CHECK (only = 1), number INTEGER NOT NULL, hash BLOB NOT NULL,"
        " signature BLOB NOT NULL, public_key BLOB NOT NULL, totals_checksum BLOB NOT NULL) STRICT"
    ),
    "totals": "CREATE TABLE totals (release TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "requests": (
        "CREATE TABLE requests (run_id TEXT NOT NULL, server_round INTEGER NOT NULL, reserved INTEGER NOT NULL,"
        " committed INTEGER, PRIMARY KEY (run_id, server_round)) STRICT, WITHOUT ROWID"
    ),
}
OLD_TABLE = "charges_before_1"  # a ledger's rows from before it was chained, kept for reading

_ADVICE = {
    "SQLITE_FULL": "make room on its disk",
    "SQLITE_BUSY": "another process has held it for 30 seconds: wait for that process, or stop it",
    "SQLITE_READONLY": "let the agent's user write to it and to its folder",
    "SQLITE_CANTOPEN": "let the agent's user write to it and to its folder",
    "SQLITE_PERM": "let the agent's user write to it and to its folder",
}


def connect(path: Path, *, mode: Literal["rw", "rwc"] = "rw") -> sqlite3.Connection:
    """A connection whose commits survive a power cut; mode ``rw`` never makes a new file."""
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=30, isolation_level=None)
    try:
        (journal,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal != "wal":
            raise sqlite3.OperationalError(f"its disk allows no write-ahead log, only {journal!r}; use a local disk")
        database.execute("PRAGMA synchronous = FULL")  # in WAL mode, the only level that survives a power cut
        database.execute("PRAGMA fullfsync = ON")  # on macOS, fsync alone does not reach the disk
        _distrust(database)
    except BaseException:
        database.close()
        raise
    return database


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that changes no entry, also where the folder may not be written.

    A write-ahead log that a dead process left is written back into its file, as by whoever opens it next.
    """
    uri = f"{path.resolve().as_uri()}?mode=rw"  # rw, since a connection that only reads leaves SQLite's files behind
    try:
        return _connect_to_read(uri)
    except sqlite3.OperationalError:
        # Without write-ahead log there is nothing to lock and nothing to miss; with one, reading past it would.
        if path.with_name(path.name + "-wal").exists() or not path.exists():
            raise
        return _connect_to_read(f"{uri}&immutable=1")


def _connect_to_read(uri: str) -> sqlite3.Connection:
    database = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)
    try:
        database.execute("PRAGMA query_only = ON")
        _distrust(database)
        database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def _distrust(database: sqlite3.Connection) -> None:
    # The file may be damaged, or come from a backup that others could write to.
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA cell_size_check = ON")


def schema_problems(database: sqlite3.Connection) -> list[str]:
    """What the file holds besides a ledger's tables, or lacks: a trigger could undo a charge as it is written."""
    query = "SELECT type, name, sql FROM sqlite_schema WHERE type <> 'table' OR name <> ?"
    found = database.execute(query, (OLD_TABLE,)).fetchall()
    expected = {("table", name, sql) for name, sql in TABLES.items()}
    return [
        *(f"table {name!r} is missing or is not as it was made" for _, name, _ in sorted(expected - set(found))),
        *(f"{kind} {name!r} is no part of a ledger" for kind, name, sql in found if (kind, name, sql) not in expected),
    ]


def refuse_leftovers(path: Path) -> None:
    """Raise where a ledger's write-ahead log outlived the ledger: SQLite would write it into whatever comes next."""
    for suffix in ("-wal", "-journal"):
        leftover = path.with_name(path.name + suffix)
        if leftover.exists():
            raise InputError(
                f"{leftover} belongs to a ledger that is no longer at {path}. Bring that ledger back; or, where it is"
                " lost, move this file away and restore the ledger from a backup."
            )


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk say inside the block into advice."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last, where damaged bytes are in its message
        raise unusable(path, error) from None


def unusable(path: Path, error: Exception | str) -> InputError:
    name = "_".join(str(getattr(error, "sqlite_errorname", "")).split("_")[:2])
    advice = _ADVICE.get(name, "restore it from a backup")
    return InputError(
        f"the ledger at {path} cannot be used ({error}). Nothing is trained without it: {advice}, but never start an"
        " empty one for the same data."
    )


def missing(path: Path) -> InputError:
    return InputError(
        f"there is no ledger at {path}. Nothing is trained without it: restore it from a backup, but never start an"
        " empty one for the same data."
    )
