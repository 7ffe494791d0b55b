"""Small ledgers to test with."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from shared.privacy.chain import Charge
from shared.privacy.noise import LOCAL_NOISE
from shared.privacy.releases import DpSgdRelease

RELEASE = DpSgdRelease(noise_multiplier=1.5, sample_rate=0.1, num_steps=5, max_users=100)
OTHER_RELEASE = DpSgdRelease(noise_multiplier=2.0, sample_rate=0.1, num_steps=5, max_users=100, max_batch=40)
REPLY = "ab" * 32
SOURCE = "books-2026"


def a_charge(server_round: int = 1, **changes) -> Charge:
    values = {
        "run_id": "r",
        "server_round": server_round,
        "release": RELEASE,
        "noise": LOCAL_NOISE,
        "job_digest": "d",
        "policy_hash": "p",
        "code_hash": "c",
        "versions": {"torch": "2.13"},
        "fingerprint": "f",
    }
    return Charge(**{**values, **changes})


def anything(spent):
    pass


def make(path: Path, key: OwnerKey, *, rounds: int = 0) -> Path:
    """A ledger with this many rounds reserved and committed."""
    LifetimeLedger.create(path, data_source=SOURCE, key=key)
    with open_(path, key) as ledger:
        for server_round in range(1, rounds + 1):
            answer(ledger, a_charge(server_round))
    return path


def open_(path: Path, key: OwnerKey | None) -> LifetimeLedger:
    return LifetimeLedger(path, key=key, data_source=SOURCE)


def answer(ledger: LifetimeLedger, charge: Charge):
    number = ledger.reserve(charge, allow=anything)
    return ledger.commit(number, executed=charge.release, zeroed_users=0, reply_digest=REPLY)


def rows(path: Path) -> list[tuple]:
    """The table of entries as SQLite gives it, whatever it holds."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT number, body, hash FROM entries ORDER BY number").fetchall()


def tamper(path: Path, *statements: str | tuple) -> None:
    """Run SQL on the file behind the ledger's back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(*((statement,) if isinstance(statement, str) else statement))


def as_nobody(action: Callable[[], object]) -> str:
    """What ``action`` returns or raises, as text, for a user who may not write where modes forbid it; root may."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            os.write(writing, str(action()).encode())
        except BaseException as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as told:
        return told.read()
