"""What one release of statistics asks of an owner."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self

from shared.errors import InputError
from shared.privacy.releases import GaussianRelease

_LARGEST_HEAD = 2**24  # positions up to here are float32 numbers exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchTerms:
    """Public terms of one release of statistics, the same for every owner.

    Args:
        statistic: ``popularity`` is item popularity and history lengths over the whole catalogue; ``cooccurrence`` is
            how often two items of a head are in one history; ``both`` is one concatenated release of the two, where the
            head is the whole catalogue.
        head_items: items of the head, the most popular ones by an earlier release.
        length_edges: rising lower ends of the buckets in which history lengths are counted; the first is 1.
        release: what it is charged as; None in a simulation without privacy.
    Raises:
        InputError: a number is out of range, or the release is of another statistic.
    """

    statistic: Literal["popularity", "cooccurrence", "both"]
    head_items: int
    length_edges: tuple[int, ...]
    release: GaussianRelease | None

    def __post_init__(self) -> None:
        if self.statistic not in ("popularity", "cooccurrence", "both"):
            raise InputError(f"sketch: unknown statistic {self.statistic!r:.80}")
        whole = [self.head_items, *self.length_edges]
        if any(isinstance(number, bool) or not isinstance(number, int) for number in whole):
            raise InputError("sketch: head_items and length_edges must be whole numbers")
        if not 1 <= self.head_items <= _LARGEST_HEAD:
            raise InputError(f"sketch: head_items must lie between 1 and {_LARGEST_HEAD}")
        edges = self.length_edges
        rising = all(low < high for low, high in pairwise(edges))
        if not (1 <= len(edges) <= 1000 and edges[0] == 1 and rising):
            raise InputError("sketch: length_edges must be at most 1000 rising numbers, from 1 on")
        if self.release is not None and self.release.statistic != self.statistic:
            raise InputError(f"sketch: the release prices {self.release.statistic!r}, the terms ask {self.statistic!r}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "release": self.release.to_dict() if self.release else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form; InputError where a field is unknown, missing or out of range."""
        release = values.get("release")
        try:
            read = {
                "length_edges": tuple(values["length_edges"]),
                "release": GaussianRelease.from_dict(release) if release else None,
            }
            return cls(**{**values, **read})
        except (TypeError, KeyError) as error:
            raise InputError(f"sketch: missing or unknown field {error}") from None
