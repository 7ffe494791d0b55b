"""The key with which an owner signs its ledger and hides what the record says of its data."""

import hashlib
import hmac
import os
import stat
import tempfile
from pathlib import Path
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from client.store.files import publish
from shared.errors import InputError
from shared.privacy.chain import verify_signature as verify_signature  # the coordinator checks receipts with it too

_FINGERPRINT_USE = b"fedaug fingerprint of data"


class OwnerKey:
    """An owner's Ed25519 key; it never leaves the owner, only :attr:`public` does."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._fingerprint_key = HKDF(hashes.SHA256(), length=32, salt=None, info=_FINGERPRINT_USE).derive(
            private.private_bytes_raw()
        )

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a key and write it to ``path``, readable by its owner only, as PKCS #8 in PEM.

        Raises:
            InputError: a file is there already, which is left as it is; or it cannot be written.
        """
        key = cls(Ed25519PrivateKey.generate())
        content = key._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:  # mode 0600
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                try:
                    publish(Path(file.name), path)
                except FileExistsError:
                    raise InputError(
                        f"{path} exists already and was left as it is: a ledger can only be continued with its own"
                        " key. Use that key, or choose another path for a new one."
                    ) from None
        except OSError as error:
            raise InputError(
                f"cannot write a key to {path} ({error.strerror or error}): make room or choose another folder."
            ) from None
        return key

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`create` wrote.

        Raises:
            InputError: it is missing, no Ed25519 key, or others may read it.
        """
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read()
        except OSError as error:
            raise InputError(
                f"no usable key at {path} ({error.strerror or error}). Nothing can be signed without it: bring it back"
                " from where its backup is kept. A new key cannot continue the ledger of the old one."
            ) from None
        if mode & 0o077:
            raise InputError(
                f"the key at {path} can be used by others (mode {mode:04o}). Run `chmod 600 {path}`; if others had the"
                " chance to read it, rotate to a new key as well."
            )
        try:
            private = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            raise InputError(
                f"{path} holds no Ed25519 key (unencrypted PKCS #8 in PEM): bring it back from where its backup is"
                " kept. A new key cannot continue the ledger of the old one."
            )
        return cls(private)

    @property
    def public(self) -> str:
        """The public key, in hex."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)

    def fingerprint_of(self, digest: bytes) -> str:
        """A name for the data with this digest that only this key can make.

        The digest itself would let anyone who guesses the data confirm the guess. Another key gives another name: after
        a rotation, the same data does.
        """
        return hmac.new(self._fingerprint_key, digest, hashlib.sha256).hexdigest()
