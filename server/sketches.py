"""Add up what owners release in the sketches of a run, then begin the generator from it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from server.plan import FederationPlan
from shared.generators.base import Weights
from shared.generators.beginning import begin_from
from shared.sketch.release import Sketch, choose_head, read_sketch, save_sketch
from shared.wire.arrays import HEAD, travelling_only
from shared.wire.messages import TrainReply

Sums = Mapping[str, npt.NDArray[np.float64]]

SKETCH_FILE = "sketch.safetensors"


def arrays_to_send(plan: FederationPlan, statistics: Sums, server_round: int) -> Weights:
    """What a sketch brings to the owners: the head, where it asks for its co-occurrence."""
    sketch = plan.terms.sketches[server_round - 1]
    if sketch.statistic != "cooccurrence":
        return {}
    marks = np.zeros(plan.spec.num_items, dtype=np.float32)
    marks[choose_head(_of_round(statistics, server_round - 1)["popularity"], sketch.head_items)] = 1.0
    return {HEAD: marks}


def add_up(statistics: Sums, replies: Iterable[TrainReply], server_round: int) -> dict[str, npt.NDArray[np.float64]]:
    """``statistics`` with the sums of this round's replies, in the order that they come in."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for reply in replies:
        for name, values in reply.weights.items():
            where = f"{server_round}/{name}"
            sums[where] = sums[where] + values if where in sums else values.astype(np.float64)
    return {**statistics, **sums}


def begin(run_dir: Path, plan: FederationPlan, statistics: Sums, num_replies: int) -> Weights:
    """The weights to begin with, from every sketch; what was read off them is kept in the run folder.

    Guarantee:
        Post-processing of the releases: the same sums give the same weights.
    """
    sketches = plan.terms.sketches
    sketch: Sketch = read_sketch(
        [_of_round(statistics, number) for number in range(1, len(sketches) + 1)],
        sketches,
        num_owners=num_replies,
        num_items=plan.spec.num_items,
    )
    save_sketch(run_dir / SKETCH_FILE, sketch)
    return travelling_only(plan.spec, begin_from(sketch, plan.spec, seed=plan.seed))


def _of_round(statistics: Sums, server_round: int) -> dict[str, npt.NDArray[np.float64]]:
    prefix = f"{server_round}/"
    return {name.removeprefix(prefix): values for name, values in statistics.items() if name.startswith(prefix)}
