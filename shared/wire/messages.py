"""What server and owners say to each other, as values; records exist only here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from shared.errors import FedAugError, InputError, RefusedError
from shared.generators.base import Weights
from shared.generators.family import GeneratorSpec, spec_from_dict
from shared.privacy.chain import Receipt
from shared.privacy.releases import Release, release_from_dict
from shared.wire.plan import RoundPlan

# Raised whenever a message changes its meaning; both sides must have the same.
WIRE_VERSION = "3"

_LONGEST_FIELD = 64 * 1024

# Names of the records in a message. Flower's strategies are told the first two.
WEIGHTS, JOB = "weights", "job"
_REPLY, _HELLO, _REFUSAL, _SIMULATION_ONLY = "reply", "hello", "refusal", "simulation-only"


class CatalogueMismatch(InputError):
    """Server and owner do not hold the same public catalogue."""

    def __init__(self, owner: str, *, server_hash: str, owner_hash: str) -> None:
        super().__init__(
            f"{owner} holds catalogue {owner_hash}, the server plans with {server_hash}. Item positions would mean"
            " different items: give both the same catalogue file, then start again."
        )


class OwnerFailed(FedAugError):
    """An owner's program stopped on a bug of its own; only the owner's log may say more."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One round's request to an owner.

    Args:
        noise_seed: makes the noise repeatable, so not private; only a simulated owner accepts it.
        collect_metrics: asks for private figures; only a simulated owner answers.
    """

    run_id: str
    weights: Weights
    spec: GeneratorSpec
    plan: RoundPlan
    catalogue_hash: str
    noise_seed: int | None
    collect_metrics: bool

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything asked: two requests with one digest have one answer."""
        content = hashlib.sha256(_dump({**self._scalars(), "proximal_mu": self.plan.proximal_mu}).encode())
        for name, values in self.weights.items():
            content.update(f"{name}{values.dtype.str}{values.shape}".encode())
            content.update(np.ascontiguousarray(values).tobytes())
        return content.hexdigest()

    def to_arrays(self) -> ArrayRecord:
        return _array_record(self.weights)

    def to_config(self) -> ConfigRecord:
        """The scalars; a strategy adds the round and, for FedProx, ``proximal-mu``."""
        return ConfigRecord(dict(self._scalars()))

    @classmethod
    def from_record(cls, content: RecordDict) -> Self:
        """Read what :meth:`to_arrays` and :meth:`to_config` make, once a strategy has sent it.

        Raises:
            InputError: a record or a field is missing, unknown or out of range.
        """
        _only_records(content, {WEIGHTS, JOB}, what="train job")
        values = dict(content.config_records[JOB])
        _refuse_long_fields(values)
        try:
            server_round, mu = values.pop("server-round"), values.pop("proximal-mu", 0.0)
            plan = {**json.loads(str(values.pop("plan"))), "proximal_mu": mu}
            spec = spec_from_dict(json.loads(str(values.pop("spec"))))
            run_id, catalogue_hash = str(values.pop("run-id")), str(values.pop("catalogue-hash"))
            noise_seed, collect_metrics = values.pop("noise-seed", None), values.pop("collect-metrics")
        except (KeyError, ValueError) as error:
            raise InputError(
                f"train job: missing or unreadable field {error}; the server is of another version."
            ) from None
        if values or not isinstance(collect_metrics, bool) or not (noise_seed is None or isinstance(noise_seed, int)):
            raise InputError(
                f"train job: unknown or mistyped fields {sorted(values) or 'noise-seed, collect-metrics'}."
            )
        job = cls(
            run_id=run_id,
            weights=_weights(content.array_records[WEIGHTS]),
            spec=spec,
            plan=RoundPlan.from_dict(plan),
            catalogue_hash=catalogue_hash,
            noise_seed=noise_seed,
            collect_metrics=collect_metrics,
        )
        if job.plan.server_round != server_round:
            raise InputError(f"train job: sent for round {server_round!r} but planned for {job.plan.server_round}.")
        return job

    def _scalars(self) -> dict[str, str | int | bool]:
        plan = {name: value for name, value in self.plan.to_dict().items() if name != "proximal_mu"}
        scalars: dict[str, str | int | bool] = {
            "run-id": self.run_id,
            "spec": _dump(self.spec.to_dict()),
            "plan": _dump(plan),
            "catalogue-hash": self.catalogue_hash,
            "collect-metrics": self.collect_metrics,
        }
        if self.noise_seed is not None:
            scalars["noise-seed"] = self.noise_seed
        return scalars


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReply:
    """What an owner releases for one round.

    Args:
        release: what the owner charged for it; None where a simulation trains without privacy.
        receipt: the owner's signed word on where its ledger stands, for the server to keep.
        simulation_only: private figures (``loss``, ``num_users``, ``zeroed_users``), empty at a deployed owner.
    """

    owner: str
    server_round: int
    weights: Weights
    release: Release | None
    receipt: Receipt | None
    simulation_only: Mapping[str, float]

    def to_record(self) -> RecordDict:
        fields: dict[str, str | int] = {
            "owner": self.owner,
            "server-round": self.server_round,
            "release": _dump(self._release()),
            "receipt": _dump(self.receipt.to_dict() if self.receipt else None),
        }
        records = RecordDict({WEIGHTS: _array_record(self.weights), _REPLY: ConfigRecord(dict(fields))})
        if self.simulation_only:
            records[_SIMULATION_ONLY] = MetricRecord(dict(self.simulation_only))
        return records

    @classmethod
    def from_record(cls, content: RecordDict, *, metrics_expected: bool) -> Self:
        """Read :meth:`to_record`'s form.

        Raises:
            RefusedError, InputError, OwnerFailed: the owner's own words, where it said no.
            InputError: a record or field is missing or unknown, or figures came unasked.
        """
        raise_refusal(content)
        wanted = {WEIGHTS, _REPLY} | ({_SIMULATION_ONLY} if metrics_expected else set())
        _only_records(content, wanted, what="train reply")
        values = dict(content.config_records[_REPLY])
        try:
            owner, server_round = values.pop("owner"), values.pop("server-round")
            release, receipt = json.loads(str(values.pop("release"))), json.loads(str(values.pop("receipt")))
        except (KeyError, ValueError) as error:
            raise InputError(f"train reply: missing or unreadable field {error}.") from None
        if values or not isinstance(owner, str) or not isinstance(server_round, int):
            raise InputError(f"train reply: unknown or mistyped fields {sorted(values) or 'owner, server-round'}.")
        metrics = dict(content.metric_records[_SIMULATION_ONLY]) if metrics_expected else {}
        return cls(
            owner=owner,
            server_round=server_round,
            weights=_weights(content.array_records[WEIGHTS]),
            release=release_from_dict(release) if release else None,
            receipt=Receipt.from_dict(receipt) if receipt else None,
            simulation_only={name: float(value) for name, value in metrics.items() if isinstance(value, int | float)},
        )

    def _release(self) -> dict[str, Any] | None:
        return self.release.to_dict() if self.release else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who an owner is and what it brings; all of it public.

    Args:
        versions: of the programs that must agree, by name.
        capabilities: kinds of generator the owner can train.
    """

    owner: str
    catalogue_hash: str
    versions: Mapping[str, str]
    capabilities: tuple[str, ...]

    def to_record(self) -> RecordDict:
        fields: dict[str, Any] = {
            "owner": self.owner,
            "catalogue-hash": self.catalogue_hash,
            "versions": _dump(dict(self.versions)),
            "capabilities": list(self.capabilities),
        }
        return RecordDict({_HELLO: ConfigRecord(fields)})

    @classmethod
    def from_record(cls, content: RecordDict) -> Self:
        """Read :meth:`to_record`'s form.

        Raises:
            RefusedError, InputError, OwnerFailed: the owner's own words, where it said no.
            InputError: a record or field is missing or unreadable.
        """
        raise_refusal(content)
        _only_records(content, {_HELLO}, what="hello")
        values = content.config_records[_HELLO]
        try:
            capabilities = values["capabilities"]
            return cls(
                owner=str(values["owner"]),
                catalogue_hash=str(values["catalogue-hash"]),
                versions={str(name): str(version) for name, version in json.loads(str(values["versions"])).items()},
                capabilities=tuple(map(str, capabilities)) if isinstance(capabilities, list) else (),
            )
        except (KeyError, ValueError, AttributeError) as error:
            raise InputError(f"hello: missing or unreadable field {error}; the owner is of another version.") from None


def refusal_record(error: FedAugError) -> RecordDict:
    """An owner's no, in the words of our own error."""
    kind = "refused" if isinstance(error, RefusedError) else "failed" if isinstance(error, OwnerFailed) else "input"
    return RecordDict({_REFUSAL: ConfigRecord({"kind": kind, "text": str(error)})})


