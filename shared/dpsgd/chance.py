"""Chance that privacy rests on: uniforms and normals from a key stream that nobody else has."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from shared.dpsgd.box_muller import normals
from shared.rng import stream

Floats = npt.NDArray[np.float64]

# Numbers made at a time: what they pass through stays in a core's cache.
_CHUNK = 1 << 17
_ZEROS = memoryview(bytes(4 * _CHUNK))
_CUDA_CHUNK = 1 << 22


class Chance:
    """Uniform and normal numbers from AES-256 in counter mode.

    Torch's own CPU generator keeps 32 bits of any seed, so that whoever sees an update could try them all and
    subtract the noise, and its float32 normals end at 5.8 standard deviations; these reach 10.7.

    Args:
        key: 32 bytes, which repeat the stream; None draws a key from the operating system, another in every process,
            and never keeps it anywhere.
    Guarantee:
        Without a key, no two objects and no two processes share a stream, forked ones included.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        self._process = -1
        self._cipher: CipherContext
        self._words = bytearray(4 * _CHUNK + 15)  # update_into asks for one block less one byte more than it writes

    @classmethod
    def secret(cls) -> "Chance":
        """With a key of the operating system's cryptographic generator."""
        return cls()

    @classmethod
    def seeded(cls, seed: int, *names: str | int) -> "Chance":
        """Repeatable, and so *not private*: for simulations and tests."""
        return cls(stream(seed, *names).bytes(32))

    def __reduce__(self) -> str:
        # A copy would repeat the noise, and a stored key could remove it.
        raise TypeError("a stream of chance is never copied or stored; make another one where it is needed")

    def uniform(self, count: int) -> Floats:
        """Numbers strictly between 0 and 1, of 52 bits, shape ``(count,)``."""
        words = np.frombuffer(self._bytes(8 * count), dtype=np.uint64)
        # 52 bits and the half are a float64 exactly; with 53 the largest would round to 1.
        return np.asarray(((words >> np.uint64(12)) + 0.5) * 2.0**-52, dtype=np.float64)

    def fill_normal(self, values: Tensor, *, stddev: float) -> None:
        """Overwrite contiguous ``values`` with normals of mean 0.

        On a CPU by :mod:`shared.dpsgd.box_muller` from the key stream. On a GPU by torch's Philox in float64, seeded
        for every call with 63 bits of the key stream; it is not a cryptographic generator: see docs/privacy-model.md.
        """
        flat = values.view(-1)
        if values.is_cuda:
            self._fill_on_gpu(flat, stddev)
            return
        for start in range(0, len(flat), _CHUNK):
            self._fill_on_cpu(flat[start : start + _CHUNK].numpy(), stddev)

    def _fill_on_cpu(self, values: npt.NDArray[Any], stddev: float) -> None:
        even = len(values) + len(values) % 2
        self._stream().update_into(_ZEROS[: 4 * even], self._words)
        words = np.frombuffer(self._words, dtype=np.uint32, count=even)
        if even == len(values):
            normals(words, values, stddev=stddev, uniform=self.uniform)
            return
        one_more = np.empty(even, values.dtype)
        normals(words, one_more, stddev=stddev, uniform=self.uniform)
        values[:] = one_more[:-1]

    def _fill_on_gpu(self, values: Tensor, stddev: float) -> None:
        generator = torch.Generator(values.device)
        generator.manual_seed(int.from_bytes(self._bytes(8), "little") >> 1)
        # In float64, whose normals reach 8.5 standard deviations.
        for start in range(0, len(values), _CUDA_CHUNK):
            chunk = values[start : start + _CUDA_CHUNK]
            drawn = torch.randn(len(chunk), generator=generator, device=values.device, dtype=torch.float64)
            chunk.copy_(drawn.mul_(stddev))

    def _bytes(self, count: int) -> bytes:
        return self._stream().update(bytes(count))

    def _stream(self) -> CipherContext:
        if self._process != os.getpid():
            if self._process == -1 or self._key is None:
                key = os.urandom(32) if self._key is None else self._key
                self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
            self._process = os.getpid()
        return self._cipher
