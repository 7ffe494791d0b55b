"""What the generator section of a scenario asks for."""

from shared.config import GeneratorSection, Scenario
from shared.generators.family import GeneratorSpec, spec_from_dict


def spec_of(scenario: Scenario, num_items: int) -> GeneratorSpec:
    """The generator that ``scenario`` asks for, over a catalogue of ``num_items``."""
    section = scenario.generator
    own = {"kind", "warm_start", "head_items"}
    return spec_from_dict({"kind": section.kind, "num_items": num_items, **section.model_dump(exclude=own)})


def trains(section: GeneratorSection) -> bool:
    """Whether the generator is trained in rounds, or all of it is read off the sketch."""
    return section.kind != "spectral"


def needs_sketch(section: GeneratorSection) -> bool:
    """Whether statistics of all users are released before anything is trained."""
    return not trains(section) or section.warm_start != "none"
