"""Find what an owner's state folder holds, or say where it should be."""

from pathlib import Path

from client.store.database import missing
from client.store.keys import OwnerKey
from shared.errors import InputError

LEDGER, KEY = "ledger.sqlite", "owner.key"


def require_folder(directory: Path) -> None:
    """Raise InputError unless ``directory`` is a folder."""
    if not directory.is_dir():
        raise InputError(
            f"there is no folder {directory}. --state names an owner's folder, in which its policy.toml and {LEDGER}"
            " lie; of a simulation that is RUN/owners/NAME."
        )


def ledger_in(directory: Path) -> Path:
    """Where the ledger lies.

    Raises:
        InputError: there is no such folder, or no ledger in it.
    """
    require_folder(directory)
    path = directory / LEDGER
    if not path.exists():
        raise InputError(f"{missing(path)} With a backup: `fedaug ledger restore --state {directory} --from BACKUP`.")
    return path


def public_key_in(directory: Path) -> str | None:
    """Hex of the owner's public key; None where the key lies elsewhere.

    Raises:
        InputError: the key cannot be read, or others can.
    """
    path = directory / KEY
    return OwnerKey.load(path).public if path.exists() else None
