"""An owner's key is its own: nobody else reads it, nothing overwrites it."""

import hashlib
import hmac
import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.store.keys import OwnerKey, verify_signature
from shared.errors import InputError

# RFC 8032, section 7.1, test 2.
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302ae"
    "eb00d291612bb0c00"
)


def pem(private, encryption=None) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption or serialization.NoEncryption()
    )


def written(path, content: bytes, mode: int = 0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture
def known_key(tmp_path) -> OwnerKey:
    return OwnerKey.load(written(tmp_path / "known.pem", pem(Ed25519PrivateKey.from_private_bytes(SECRET))))


def test_it_signs_as_rfc_8032_does(known_key):
    assert known_key.public == PUBLIC
    assert known_key.sign(b"\x72").hex() == SIGNATURE
    assert verify_signature(PUBLIC, b"\x72", bytes.fromhex(SIGNATURE))


def test_a_fingerprint_is_an_hmac_under_a_key_of_its_own(known_key):
    """RFC 5869 by hand: extract with an empty salt, expand to one block."""
    extracted = hmac.new(b"\0" * 32, SECRET, hashlib.sha256).digest()
    derived = hmac.new(extracted, b"fedaug fingerprint of data\x01", hashlib.sha256).digest()
    assert known_key.fingerprint_of(b"data") == hmac.new(derived, b"data", hashlib.sha256).hexdigest()


def test_a_fingerprint_tells_the_data_to_nobody_else(tmp_path):
    one, two = OwnerKey.create(tmp_path / "1.pem"), OwnerKey.create(tmp_path / "2.pem")
    assert one.fingerprint_of(b"data") == OwnerKey.load(tmp_path / "1.pem").fingerprint_of(b"data")
    assert one.fingerprint_of(b"data") != one.fingerprint_of(b"Data")
    assert one.fingerprint_of(b"data") != two.fingerprint_of(b"data")


def test_a_new_key_is_for_its_owner_only(tmp_path):
    before = os.umask(0)
    try:
        created = OwnerKey.create(tmp_path / "new" / "key.pem")
    finally:
        os.umask(before)
    path = tmp_path / "new" / "key.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert OwnerKey.load(path).public == created.public
    assert list(path.parent.iterdir()) == [path]


def test_a_key_is_never_overwritten(tmp_path):
    OwnerKey.create(tmp_path / "key.pem")
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(InputError, match="exists already and was left as it is"):
        OwnerKey.create(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "key.pem"]


def test_a_key_that_cannot_be_written_is_refused_with_advice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        OwnerKey.create(tmp_path / "file" / "key.pem")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o777])
def test_a_key_that_others_can_use_is_refused(tmp_path, mode):
    path = written(tmp_path / "key.pem", pem(Ed25519PrivateKey.generate()), mode)
    with pytest.raises(InputError, match=rf"mode {mode:04o}.*chmod 600 .*rotate"):
        OwnerKey.load(path)


def test_a_key_may_be_read_only(tmp_path):
    OwnerKey.load(written(tmp_path / "key.pem", pem(Ed25519PrivateKey.from_private_bytes(SECRET)), 0o400))


def test_a_missing_key_is_refused_with_advice(tmp_path):
    with pytest.raises(InputError, match="where its backup is kept"):
        OwnerKey.load(tmp_path / "key.pem")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a key",
        pem(Ed25519PrivateKey.from_private_bytes(SECRET))[:-30],
        pem(X25519PrivateKey.generate()),
        pem(Ed25519PrivateKey.from_private_bytes(SECRET), serialization.BestAvailableEncryption(b"secret")),
    ],
    ids=["empty", "text", "cut", "another kind", "encrypted"],
)
def test_what_is_no_key_is_refused_with_advice(tmp_path, content):
    with pytest.raises(InputError, match=r"holds no Ed25519 key.*where its backup is kept"):
        OwnerKey.load(written(tmp_path / "key.pem", content))


def test_a_key_does_not_show_itself(known_key):
    assert SECRET.hex() not in repr(known_key)
    assert str(SECRET) not in repr(vars(known_key))
