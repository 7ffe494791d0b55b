"""An owner's record of what its data was charged for, on disk before anything is trained."""

import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from shared.errors import InputError
from shared.privacy.noise import NoiseKind
from shared.privacy.releases import DpSgdRelease

# Epsilon is not a column: it is derived from the releases, so a better accountant re-reads the same rows.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
    number INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    server_round INTEGER NOT NULL,
    release TEXT NOT NULL,       -- JSON; 'null' where a simulation trained without privacy
    job_digest TEXT NOT NULL,
    noise TEXT NOT NULL,         -- 'local', or why it is not private
    zeroed_users INTEGER,        -- users that counted as zero, known when committed; never leaves the owner
    status TEXT NOT NULL CHECK (status IN ('reserved', 'committed'))
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One release an owner may have made.

    Args:
        release: None where a simulation trained without privacy.
        job_digest: of the request it answers.
        noise: local noise is secret; seeded noise can be repeated, and so the same request gives the same release.
        status: ``reserved`` before training, ``committed`` once the reply is on disk.
        zeroed_users: how often a user counted as zero because its loss or gradient was not finite; None until
            committed.
    """

    run_id: str
    server_round: int
    release: DpSgdRelease | None
    job_digest: str
    noise: NoiseKind
    status: Literal["reserved", "committed"] = "reserved"
    zeroed_users: int | None = None


class Ledger:
    """Charges in the order they were made; use as a context manager.

    Guarantee:
        A charge that :meth:`reserve` returned from survives a crash or a power cut, and two
        processes never decide on the same sum.
    """

    def __init__(self, path: Path) -> None:
        """Open the ledger at ``path``.

        Raises:
            InputError: there is none, it is not a ledger, or it cannot be written.
        """
        self._path = path
        try:
            # mode=rw: a missing ledger must stop the owner, not begin again at epsilon 0.
            self._database = _connect(path, mode="rw")
            self._database.execute("SELECT count(*) FROM charges")
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from None

    @classmethod
    def create(cls, path: Path) -> None:
        """Make the ledger of data that was never charged; one that exists is left as it is.

        Raises:
            InputError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(_connect(path, mode="rwc")) as database:
                database.execute(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise _unusable(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def charges(self) -> tuple[Charge, ...]:
        """Every charge, reserved ones too: a release may have left before the crash."""
        columns = "run_id, server_round, release, job_digest, noise, status, zeroed_users"
        try:
            rows = self._database.execute(f"SELECT {columns} FROM charges ORDER BY number").fetchall()
            return tuple(
                Charge(
                    run_id=run_id,
                    server_round=server_round,
                    release=DpSgdRelease.from_dict(values) if (values := json.loads(release)) else None,
                    job_digest=digest,
                    noise=noise,
                    status=status,
                    zeroed_users=zeroed,
                )
                for run_id, server_round, release, digest, noise, status, zeroed in rows
            )
        except (sqlite3.Error, ValueError) as error:
            raise self._unusable(error) from None

    def releases(self) -> tuple[DpSgdRelease | None, ...]:
        return tuple(charge.release for charge in self.charges())

    def latest(self, run_id: str, server_round: int) -> Charge | None:
        """The last charge for one request, or None."""
        asked = [c for c in self.charges() if (c.run_id, c.server_round) == (run_id, server_round)]
        return asked[-1] if asked else None

    def reserve(self, charge: Charge, *, allow: Callable[[Sequence[DpSgdRelease | None]], None]) -> None:
        """Append ``charge``, unless ``allow`` raises when shown all releases with it.

        The rows stay locked in between, so two rounds at once cannot both fit the last of a budget.
        """
        try:
            self._database.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        try:
            allow((*self.releases(), charge.release))
            release = json.dumps(charge.release.to_dict() if charge.release else None)
            self._database.execute(
                "INSERT INTO charges (run_id, server_round, release, job_digest, noise, status)"
                " VALUES (?, ?, ?, ?, ?, 'reserved')",
                (charge.run_id, charge.server_round, release, charge.job_digest, charge.noise),
            )
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def commit(self, run_id: str, server_round: int, *, zeroed_users: int) -> None:
        """Mark the last charge for one request as answered; call once its reply is on disk."""
        try:
            self._database.execute(
                "UPDATE charges SET status = 'committed', zeroed_users = ? WHERE number ="
                " (SELECT max(number) FROM charges WHERE run_id = ? AND server_round = ?)",
                (zeroed_users, run_id, server_round),
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> InputError:
        return _unusable(self._path, error)


def _connect(path: Path, *, mode: Literal["rw", "rwc"]) -> sqlite3.Connection:
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=30, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # in WAL mode, the only level that survives a power cut
    except sqlite3.Error:
        database.close()
        raise
    return database


def _unusable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"the ledger at {path} cannot be used ({error}). Nothing is trained without it: restore it or make"
        " room on its disk, but never start an empty one for the same data."
    )
