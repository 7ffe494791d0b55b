"""Which arrays a request brings and which its answer must be, by name, in their order."""

from collections.abc import Mapping
from math import prod

from shared.generators.base import Weights
from shared.generators.family import GeneratorSpec, travelling_shapes
from shared.sketch.statistic import sketch_shapes
from shared.wire.messages import TrainJob

Shapes = Mapping[str, tuple[int, ...]]

# Of a request for the co-occurrence of a head: 1 for each item of the catalogue that is in it, else 0.
HEAD = "head"


def asked_shapes(job: TrainJob) -> Shapes:
    """Names and shapes of the arrays that ``job`` must bring, from its public terms alone."""
    sketch = job.plan.sketch
    if sketch is None:
        return travelling_shapes(job.spec)
    return {HEAD: (job.spec.num_items,)} if sketch.statistic == "cooccurrence" else {}


def answered_shapes(job: TrainJob) -> Shapes:
    """Names and shapes of the arrays that answer ``job``, from its public terms alone."""
    sketch = job.plan.sketch
    return travelling_shapes(job.spec) if sketch is None else sketch_shapes(sketch, job.spec.num_items)


def travelling_only(spec: GeneratorSpec, weights: Weights) -> Weights:
    """``weights`` without those that every owner keeps, in the order of a request."""
    return {name: weights[name] for name in travelling_shapes(spec)}


def num_numbers(shapes: Shapes) -> int:
    """Numbers in arrays of such shapes."""
    return sum(map(prod, shapes.values()))
