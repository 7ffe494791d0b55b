"""Weights of a generator that an owner keeps between rounds and never sends, such as its own discriminator's."""

from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError

from shared.errors import InputError
from shared.files import sha256, write_atomically
from shared.generators.base import Weights
from shared.generators.family import GeneratorSpec, travelling_shapes, weight_shapes, with_home_weights

# The server may ask for the round after its last checkpoint or for one of the two before, whose checkpoints it keeps.
_KEPT_ROUNDS = 4


def home_names(spec: GeneratorSpec) -> tuple[str, ...]:
    """The weights that stay at home, in their order; mostly none."""
    travelling = travelling_shapes(spec)
    return tuple(name for name in weight_shapes(spec) if name not in travelling)


def load_home_weights(
    directory: Path, run_id: str, spec: GeneratorSpec, *, before_round: int, first_round: int
) -> Weights:
    """Those that the latest round before ``before_round`` left; in ``first_round`` those that every owner begins with.

    Raises:
        InputError: there are none of an earlier round, or they cannot be read.
    """
    names = home_names(spec)
    if not names:
        return {}
    folder = _folder(directory, run_id)
    earlier = [path for path in _rounds(folder) if int(path.stem) < before_round]
    if not earlier and before_round > first_round:
        raise InputError(
            f"{folder} keeps no weights from before round {before_round}: they were lost, this owner joined late, or"
            " the server asks for a round too far back. Restore the folder from a copy, or take part in a new run."
        )
    if not earlier:
        first = with_home_weights(spec, {})
        return {name: first[name] for name in names}
    try:
        stored = safetensors.numpy.load(earlier[-1].read_bytes())
        return {name: stored[name] for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{earlier[-1]} cannot be read ({error!r}): it holds weights of this run that only this owner has. Restore"
            " it from a copy, or take part in a new run."
        ) from None


def save_home_weights(directory: Path, run_id: str, weights: Weights, *, server_round: int) -> None:
    """Keep what ``server_round`` left, and forget rounds too old to be asked for again."""
    if not weights:
        return
    folder = _folder(directory, run_id)
    write_atomically(folder / f"{server_round:05d}.safetensors", safetensors.numpy.save(weights))
    for old in _rounds(folder)[:-_KEPT_ROUNDS]:
        old.unlink(missing_ok=True)


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))


def _folder(directory: Path, run_id: str) -> Path:
    # The run's name comes from the server: hashed, so that it cannot name a place of its own.
    return directory / "home-weights" / sha256(run_id.encode())[:16]
