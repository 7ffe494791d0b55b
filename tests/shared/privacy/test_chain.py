"""Entries have one spelling, follow one another by hash, and say what they say to nobody but who reads them."""

import dataclasses
import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InputError
from shared.privacy.chain import (
    NOTHING_BEFORE,
    Charge,
    Commit,
    Entry,
    KeyChange,
    Opening,
    Raise,
    Receipt,
    Reserve,
    canonical,
    digest,
    head_message,
    key_message,
    release_checksum,
    release_text,
    totals_checksum,
    verify_signature,
)
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE, SEEDED_NOISE
from shared.privacy.releases import DpSgdRelease, GaussianRelease

RELEASE = DpSgdRelease(noise_multiplier=1.5, sample_rate=0.1, num_steps=5, max_users=100)
AT = "2026-11-22T05:45:00Z"
SALT = "5a" * 16

# RFC 8032, section 7.1, test 1: the message is empty.
RFC_SECRET = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
RFC_PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
RFC_SIGNATURE = (
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
    "655141438e7a100b"
)


def an_entry(content, number=2, previous="ab" * 32) -> Entry:
    return Entry(number=number, previous=previous, salt=SALT, content=content)


def a_reserve(**changes) -> Reserve:
    values = {
        "run_id": "run-1",
        "server_round": 3,
        "release": RELEASE,
        "noise": LOCAL_NOISE,
        "job_digest": "d",
        "policy_hash": "p",
        "code_hash": "c",
        "versions": {"torch": "2.13", "fedaug": "0.1"},
        "fingerprint": "f",
        "at": AT,
    }
    return Reserve(**{**values, **changes})


def test_two_entries_chained_by_hand():
    first = (
        '{"at":"2026-11-22T05:45:00Z","data_source":"bücher","kind":"open","number":1,"previous":"'
        + "0" * 64
        + '","public_key":"'
        + "cd" * 32
        + '","salt":"'
        + "5a" * 16
        + '","schema":1}'
    ).encode()
    second = (
        '{"at":"2026-11-22T05:45:00Z","code_hash":"c","fingerprint":"f","job_digest":"d","kind":"reserve",'
        '"noise":"local","number":2,"policy_hash":"p","previous":"'
        + hashlib.sha256(first).hexdigest()
        + '","release":{"max_batch":null,"max_users":100,"mechanism":"dp_sgd_poisson","noise_multiplier":1.5,'
        '"num_steps":5,"sample_rate":0.1},"run_id":"run-1","salt":"' + "5a" * 16 + '","server_round":3,'
        '"versions":{"fedaug":"0.1","torch":"2.13"}}'
    ).encode()
    opening = an_entry(Opening(data_source="bücher", public_key="cd" * 32, at=AT), number=1, previous=NOTHING_BEFORE)
    reserve = an_entry(a_reserve(), previous=digest(opening.to_bytes()))
    assert opening.to_bytes() == first
    assert reserve.to_bytes() == second
    assert Entry.from_bytes(first) == opening
    assert Entry.from_bytes(second) == reserve
    assert head_message("bücher", 2, digest(second)) == (
        b"fedaug ledger head\0" + b"b\xc3\xbccher" + b"\0\0\0\0\0\0\0\x02" + hashlib.sha256(second).digest()
    )


