"""The ledger keeps every charge for life, whatever happens after it."""

import json
import multiprocessing
import shutil
import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from shared.errors import BudgetExceeded, FedAugError, InputError
from shared.privacy.chain import Commit, KeyChange, Opening, Raise, Reserve, release_text
from shared.privacy.noise import NO_NOISE, SEEDED_NOISE
from tests.client.lifetime_ledgers import (
    OTHER_RELEASE,
    RELEASE,
    REPLY,
    SOURCE,
    a_charge,
    answer,
    anything,
    as_nobody,
    make,
    open_,
    rows,
    tamper,
)


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> OwnerKey:
    return OwnerKey.create(tmp_path_factory.mktemp("keys") / "key.pem")


@pytest.fixture
def path(tmp_path, key):
    return make(tmp_path / "ledger.sqlite", key)


def kinds(path, key):
    with open_(path, key) as ledger:
        return [entry.content.kind for entry in ledger.entries()]


def spent_at(path, key) -> Counter:
    with open_(path, key) as ledger:
        return Counter(ledger.releases())


def assert_sound(path, key):
    found = verify(path, public_key=key.public)
    assert found.problems == ()


# Charging


def test_charges_survive_reopening_in_order(path, key):
    with open_(path, key) as ledger:
        number = ledger.reserve(a_charge(1), allow=anything)
        ledger.commit(number, executed=RELEASE, zeroed_users=3, reply_digest=REPLY)
        ledger.reserve(a_charge(2, release=None, noise=NO_NOISE), allow=anything)
    with open_(path, key) as ledger:
        opening, reserve, commit, unanswered = [entry.content for entry in ledger.entries()]
        assert isinstance(opening, Opening)
        assert (opening.data_source, opening.public_key, opening.schema) == (SOURCE, key.public, 1)
        assert reserve == Reserve.of(a_charge(1), at=reserve.at)
        assert commit == Commit(reserve=2, release=RELEASE, zeroed_users=3, reply_digest=REPLY, at=commit.at)
        assert unanswered.release is None
        assert ledger.releases() == (RELEASE, None)
        assert ledger.totals() == {release_text(RELEASE): 1, "null": 1}
    assert_sound(path, key)


