"""Keep what the next round needs, so that a killed run goes on as if it had not been."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from shared.errors import InputError
from shared.files import sha256, write_atomically
from shared.generators.base import Weights

# One to go on from, and two to fall back to where the disk lost the newest.
_KEPT_ROUNDS = 3
_PARTS = ("weights", "strategy_state", "average", "statistics")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state after a round; round 0 is before the first.

    Args:
        weights: of the generator, without those that owners keep; what training goes on from.
        strategy_state: what the server's optimizer remembers, by name.
        average: of the weights over the rounds, by name; empty where none is kept.
        statistics: sums of what the owners released in the sketches so far, by round and name; float64. Empty once the
            generator was begun from them.
        figures: one entry per finished round, for people and ``run.json``.
    """

    server_round: int
    weights: Weights
    strategy_state: Mapping[str, npt.NDArray[np.float32]]
    figures: tuple[dict[str, Any], ...]
    average: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    statistics: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, *, plan_digest: str, num_rounds: int) -> None:
    """Write the arrays, then ``state.json`` that points to them.

    Guarantee:
        After a crash at any moment, :func:`load_checkpoint` finds this checkpoint or the one before, whole.
    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    parts = {part: getattr(checkpoint, part) for part in _PARTS}
    arrays = {f"{part}/{name}": values for part, named in parts.items() for name, values in named.items()}
    order = json.dumps({part: list(named) for part, named in parts.items()})
    content = safetensors.numpy.save(arrays, metadata={"order": order})
    path = folder(run_dir) / f"round-{checkpoint.server_round:05d}.safetensors"
    write_atomically(path, content)
    kept = [entry for entry in _entries(run_dir, plan_digest) if entry["server_round"] < checkpoint.server_round]
    kept = [*kept, {"server_round": checkpoint.server_round, "file": path.name, "sha256": sha256(content)}][
        -_KEPT_ROUNDS:
    ]
    state = {
        "plan_digest": plan_digest,
        "server_round": checkpoint.server_round,
        "num_rounds": num_rounds,
        "checkpoints": kept,
        "rounds": list(checkpoint.figures),
    }
    write_atomically(folder(run_dir) / "state.json", json.dumps(state, indent=2).encode())
    named = {entry["file"] for entry in kept}
    for old in folder(run_dir).glob("round-*.safetensors"):
        if old.name not in named:
            old.unlink(missing_ok=True)


def load_checkpoint(run_dir: Path, *, plan_digest: str) -> Checkpoint | None:
    """The newest whole checkpoint, or None before the first.

    Raises:
        InputError: ``state.json`` is unreadable or another plan's, or no checkpoint it names is whole.
    """
    entries = _entries(run_dir, plan_digest)
    for entry in reversed(entries):
        path = folder(run_dir) / entry["file"]
        try:
            content = path.read_bytes()
            if sha256(content) != entry["sha256"]:
                raise ValueError("its SHA-256 is not the recorded one")
            return _parse(content, entry["server_round"], read_state(run_dir)["rounds"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logging.getLogger("fedaug.server").warning("%s is torn (%s); trying the one before.", path, error)
    if entries:
        raise InputError(
            f"no whole checkpoint is left in {folder(run_dir)}: {len(entries)} recorded, all torn. Restore the folder"
            " from a copy, or start a new run; the owners' ledgers keep what was spent."
        )
    return None


def read_state(run_dir: Path) -> dict[str, Any]:
    """``state.json`` as it is now; empty before the first checkpoint.

    Raises:
        InputError: the file is not one of ours.
    """
    path = folder(run_dir) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not {"plan_digest", "server_round", "num_rounds", "checkpoints", "rounds"} <= set(state):
            raise ValueError("fields are missing")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is not a state that a run wrote ({error}). Restore it from a copy, or start a new run."
        ) from None
    return dict(state)


def _entries(run_dir: Path, plan_digest: str) -> list[dict[str, Any]]:
    state = read_state(run_dir)
    if state and state["plan_digest"] != plan_digest:
        raise InputError(
            f"{folder(run_dir)} belongs to another plan ({state['plan_digest'][:12]}, this one is"
            f" {plan_digest[:12]}). Continuing would mix two runs: choose another --out, or restore plan.json."
        )
    return list(state.get("checkpoints", []))


def _parse(content: bytes, server_round: int, figures: list[dict[str, Any]]) -> Checkpoint:
    arrays = safetensors.numpy.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    # safetensors sorts names; the order in which sums run is ours to keep.
    order = json.loads(header["__metadata__"]["order"])
    return Checkpoint(
        server_round=server_round,
        **{part: {name: arrays[f"{part}/{name}"] for name in order[part]} for part in _PARTS},
        figures=tuple(entry for entry in figures if entry["server_round"] <= server_round),
    )
