"""Chance that privacy rests on: 52-bit uniforms and normals from words that nobody else has."""

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shared.rng import stream

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

# Torch's CPU generator keeps 32 bits of any seed: whoever sees an update could try them all and subtract the noise.
# Its float32 normals also end at 5.77 standard deviations; these reach 8.5.


class Chance:
    """Uniform and normal numbers made from 64-bit words.

    Args:
        words: returns so many words, uniform and independent.
    """

    def __init__(self, words: Callable[[int], Words]) -> None:
        self._words = words

    @classmethod
    def secret(cls) -> "Chance":
        """From the operating system's cryptographic generator: nothing to seed, store, copy or fork."""
        return cls(lambda count: np.frombuffer(os.urandom(8 * count), dtype=np.uint64))

    @classmethod
    def seeded(cls, seed: int, *names: str | int) -> "Chance":
        """Repeatable, and so *not private*: for simulations and tests."""
        generator = stream(seed, *names)
        return cls(lambda count: generator.integers(0, 2**64, size=count, dtype=np.uint64))

    def uniform(self, count: int) -> Floats:
        """Numbers strictly between 0 and 1, shape ``(count,)``."""
        # 52 bits and the half are a float64 exactly; with 53 the largest would round to 1.
        return np.asarray(((self._words(count) >> np.uint64(12)) + 0.5) * 2.0**-52, dtype=np.float64)

    def normal(self, count: int) -> Floats:
        """Standard normal numbers, shape ``(count,)``, by Box & Muller 1958."""
        pairs = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
