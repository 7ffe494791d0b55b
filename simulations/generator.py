"""What the generator section of a scenario asks for."""

from typing import Any

from shared.config import GeneratorSection, Scenario
from shared.generators.family import GeneratorSpec, spec_from_dict

_OF_VAE = ("hidden_size", "latent_size", "prior", "num_components", "kl_weight", "kl_anneal_share", "dropout")


def spec_of(scenario: Scenario, num_items: int, *, has_times: bool = True) -> GeneratorSpec:
    """The generator that ``scenario`` asks for, over a catalogue of ``num_items``.

    Args:
        has_times: whether the source tells when things happened; a sequence generator models no time without.
    """
    section = scenario.generator
    values: dict[str, Any] = {"kind": section.kind, "num_items": num_items}
    if section.kind != "spectral":
        values["popularity_scale"] = section.popularity_scale
    match section.kind:
        case "vae":
            values |= {name: getattr(section, name) for name in _OF_VAE}
        case "gan":
            values |= {"hidden_size": section.hidden_size, "latent_size": section.latent_size}
            values |= section.gan.model_dump()
        case "sequence":
            values |= section.sequence.model_dump(exclude={"behaviours"})
            values |= {"dropout": section.dropout, "num_behaviours": max(1, len(section.sequence.behaviours))}
            if not has_times:
                values["gap_edges"] = ()
        case "spectral":
            values["latent_size"] = section.latent_size
    return spec_from_dict(values)


def trains(section: GeneratorSection) -> bool:
    """Whether the generator is trained in rounds, or all of it is read off the sketch."""
    return section.kind != "spectral"


def needs_sketch(section: GeneratorSection) -> bool:
    """Whether statistics of all users are released before anything is trained."""
    return not trains(section) or section.warm_start != "none"
