"""Carry with every value whether it may leave its owner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from shared.generators.card import GeneratorCard

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Traced(Generic[T_co]):
    """A value and its class. Made by :func:`private`, :func:`public`, :func:`released` and :func:`derive` alone.

    Args:
        exportable: whether it depends on a DP release, public inputs and fresh randomness only; else it is *internal*,
            and so is whatever is made with it.
    """

    value: T_co
    exportable: bool


def private(value: T) -> Traced[T]:
    """What an owner's own users made: internal."""
    return Traced(value, exportable=False)


def public(value: T) -> Traced[T]:
    """What anybody may know, such as a published table; whoever calls this vouches that no user was looked at."""
    return Traced(value, exportable=True)


def released(value: T, card: GeneratorCard) -> Traced[T]:
    """What was computed from the weights of a generator, public numbers and fresh randomness: of the generator's class.

    Reference:
        Dwork & Roth 2014, proposition 2.1: post-processing keeps differential privacy.
    """
    return Traced(value, exportable=card.exportable)


def derive(make: Callable[..., T], first: Traced[Any], *others: Traced[Any]) -> Traced[T]:
    """``make(*values)``, exportable only where every source is.

    Args:
        make: reads its arguments, public numbers and fresh randomness; a private value that it finds elsewhere would
            escape the class, so it has to come in as a source.
        first, others: the sources, whose values ``make`` is called with.
    Guarantee:
        Once internal, always internal: from one traced value to the next there is no way but this.
    """
    sources = (first, *others)
    return Traced(make(*(source.value for source in sources)), exportable=all(one.exportable for one in sources))
