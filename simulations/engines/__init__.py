"""Run a planned federation on this machine, one result whatever the engine."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context, RecordDict

from client.app import app as client_app
from server.app import app as server_app
from server.checkpoints import read_state
from server.plan import FederationPlan
from server.rounds import latest_checkpoint
from shared.errors import FedAugError
from shared.generators.base import Weights
from simulations.engines.flower import run_flower
from simulations.engines.inprocess import InProcessGrid

Engine = Literal["inprocess", "flower"]
Progress = Callable[[int, int, dict[str, Any]], None]


def run_federation(run_dir: Path, *, engine: Engine, num_owners: int, progress: Progress) -> Weights:
    """Run, or resume, the rounds that ``run_dir/plan.json`` asks for.

    Args:
        run_dir: holds ``plan.json`` and ``owners/NAME/{train.npz,policy.json}``.
        num_owners: how many owners the folder holds.
        progress: called with (server_round, num_rounds, figures) once for each round that finishes.
    Returns: the weights after the last round: with seeded noise the same bits from both engines,
        resumed or not.
    Raises:
        FedAugError: what stopped the run, with the path of the log where an engine has one.
    """
    run_dir = run_dir.resolve()
    num_rounds = FederationPlan.load(run_dir).num_rounds
    reporter = _Reporter(run_dir, progress)
    latest = latest_checkpoint(run_dir)
    if latest is None or latest[0] < num_rounds:
        if engine == "inprocess":
            _run_in_process(run_dir, num_owners, reporter.report)
        else:
            run_flower(run_dir, num_owners=num_owners, report=reporter.report)
        reporter.report()
        latest = latest_checkpoint(run_dir)
    if latest is None or latest[0] < num_rounds:
        raise FedAugError(
            f"the run in {run_dir} ended after round {latest[0] if latest else 0} of {num_rounds}; resume it."
        )
    return latest[1]


def _run_in_process(run_dir: Path, num_owners: int, report: Callable[[], None]) -> None:
    grid = InProcessGrid(client_app, num_owners=num_owners, run_dir=run_dir, between=report)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"run-dir": str(run_dir)})
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.WARNING)  # Flower tells each round to stderr, over the caller's progress
    try:
        server_app(grid, context)
    finally:
        log.setLevel(level)


class _Reporter:
    """Tells rounds as their checkpoints appear: the one thing both engines leave behind."""

    def __init__(self, run_dir: Path, progress: Progress) -> None:
        self._run_dir, self._progress = run_dir, progress
        self._told = read_state(run_dir).get("server_round", 0)

    def report(self) -> None:
        state = read_state(self._run_dir)
        for figures in state.get("rounds", []):
            if figures["server_round"] > self._told:
                self._told = figures["server_round"]
                self._progress(self._told, state["num_rounds"], figures)