def test_the_latest_charge_of_a_request(path, key):
    with open_(path, key) as ledger:
        assert ledger.latest("r", 1) is None
        first = ledger.reserve(a_charge(1), allow=anything)
        second = ledger.reserve(a_charge(1, job_digest="other"), allow=anything)
        ledger.reserve(a_charge(1, run_id="another"), allow=anything)
        found = ledger.latest("r", 1)
        assert (found.number, found.reserve.job_digest, found.commit) == (second, "other", None)
        assert first < second
        ledger.commit(second, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
        assert ledger.latest("r", 1).commit.reply_digest == REPLY


def test_what_is_not_allowed_is_not_charged(path, key):
    def refuse(spent):
        assert spent == {RELEASE: 1}
        raise BudgetExceeded("too much")

    with open_(path, key) as ledger:
        ledger.reserve(a_charge(1), allow=anything)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(a_charge(2), allow=refuse)
        assert ledger.releases() == (RELEASE,)
        ledger.reserve(a_charge(3), allow=refuse_nothing_but({RELEASE: 1}))  # and the refusal left no lock behind
    assert_sound(path, key)


def refuse_nothing_but(expected):
    def allow(spent):
        assert dict(spent) == expected

    return allow


def test_who_decides_cannot_change_what_is_spent(path, key):
    def forget(spent):
        spent[RELEASE] = 0

    with open_(path, key) as ledger:
        ledger.reserve(a_charge(), allow=anything)
        with pytest.raises(TypeError):
            ledger.reserve(a_charge(), allow=forget)


def test_a_decision_is_made_on_a_sum_nobody_else_can_change(path, key):
    def write_beside(spent):
        with (
            closing(sqlite3.connect(path, timeout=0.1, isolation_level=None)) as beside,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            beside.execute("BEGIN IMMEDIATE")

    with open_(path, key) as ledger:
        ledger.reserve(a_charge(), allow=write_beside)


def test_one_ledger_sees_what_another_wrote(path, key):
    with open_(path, key) as one, open_(path, key) as two:
        one.reserve(a_charge(1), allow=refuse_nothing_but({}))
        two.reserve(a_charge(2, release=OTHER_RELEASE), allow=refuse_nothing_but({RELEASE: 1}))
        one.reserve(a_charge(3), allow=refuse_nothing_but({RELEASE: 1, OTHER_RELEASE: 1}))
        assert one.receipt().number == two.receipt().number == 4


def test_what_is_read_is_of_one_moment(path, key):
    """Between two statements of the reader somebody else charges."""
    with open_(path, key) as reader, open_(path, key) as writer:
        writer.reserve(a_charge(1), allow=anything)

        def charge_beside(statement):
            if "FROM totals" in statement:
                writer.reserve(a_charge(2), allow=anything)

        reader._database.set_trace_callback(charge_beside)
        assert reader.receipt().number == 2
        reader._database.set_trace_callback(None)
        assert reader.receipt().number == 3


def reserve_fifty(path, key_path, run_id, seen):
    key = OwnerKey.load(key_path)
    with open_(path, key) as ledger:
        for server_round in range(50):
            ledger.reserve(a_charge(server_round, run_id=run_id), allow=lambda spent: seen.put(sum(spent.values())))


def test_two_processes_lose_no_charge_and_never_decide_on_the_same_sum(tmp_path):
    key = OwnerKey.create(tmp_path / "key.pem")
    path = make(tmp_path / "ledger.sqlite", key)
    fork = multiprocessing.get_context("fork")
    seen = fork.Queue()
    workers = [fork.Process(target=reserve_fifty, args=(path, tmp_path / "key.pem", run, seen)) for run in ("a", "b")]
    for worker in workers:
        worker.start()
    sums = sorted(seen.get(timeout=60) for _ in range(100))
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert sums == list(range(100))
    with open_(path, key) as ledger:
        charged = [(entry.content.run_id, entry.content.server_round) for entry in ledger.entries() if entry.number > 1]
    assert sorted(charged) == [(run, server_round) for run in "ab" for server_round in range(50)]
    assert_sound(path, key)


def test_a_charge_does_not_read_all_that_came_before(path, key):
    """Counted in steps of SQLite's machine, which no other load on this computer changes."""

    def steps(ledger) -> int:
        count = 0

        def step():
            nonlocal count
            count += 1

        ledger._database.set_progress_handler(step, 1)
        number = ledger.reserve(a_charge(10**6), allow=anything)
        ledger.commit(number, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
        ledger._database.set_progress_handler(None, 1)
        return count

    with open_(path, key) as ledger:
        few = steps(ledger)
        with ledger._writing():
            ledger._append([Reserve.of(a_charge(n), at="2026-11-22T05:45:00Z") for n in range(3000)])
        assert steps(ledger) < 1.2 * few


def test_a_commit_waits_for_the_disk(path, key):
    with open_(path, key) as ledger:
        assert ledger._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ledger._database.execute("PRAGMA synchronous").fetchone() == (2,)


def test_epsilon_is_nowhere_in_the_ledger(path, key):
    make(path, key, rounds=1)
    for _, body, _ in rows(path):
        assert "epsilon" not in json.loads(body)
    with closing(sqlite3.connect(path)) as database:
        assert "epsilon" not in "".join(sql for (sql,) in database.execute("SELECT sql FROM sqlite_schema"))


def test_times_are_utc_with_seconds(path, key):
    make(path, key, rounds=1)
    for _, body, _ in rows(path):
        at = json.loads(body)["at"]
        assert at.endswith("Z")
        assert len(at) == len("2026-11-22T05:45:00Z")


# Committing


def test_a_commit_must_name_what_was_reserved(path, key):
    with open_(path, key) as ledger:
        number = ledger.reserve(a_charge(), allow=anything)
        with pytest.raises(FedAugError, match="Nothing was released; report this as a bug"):
            ledger.commit(number, executed=OTHER_RELEASE, zeroed_users=0, reply_digest=REPLY)
        with pytest.raises(FedAugError, match="charged nothing"):
            ledger.commit(1, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
        with pytest.raises(FedAugError, match="no entry 9"):
            ledger.commit(9, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
    assert kinds(path, key) == ["open", "reserve"]


def test_secret_noise_is_answered_once(path, key):
    with open_(path, key) as ledger:
        number = ledger.reserve(a_charge(), allow=anything)
        ledger.commit(number, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
        with pytest.raises(FedAugError, match="reserve it first"):
            ledger.commit(number, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
    assert kinds(path, key) == ["open", "reserve", "commit"]


@pytest.mark.parametrize(("noise", "release"), [(SEEDED_NOISE, RELEASE), (NO_NOISE, None)])
def test_noise_that_repeats_may_be_answered_again_on_one_charge(path, key, noise, release):
    with open_(path, key) as ledger:
        number = ledger.reserve(a_charge(noise=noise, release=release), allow=anything)
        for _ in range(2):
            ledger.commit(number, executed=release, zeroed_users=0, reply_digest=REPLY)
        assert ledger.releases() == (release,)
    assert_sound(path, key)


def test_only_the_last_charge_of_a_request_is_answered(path, key):
    with open_(path, key) as ledger:
        first = ledger.reserve(a_charge(1), allow=anything)
        ledger.reserve(a_charge(1), allow=anything)
        with pytest.raises(FedAugError, match="the reply to the older one must not leave"):
            ledger.commit(first, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
        assert ledger.releases() == (RELEASE, RELEASE)


# Opening and creating


def test_a_missing_ledger_is_never_begun_again(path, key):
    path.unlink()
    with pytest.raises(InputError, match="never start an empty one"):
        open_(path, key)
    assert list(path.parent.iterdir()) == []


def test_creating_a_ledger_keeps_the_one_there_is(path, key):
    make(path, key, rounds=1)
    before = rows(path)
    LifetimeLedger.create(path, data_source="another", key=key)
    assert rows(path) == before
    assert list(path.parent.iterdir()) == [path]


def test_a_new_ledger_does_not_swallow_the_log_of_a_lost_one(path, key, tmp_path):
    """SQLite would write a log that it finds into whatever file has the name that the log belongs to."""
    with open_(path, key) as ledger:
        answer(ledger, a_charge())
        shutil.copy(path.with_name("ledger.sqlite-wal"), tmp_path / "log")
    path.unlink()
    shutil.move(tmp_path / "log", path.with_name("ledger.sqlite-wal"))
    for attempt in (
        lambda: LifetimeLedger.create(path, data_source=SOURCE, key=key),
        lambda: LifetimeLedger.restore(path, make(tmp_path / "other.sqlite", key), key=key, data_source=SOURCE),
    ):
        with pytest.raises(InputError, match="move this file away and restore"):
            attempt()
        assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be read as one" * 40])
def test_a_file_that_is_no_ledger_is_refused_with_advice(tmp_path, key, content):
    (tmp_path / "ledger.sqlite").write_bytes(content)
    with pytest.raises(InputError, match="never start an empty one for the same data"):
        open_(tmp_path / "ledger.sqlite", key)


def test_another_data_source_or_key_is_refused(path, key, tmp_path):
    with pytest.raises(InputError, match="name the right one in the policy"):
        LifetimeLedger(path, key=key, data_source="films")
    with pytest.raises(InputError, match="Use that key"):
        open_(path, OwnerKey.create(tmp_path / "another.pem"))


def test_without_the_key_it_can_be_read_but_not_charged(path, key):
    make(path, key, rounds=1)
    with LifetimeLedger(path) as ledger:
        assert ledger.releases() == (RELEASE,)
        assert ledger.receipt().is_signed()
        with pytest.raises(InputError, match="to read only"):
            ledger.reserve(a_charge(2), allow=anything)
    assert kinds(path, key) == ["open", "reserve", "commit"]


def test_a_full_disk_charges_nothing_and_says_what_to_do(path, key):
    with open_(path, key) as ledger:
        ledger.reserve(a_charge(1), allow=anything)
        (pages,) = ledger._database.execute("PRAGMA page_count").fetchone()
        ledger._database.execute(f"PRAGMA max_page_count = {pages}")
        long_id = "r" * 20_000  # fills several pages
        with pytest.raises(InputError, match="make room on its disk"):
            ledger.reserve(a_charge(2, run_id=long_id), allow=anything)
        assert ledger.latest(long_id, 2) is None
        ledger._database.execute("PRAGMA max_page_count = 100000")
        assert ledger.reserve(a_charge(2, run_id=long_id), allow=refuse_nothing_but({RELEASE: 1})) == 3
    assert_sound(path, key)


def test_a_charge_that_failed_at_the_last_moment_is_not_remembered(path, key):
    def deny_commit(action, what, *_):
        return sqlite3.SQLITE_DENY if (action, what) == (sqlite3.SQLITE_TRANSACTION, "COMMIT") else sqlite3.SQLITE_OK

    with open_(path, key) as ledger:
        ledger._database.set_authorizer(deny_commit)
        with pytest.raises(InputError, match="cannot be used"):
            ledger.reserve(a_charge(1), allow=anything)
        ledger._database.set_authorizer(None)
        assert ledger.reserve(a_charge(2), allow=refuse_nothing_but({})) == 2
        assert ledger.releases() == (RELEASE,)
    assert_sound(path, key)


def test_a_ledger_that_cannot_be_written_is_refused_with_advice(key):
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder) / "ledger.sqlite", key)
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        advice = as_nobody(lambda: open_(path, key).reserve(a_charge(), allow=anything))
        Path(folder).chmod(0o755)
    assert "let the agent's user write to it and to its folder" in advice


def test_a_ledger_of_a_later_fedaug_is_refused(path, key):
    tamper(path, "PRAGMA user_version = 2")
    with pytest.raises(InputError, match="Upgrade fedaug here; never start another ledger"):
        open_(path, key)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE totals SET count = 1",
        "DELETE FROM totals",
        "UPDATE entries SET body = CAST(replace(body, 'a', 'b') AS BLOB) WHERE number = 5",
        "UPDATE head SET signature = zeroblob(64)",
        "UPDATE head SET signature = x''",
        "UPDATE head SET number = 3, hash = (SELECT hash FROM entries WHERE number = 3)",
        "DELETE FROM entries WHERE number = 5",
        "DELETE FROM head",
        "DELETE FROM entries",
        "UPDATE entries SET hash = zeroblob(32) WHERE number = 1",
        "CREATE TRIGGER undo AFTER INSERT ON totals BEGIN DELETE FROM totals; END",
        "CREATE TABLE more (anything)",
        "DROP TABLE requests",
    ],
)
def test_nothing_is_charged_to_a_ledger_that_was_tampered_with(path, key, statement):
    """Else the next signature would cover what the owner never wrote."""
    make(path, key, rounds=2)
    tamper(path, statement)
    with pytest.raises(InputError, match=r"cannot be used.*restore it from a backup"):
        open_(path, key)


def test_a_wrong_table_of_requests_is_noticed_when_asked(path, key):
    make(path, key, rounds=2)
    tamper(path, "UPDATE requests SET reserved = 4 WHERE server_round = 1")
    with open_(path, key) as ledger, pytest.raises(InputError, match="table of requests is wrong"):
        ledger.latest("r", 1)


def test_a_ledger_that_went_back_while_it_was_open_is_refused(path, key):
    with open_(path, key) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        (before,) = other.execute("SELECT number, hash, signature, totals_checksum FROM head").fetchall()
        ledger.reserve(a_charge(), allow=anything)
        other.execute("DELETE FROM entries WHERE number = 2")
        other.execute("UPDATE head SET number = ?, hash = ?, signature = ?, totals_checksum = ?", before)
        other.execute("DELETE FROM totals")
        with pytest.raises(InputError, match="it has no entry 2"):
            ledger.reserve(a_charge(), allow=anything)
        with pytest.raises(InputError, match="it has no entry 2"):
            ledger.receipt()


@pytest.mark.parametrize("replace", [True, False])
def test_a_ledger_replaced_or_removed_while_it_was_open_is_refused(path, key, tmp_path, replace):
    with open_(path, key) as ledger:
        shutil.copy(path, tmp_path / "copy")
        path.unlink()
        if replace:
            shutil.move(tmp_path / "copy", path)
        with pytest.raises(InputError, match="never start an empty one"):
            ledger.reserve(a_charge(), allow=anything)


# Taking over a ledger of before the chain

OLD_SCHEMA = """
CREATE TABLE charges (
    number INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    server_round INTEGER NOT NULL,
    release TEXT NOT NULL,
    job_digest TEXT NOT NULL,
    noise TEXT NOT NULL,
    zeroed_users INTEGER,
    status TEXT NOT NULL CHECK (status IN ('reserved', 'committed'))
)
"""
OLD_ROWS = [
    (1, "r", 1, json.dumps(RELEASE.to_dict()), "d1", "local", None, "reserved"),
    (2, "r", 1, json.dumps(RELEASE.to_dict()), "d1", "local", 4, "committed"),
    (3, "r", 2, json.dumps(OTHER_RELEASE.to_dict()), "d2", "seeded, not private", 0, "committed"),
    (4, "s", 1, "null", "d3", "none, not private", None, "reserved"),
]


def an_old_ledger(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(OLD_SCHEMA)
        database.executemany("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?, ?)", OLD_ROWS)
    return path


def test_charges_of_before_the_chain_are_taken_over(tmp_path, key):
    path = an_old_ledger(tmp_path / "ledger.sqlite")
    for _ in range(2):  # and only once
        with open_(path, key) as ledger:
            assert ledger.releases() == (RELEASE, RELEASE, OTHER_RELEASE, None)
            assert ledger.totals() == {release_text(RELEASE): 2, release_text(OTHER_RELEASE): 1, "null": 1}
            assert ledger.latest("r", 1).commit.zeroed_users == 4
            assert ledger.latest("r", 1).reserve.job_digest == "d1"
            assert ledger.latest("r", 2).reserve.noise == SEEDED_NOISE
            assert ledger.latest("s", 1).commit is None
    assert kinds(path, key) == ["open", "reserve", "reserve", "commit", "reserve", "commit", "reserve"]
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT * FROM charges_before_1").fetchall() == OLD_ROWS
    assert_sound(path, key)
    with open_(path, key) as ledger:
        ledger.reserve(a_charge(3), allow=refuse_nothing_but({RELEASE: 2, OTHER_RELEASE: 1, None: 1}))


def test_an_old_ledger_is_not_taken_over_by_a_reader(tmp_path, key):
    path = an_old_ledger(tmp_path / "ledger.sqlite")
    before = path.read_bytes()
    with pytest.raises(InputError, match="Open it once with the owner's key"):
        LifetimeLedger(path)
    with pytest.raises(InputError, match="Open it once with the owner's key"):
        LifetimeLedger(path, key=key)
    assert any("open it once with its key" in problem for problem in verify(path).problems)
    assert path.read_bytes() == before


@pytest.mark.parametrize("statement", ["release = '{}'", "release = 'x'", "noise = 'quiet'", "run_id = ''"])
def test_an_old_ledger_with_a_bad_row_is_refused_and_left_as_it_is(tmp_path, key, statement):
    path = an_old_ledger(tmp_path / "ledger.sqlite")
    tamper(path, f"UPDATE charges SET {statement} WHERE number = 4")
    with pytest.raises(InputError):
        open_(path, key)
    with closing(sqlite3.connect(path)) as database:
        assert [name for (name,) in database.execute("SELECT name FROM sqlite_schema")] == ["charges"]


# Keys


def test_a_new_key_takes_over_and_the_old_one_no_longer_opens(path, key, tmp_path):
    new = OwnerKey.create(tmp_path / "new.pem")
    with open_(path, key) as ledger:
        answer(ledger, a_charge(1))
        receipt = ledger.rotate_key(new)
        assert receipt.public_key == new.public
        after = answer(ledger, a_charge(2))
        assert after.public_key == new.public
    with pytest.raises(InputError, match="after a rotation, the new one"):
        open_(path, key)
    with open_(path, new) as ledger:
        assert isinstance(list(ledger.entries())[3].content, KeyChange)
        answer(ledger, a_charge(3))
    for known in (key, new):
        assert verify(path, public_key=known.public, receipt=receipt).problems == ()


def test_an_open_ledger_notices_that_its_key_was_changed(path, key, tmp_path):
    new = OwnerKey.create(tmp_path / "new.pem")
    with open_(path, key) as one, open_(path, key) as two:
        one.rotate_key(new)
        with pytest.raises(InputError, match="after a rotation, the new one"):
            two.reserve(a_charge(), allow=anything)


# Backups


def test_a_backup_is_one_whole_file_also_while_the_ledger_is_in_use(path, key, tmp_path):
    with open_(path, key) as ledger:
        answer(ledger, a_charge())
        (tmp_path / "backups").mkdir()
        ledger.backup(tmp_path / "backups" / "one.sqlite")
        with pytest.raises(InputError, match="choose another name"):
            ledger.backup(tmp_path / "backups" / "one.sqlite")
    assert rows(tmp_path / "backups" / "one.sqlite") == rows(path)
    assert_sound(tmp_path / "backups" / "one.sqlite", key)
    assert [file.name for file in (tmp_path / "backups").iterdir()] == ["one.sqlite"]


@pytest.fixture
def parted(path, key, tmp_path):
    """A ledger and a copy of it, each charged without the other since."""
    make(path, key, rounds=1)
    backup = tmp_path / "backup.sqlite"
    shutil.copy(path, backup)
    with open_(path, key) as ledger:
        answer(ledger, a_charge(2, job_digest="here"))
    with open_(backup, key) as ledger:
        answer(ledger, a_charge(2, job_digest="there", release=OTHER_RELEASE))
        ledger.reserve(a_charge(3, job_digest="there"), allow=anything)
    return backup


def test_restoring_adds_what_only_the_backup_had(path, key, parted):
    before = parted.read_bytes()
    restored = LifetimeLedger.restore(path, parted, key=key, data_source=SOURCE)
    assert (restored.num_raised, restored.may_be_behind) == (2, False)
    assert spent_at(path, key) == {RELEASE: 3, OTHER_RELEASE: 1}
    with open_(path, key) as ledger:
        raised = [entry.content for entry in ledger.entries() if isinstance(entry.content, Raise)]
        assert [content.reserve.job_digest for content in raised] == ["there", "there"]
        assert raised[0].origin == rows(parted)[3][2].hex()
        assert raised[0].backup == rows(parted)[-1][2].hex()
        assert ledger.latest("r", 2).reserve.job_digest == "here"  # what it knew itself, it still knows
        assert ledger.latest("r", 3).reserve.job_digest == "there"
    assert_sound(path, key)
    assert parted.read_bytes() == before


def test_restoring_twice_adds_nothing_more(path, key, parted, tmp_path):
    LifetimeLedger.restore(path, parted, key=key, data_source=SOURCE)
    before = rows(path)
    assert LifetimeLedger.restore(path, parted, key=key, data_source=SOURCE).num_raised == 0
    # Nor does a backup of what was itself raised from a backup.
    with open_(path, key) as ledger:
        ledger.backup(tmp_path / "later.sqlite")
    assert LifetimeLedger.restore(path, tmp_path / "later.sqlite", key=key, data_source=SOURCE).num_raised == 0
    assert LifetimeLedger.restore(parted, path, key=key, data_source=SOURCE).num_raised == 1
    assert rows(path) == before
    assert spent_at(parted, key) == spent_at(path, key)


def test_a_raised_charge_with_repeatable_noise_can_be_answered(path, key, tmp_path):
    shutil.copy(path, tmp_path / "backup.sqlite")
    with open_(tmp_path / "backup.sqlite", key) as ledger:
        ledger.reserve(a_charge(noise=SEEDED_NOISE), allow=anything)
    LifetimeLedger.restore(path, tmp_path / "backup.sqlite", key=key, data_source=SOURCE)
    with open_(path, key) as ledger:
        ledger.commit(ledger.latest("r", 1).number, executed=RELEASE, zeroed_users=0, reply_digest=REPLY)
        assert ledger.releases() == (RELEASE,)
    assert_sound(path, key)


def test_where_the_ledger_is_lost_the_backup_takes_its_place_and_says_so(path, key, parted):
    path.unlink()
    restored = LifetimeLedger.restore(path, parted, key=key, data_source=SOURCE)
    assert (restored.num_raised, restored.may_be_behind) == (0, True)
    assert rows(path)[:-1] == rows(parted)
    with open_(path, key) as ledger:
        last = list(ledger.entries())[-1].content
        assert (last.kind, last.reserve, last.backup) == ("raise", None, rows(parted)[-1][2].hex())
        assert Counter(ledger.releases()) == spent_at(parted, key)
        ledger.reserve(a_charge(1, run_id="allowance after a restore"), allow=anything)
    assert_sound(path, key)
    assert sorted(file.name for file in path.parent.iterdir()) == ["backup.sqlite", "ledger.sqlite"]


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("damage", ["another source", "another owner", "bits", "no database", "missing", "behind head"])
def test_a_backup_that_is_not_this_ledgers_or_not_whole_is_refused(path, key, parted, tmp_path, damage, lost):
    stranger = OwnerKey.create(tmp_path / "stranger.pem")
    backup = tmp_path / "bad.sqlite"
    if damage == "another source":
        LifetimeLedger.create(backup, data_source="films", key=key)
    elif damage == "another owner":
        make(backup, stranger, rounds=1)
    elif damage == "bits":
        shutil.copy(parted, backup)
        tamper(backup, "UPDATE entries SET body = CAST(replace(body, 'torch', 'tensor') AS BLOB) WHERE number = 2")
    elif damage == "behind head":
        shutil.copy(parted, backup)
        tamper(backup, "DELETE FROM entries WHERE number = 6")
    elif damage == "no database":
        backup.write_bytes(b"x" * 5000)
    if lost:
        path.unlink()
    before = None if lost else rows(path)
    with pytest.raises(InputError, match="backup"):
        LifetimeLedger.restore(path, backup, key=key, data_source=SOURCE)
    assert path.exists() != lost
    assert lost or rows(path) == before


def test_a_backup_of_before_a_rotation_is_still_this_owners(path, key, parted, tmp_path):
    new = OwnerKey.create(tmp_path / "new.pem")
    with open_(path, key) as ledger:
        ledger.rotate_key(new)
    assert LifetimeLedger.restore(path, parted, key=new, data_source=SOURCE).num_raised == 2
    assert_sound(path, new)


def test_a_damaged_ledger_is_not_added_to(path, key, parted):
    tamper(path, "UPDATE entries SET body = CAST(replace(body, 'torch', 'tensor') AS BLOB) WHERE number = 2")
    with pytest.raises(InputError, match="Move it away, but keep it; then restore again"):
        LifetimeLedger.restore(path, parted, key=key, data_source=SOURCE)


steps = st.lists(
    st.sampled_from(["charge here", "charge there", "copy", "lose", "restore here", "restore there"]), max_size=12
)


@given(steps)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_restoring_never_lowers_what_is_spent(key, tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("restore")
    here, there = make(folder / "here.sqlite", key), folder / "there.sqlite"
    shutil.copy(here, there)
    for at, step in enumerate(steps):
        if step == "charge here" and here.exists():
            with open_(here, key) as ledger:
                ledger.reserve(a_charge(at), allow=anything)
        elif step == "charge there":
            with open_(there, key) as ledger:
                answer(ledger, a_charge(at, release=OTHER_RELEASE))
        elif step == "copy" and here.exists():
            shutil.copy(here, there)
        elif step == "lose":
            here.unlink(missing_ok=True)
        elif step == "restore here":
            lost = not here.exists()
            before = Counter() if lost else spent_at(here, key)
            LifetimeLedger.restore(here, there, key=key, data_source=SOURCE)
            assert spent_at(here, key) == spent_at(there, key) if lost else spent_at(here, key) >= before
            assert spent_at(here, key) >= spent_at(there, key)
            assert_sound(here, key)
        elif step == "restore there" and here.exists():
            before = spent_at(there, key)
            LifetimeLedger.restore(there, here, key=key, data_source=SOURCE)
            assert spent_at(there, key) >= before
            assert spent_at(there, key) >= spent_at(here, key)
            assert_sound(there, key)
