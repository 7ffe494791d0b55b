"""A generator on disk: its weights, with a card that says what they may be used for."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from shared.errors import InputError
from shared.files import write_atomically, write_json
from shared.generators.base import GeneratorModel, Weights
from shared.generators.family import GeneratorSpec, model_from, spec_from_dict, with_home_weights
from shared.generators.lengths import LengthShares
from shared.privacy.noise import LOCAL_NOISE

TUNED_AT_HOME = "none, tuned at home"
"""Noise on the card of a generator that its owner's own users taught after it was received: it never leaves."""

_FORMAT = 2
_PEOPLE = (
    "Epsilon holds for a user of one owner. A person who is a user of k owners is protected by the composition over"
    " the ledgers of all k: at most the sum of their epsilons, at the sum of their deltas."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorCard:
    """What a recipient must know of a generator.

    Args:
        catalogue: ``{"hash", "version", "source", "num_items"}``, with the item ids beside the card.
        epsilon: what an owner paid at ``delta``; infinity without privacy.
        noise: ``local``, or why it protects nobody.
        privacy_unit: whose presence is hidden.
        releases: per owner, what the price was computed from.
        max_items_per_user: the contribution bound, public.
        lengths: how long histories are, where owners released it; None where synthesis goes by a public mean.
        behaviours: public names of the behaviours that the generator tells apart, in the order of its codes.
    """

    spec: GeneratorSpec
    catalogue: dict[str, Any]
    epsilon: float
    delta: float
    noise: str
    privacy_unit: str
    releases: dict[str, list[dict[str, Any]]]
    max_items_per_user: int
    lengths: LengthShares | None = None
    behaviours: tuple[str, ...] = ()

    @property
    def exportable(self) -> bool:
        """Whether the generator, and users drawn from it, may leave the owners.

        Not where its catalogue was read off the data: that it exists says who bought what.
        """
        public = self.catalogue.get("source") != "assumed public"
        return public and self.noise == LOCAL_NOISE and math.isfinite(self.epsilon)


@dataclass(frozen=True, slots=True)
class Generator:
    """A trained model, its card, its identity and the public items it speaks of."""

    model: GeneratorModel
    card: GeneratorCard
    generator_id: str
    item_ids: tuple[str, ...]


def generator_id(weights: Weights) -> str:
    """Sixteen hexadecimal digits that name these weights."""
    return hashlib.sha256(save_tensors(dict(weights))).hexdigest()[:16]


def save_generator(directory: Path, weights: Weights, card: GeneratorCard, item_ids: tuple[str, ...]) -> str:
    """Write ``model.safetensors``, ``items.json`` and last ``card.json``; return the generator's id."""
    directory.mkdir(parents=True, exist_ok=True)
    identity = generator_id(weights)
    write_atomically(directory / "model.safetensors", save_tensors(dict(weights)))
    write_json(directory / "items.json", list(item_ids))
    write_json(
        directory / "card.json",
        {
            "format": _FORMAT,
            "generator_id": identity,
            "spec": card.spec.to_dict(),
            "catalogue": card.catalogue,
            "privacy": {
                "epsilon": card.epsilon,
                "delta": card.delta,
                "unit": card.privacy_unit,
                "neighbours": "add or remove one user",
                "people": _PEOPLE,
                "noise": card.noise,
                "releases": card.releases,
            },
            "max_items_per_user": card.max_items_per_user,
            "lengths": asdict(card.lengths) if card.lengths else None,
            "behaviours": list(card.behaviours),
            "exportable": card.exportable,
        },
    )
    return identity


def load_generator(directory: Path) -> Generator:
    """Read what :func:`save_generator` wrote.

    Raises:
        InputError: a file is missing or damaged, or the weights are not those the card names.
    """
    try:
        stored = json.loads((directory / "card.json").read_text())
        content = (directory / "model.safetensors").read_bytes()
        item_ids = tuple(json.loads((directory / "items.json").read_text()))
        if stored["format"] != _FORMAT:
            raise InputError(f"{directory}: card format {stored['format']}, this version reads {_FORMAT}.")
        privacy = stored["privacy"]
        card = GeneratorCard(
            spec=spec_from_dict(stored["spec"]),
            catalogue=stored["catalogue"],
            epsilon=float(privacy["epsilon"]),
            delta=float(privacy["delta"]),
            noise=privacy["noise"],
            privacy_unit=privacy["unit"],
            releases=privacy["releases"],
            max_items_per_user=int(stored["max_items_per_user"]),
            lengths=_lengths(stored["lengths"]),
            behaviours=tuple(map(str, stored["behaviours"])),
        )
        weights = load_tensors(content)
    except FileNotFoundError as error:
        raise InputError(
            f"{directory}: no generator there ({Path(error.filename).name} is missing). Give the"
            " generator folder of a finished run, such as RUN/generator."
        ) from None
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"{directory}: the generator cannot be read ({error}). Copy it again from its run.") from None
    identity = generator_id(weights)
    if identity != stored["generator_id"] or len(item_ids) != card.spec.num_items:
        raise InputError(
            f"{directory}: the weights ({identity}, {len(item_ids)} items) are not those of the card"
            f" ({stored['generator_id']}, {card.spec.num_items} items). Copy the whole folder again."
        )
    return Generator(model_from(card.spec, with_home_weights(card.spec, weights)), card, identity, item_ids)


def _lengths(stored: dict[str, Any] | None) -> LengthShares | None:
    if stored is None:
        return None
    return LengthShares(tuple(map(int, stored["edges"])), tuple(map(float, stored["shares"])))
