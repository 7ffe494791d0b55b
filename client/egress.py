"""Let out what was declared and nothing else: arrays, and words to the server."""

import json
from io import BytesIO

import numpy as np
import numpy.typing as npt
from flwr.app import Array, RecordDict

from client.rules import Refusal
from shared.errors import FedAugError, InputError, RefusedError
from shared.wire.arrays import answered_shapes
from shared.wire.messages import OwnerFailed, TrainJob, TrainReply

# Written out here although shared.wire.messages has them too: what leaves is to be changed in two places, or not.
_WEIGHTS, _REPLY, _SIMULATION_ONLY = "weights", "reply", "simulation-only"
_REPLY_FIELDS = {"owner", "server-round", "release", "receipt"}
_PRIVATE_FIGURES = {"loss", "num_users", "zeroed_users"}


class EgressError(FedAugError):
    """A reply holds what was not declared. It is our bug, and the reply stays at home."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the reply {what}. Nothing left this owner; report this as a bug.")


def check_egress(reply: TrainReply, job: TrainJob, *, owner: str, simulated: bool) -> RecordDict:
    """Return the record of ``reply``, fit to leave.

    Args:
        owner: as whom this agent answers.
        simulated: a simulation, which alone may ask for private figures.
    Returns: the record that was looked at: send this one, not another made of the same reply.
    Guarantee:
        It holds the generator's own arrays, each with its name, place, shape, float32 and finite numbers and nothing
        behind them, and the public fields of the reply. Messages name what is wrong, never a value.
    Raises:
        EgressError: anything else is in it, or something is missing.
    """
    if reply.owner != owner:
        raise EgressError("is signed with another owner's name")
    if reply.server_round != job.plan.server_round:
        raise EgressError("answers another round")
    if reply.release != job.plan.round_release:
        raise EgressError("describes another release than was asked for")
    figures = set(reply.simulation_only)
    if figures and not (simulated and job.collect_metrics):
        raise EgressError(f"holds {len(figures)} private figure(s), which nobody may collect here")
    if not figures <= _PRIVATE_FIGURES:
        raise EgressError(f"holds {len(figures - _PRIVATE_FIGURES)} undeclared figure(s)")
    _check_arrays(reply, job)
    record = reply.to_record()
    _check_record(record, reply, job)
    return record


def public_words(error: Exception, *, simulated: bool) -> FedAugError:
    """What the server may be told of ``error``.

    Guarantee:
        A deployed owner tells the name of a rule or one of three codes, never a text. A simulated one tells our own
        errors, which name parameters and totals; of other people's errors nobody tells more than that there was one.
    """
    if isinstance(error, FedAugError) and simulated:
        return error
    if isinstance(error, Refusal):
        return RefusedError(f"refused by the owner's policy: rule '{error.rule}'. Its own log says more.")
    if isinstance(error, RefusedError):
        return RefusedError("refused by the owner (code 'refused'). Its own log says more.")
    if isinstance(error, InputError):
        return InputError("an owner cannot answer as it is set up (code 'input'). Its own log says more.")
    return OwnerFailed("an owner's program failed (code 'failed'); its own log says why, nothing left the owner.")


def _check_arrays(reply: TrainReply, job: TrainJob) -> None:
    declared = answered_shapes(job)
    undeclared, missing = set(reply.weights) - set(declared), set(declared) - set(reply.weights)
    if undeclared or missing:
        raise EgressError(f"holds {len(undeclared)} undeclared array(s) and lacks {len(missing)}")
    if list(reply.weights) != list(declared):
        raise EgressError("holds its arrays in another order than the generator")
    for name, values in reply.weights.items():
        # Exactly an array: a masked or structured one carries more than its numbers.
        if type(values) is not np.ndarray or values.dtype != np.dtype(np.float32):
            raise EgressError(f"holds {name} not as a plain array of float32")
        if values.shape != declared[name]:
            raise EgressError(f"holds {name} in another shape than {declared[name]}")
        if not np.isfinite(values).all():
            raise EgressError(f"holds a number in {name} that is not finite")


def _check_record(record: RecordDict, reply: TrainReply, job: TrainJob) -> None:
    declared = {_WEIGHTS, _REPLY} | ({_SIMULATION_ONLY} if reply.simulation_only else set())
    if set(record) != declared:
        raise EgressError(f"holds {len(set(record) - declared)} undeclared record(s)")
    fields, release = record.config_records[_REPLY], job.plan.round_release
    if set(fields) != _REPLY_FIELDS:
        raise EgressError(f"holds {len(set(fields) - _REPLY_FIELDS)} undeclared field(s)")
    texts = (json.loads(str(fields[name])) for name in ("release", "receipt"))
    said = (fields["owner"], fields["server-round"], *texts)
    receipt = reply.receipt.to_dict() if reply.receipt else None
    if said != (reply.owner, job.plan.server_round, release.to_dict() if release else None, receipt):
        raise EgressError("says other things in its fields than were declared")
    if reply.simulation_only and set(record.metric_records[_SIMULATION_ONLY]) != set(reply.simulation_only):
        raise EgressError("holds undeclared figures")
    arrays = record.array_records[_WEIGHTS]
    if list(arrays) != list(reply.weights):
        raise EgressError("holds other arrays than were declared")
    for name, array in arrays.items():
        _check_bytes(name, array, reply.weights[name])


def _check_bytes(name: str, array: Array, values: npt.NDArray[np.float32]) -> None:
    if (array.dtype, array.shape, array.stype) != ("float32", values.shape, "numpy.ndarray"):
        raise EgressError(f"declares {name} as something else than it is")
    plain = BytesIO()
    np.save(plain, np.ascontiguousarray(values), allow_pickle=False)
    # The whole of it: numpy reads an array and does not look at what comes behind.
    if array.data != plain.getbuffer():
        raise EgressError(f"holds other bytes than the numbers of {name}")
