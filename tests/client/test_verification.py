"""Whatever is changed, dropped or moved in a ledger, verification says so."""

import json
import random
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from client.store.verification import Replay, _parse, verify
from shared.errors import InputError
from shared.privacy.chain import (
    NOTHING_BEFORE,
    Commit,
    Entry,
    KeyChange,
    Opening,
    Raise,
    Reserve,
    canonical,
    digest,
    head_message,
    release_text,
    totals_checksum,
)
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
from tests.shared.privacy.test_chain import entries

AT = "2026-11-22T05:45:00Z"


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> OwnerKey:
    return OwnerKey.create(tmp_path_factory.mktemp("keys") / "key.pem")


@pytest.fixture
def path(tmp_path, key):
    return make(tmp_path / "ledger.sqlite", key, rounds=3)


def problems(path, **known) -> str:
    return "\n".join(verify(path, **known).problems)


def forged(path: Path, signer: OwnerKey, contents, *, entries=None) -> None:
    """Fill a ledger's file with a chain that is right in everything, as far as ``signer`` can make it."""
    number, previous, table = 0, NOTHING_BEFORE, []
    for content in contents:
        number += 1
        body = Entry(number=number, previous=previous, salt="5a" * 16, content=content).to_bytes()
        previous = digest(body)
        table.append((number, body, bytes.fromhex(previous)))
    replay = Replay()
    for row in table:
        replay.add(*row)
    signature = signer.sign(head_message(SOURCE, number, previous))
    checksum = totals_checksum(replay.totals).to_bytes(32, "big")
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for name in ("entries", "totals", "requests"):
            database.execute(f"DELETE FROM {name}")
        database.executemany("INSERT INTO entries VALUES (?, ?, ?)", table)
        database.executemany("INSERT INTO totals VALUES (?, ?)", replay.totals.items())
        for (run_id, server_round), (reserved, committed) in replay.requests.items():
            database.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", (run_id, server_round, reserved, committed))
        database.execute(
            "UPDATE head SET number = ?, hash = ?, signature = ?, totals_checksum = ?",
            (number, bytes.fromhex(previous), signature, checksum),
        )


def contents_of(path) -> list:
    return [Entry.from_bytes(body).content for _, body, _ in rows(path)]


def test_a_sound_ledger(path, key):
    with open_(path, key) as ledger:
        ledger.reserve(a_charge(4, release=None, noise=NO_NOISE), allow=anything)
        receipt = ledger.receipt()
    found = verify(path, public_key=key.public, receipt=receipt)
    assert found.ok
    assert (found.entries, found.reserved, found.committed) == (8, 4, 3)
    assert (found.data_source, found.public_keys) == (SOURCE, (key.public,))


def test_verifying_changes_no_file(path):
    before = path.read_bytes()
    assert verify(path).ok
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_ledger_in_use_is_verified_with_all_that_was_charged(path, key):
    with open_(path, key) as ledger:
        ledger.reserve(a_charge(4), allow=anything)
        found = verify(path, receipt=ledger.receipt())
        assert (found.problems, found.reserved) == ((), 4)


def test_a_ledger_on_a_disk_that_cannot_be_written_is_verified(key):
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder) / "ledger.sqlite", key, rounds=3)
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        told = as_nobody(lambda: verify(path).reserved)
        Path(folder).chmod(0o755)
    assert told == "3"


# What somebody without the key can do


def test_entries_cut_off_the_end_are_found(path, key):
    """The old signature covers the old head, and no other signature is to be had."""
    tamper(path, "CREATE TABLE saved AS SELECT signature FROM head")
    forged(path, OwnerKey.create(path.with_name("forger.pem")), contents_of(path)[:-2])
    tamper(path, "UPDATE head SET signature = (SELECT signature FROM saved)", "DROP TABLE saved")
    assert problems(path) == "its head is not signed by the owner's key"


