"""An owner's record of all its data was ever charged for: on disk first, chained, signed, for life."""

import json
import os
import secrets
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal, Self

from client.store.database import (
    OLD_TABLE,
    TABLES,
    connect,
    connect_to_read,
    missing,
    refuse_leftovers,
    schema_problems,
    unusable,
    usable,
)
from client.store.files import publish
from client.store.keys import OwnerKey
from client.store.verification import verify
from shared.errors import FedAugError, InputError
from shared.privacy.chain import (
    NOTHING_BEFORE,
    SCHEMA_VERSION,
    Charge,
    Commit,
    Content,
    Entry,
    KeyChange,
    Opening,
    Raise,
    Receipt,
    Reserve,
    digest,
    head_message,
    key_message,
    release_checksum,
    release_text,
    totals_checksum,
)
from shared.privacy.noise import LOCAL_NOISE
from shared.privacy.releases import Release, release_from_dict

Spent = Mapping[Release | None, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Charged:
    """The last charge for one request, and what became of it.

    Args:
        number: of the entry that charged it.
        commit: None until its reply was on disk, and where the training was cut off.
    """

    number: int
    reserve: Reserve
    commit: Commit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restored backup did.

    Args:
        num_raised: charges that only the backup had, now on the ledger.
        may_be_behind: the ledger was lost and the backup stands in for it. What was charged after the backup is not
            known: decide on an allowance, and reserve it.
    """

    num_raised: int
    may_be_behind: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    number: int
    hash: str
    signature: bytes
    public_key: str
    totals_checksum: int


class LifetimeLedger:
    """All charges of one data set; use as a context manager, in the thread that opened it.

    Guarantee:
        A charge that :meth:`reserve` returned from survives a crash or a power cut and counts as spent for ever, and
        two processes never decide on the same sum.
    """

    def __init__(self, path: Path, *, key: OwnerKey | None = None, data_source: str | None = None) -> None:
        """Open the ledger at ``path``; one of before the chain is taken over into it first, all or nothing.

        Args:
            key: whose signature the ledger carries; None to read only.
            data_source: refuse the ledger of any other; required to take over one of before the chain.
        Raises:
            InputError: there is none, it is not a ledger, it is damaged, another's, or cannot be written.
        """
        self._path, self._key = path, key
        if not path.exists():
            raise missing(path)
        with usable(path):
            self._database = connect(path)
        try:
            with usable(path):
                self._identity = _identity(path)
                if self._schema_version() == 0:
                    self._take_over(data_source)
            with self._reading():
                self._load()
            if data_source not in (None, self.data_source):
                raise InputError(
                    f"the ledger at {path} is of the data source {self.data_source!r}, not of {data_source!r}: name the"
                    " right one in the policy, or bring its own ledger."
                )
        except BaseException:
            self._database.close()
            raise

    @classmethod
    def create(cls, path: Path, *, data_source: str, key: OwnerKey) -> None:
        """Make the ledger of data that was never charged; one that exists is left as it is.

        Raises:
            InputError: it cannot be written, or remains of a lost one are beside it.
        """
        if path.exists():
            return
        refuse_leftovers(path)
        with usable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                new = Path(folder) / "ledger.sqlite"
                with closing(connect(new, mode="rwc")) as database, _transaction(database, "BEGIN IMMEDIATE"):
                    _begin(database, [Opening(data_source=data_source, public_key=key.public, at=_now())], key)
                # Where somebody else was faster, theirs stays.
                with suppress(FileExistsError):
                    _publish(new, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    @property
    def data_source(self) -> str:
        return self._opening.data_source

    def entries(self) -> Iterator[Entry]:
        """Every entry, in order."""
        with usable(self._path):
            for (body,) in self._database.execute("SELECT body FROM entries ORDER BY number"):
                yield self._read(body)

    def releases(self) -> tuple[Release | None, ...]:
        """Every release that counts as spent, in order: committed or not, for one may have left before the crash."""
        charged = (_charge_in(entry.content) for entry in self.entries())
        return tuple(reserve.release for reserve in charged if reserve is not None)

    def releases_of(self, run_id: str) -> tuple[Release | None, ...]:
        """Those of :meth:`releases` that were charged for one run."""
        charged = (_charge_in(entry.content) for entry in self.entries())
        return tuple(reserve.release for reserve in charged if reserve is not None and reserve.run_id == run_id)

    def spent(self) -> Spent:
        """How often each release counts as spent."""
        with self._reading():
            self._catch_up()
        return dict(self._spent)

    def totals(self) -> dict[str, int]:
        """How often each release counts as spent, by its canonical JSON."""
        with usable(self._path):
            return dict(self._database.execute("SELECT release, count FROM totals").fetchall())

    def latest(self, run_id: str, server_round: int) -> Charged | None:
        """The last charge for one request, or None.

        Where its noise was not secret, training again repeats the release: commit it again instead of reserving again.
        """
        with self._reading():
            row = self._database.execute(
                "SELECT reserved, committed FROM requests WHERE run_id = ? AND server_round = ?", (run_id, server_round)
            ).fetchone()
            if row is None:
                return None
            number, committed = row
            reserve = _charge_in(self._entry(number))
            commit = self._entry(committed) if committed is not None else None
        if (
            reserve is None
            or (reserve.run_id, reserve.server_round) != (run_id, server_round)
            or not (commit is None or (isinstance(commit, Commit) and commit.reserve == number))
        ):
            raise self._damaged(f"its table of requests is wrong about round {server_round} of run {run_id!r}")
        return Charged(number=number, reserve=reserve, commit=commit)

    def receipt(self) -> Receipt:
        """The owner's signed word on where its ledger stands."""
        with self._reading():
            self._catch_up()
        return self._receipt(self._head)

    def reserve(self, charge: Charge, *, allow: Callable[[Spent], None]) -> int:
        """Append ``charge``, unless ``allow`` raises when shown what is spent without it; return the entry's number.

        The rows stay locked in between, so two rounds at once cannot both fit the last of a budget.

        Raises:
            InputError: the ledger cannot be written; nothing was charged.
        """
        with self._writing():
            allow(MappingProxyType(self._spent))
            self._append([Reserve.of(charge, at=_now())])
        return self._head.number

    def commit(self, number: int, *, executed: Release | None, zeroed_users: int, reply_digest: str) -> Receipt:
        """Say what became of the charge ``number``; call once its reply is on disk.

        Raises:
            FedAugError: ``executed`` is not what was reserved, ``number`` is not the last charge of its request, or it
                was committed before and its noise was secret. Nothing is written, and nothing may leave.
        """
        with self._writing():
            reserve = _charge_in(self._entry(number))
            if reserve is None:
                raise FedAugError(f"entry {number} of the ledger charged nothing: commit the number reserve() returned")
            row = self._database.execute(
                "SELECT reserved, committed FROM requests WHERE run_id = ? AND server_round = ?",
                (reserve.run_id, reserve.server_round),
            ).fetchone()
            if row is None or row[0] != number:
                raise FedAugError(
                    f"round {reserve.server_round} was charged again after entry {number} of the ledger: commit that"
                    " charge; the reply to the older one must not leave."
                )
            if row[1] is not None and reserve.noise == LOCAL_NOISE:
                raise FedAugError(
                    f"entry {number} of the ledger was committed before. Secret noise cannot be repeated, so a second"
                    " reply is a second release: reserve it first."
                )
            if executed != reserve.release:
                raise FedAugError(
                    f"entry {number} of the ledger charged {reserve.release}, but {executed} was executed. Nothing was"
                    " released; report this as a bug."
                )
            self._append(
                [
                    Commit(
                        reserve=number,
                        release=executed,
                        zeroed_users=zeroed_users,
                        reply_digest=reply_digest,
                        at=_now(),
                    )
                ]
            )
        return self._receipt(self._head)

    def rotate_key(self, new: OwnerKey) -> Receipt:
        """Let ``new`` sign from now on. Keep its file before calling: the ledger then opens with no other key."""
        with self._writing():
            head, key = self._head, self._signing_key()
            message = key_message(self.data_source, head.number + 1, head.hash, new.public)
            change = KeyChange(public_key=new.public, endorsement=key.sign(message).hex(), at=_now())
            self._append([change], signer=new)
        self._key = new
        return self._receipt(self._head)

    def backup(self, path: Path) -> None:
        """Write a copy as one file, also while others use the ledger.

        Raises:
            InputError: there is a file already, which is left as it is; or it cannot be written.
        """
        refuse_leftovers(path)
        with usable(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            copy = Path(folder) / "ledger.sqlite"
            _copy(self._database, copy)
            try:
                _publish(copy, path)
            except FileExistsError:
                raise InputError(f"{path} exists already and was left as it is: choose another name.") from None

    @classmethod
    def restore(cls, path: Path, backup: Path, *, key: OwnerKey, data_source: str) -> Restored:
        """Add to the ledger at ``path`` what only ``backup`` has; where there is no ledger, the backup becomes it.

        Guarantee:
            What counts as spent afterwards is never less than before, nor less than the backup's.
        Raises:
            InputError: the backup or the ledger does not verify, is of another data source or another owner, or cannot
                be written. All is as it was.
        """
        if not backup.exists():
            raise InputError(f"there is no backup at {backup}.")
        with usable(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            copy = Path(folder) / "ledger.sqlite"  # verified and read from the same bytes, whoever writes to the backup
            try:
                with closing(connect_to_read(backup)) as source:
                    _copy(source, copy)
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise _no_backup(backup, error) from None
            if path.exists():
                return cls._add_backup(path, copy, backup, key=key, data_source=data_source)
            refuse_leftovers(path)
            return cls._begin_from_backup(path, copy, backup, key=key, data_source=data_source)

    @classmethod
    def _add_backup(cls, path: Path, copy: Path, backup: Path, *, key: OwnerKey, data_source: str) -> Restored:
        with cls(path, key=key, data_source=data_source) as ledger:
            state = verify(path, public_key=key.public)
            if not state.ok:
                raise InputError(
                    f"the ledger at {path} does not verify ({'; '.join(state.problems)}). Move it away, but keep it;"
                    " then restore again."
                )
            _check_backup(copy, backup, trusted=state.public_keys, data_source=data_source)
            with ledger._writing():
                known = {origin for origin, _ in _charges(ledger.entries())}
                with cls(copy) as other:
                    raised = [
                        Raise(reserve=reserve, origin=origin, backup=other._head.hash, at=_now())
                        for origin, reserve in _charges(other.entries())
                        if origin not in known
                    ]
                ledger._append(raised)
            return Restored(num_raised=len(raised), may_be_behind=False)

    @classmethod
    def _begin_from_backup(cls, path: Path, copy: Path, backup: Path, *, key: OwnerKey, data_source: str) -> Restored:
        _check_backup(copy, backup, trusted=(key.public,), data_source=data_source)
        with cls(copy, key=key, data_source=data_source) as ledger, ledger._writing():
            ledger._append([Raise(reserve=None, origin=None, backup=ledger._head.hash, at=_now())])
        try:
            _publish(copy, path)
        except FileExistsError:
            raise InputError(
                f"a ledger appeared at {path} meanwhile: restore again, to add the backup to it."
            ) from None
        return Restored(num_raised=0, may_be_behind=True)

    def _schema_version(self) -> int:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise InputError(
                f"the ledger at {self._path} was written by a later fedaug (schema {version}; this one knows"
                f" {SCHEMA_VERSION}). Upgrade fedaug here; never start another ledger for the same data."
            )
        return int(version)

    def _take_over(self, data_source: str | None) -> None:
        """Turn the charges of a ledger of before the chain into entries; the old table stays, under another name."""
        self._database.execute("SELECT count(*) FROM charges")  # else it is no ledger at all
        if self._key is None or data_source is None:
            raise InputError(
                f"the ledger at {self._path} was written by an earlier fedaug, unsigned. Open it once with the owner's"
                " key and the data source that its policy names; its charges are then taken over."
            )
        with _transaction(self._database, "BEGIN IMMEDIATE"):
            if self._schema_version() != 0:  # somebody else was faster
                return
            now = _now()
            contents: list[Content] = [Opening(data_source=data_source, public_key=self._key.public, at=now)]
            for charge, zeroed_users in _old_charges(self._database):
                contents.append(Reserve.of(charge, at=now))
                number = len(contents)
                if zeroed_users is not None:
                    contents.append(
                        Commit(
                            reserve=number,
                            release=charge.release,
                            zeroed_users=zeroed_users,
                            reply_digest=None,
                            at=now,
                        )
                    )
            self._database.execute(f"ALTER TABLE charges RENAME TO {OLD_TABLE}")
            _begin(self._database, contents, self._key)

    def _load(self) -> None:
        """Read the head and what it stands for, and check all that does not take reading every entry."""
        problems = schema_problems(self._database)
        if problems:
            raise self._damaged("; ".join(problems))
        head = self._read_head()
        opening = self._entry(1)
        if not isinstance(opening, Opening):
            raise self._damaged("its first entry opens no ledger")
        self._opening = opening
        (last,) = self._database.execute("SELECT max(number) FROM entries").fetchone()
        if last != head.number or self._row(last)[1].hex() != head.hash:
            raise self._damaged(f"its head is not its last entry, {last}")
        self._entry(last)
        # Before anything is signed on top of it: else one more entry would make a forged past genuine.
        if not self._receipt(head).is_signed():
            raise self._damaged("its head is not signed by its key")
        if self._key is not None and self._key.public != head.public_key:
            raise InputError(
                f"the ledger at {self._path} is signed by the key {head.public_key[:16]}…, not by the one given,"
                f" {self._key.public[:16]}…. Use that key; after a rotation, the new one."
            )
        totals = self.totals()
        if not _are(str, totals) or not _are(int, totals.values()) or totals_checksum(totals) != head.totals_checksum:
            raise self._damaged("its totals do not have their checksum")
        spent: Counter[Release | None] = Counter()
        for text, count in totals.items():
            values = json.loads(text)
            spent[None if values is None else release_from_dict(values)] += count
        self._head, self._spent = head, spent

    def _read_head(self) -> _Head:
        columns = "number, hash, signature, public_key, totals_checksum"
        rows = self._database.execute(f"SELECT {columns} FROM head").fetchall()
        if len(rows) != 1 or not _are(bytes, rows[0][1:]):
            raise self._damaged("its head cannot be read")
        number, hash_, signature, public_key, checksum = rows[0]
        return _Head(
            number=number,
            hash=hash_.hex(),
            signature=signature,
            public_key=public_key.hex(),
            totals_checksum=int.from_bytes(checksum, "big"),
        )

    def _catch_up(self) -> None:
        """Know what other processes wrote since this one looked."""
        head = self._read_head()
        if head == self._head:
            return
        # This also finds an older copy that was written into the file.
        if self._row(self._head.number)[1].hex() != self._head.hash:
            raise self._damaged(f"entry {self._head.number} was replaced while it was open")
        self._load()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One state of all tables, whoever writes meanwhile."""
        with usable(self._path):
            if self._database.in_transaction:
                yield
            else:
                with _transaction(self._database, "BEGIN"):
                    yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction nobody else can write beside, on a ledger that is up to date."""
        before = self._head, self._spent.copy()
        try:
            with usable(self._path), _transaction(self._database, "BEGIN IMMEDIATE"):
                # A charge written to a file that no longer has its name would be gone with this process.
                if _identity(self._path) != self._identity:
                    raise self._damaged("another file took its place while it was open")
                self._catch_up()
                yield
        except BaseException:
            self._head, self._spent = before
            raise

    def _append(self, contents: Sequence[Content], *, signer: OwnerKey | None = None) -> None:
        head = _append(self._database, self._head, contents, signer or self._signing_key(), self.data_source)
        self._head = head
        for content in contents:
            reserve = _charge_in(content)
            if reserve is not None:
                self._spent[reserve.release] += 1

    def _signing_key(self) -> OwnerKey:
        if self._key is None:
            raise InputError(f"the ledger at {self._path} was opened without the owner's key, to read only.")
        return self._key

    def _receipt(self, head: _Head) -> Receipt:
        try:
            return Receipt(
                data_source=self.data_source,
                number=head.number,
                head_hash=head.hash,
                signature=head.signature.hex(),
                public_key=head.public_key,
            )
        except InputError as error:
            raise self._damaged(str(error)) from None

    def _row(self, number: int) -> tuple[bytes, bytes]:
        row = self._database.execute("SELECT body, hash FROM entries WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise self._damaged(f"it has no entry {number}")
        body, stored = row
        if not _are(bytes, row) or digest(body) != stored.hex():
            raise self._damaged(f"entry {number} was changed")
        return body, stored

    def _entry(self, number: int) -> Content:
        entry = self._read(self._row(number)[0])
        if entry.number != number:
            raise self._damaged(f"entry {number} was moved")
        return entry.content

    def _read(self, body: object) -> Entry:
        if not isinstance(body, bytes):
            raise self._damaged("the type of an entry was changed")
        try:
            return Entry.from_bytes(body)
        except InputError as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, what: str) -> InputError:
        return unusable(self._path, what)


@contextmanager
def _transaction(database: sqlite3.Connection, begin: Literal["BEGIN", "BEGIN IMMEDIATE"]) -> Iterator[None]:
    database.execute(begin)
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _begin(database: sqlite3.Connection, contents: Sequence[Content], key: OwnerKey) -> None:
    """Make the tables and write the first entries, an opening before all."""
    for statement in TABLES.values():
        database.execute(statement)
    database.execute("INSERT INTO head VALUES (1, 0, x'', x'', x'', x'')")
    opening = contents[0]
    assert isinstance(opening, Opening)
    nothing = _Head(number=0, hash=NOTHING_BEFORE, signature=b"", public_key=key.public, totals_checksum=0)
    _append(database, nothing, contents, key, opening.data_source)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _append(
    database: sqlite3.Connection, head: _Head, contents: Sequence[Content], signer: OwnerKey, data_source: str
) -> _Head:
    """Write ``contents`` after ``head``, in the transaction of the caller; return the new head."""
    number, previous, checksum = head.number, head.hash, head.totals_checksum
    for content in contents:
        number += 1
        # The salt keeps small private numbers from being found by trying, by those who hold hashes of entries.
        body = Entry(number=number, previous=previous, salt=secrets.token_hex(16), content=content).to_bytes()
        previous = digest(body)
        database.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, body, bytes.fromhex(previous)))
        reserve = _charge_in(content)
        if reserve is not None:
            text = release_text(reserve.release)
            checksum = (checksum + release_checksum(text)) % 2**256
            database.execute(
                "INSERT INTO totals VALUES (?, 1) ON CONFLICT (release) DO UPDATE SET count = count + 1", (text,)
            )
            # What a backup knows of a request must not hide what this ledger knows of it.
            clash = "UPDATE SET reserved = excluded.reserved, committed = NULL"
            database.execute(
                "INSERT INTO requests VALUES (?, ?, ?, NULL) ON CONFLICT (run_id, server_round) DO"
                f" {clash if isinstance(content, Reserve) else 'NOTHING'}",
                (reserve.run_id, reserve.server_round, number),
            )
        if isinstance(content, Commit):
            (charged,) = database.execute("SELECT body FROM entries WHERE number = ?", (content.reserve,)).fetchone()
            reserve = _charge_in(Entry.from_bytes(charged).content)
            assert reserve is not None
            database.execute(
                "UPDATE requests SET committed = ? WHERE run_id = ? AND server_round = ? AND reserved = ?",
                (number, reserve.run_id, reserve.server_round, content.reserve),
            )
    signature = signer.sign(head_message(data_source, number, previous))
    new = _Head(number=number, hash=previous, signature=signature, public_key=signer.public, totals_checksum=checksum)
    database.execute(
        "UPDATE head SET number = ?, hash = ?, signature = ?, public_key = ?, totals_checksum = ?",
        (number, bytes.fromhex(previous), signature, bytes.fromhex(signer.public), checksum.to_bytes(32, "big")),
    )
    return new


def _old_charges(database: sqlite3.Connection) -> Iterator[tuple[Charge, int | None]]:
    """The rows of a ledger of before the chain, with the zeroed users of those that were committed."""
    columns = "run_id, server_round, release, job_digest, noise, status, zeroed_users"
    for run_id, server_round, release, job_digest, noise, status, zeroed_users in database.execute(
        f"SELECT {columns} FROM charges ORDER BY number"
    ).fetchall():
        try:
            values = json.loads(release)
        except ValueError as error:
            raise InputError(f"ledger: a release of before the chain cannot be read ({error})") from None
        charge = Charge(
            run_id=run_id,
            server_round=server_round,
            release=None if values is None else release_from_dict(values),
            noise=noise,
            job_digest=job_digest,
            policy_hash=None,
            code_hash=None,
            versions={},
            fingerprint=None,
        )
        yield charge, zeroed_users if status == "committed" else None


def _charge_in(content: Content) -> Reserve | None:
    if isinstance(content, Raise):
        return content.reserve
    return content if isinstance(content, Reserve) else None


def _charges(entries: Iterable[Entry]) -> Iterator[tuple[str, Reserve]]:
    """Each charge with the hash of the entry that first made it, the same in every copy of a ledger."""
    for entry in entries:
        if isinstance(entry.content, Reserve):
            yield digest(entry.to_bytes()), entry.content
        elif isinstance(entry.content, Raise) and entry.content.reserve and entry.content.origin:
            yield entry.content.origin, entry.content.reserve


def _copy(source: sqlite3.Connection, path: Path) -> None:
    with closing(sqlite3.connect(path)) as target:
        source.backup(target)


def _publish(new: Path, path: Path) -> None:
    if new.with_name(new.name + "-wal").exists():
        raise OSError("its write-ahead log could not be written back into it")
    publish(new, path)


def _check_backup(copy: Path, backup: Path, *, trusted: Sequence[str], data_source: str) -> None:
    found = verify(copy, public_key=None, receipt=None)
    if not found.ok:
        raise _no_backup(backup, "; ".join(found.problems))
    if found.data_source != data_source:
        raise _no_backup(backup, f"it is of the data source {found.data_source!r}, not of {data_source!r}")
    if not set(found.public_keys) & set(trusted):
        raise _no_backup(backup, f"it is signed by the key {found.public_keys[-1][:16]}…, which is not this owner's")


def _no_backup(backup: Path, problem: Exception | str) -> InputError:
    return InputError(
        f"the backup at {backup} was not used ({problem}), and nothing was changed. Use another backup; never start an"
        " empty ledger for the same data."
    )


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _are(kind: type, values: Iterable[object]) -> bool:
    return all(type(value) is kind for value in values)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