texts = st.text(min_size=1, max_size=8)
hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
counts = st.integers(0, 2**53)
releases = st.builds(
    DpSgdRelease,
    noise_multiplier=st.floats(1e-3, 1e3) | st.integers(1, 9),
    sample_rate=st.floats(0, 1, exclude_min=True),
    num_steps=st.integers(1, 10**6),
    max_users=st.integers(1, 2**53),
) | st.builds(
    GaussianRelease,
    statistic=st.text('aé {}"', min_size=1, max_size=5).filter(str.strip),
    noise_multiplier=st.floats(1e-3, 1e3),
    max_users=st.integers(1, 2**53),
)
reserves = st.builds(
    lambda release, noise, **rest: Reserve(release=release, noise=noise if release else NO_NOISE, at=AT, **rest),
    release=st.none() | releases,
    noise=st.sampled_from([LOCAL_NOISE, SEEDED_NOISE]),
    run_id=texts,
    server_round=counts,
    job_digest=texts,
    policy_hash=st.none() | texts,
    code_hash=st.none() | texts,
    fingerprint=st.none() | texts,
    versions=st.dictionaries(texts, texts, max_size=3),
)
commits = st.builds(
    Commit,
    reserve=counts,
    release=st.none() | releases,
    zeroed_users=counts,
    reply_digest=st.none() | hexes,
    at=st.just(AT),
)
contents = (
    reserves
    | commits
    | st.builds(Raise, reserve=reserves, origin=hexes, backup=hexes, at=st.just(AT))
    | st.builds(KeyChange, public_key=hexes, endorsement=hexes.map(lambda half: half * 2), at=st.just(AT))
    | st.builds(Opening, data_source=texts, public_key=hexes, at=st.just(AT), schema=counts)
)
entries = st.builds(
    Entry, number=counts, previous=hexes, salt=st.binary(min_size=16, max_size=16).map(bytes.hex), content=contents
)


@given(entries)
def test_an_entry_reads_back_as_it_was_and_has_one_spelling(entry):
    body = entry.to_bytes()
    assert Entry.from_bytes(body) == entry
    assert Entry.from_bytes(body).to_bytes() == body
    assert body == json.dumps(json.loads(body), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"run_id":"run-1"', '"run_id": "run-1"'),
        ('"run_id":"run-1"', '"run_id":"run-\\u0031"'),
        ('"run_id":"run-1"', '"run_id":"run-0","run_id":"run-1"'),
        ('"noise_multiplier":1.5', '"noise_multiplier":1.50'),
        ('"noise_multiplier":1.5', '"noise_multiplier":NaN'),
        ('"noise_multiplier":1.5', '"noise_multiplier":1e999'),
        ('"kind":"reserve","noise":"local"', '"noise":"local","kind":"reserve"'),
        ('"max_batch":null,', ""),
        ("}}", "}}\n"),
        ("{", "\ufeff{"),
    ],
)
def test_another_spelling_of_the_same_is_refused(old, new):
    body = an_entry(a_reserve()).to_bytes().decode()
    assert old in body
    with pytest.raises(InputError, match=r"canonical|cannot be read|finite"):
        Entry.from_bytes(body.replace(old, new, 1).encode())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_only_utf_8_is_read(encoding):
    with pytest.raises(InputError, match="cannot be read"):
        Entry.from_bytes(an_entry(a_reserve()).to_bytes().decode().encode(encoding))


@pytest.mark.parametrize(
    "change",
    [
        {"number": True},
        {"number": "2"},
        {"number": -1},
        {"previous": "AB" * 32},
        {"previous": "ab" * 31},
        {"salt": ""},
        {"kind": "refund"},
        {"kind": ["reserve"]},
        {"server_round": 1.0},
        {"server_round": 2**53 + 1},
        {"run_id": ""},
        {"run_id": 7},
        {"noise": "seeded"},
        {"release": None},
        {"release": {}},
        {"release": {**RELEASE.to_dict(), "epsilon": 1.0}},
        {"release": [1]},
        {"versions": ["torch"]},
        {"versions": {"torch": 2}},
        {"at": "2026-11-22 05:45"},
        {"epsilon": 1.0},
    ],
)
def test_a_field_of_another_kind_is_refused(change):
    values = json.loads(an_entry(a_reserve()).to_bytes())
    with pytest.raises(InputError, match=r"ledger entry|release:"):
        Entry.from_bytes(canonical({**values, **change}))


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b"7", b"\xff", b"[" * 100_000, b"9" * 10_000])
def test_what_is_no_entry_is_refused(body):
    with pytest.raises(InputError, match="ledger entry"):
        Entry.from_bytes(body)


def test_a_missing_field_is_refused():
    values = json.loads(an_entry(a_reserve()).to_bytes())
    for name in values:
        with pytest.raises(InputError, match="ledger entry"):
            Entry.from_bytes(canonical({key: value for key, value in values.items() if key != name}))


