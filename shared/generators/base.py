"""What every generator is: weights that learn from users under DP-SGD, and are sampled without looking at any."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.dpsgd.engine import Users
from shared.errors import InputError
from shared.rng import torch_stream

Weights = dict[str, npt.NDArray[np.float32]]
IntArray = npt.NDArray[np.int64]

LARGEST_CATALOGUE = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The architecture and the loss of a generator, all public; two owners with one spec build one model.

    A subclass gives every field a range: an owner builds what a server asks for, so sizes have an end.

    Raises:
        InputError: a field is not of its kind, or outside its range.
    """

    kind: ClassVar[str]
    WHOLE: ClassVar[Mapping[str, int]] = {}
    """Whole numbers from 1, with the largest of each."""
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Other numbers, with both ends of the range of each."""
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names, with those allowed for each."""

    num_items: int

    def __post_init__(self) -> None:
        for name, largest in {"num_items": LARGEST_CATALOGUE, **self.WHOLE}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise InputError(f"generator spec: {name} must be a whole number from 1 to {largest}, not {value!r}")
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and low <= value <= high):
                raise InputError(f"generator spec: {name} must lie between {low:g} and {high:g}, not {value!r}")
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"generator spec: {name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form; InputError where a field is unknown, missing or out of range."""
        own: dict[str, Any] = {name: value for name, value in values.items() if name != "kind"}
        try:
            lists: dict[str, Any] = {name: tuple(v) for name, v in own.items() if isinstance(v, list)}
            return cls(**{**own, **lists})
        except TypeError as error:
            raise InputError(f"generator spec: {error}") from None


class Encoded(Protocol):
    """An owner's users in the form that one kind of generator trains on."""

    def batch(self, drawn: IntArray) -> Users:
        """The users at positions ``drawn``, on the CPU."""
        ...


class GeneratorModel(nn.Module, ABC):
    """A generator's weights and all that is done with them.

    What sees users is :attr:`private_part`, and DP-SGD trains it alone: it mixes no users, and calls each of its layers
    once in a loss. Everything else is a function of its weights, of public numbers and of fresh chance.
    """

    spec: Any

    @property
    def private_part(self) -> nn.Module:
        """The module whose parameters :meth:`loss` trains on users."""
        return self

    @abstractmethod
    def encode(self, histories: Histories) -> Encoded:
        """``histories`` as this kind trains on them: each user's row a function of that user alone."""

    @abstractmethod
    def loss(self, users: Any, *, share_done: float, chance: Chance) -> Tensor:
        """Each user's loss, shape ``(len(users),)``.

        Args:
            users: a batch of :meth:`encode`'s, on the model's device.
            share_done: part of the training that lies behind, from 0 to 1.
            chance: of all draws, such as dropout and latents. Users take from it in turn, so one more user moves the
                draws of those behind: the bound on a user's influence holds because nobody can know them.
        """

    def after_step(self, *, learning_rate: float, share_done: float, chance: Chance) -> None:
        """Train whatever sees no user; called after each noised step of the private part."""

    def stays_home(self, name: str) -> bool:
        """Whether the weight ``name`` is kept by each owner instead of being sent and averaged."""
        return False

    @abstractmethod
    def draw(
        self, lengths: IntArray, *, generator: torch.Generator, tilt: npt.NDArray[np.float32] | None = None
    ) -> Histories:
        """Users who never existed.

        Args:
            lengths: items of each, shape ``(num_users,)``, from 1 to ``num_items``.
            generator: fresh randomness; it protects nobody and may be public.
            tilt: shape ``(num_items,)``, added to the logit of each item at every draw.
        Guarantee:
            A function of the weights and the arguments alone: post-processing.
        """

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The weight ``name`` before training, from chance and public sizes alone."""
        if name.endswith("bias"):
            return torch.zeros(shape)
        # Glorot & Bengio 2010: keeps the scale of a signal through tanh layers.
        values: Tensor = torch.randn(shape, generator=generator) * (2.0 / sum(shape)) ** 0.5
        return values


def initial_weights_of(model: GeneratorModel, seed: int) -> Weights:
    """Weights before training, from ``seed`` and public sizes alone: float32, in the order of ``state_dict``."""
    generator = torch_stream(seed, "initial-weights")
    return {
        name: model.initial(name, tuple(value.shape), generator).numpy().astype(np.float32)
        for name, value in model.state_dict().items()
    }


def load_weights(model: GeneratorModel, weights: Weights) -> None:
    """Put ``weights`` into ``model``.

    Raises:
        InputError: names or shapes are not those of the model, or a number is not finite.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != given:
        odd = sorted(set(expected.items()) ^ set(given.items()))[0]
        raise InputError(f"generator weights do not fit the spec: first difference at {odd[0]} {odd[1]}.")
    if any(not np.isfinite(value).all() for value in weights.values()):
        raise InputError("generator weights hold a number that is not finite; use the last good checkpoint.")
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