def test_an_entry_replaced_by_one_with_a_hash_of_its_own_is_found(path):
    body = rows(path)[1][1].replace(b'"noise_multiplier":1.5', b'"noise_multiplier":9.5')
    tamper(path, ("UPDATE entries SET body = ?, hash = ? WHERE number = 2", (body, bytes.fromhex(digest(body)))))
    assert "entry 3: it does not follow the entry before it" in problems(path)


def test_a_forged_entry_is_found(path, key):
    contents = contents_of(path)
    cheaper = Reserve.of(a_charge(1, release=OTHER_RELEASE), at=AT)
    forged(path, OwnerKey.create(path.with_name("forger.pem")), [contents[0], cheaper])
    assert problems(path) == "its head is not signed by the owner's key"
    with pytest.raises(InputError, match="not signed by its key"):
        open_(path, key)


def test_a_ledger_forged_as_a_whole_is_found_by_who_knows_the_key_or_has_a_receipt(path, key):
    with open_(path, key) as ledger:
        receipt = ledger.receipt()
    forger = OwnerKey.create(path.with_name("forger.pem"))
    forged(path, forger, [Opening(data_source=SOURCE, public_key=forger.public, at=AT), *contents_of(path)[1:]])
    tamper(path, ("UPDATE head SET public_key = ?", (bytes.fromhex(forger.public),)))
    assert problems(path) == ""
    assert "not signed by the key" in problems(path, public_key=key.public)
    assert "not the one that the receipt was given for" in problems(path, receipt=receipt)
    assert "signed by another key than entry 7" in problems(path, receipt=receipt)


def test_a_key_that_endorsed_itself_is_found(path, key):
    forger = OwnerKey.create(path.with_name("forger.pem"))
    change = KeyChange(public_key=forger.public, endorsement=forger.sign(b"anything").hex(), at=AT)
    forged(path, forger, [*contents_of(path), change])
    tamper(path, ("UPDATE head SET public_key = ?", (bytes.fromhex(forger.public),)))
    assert problems(path, public_key=key.public) == "entry 8: the key before it did not endorse its key"


def test_an_older_copy_is_found_with_a_receipt_only(path, key, tmp_path):
    shutil.copy(path, tmp_path / "older")
    with open_(path, key) as ledger:
        receipt = answer(ledger, a_charge(4))
    shutil.move(tmp_path / "older", path)
    assert problems(path, public_key=key.public) == ""
    assert "it ends at entry 7, the receipt names entry 9" in problems(path, receipt=receipt)
    with open_(path, key) as ledger:  # and going on from the older copy does not hide it
        answer(ledger, a_charge(5))
    assert "entry 9: it is not the one" in problems(path, receipt=receipt)


def test_a_receipt_of_another_ledger_is_found(path, key, tmp_path):
    LifetimeLedger.create(tmp_path / "films.sqlite", data_source="films", key=key)
    with LifetimeLedger(tmp_path / "films.sqlite", key=key) as films:
        receipt = films.receipt()
    assert "data source 'films'" in problems(path, receipt=receipt)


