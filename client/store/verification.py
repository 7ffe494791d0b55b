"""Find whether anything in an owner's ledger was changed, dropped or moved."""

import hashlib
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from client.store.database import connect_to_read, schema_problems
from shared.errors import InputError
from shared.privacy.chain import (
    NOTHING_BEFORE,
    SCHEMA_VERSION,
    Commit,
    Content,
    Entry,
    KeyChange,
    Opening,
    Raise,
    Receipt,
    Reserve,
    canonical,
    head_message,
    key_message,
    release_text,
    totals_checksum,
    verify_signature,
)
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE, SEEDED_NOISE
from shared.privacy.releases import release_from_dict

_MAX_PROBLEMS = 20

# The two kinds of entry that a ledger grows by, in the one spelling that canonical JSON without escapes has. To parse
# and encode an entry again takes 30 us, to match it 4; what does not match is parsed.
_TEXT = r'"([^"\\\x00-\x1f]+)"'
_ANY_TEXT = r'"[^"\\\x00-\x1f]+"'
_HASH = r'"([0-9a-f]{64})"'
_SALT = '"[0-9a-f]{32}"'
_COUNT = "(0|[1-9][0-9]{0,14})"
_TIME = '"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"'
_OBJECT = r"(null|\{[^{}]*\})"
_RESERVE = re.compile(
    rf'\{{"at":{_TIME},"code_hash":{_ANY_TEXT},"fingerprint":{_ANY_TEXT},"job_digest":{_ANY_TEXT},"kind":"reserve",'
    rf'"noise":{_TEXT},"number":{_COUNT},"policy_hash":{_ANY_TEXT},"previous":{_HASH},"release":{_OBJECT},'
    rf'"run_id":{_TEXT},"salt":{_SALT},"server_round":{_COUNT},"versions":{_OBJECT}\}}'
)
_COMMIT = re.compile(
    rf'\{{"at":{_TIME},"kind":"commit","number":{_COUNT},"previous":{_HASH},"release":{_OBJECT},'
    rf'"reply_digest":"[0-9a-f]{{64}}","reserve":{_COUNT},"salt":{_SALT},"zeroed_users":{_COUNT}\}}'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a ledger holds and all that is wrong with it.

    Args:
        reserved: charges that count as spent, those that a restored backup raised among them.
        public_keys: that signed for it, the last one now.
    """

    entries: int
    reserved: int
    committed: int
    data_source: str
    public_keys: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: Path, *, public_key: str | None = None, receipt: Receipt | None = None) -> Verification:
    """Check the ledger at ``path`` from its first byte; whatever it holds, say so instead of raising.

    Args:
        public_key: hex of a key known to be the owner's: the present one, or an older one that endorsed it. Without
            it, or a receipt, a ledger that somebody else made and signed with a key of their own is found in order.
        receipt: that the owner gave out. Only a receipt can tell that the ledger is an older copy of itself.
    """
    replay = Replay()
    try:
        with closing(connect_to_read(path)) as database:
            database.execute("BEGIN")  # one state of it, whoever writes meanwhile
            _check_file(database, replay)
    except (sqlite3.Error, OSError, ValueError, OverflowError, MemoryError) as error:
        replay.problem(f"{path} cannot be read ({error})")
    replay.check_key(public_key)
    replay.check_receipt(receipt)
    return Verification(
        entries=len(replay.hashes),
        reserved=replay.reserved,
        committed=replay.committed,
        data_source=replay.data_source,
        public_keys=tuple(public for _, public in replay.keys),
        problems=tuple(replay.problems),
    )


def _check_file(database: sqlite3.Connection, replay: "Replay") -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != SCHEMA_VERSION:
        replay.problem(
            f"it has schema {version}, this fedaug knows {SCHEMA_VERSION}:"
            f" {'upgrade fedaug here' if version > SCHEMA_VERSION else 'open it once with its key, to take it over'}"
        )
        return
    for (problem,) in database.execute("PRAGMA integrity_check"):
        if problem != "ok":
            replay.problem(f"SQLite finds {problem}")
    for problem in schema_problems(database):
        replay.problem(problem)
    for number, body, stored in database.execute("SELECT number, body, hash FROM entries ORDER BY number"):
        replay.add(number, body, stored)
    replay.check_head(
        database.execute("SELECT only, number, hash, signature, public_key, totals_checksum FROM head").fetchall()
    )
    totals = database.execute("SELECT release, count FROM totals").fetchall()
    if len(totals) != len(replay.totals) or any(
        type(count) is not int or count != replay.totals.get(text) for text, count in totals
    ):
        replay.problem("its totals are not what its entries add up to")
    requests = database.execute("SELECT run_id, server_round, reserved, committed FROM requests").fetchall()
    if len(requests) != len(replay.requests) or any(
        replay.requests.get((run_id, server_round)) != (reserved, committed)
        for run_id, server_round, reserved, committed in requests
    ):
        replay.problem("its table of requests is not what its entries say")


class _Charged(NamedTuple):
    release: str  # canonical JSON
    noise: str
    request: tuple[str, int]
    raised: bool = False


class _Committed(NamedTuple):
    release: str
    reserve: int


class Replay:
    """What rows add up to, in order, and what is wrong with them; touches no file."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.hashes: list[str] = []
        self.data_source = ""
        self.keys: list[tuple[int, str]] = []  # with the number of the entry that named it
        self.reserved = self.committed = 0
        self.totals: Counter[str] = Counter()
        self.requests: dict[tuple[str, int], tuple[int, int | None]] = {}
        self._previous = NOTHING_BEFORE
        self._charges: dict[int, _Charged] = {}
        self._with_reply: set[int] = set()
        # Few releases and versions are spelled many times.
        self._is_release = lru_cache(maxsize=1024)(_is_release)
        self._is_versions = lru_cache(maxsize=1024)(_is_versions)

    def problem(self, text: str) -> None:
        if len(self.problems) == _MAX_PROBLEMS:
            self.problems.append("there is more")
        elif len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def add(self, number: object, body: object, stored: object) -> None:
        """Follow one row of the table of entries."""
        at = len(self.hashes) + 1
        if type(number) is not int or type(body) is not bytes or type(stored) is not bytes:
            self.problem(f"entry {at}: the type of a column was changed")
            body, stored = b"", b""
        if number != at:
            self.problem(f"entry {at}: it is numbered {number}")
        hash_ = hashlib.sha256(body)
        if hash_.digest() != stored:
            self.problem(f"entry {at}: its bytes are not those that were hashed")
        self.hashes.append(hash_.hexdigest())
        try:
            named, previous, content = self._skim(body) or _parse(body)
        except InputError as error:
            self.problem(f"entry {at}: {error}")
        else:
            if named != at:
                self.problem(f"entry {at}: its bytes name number {named}")
            if previous != self._previous:
                self.problem(f"entry {at}: it does not follow the entry before it")
            self._follow(at, content)
        self._previous = self.hashes[-1]

    def check_head(self, rows: list[tuple[object, ...]]) -> None:
        """Compare the one row of the table ``head``, as it must be, with the entries."""
        if len(rows) != 1:
            self.problem(f"it has {len(rows)} heads")
            return
        only, number, hash_, signature, public_key, checksum = rows[0]
        if not self.hashes or (only, number, hash_) != (1, len(self.hashes), bytes.fromhex(self.hashes[-1])):
            self.problem("its head is not its last entry")
        key = self.keys[-1][1] if self.keys else ""
        if public_key != bytes.fromhex(key):
            self.problem("its head names another key than its entries")
        message = head_message(self.data_source, len(self.hashes), self._previous)
        if type(signature) is not bytes or not verify_signature(key, message, signature):
            self.problem("its head is not signed by the owner's key")
        if checksum != totals_checksum(self.totals).to_bytes(32, "big"):
            self.problem("its totals do not have their checksum")

    def check_key(self, public_key: str | None) -> None:
        if public_key is not None and public_key not in (public for _, public in self.keys):
            self.problem(f"it is not signed by the key {public_key[:16]}…, nor by one that this key endorsed")

    def check_receipt(self, receipt: Receipt | None) -> None:
        if receipt is None:
            return
        if not receipt.is_signed():
            self.problem("the receipt is not signed by the key that it names")
        if receipt.data_source != self.data_source:
            self.problem(f"the receipt is of the data source {receipt.data_source!r}")
        if not 1 <= receipt.number <= len(self.hashes):
            self.problem(
                f"it ends at entry {len(self.hashes)}, the receipt names entry {receipt.number}: it was cut, or is an"
                " older copy"
            )
            return
        if self.hashes[receipt.number - 1] != receipt.head_hash:
            self.problem(f"entry {receipt.number}: it is not the one that the receipt was given for")
        if receipt.public_key not in [public for number, public in self.keys if number <= receipt.number][-1:]:
            self.problem(f"the receipt is signed by another key than entry {receipt.number}")

    def _skim(self, body: bytes) -> "tuple[int, str, _Charged | _Committed] | None":
        """What :func:`_parse` finds in most reserves and commits, sooner; None for all else."""
        try:
            text = body.decode()
        except UnicodeDecodeError:
            return None
        if match := _COMMIT.fullmatch(text):
            number, previous, release, reserve, _ = match.groups()
            if self._is_release(release):
                return int(number), previous, _Committed(release, int(reserve))
        elif match := _RESERVE.fullmatch(text):
            noise, number, previous, release, run_id, server_round, versions = match.groups()
            right = noise == NO_NOISE if release == "null" else noise in (LOCAL_NOISE, SEEDED_NOISE)
            if right and self._is_release(release) and self._is_versions(versions):
                return int(number), previous, _Charged(release, noise, (run_id, int(server_round)))
        return None

    def _follow(self, at: int, content: "_Charged | _Committed | Content") -> None:
        if (at == 1) != isinstance(content, Opening):
            self.problem(f"entry {at}: the first entry opens the ledger, and no other")
        if isinstance(content, _Charged):
            self.reserved += 1
            self.totals[content.release] += 1
            self._charges[at] = content
            if not content.raised or content.request not in self.requests:
                self.requests[content.request] = (at, None)
        elif isinstance(content, _Committed):
            self._commit(at, content)
        elif isinstance(content, Opening):
            self.data_source = content.data_source
            self.keys.append((at, content.public_key))
        elif isinstance(content, KeyChange):
            message = key_message(self.data_source, at, self._previous, content.public_key)
            endorsed = self.keys and verify_signature(self.keys[-1][1], message, bytes.fromhex(content.endorsement))
            if not endorsed:
                self.problem(f"entry {at}: the key before it did not endorse its key")
            self.keys.append((at, content.public_key))

    def _commit(self, at: int, commit: _Committed) -> None:
        self.committed += 1
        charged = self._charges.get(commit.reserve)
        if charged is None:
            self.problem(f"entry {at}: it commits entry {commit.reserve}, which charged nothing before it")
            return
        if commit.release != charged.release:
            self.problem(f"entry {at}: it executed another release than entry {commit.reserve} charged")
        if commit.reserve in self._with_reply and charged.noise == LOCAL_NOISE:
            self.problem(f"entry {at}: a second reply to entry {commit.reserve}, whose noise was secret")
        self._with_reply.add(commit.reserve)
        if self.requests[charged.request][0] == commit.reserve:
            self.requests[charged.request] = (commit.reserve, at)


def _parse(body: bytes) -> tuple[int, str, _Charged | _Committed | Content]:
    entry = Entry.from_bytes(body)
    content = entry.content
    reserve = content.reserve if isinstance(content, Raise) else content
    if isinstance(reserve, Reserve):
        request = reserve.run_id, reserve.server_round
        raised = isinstance(content, Raise)
        return entry.number, entry.previous, _Charged(release_text(reserve.release), reserve.noise, request, raised)
    if isinstance(content, Commit):
        return entry.number, entry.previous, _Committed(release_text(content.release), content.reserve)
    return entry.number, entry.previous, content


def _is_release(text: str) -> bool:
    """Whether ``text`` is a release, or null, in its canonical spelling."""
    try:
        return text == "null" or release_text(release_from_dict(json.loads(text))) == text
    except (InputError, ValueError, RecursionError):
        return False


def _is_versions(text: str) -> bool:
    try:
        values = json.loads(text)
        return canonical(values).decode() == text and all(isinstance(value, str) for value in values.values())
    except (InputError, ValueError, AttributeError, RecursionError):
        return False
