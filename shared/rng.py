"""Named streams of chance: a new draw under one name changes no number under another."""

import hashlib

import numpy as np
import torch


def _entropy(seed: int, names: tuple[str | int, ...]) -> int:
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for ``names`` under ``seed``; the same on every platform and in every process."""
    return np.random.Generator(np.random.PCG64(_entropy(seed, names)))


def torch_stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU torch generator for ``names`` under ``seed``."""
    return torch.Generator().manual_seed(_entropy(seed, names) % 2**63)
