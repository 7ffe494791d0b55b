"""Whenever a process dies, its ledger opens, verifies, and counts every release that may have left."""

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from shared.privacy.chain import Commit, Content, Reserve
from tests.client.lifetime_ledgers import RELEASE, REPLY, SOURCE, a_charge, anything, make, open_, rows
from tests.client.test_lifetime import OLD_ROWS, an_old_ledger


@pytest.fixture
def key(tmp_path) -> OwnerKey:
    return OwnerKey.create(tmp_path / "key.pem")


def killed(work: Callable[[], None], *, after_seconds: float) -> None:
    """Run ``work`` in a process of its own until SIGKILL; let it end where it is done sooner."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(after_seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def an_agent(path: Path, key: OwnerKey, released: Path, *, careless: bool = False) -> None:
    """Reserve, release, commit, and again. What it releases is seen at once: a line in ``released``."""
    releases = os.open(released, os.O_WRONLY | os.O_APPEND)
    with open_(path, key) as ledger:
        ledger._database.execute("PRAGMA wal_autocheckpoint = 7")  # so that kills fall into checkpoints too
        next_number = ledger.receipt().number + 1
        while True:
            if careless:
                os.write(releases, b"%d\n" % next_number)
            number = ledger.reserve(a_charge(next_number), allow=anything)
            if not careless:
                os.write(releases, b"%d\n" % number)
            ledger.commit(number, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
            next_number = number + 2


def missed_releases(path: Path, key: OwnerKey, released: Path) -> tuple[Counter[int], Content]:
    """Releases that the ledger does not count, and its last entry; fails where the ledger is not sound.

    Had a charge been lost, its number would be given, and released, a second time: each counts once.
    """
    with open_(path, key) as ledger:
        entries = list(ledger.entries())
        assert len(ledger.releases()) == sum(ledger.totals().values())
    found = verify(path, public_key=key.public)
    assert found.problems == ()
    charged = Counter(entry.number for entry in entries if isinstance(entry.content, Reserve))
    return Counter(map(int, released.read_text().split())) - charged, entries[-1].content


def kill_agents(key: OwnerKey, folder: Path, *, kills: int) -> None:
    rng = random.Random(kills)
    unanswered = answered = 0
    for trial in range(kills):
        if trial % 50 == 0:  # long ledgers take longer to verify and die no differently
            path = make(folder / f"{trial}.sqlite", key)
            released = folder / f"{trial}.released"
            released.touch()
        killed(lambda path=path, released=released: an_agent(path, key, released), after_seconds=rng.uniform(0, 0.03))
        missed, last = missed_releases(path, key, released)
        assert not missed, f"kill {trial}"
        unanswered += isinstance(last, Reserve)
        answered += isinstance(last, Commit)
    # It died on both sides of its replies, often enough to mean something.
    assert unanswered > kills / 20
    assert answered > kills / 20


def test_an_agent_killed_a_hundred_times_counts_all_it_released(key, tmp_path):
    kill_agents(key, tmp_path, kills=100)


@pytest.mark.exhaustive
def test_an_agent_killed_five_hundred_times_counts_all_it_released(key, tmp_path):
    kill_agents(key, tmp_path, kills=500)


def test_an_agent_that_releases_before_it_reserves_is_caught(key, tmp_path):
    """The proof that the tests above can fail."""
    rng = random.Random(1)
    path, released = make(tmp_path / "ledger.sqlite", key), tmp_path / "released"
    released.touch()
    for _ in range(300):
        killed(lambda: an_agent(path, key, released, careless=True), after_seconds=rng.uniform(0, 0.03))
        missed, _ = missed_releases(path, key, released)
        if missed:
            return
    pytest.fail("300 kills did not show a release that was never charged")


def test_a_reserve_that_returned_survives_at_once(key, tmp_path):
    path = make(tmp_path / "ledger.sqlite", key)

    def reserve_and_die():
        open_(path, key).reserve(a_charge(), allow=anything)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            reserve_and_die()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with open_(path, key) as ledger:
        assert ledger.releases() == (RELEASE,)


def test_a_taking_over_that_is_killed_is_done_or_not_begun(key, tmp_path):
    rng, done = random.Random(2), 0
    for trial in range(40):
        path = an_old_ledger(tmp_path / f"{trial}.sqlite")
        killed(lambda path=path: open_(path, key), after_seconds=rng.uniform(0, 0.02))
        with closing(sqlite3.connect(path)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema")}
        done += "entries" in tables
        assert tables in ({"charges"}, {"charges_before_1", "entries", "head", "totals", "requests"})
        with open_(path, key) as ledger:
            assert len(ledger.releases()) == len(OLD_ROWS)
        assert verify(path, public_key=key.public).ok
    assert 0 < done < 40


def test_a_creation_that_is_killed_leaves_a_whole_ledger_or_none(key, tmp_path):
    rng, done = random.Random(3), 0
    for trial in range(40):
        path = tmp_path / f"{trial}.sqlite"
        killed(
            lambda path=path: LifetimeLedger.create(path, data_source=SOURCE, key=key),
            after_seconds=rng.uniform(0, 0.1),
        )
        done += path.exists()
        assert not path.exists() or verify(path, public_key=key.public).ok
        make(path, key, rounds=1)
        assert verify(path, public_key=key.public).ok
    assert 0 < done < 40


# A power cut leaves any prefix of the log, and where it ends, anything


@pytest.fixture
def recorded(key, tmp_path):
    """A ledger's file, its log after some charges, and how long the log was after each entry."""
    path = make(tmp_path / "ledger.sqlite", key, rounds=1)
    log, lengths = path.with_name("ledger.sqlite-wal"), []
    with open_(path, key) as ledger:
        for server_round in range(2, 5):
            number = ledger.reserve(a_charge(server_round), allow=anything)
            lengths.append(log.stat().st_size)
            ledger.commit(number, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
            lengths.append(log.stat().st_size)
        whole = rows(path)
        file, content = path.read_bytes(), log.read_bytes()
    assert len(content) == lengths[-1]
    assert lengths == sorted(set(lengths))
    return file, content, lengths, whole


def frames(content: bytes) -> list[int]:
    """Where each frame of the log ends: 32 bytes of header, then 24 and a page for each."""
    page_size = int.from_bytes(content[8:12], "big")
    return [32, *range(32 + 24 + page_size, len(content) + 1, 24 + page_size)]


def test_a_log_cut_at_any_byte_opens_with_all_that_was_whole(key, tmp_path, recorded):
    file, content, lengths, whole = recorded
    ends = frames(content)
    assert set(lengths) <= set(ends)
    rng = random.Random(4)
    cuts = {end + near for end in ends for near in (-1, 0, 1)} | {rng.randrange(len(content)) for _ in range(100)}
    for cut in sorted(cut for cut in cuts | {0} if cut <= len(content)):
        rest = len(content) - cut
        # Blocks that were allocated but never written hold zeros, or what was there before.
        for tail in (b"", rng.choice([bytes(rest), b"\xff" * rest, rng.randbytes(rest)])):
            copy = tmp_path / f"{cut}-{len(tail)}" / "ledger.sqlite"
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file)
            copy.with_name("ledger.sqlite-wal").write_bytes(content[:cut] + tail)
            survived = 3 + sum(length <= cut for length in lengths)
            with open_(copy, key) as ledger:
                assert rows(copy) == whole[:survived]
                assert ledger.receipt().number == survived
                ledger.reserve(a_charge(99), allow=anything)  # and it goes on from there
            found = verify(copy, public_key=key.public)
            assert (found.problems, found.entries) == ((), survived + 1)


def test_a_ledger_without_its_log_is_found_with_the_receipt(key, tmp_path, recorded):
    """Losing the log as a whole looks like an older copy: no crash does that, but copying one file of two does."""
    file, _, _, whole = recorded
    with open_(tmp_path / "ledger.sqlite", key) as ledger:
        receipt = ledger.receipt()
    copy = tmp_path / "alone.sqlite"
    copy.write_bytes(file)
    assert rows(copy) == whole[:3]
    assert any("older copy" in problem for problem in verify(copy, receipt=receipt).problems)
