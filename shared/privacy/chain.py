"""Chain the entries of an owner's ledger, so that none can be changed, dropped or moved unseen.

An entry's canonical bytes name the SHA-256 of the entry before it, and the owner signs the last one: whoever holds a
:class:`Receipt` can tell later whether everything up to it is still there. Nothing here touches a file or a clock.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shared.errors import InputError
from shared.privacy.noise import NO_NOISE, NoiseKind
from shared.privacy.releases import Release, release_from_dict

SCHEMA_VERSION = 1
NOTHING_BEFORE = "0" * 64  # what the first entry names as `previous`

# Some texts come from a server. A ledger keeps what it takes for ever, so it does not take just anything.
_LARGEST_BODY_BYTES = 64 * 1024
_LARGEST_COUNT = 2**53
_HEX = re.compile("[0-9a-f]*")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")

_encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False
).encode


def canonical(values: Any) -> bytes:
    """``values`` as JSON with sorted keys, no spaces, UTF-8: one value, one spelling.

    Raises:
        InputError: a number is not finite, or a text is not Unicode.
    """
    try:
        return _encode(values).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"a ledger cannot store {error}: its entries are JSON with finite numbers.") from None


def release_text(release: Release | None) -> str:
    """A release as its canonical JSON, under which totals count it."""
    return canonical(release.to_dict() if release else None).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """The first entry: whose data this is, and who may sign for it.

    Args:
        data_source: permanent id of the data set, as the owner's policy names it.
        public_key: hex of the owner's Ed25519 public key.
    """

    kind: ClassVar[str] = "open"
    data_source: str
    public_key: str
    at: str
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_text("data_source", self.data_source)
        _check_hex("public_key", self.public_key, 64)
        _check_time(self.at)
        _check_count("schema", self.schema)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One release an owner is about to make, and everything it depends on.

    Args:
        release: None where a simulation trained without privacy.
        noise: local noise is secret; other noise can be repeated, and so the same request gives the same release.
        job_digest: of the request it answers.
        policy_hash, code_hash: of what the owner allowed, and of what ran.
        versions: of the packages that ran, by name.
        fingerprint: of the data, under the owner's key, so that it tells nobody else which data.
            These four are None, or empty, only in entries taken over from a ledger that did not record them.
    """

    run_id: str
    server_round: int
    release: Release | None
    noise: NoiseKind
    job_digest: str
    policy_hash: str | None
    code_hash: str | None
    versions: Mapping[str, str]
    fingerprint: str | None

    def __post_init__(self) -> None:
        for name in ("run_id", "job_digest"):
            _check_text(name, getattr(self, name))
        for name in ("policy_hash", "code_hash", "fingerprint"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        _check_count("server_round", self.server_round)
        if self.noise not in get_args(NoiseKind):
            raise InputError(f"ledger entry: noise must be one of {', '.join(get_args(NoiseKind))}, not {self.noise!r}")
        if (self.release is None) != (self.noise == NO_NOISE):
            raise InputError(f"ledger entry: noise {self.noise!r} does not fit the release {self.release}")
        if not (
            isinstance(self.versions, Mapping)
            and all(isinstance(name, str) and isinstance(version, str) for name, version in self.versions.items())
        ):
            raise InputError("ledger entry: versions must map names of packages to versions, both texts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve(Charge):
    """A charge written before anything is trained; it counts as spent for ever."""

    kind: ClassVar[str] = "reserve"
    at: str

    def __post_init__(self) -> None:
        Charge.__post_init__(self)
        _check_time(self.at)

    @classmethod
    def of(cls, charge: Charge, *, at: str) -> Self:
        return cls(**{part.name: getattr(charge, part.name) for part in fields(Charge)}, at=at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What became of a reserve whose reply is on disk.

    Args:
        reserve: number of the entry that charged it.
        release: as executed; equal to the reserved one.
        zeroed_users: how often a user counted as zero because its loss or gradient was not finite; private.
        reply_digest: SHA-256 of the stored reply. None only where taken over from a ledger without.
    """

    kind: ClassVar[str] = "commit"
    reserve: int
    release: Release | None
    zeroed_users: int
    reply_digest: str | None
    at: str

    def __post_init__(self) -> None:
        _check_count("reserve", self.reserve)
        _check_count("zeroed_users", self.zeroed_users)
        if self.reply_digest is not None:
            _check_hex("reply_digest", self.reply_digest, 64)
        _check_time(self.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Raise:
    """What a restored backup added.

    Args:
        reserve: a charge that only the backup had; it counts as spent like any other. None where the ledger itself
            had been lost and the backup took its place: charges made after the backup may be missing.
        origin: hash of the entry that first charged it; None with ``reserve``.
        backup: hash of the last entry of the backup.
    """

    kind: ClassVar[str] = "raise"
    reserve: Reserve | None
    origin: str | None
    backup: str
    at: str

    def __post_init__(self) -> None:
        if (self.reserve is None) != (self.origin is None):
            raise InputError("ledger entry: a raised reserve and its origin come together, or neither does")
        if self.origin is not None:
            _check_hex("origin", self.origin, 64)
        _check_hex("backup", self.backup, 64)
        _check_time(self.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """From this entry on, ``public_key`` signs; the key before it says so in ``endorsement``."""

    kind: ClassVar[str] = "key"
    public_key: str
    endorsement: str
    at: str

    def __post_init__(self) -> None:
        _check_hex("public_key", self.public_key, 64)
        _check_hex("endorsement", self.endorsement, 128)
        _check_time(self.at)


Content = Opening | Reserve | Commit | Raise | KeyChange
_KINDS: dict[str, type[Content]] = {content.kind: content for content in (Opening, Reserve, Commit, Raise, KeyChange)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a ledger.

    Args:
        number: from 1, without gaps.
        previous: hex SHA-256 of the canonical bytes of the entry before; ``NOTHING_BEFORE`` for the first.
        salt: 32 random hex digits. A receipt holds a hash of entries, and the entries hold small private numbers,
            which could be found by trying if all else were known.
    """

    number: int
    previous: str
    salt: str
    content: Content

    def __post_init__(self) -> None:
        _check_count("number", self.number)
        _check_hex("previous", self.previous, 64)
        _check_hex("salt", self.salt, 32)

    def to_bytes(self) -> bytes:
        """The canonical bytes: what is stored, hashed and chained.

        Raises:
            InputError: there are too many of them.
        """
        body = canonical(
            {
                **_values(self.content),
                "kind": self.content.kind,
                "number": self.number,
                "previous": self.previous,
                "salt": self.salt,
            }
        )
        if len(body) > _LARGEST_BODY_BYTES:
            raise InputError(
                f"ledger entry: {len(body):,} bytes are more than the {_LARGEST_BODY_BYTES:,} that a ledger keeps for"
                " one. Use a shorter run id."
            )
        return body

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Read :meth:`to_bytes`' form, and no other spelling of it.

        Raises:
            InputError: the bytes are not canonical, or a field is unknown, missing or of the wrong kind.
        """
        try:
            values = json.loads(body.decode())
            kind = _KINDS[values.pop("kind")]
            entry = cls(
                number=values.pop("number"),
                previous=values.pop("previous"),
                salt=values.pop("salt"),
                content=_content(kind, values),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"ledger entry: cannot be read ({error!r:.200})") from None
        if entry.to_bytes() != body:
            raise InputError("ledger entry: not in its canonical form")
        return entry


def _values(content: Content) -> dict[str, Any]:
    values = {part.name: getattr(content, part.name) for part in fields(content)}
    if isinstance(content, Reserve):
        values["versions"] = dict(content.versions)
    if isinstance(content, Reserve | Commit):
        values["release"] = content.release.to_dict() if content.release else None
    if isinstance(content, Raise):
        values["reserve"] = _values(content.reserve) if content.reserve else None
    return values


def _content(kind: type[Content], values: dict[str, Any]) -> Content:
    if kind in (Reserve, Commit) and values["release"] is not None:
        values["release"] = release_from_dict(values["release"])
    if kind is Raise and values["reserve"] is not None:
        values["reserve"] = cast(Reserve, _content(Reserve, values["reserve"]))
    return kind(**values)


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def head_message(data_source: str, number: int, head_hash: str) -> bytes:
    """What an owner signs when ``number`` is its last entry; different for any other three values."""
    return b"fedaug ledger head\0" + data_source.encode() + number.to_bytes(8, "big") + bytes.fromhex(head_hash)


def key_message(data_source: str, number: int, previous: str, public_key: str) -> bytes:
    """What the old key signs to name the new one, in entry ``number`` and nowhere else."""
    after = data_source.encode() + number.to_bytes(8, "big") + bytes.fromhex(previous)
    return b"fedaug ledger key\0" + after + bytes.fromhex(public_key)


def verify_signature(public_key: str, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is the Ed25519 signature of ``message`` under the key of this hex."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, message)
    except (ValueError, InvalidSignature):
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """An owner's signed word that its ledger reaches to ``number``; what a coordinator keeps.

    It names no release and no user: a number, a hash of salted entries, a signature.
    """

    data_source: str
    number: int
    head_hash: str
    signature: str
    public_key: str

    def __post_init__(self) -> None:
        _check_text("data_source", self.data_source)
        _check_count("number", self.number)
        _check_hex("head_hash", self.head_hash, 64)
        _check_hex("signature", self.signature, 128)
        _check_hex("public_key", self.public_key, 64)

    def is_signed(self) -> bool:
        """Whether the key it names signed it. Whose key that is, only an exchange outside can tell."""
        message = head_message(self.data_source, self.number, self.head_hash)
        return verify_signature(self.public_key, message, bytes.fromhex(self.signature))

    def to_dict(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form.

        Raises:
            InputError: a field is unknown, missing or of the wrong kind.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"receipt: {error}") from None


def totals_checksum(totals: Mapping[str, int]) -> int:
    """One number for a bag of releases: the sum of their SHA-256, modulo 2^256.

    A sum, so that one more release costs one addition. It finds what a failing disk does to the totals, from which
    budgets are decided; against forgers stands the chain, from which the totals are counted again.
    """
    return sum(count * release_checksum(text) for text, count in totals.items()) % 2**256


def release_checksum(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise InputError(f"ledger entry: {name} must be a text that is not empty, not {value!r:.80}")


def _check_hex(name: str, value: object, length: int) -> None:
    if not isinstance(value, str) or len(value) != length or not _HEX.fullmatch(value):
        raise InputError(f"ledger entry: {name} must be {length} digits 0-9 a-f, not {value!r:.80}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_COUNT:
        raise InputError(f"ledger entry: {name} must be a whole number from 0 to 2^53, not {value!r:.80}")


def _check_time(value: object) -> None:
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise InputError(f"ledger entry: at must be a UTC time like 2026-11-22T05:45:00Z, not {value!r:.80}")