def test_no_noise_and_a_release_do_not_go_together():
    with pytest.raises(InputError, match="does not fit"):
        a_reserve(noise=NO_NOISE)
    with pytest.raises(InputError, match="does not fit"):
        a_reserve(release=None)


def test_a_strangers_text_cannot_fill_the_disk():
    with pytest.raises(InputError, match="Use a shorter run id"):
        an_entry(a_reserve(run_id="r" * 70_000)).to_bytes()


def test_half_a_character_is_refused():
    with pytest.raises(InputError, match="cannot store"):
        an_entry(a_reserve(run_id="\ud800")).to_bytes()


def test_the_same_charge_twice_has_two_hashes():
    """A receipt holds the hash of a commit, and its private number of zeroed users is small enough to try them all."""
    commit = Commit(reserve=2, release=RELEASE, zeroed_users=0, reply_digest="ab" * 32, at=AT)
    assert an_entry(commit).to_bytes() != dataclasses.replace(an_entry(commit), salt="00" * 16).to_bytes()


@given(st.lists(st.tuples(texts, counts, hexes), min_size=2, max_size=2, unique=True))
def test_no_signature_stands_for_two_things(pair):
    one, two = pair
    assert head_message(*one) != head_message(*two)
    assert head_message(*one) != key_message(*two, "ab" * 32)


def test_signatures_are_those_of_rfc_8032():
    assert verify_signature(RFC_PUBLIC, b"", bytes.fromhex(RFC_SIGNATURE))
    assert not verify_signature(RFC_PUBLIC, b"x", bytes.fromhex(RFC_SIGNATURE))
    assert not verify_signature("ab" * 32, b"", bytes.fromhex(RFC_SIGNATURE))


@pytest.mark.parametrize(("public", "signature"), [("", b""), ("xy", b"\0" * 64), ("ab" * 32, b""), ("ab" * 31, b"1")])
def test_what_is_no_key_or_signature_verifies_nothing(public, signature):
    assert not verify_signature(public, b"message", signature)


def a_receipt(**changes) -> Receipt:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(RFC_SECRET))
    signature = key.sign(head_message("books", 7, "ab" * 32)).hex()
    values = {"data_source": "books", "number": 7, "head_hash": "ab" * 32, "signature": signature}
    return Receipt(**{**values, "public_key": RFC_PUBLIC, **changes})


def test_a_receipt_travels_and_proves_itself():
    receipt = Receipt.from_dict(json.loads(json.dumps(a_receipt().to_dict())))
    assert receipt == a_receipt()
    assert receipt.is_signed()


@pytest.mark.parametrize(
    "change",
    [
        {"data_source": "book"},
        {"number": 8},
        {"head_hash": "ac" + "ab" * 31},
        {"signature": "00" * 64},
        {"public_key": "cd" * 32},
    ],
)
def test_a_receipt_changed_anywhere_does_not(change):
    assert not a_receipt(**change).is_signed()


@pytest.mark.parametrize("change", [{"number": "7"}, {"head_hash": "xy"}, {"epsilon": 1.0}, {"signature": None}])
def test_a_receipt_with_other_fields_is_refused(change):
    with pytest.raises(InputError):
        Receipt.from_dict({**a_receipt().to_dict(), **change})


def test_a_receipt_tells_nothing_of_releases_and_users():
    assert set(a_receipt().to_dict()) == {"data_source", "number", "head_hash", "signature", "public_key"}


@given(st.dictionaries(texts, st.integers(1, 9), min_size=1, max_size=4))
def test_the_checksum_of_totals_grows_by_one_release_at_a_time(totals):
    one_by_one = 0
    for text, count in totals.items():
        for _ in range(count):
            one_by_one = (one_by_one + release_checksum(text)) % 2**256
    assert totals_checksum(totals) == one_by_one
    name = min(totals)
    assert totals_checksum({**totals, name: totals[name] - 1}) != one_by_one


def test_a_reserve_is_its_charge_at_a_time():
    reserve = a_reserve()
    charge = Charge(**{part.name: getattr(reserve, part.name) for part in dataclasses.fields(Charge)})
    assert Reserve.of(charge, at=AT) == reserve
    assert release_text(None) == "null"