def test_a_receipt_that_was_changed_is_found(path, key):
    with open_(path, key) as ledger:
        receipt = ledger.receipt()
    changed = type(receipt).from_dict({**receipt.to_dict(), "signature": "00" * 64})
    assert problems(path, receipt=changed) == "the receipt is not signed by the key that it names"


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["DELETE FROM entries WHERE number = 7"], "head is not its last entry"),
        (["DELETE FROM entries WHERE number = 4"], "entry 4: it is numbered 5"),
        (["UPDATE entries SET number = 9 WHERE number = 7"], "entry 7: it is numbered 9"),
        (
            [
                "UPDATE entries SET number = 100 WHERE number = 4",
                "UPDATE entries SET number = 4 WHERE number = 6",
                "UPDATE entries SET number = 6 WHERE number = 100",
            ],
            "entry 4: its bytes name number 6",
        ),
        (["UPDATE entries SET hash = zeroblob(32) WHERE number = 3"], "entry 3: its bytes are not those"),
        (["UPDATE entries SET hash = x'' WHERE number = 3"], "entry 3: its bytes are not those"),
        (["UPDATE entries SET body = zeroblob(9) WHERE number = 3"], "entry 3: ledger entry: cannot be read"),
        (["UPDATE head SET number = 6"], "head is not its last entry"),
        (["UPDATE head SET hash = zeroblob(32)"], "head is not its last entry"),
        (["UPDATE head SET signature = zeroblob(64)"], "not signed"),
        (["UPDATE head SET signature = x''"], "not signed"),
        (["UPDATE head SET public_key = zeroblob(32)"], "names another key"),
        (["UPDATE head SET totals_checksum = zeroblob(32)"], "do not have their checksum"),
        (["DELETE FROM head"], "it has 0 heads"),
        (["DELETE FROM entries"], "head is not its last entry"),
        (["UPDATE totals SET count = 2"], "its totals are not"),
        (["DELETE FROM totals"], "its totals are not"),
        (["INSERT INTO totals VALUES ('null', 0)"], "its totals are not"),
        (["UPDATE requests SET committed = NULL WHERE server_round = 1"], "table of requests"),
        (["DELETE FROM requests WHERE server_round = 1"], "table of requests"),
        (["INSERT INTO requests VALUES ('x', 1, 2, 3)"], "table of requests"),
        (["CREATE TRIGGER undo AFTER INSERT ON totals BEGIN DELETE FROM totals; END"], "trigger 'undo' is no part"),
        (["CREATE VIEW more AS SELECT 1"], "view 'more' is no part"),
        (["DROP TABLE requests"], "table 'requests' is missing"),
        (["DROP TABLE entries"], "table 'entries' is missing"),
        (["PRAGMA user_version = 2"], "upgrade fedaug here"),
        (["PRAGMA user_version = 0"], "open it once with its key"),
    ],
)
def test_tables_that_were_tampered_with(path, statements, problem):
    tamper(path, *statements)
    assert problem in problems(path)


def test_a_table_with_the_right_name_and_looser_types_is_found(path):
    tamper(
        path,
        "ALTER TABLE entries RENAME TO strict_ones",
        "CREATE TABLE entries (number INTEGER PRIMARY KEY, body, hash)",
        "INSERT INTO entries SELECT number, CAST(body AS TEXT), hash FROM strict_ones",
        "DROP TABLE strict_ones",
    )
    assert "table 'entries' is missing or is not as it was made" in problems(path)
    assert "entry 1: the type of a column was changed" in problems(path)


# What only our own mistake could sign


def a_commit(number, release=RELEASE) -> Commit:
    return Commit(reserve=number, release=release, zeroed_users=0, reply_digest=REPLY, at=AT)


def a_reserve(**changes) -> Reserve:
    return Reserve.of(a_charge(**changes), at=AT)


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ([a_reserve(), a_commit(2)], ""),
        ([a_reserve(noise=SEEDED_NOISE), a_commit(2), a_commit(2)], ""),
        ([a_reserve(), a_reserve(), a_commit(2)], ""),
        ([a_reserve(), a_commit(2), a_commit(2)], "entry 4: a second reply to entry 2, whose noise was secret"),
        ([a_reserve(), a_commit(2, OTHER_RELEASE)], "entry 3: it executed another release than entry 2 charged"),
        ([a_commit(3), a_reserve()], "entry 2: it commits entry 3, which charged nothing before it"),
        ([a_commit(1)], "entry 2: it commits entry 1, which charged nothing before it"),
        ([Opening(data_source=SOURCE, public_key="ab" * 32, at=AT)], "entry 2: the first entry opens the ledger"),
    ],
)
def test_entries_that_contradict_each_other_are_found_although_signed(path, key, contents, problem):
    forged(path, key, [contents_of(path)[0], *contents])
    assert problem in problems(path)
    assert problem or verify(path).ok


def test_a_ledger_that_does_not_open_itself_is_found(path, key):
    forged(path, key, contents_of(path)[1:])
    assert "entry 1: the first entry opens the ledger, and no other" in problems(path)


