"""What program runs here: a hash of its source and the versions of what it stands on."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

_PACKAGES = ("flwr", "opacus", "torch", "numpy", "numba", "dp-accounting")


@lru_cache(maxsize=1)
def code_hash() -> str:
    """SHA-256 over the files of ``client`` and ``shared``, which is all that sees an owner's data; hex."""
    root = Path(__file__).parent.parent
    content = hashlib.sha256()
    for folder in ("client", "shared"):
        for path in sorted((root / folder).rglob("*.py")):
            body = path.read_bytes()
            content.update(f"{path.relative_to(root).as_posix()}\0{len(body)}\0".encode())
            content.update(body)
    return content.hexdigest()


@lru_cache(maxsize=1)  # each is looked up on disk
def versions() -> Mapping[str, str]:
    """Of the packages that decide what is computed, by name."""
    return MappingProxyType({name: version(name) for name in _PACKAGES})