def raise_refusal(content: RecordDict) -> None:
    """Raise the error that :func:`refusal_record` carries, if this is one."""
    if _REFUSAL not in content:
        return
    refusal = content.config_records[_REFUSAL]
    kinds: dict[str, type[FedAugError]] = {"refused": RefusedError, "failed": OwnerFailed}
    raise kinds.get(str(refusal.get("kind")), InputError)(str(refusal.get("text")))


def _refuse_long_fields(values: Mapping[str, Any]) -> None:
    # Before anything of it is parsed: what a server sends may be of any size.
    if len(values) > 100 or any(isinstance(v, str | bytes | list) and len(v) > _LONGEST_FIELD for v in values.values()):
        raise InputError(
            f"train job: more fields than 100, or one longer than {_LONGEST_FIELD} characters; it was not read."
        )


def _only_records(content: RecordDict, wanted: set[str], *, what: str) -> None:
    found = set(content.keys())
    if found != wanted:
        raise InputError(f"{what}: expected the records {sorted(wanted)}, got {sorted(found)}.")


def _array_record(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(values)) for name, values in weights.items()})


def _weights(record: ArrayRecord) -> Weights:
    try:
        return {name: array.numpy() for name, array in record.items()}
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"weights: not readable as plain arrays ({error}).") from None


def _dump(values: object) -> str:
    return json.dumps(values, sort_keys=True, allow_nan=False)