def test_problems_end_before_they_fill_the_screen(path, key):
    with open_(path, key) as ledger, ledger._writing():
        ledger._append([a_reserve(server_round=n) for n in range(200)])
    tamper(path, "UPDATE entries SET hash = zeroblob(32)")
    found = verify(path)
    assert len(found.problems) == 21
    assert found.problems[-1] == "there is more"


@pytest.mark.parametrize(
    "content", [None, b"", b"x", b"x" * 5000, b"SQLite format 3\0", b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_what_is_no_ledger_is_a_problem_and_no_crash(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    found = verify(tmp_path / "file", public_key="ab" * 32)
    assert not found.ok
    assert found.entries == 0
    assert (tmp_path / "file").exists() == (content is not None)


def test_a_folder_is_no_ledger(tmp_path):
    assert not verify(tmp_path).ok


# The fast reading of entries, against the slow one


@given(entries, st.data())
def test_the_fast_reading_finds_what_the_slow_one_does(entry, data):
    body = entry.to_bytes()
    replay = Replay()
    fast = replay._skim(body)
    assert fast is None or fast == _parse(body)
    # And where a few bytes are changed, it never accepts what the slow one refuses.
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.sampled_from(b'{}[]",:\\ 019.eE-antulrsf\x00\x7f\xc3\xa9'))
    fast = replay._skim(bytes(changed))
    assert fast is None or fast == _parse(bytes(changed))


def test_the_fast_reading_reads_ordinary_entries():
    for content in (a_reserve(), a_reserve(release=None, noise=NO_NOISE), a_commit(2), a_commit(2, None)):
        body = Entry(number=3, previous="ab" * 32, salt="5a" * 16, content=content).to_bytes()
        assert Replay()._skim(body) == _parse(body)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"noise_multiplier":1.5', '"noise_multiplier":1.50'),
        ('"noise_multiplier":1.5', '"noise_multiplier":-1.5'),
        ('"noise_multiplier":1.5', '"noise_multiplier":"1.5"'),
        ('"noise_multiplier":1.5', '"noise_multiplier":' + "[" * 5000 + "]" * 5000),
        ('"torch":"2.13"', '"torch":2.13'),
        ('"torch":"2.13"', '"torch": "2.13"'),
        ('"torch":"2.13"', '"torch":' + "[" * 5000 + "]" * 5000),
        ('{"torch":"2.13"}', "null"),
        ('"noise":"local"', '"noise":"quiet"'),
        ('"noise":"local"', '"noise":"none, not private"'),
        ('"server_round":1', '"server_round":01'),
        ('"server_round":1', '"server_round":-1'),
        ('"run_id":"r"', '"run_id":""'),
        ('"run_id":"r"', '"run_id":"\t"'),
        ('"run_id":"r"', '"run_id":"\\u0072"'),
        ('"at":"2026', '"at":"۲۰۲۶'),
    ],
)
def test_the_fast_reading_leaves_what_is_not_canonical_to_the_slow_one(old, new):
    body = Entry(number=3, previous="ab" * 32, salt="5a" * 16, content=a_reserve()).to_bytes().decode()
    assert old in body
    assert Replay()._skim(body.replace(old, new).encode()) is None
    with pytest.raises(InputError):
        _parse(body.replace(old, new).encode())


# Flipped bits


@pytest.fixture(scope="module")
def twenty(tmp_path_factory, key) -> Path:
    """A ledger of twenty entries of every kind, in one file."""
    folder = tmp_path_factory.mktemp("twenty")
    path, backup = folder / "ledger.sqlite", folder / "backup.sqlite"
    make(path, key, rounds=6)
    with open_(path, key) as ledger:
        ledger.backup(backup)
    with open_(backup, key) as ledger:
        ledger.reserve(a_charge(7, release=OTHER_RELEASE), allow=anything)
    LifetimeLedger.restore(path, backup, key=key, data_source=SOURCE)
    with open_(path, key) as ledger:
        answer(ledger, a_charge(8, noise=SEEDED_NOISE))
        ledger.reserve(a_charge(9, release=None, noise=NO_NOISE), allow=anything)
        ledger.rotate_key(OwnerKey.create(folder / "new.pem"))
        answer(ledger, a_charge(10))
    found = verify(path, public_key=key.public)
    assert (found.problems, found.entries) == ((), 20)
    assert {json.loads(body)["kind"] for _, body, _ in rows(path)} == {"open", "reserve", "commit", "raise", "key"}
    return path


def places_of(path: Path) -> list[int]:
    """Offsets in the file of every byte of an entry's body and hash, and of the head's signature and key."""
    content = path.read_bytes()
    with closing(sqlite3.connect(path)) as database:
        values = [value for row in database.execute("SELECT body, hash FROM entries") for value in row]
        values += database.execute("SELECT signature, public_key, totals_checksum FROM head").fetchone()
    found = set()
    for value in values:
        assert content.count(value) in (1, 2)  # the last hash stands in the head too
        at = content.find(value)
        while at >= 0:
            found.update(range(at, at + len(value)))
            at = content.find(value, at + 1)
    return sorted(found)


def flips(path: Path, places):
    """``path`` with one bit flipped, for each of ``places``, and as it was again after each."""
    with path.open("r+b", buffering=0) as file:
        for offset, bit in places:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ (1 << bit)]))
            yield offset, bit
            file.seek(offset)
            file.write(bytes([byte]))


def assert_every_flip_is_found(path, places):
    missed = [place for place in flips(path, places) if verify(path).ok]
    assert missed == []
    assert verify(path).ok


def test_one_in_thirteen_flipped_bits_of_entries_is_found(twenty, tmp_path):
    path = Path(shutil.copy(twenty, tmp_path))
    bits = [(offset, bit) for offset in places_of(path) for bit in range(8)]
    assert len(bits) > 50_000
    assert_every_flip_is_found(path, bits[::13])


@pytest.mark.exhaustive
def test_every_flipped_bit_of_entries_is_found(twenty, tmp_path):
    path = Path(shutil.copy(twenty, tmp_path))
    assert_every_flip_is_found(path, [(offset, bit) for offset in places_of(path) for bit in range(8)])


def test_a_bit_flipped_anywhere_else_is_found_or_changes_no_entry(twenty, tmp_path):
    path = Path(shutil.copy(twenty, tmp_path))
    entries_there, size = rows(path), path.stat().st_size
    known = set(places_of(path))
    rng = random.Random(7)
    places = [(rng.randrange(size), rng.randrange(8)) for _ in range(1500)]
    # The head of each page describes what is on it: all of it, not a sample.
    (page_size,) = sqlite3.connect(path).execute("PRAGMA page_size").fetchone()
    places += [(page + at, at % 8) for page in range(0, size, page_size) for at in range(130)]
    found = unnoticed = 0
    for _ in flips(path, [place for place in places if place[0] not in known]):
        if verify(path).ok:
            unnoticed += 1
            assert rows(path) == entries_there
        else:
            found += 1
    assert found > 100
    assert unnoticed > 100  # unused space is nobody's


def test_a_flipped_bit_never_lowers_what_a_ledger_takes_for_spent(twenty, tmp_path):
    path = Path(shutil.copy(twenty, tmp_path))
    new = OwnerKey.load(twenty.with_name("new.pem"))
    with open_(path, new) as ledger:
        spent = ledger.totals()
    before, rng, opened = path.read_bytes(), random.Random(8), 0
    for _ in range(400):
        flipped = bytearray(before)
        flipped[rng.randrange(len(before))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with suppress(InputError), open_(path, new) as ledger:
            opened += 1
            assert ledger.totals() == spent
            ledger.reserve(a_charge(99), allow=lambda seen: None)
            assert sum(ledger.totals().values()) == sum(spent.values()) + 1
        for suffix in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert opened > 100


def test_canonical_totals_are_what_the_ledger_counts(twenty):
    with LifetimeLedger(twenty) as ledger:
        assert set(ledger.totals()) == {release_text(RELEASE), release_text(OTHER_RELEASE), "null"}
        assert canonical(None) == b"null"
        assert sum(isinstance(entry.content, Raise) for entry in ledger.entries()) == 1
