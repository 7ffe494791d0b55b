"""What an owner allows, whatever a server asks for: the file ``policy.toml``, written by the owner."""

import json
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.config import EngineName
from shared.errors import InputError
from shared.files import sha256, write_atomically

FILE_NAME = "policy.toml"

# As far as a float counts; more steps than a million are no release (shared.privacy.releases).
_Count = Annotated[int, Field(ge=1, le=2**53)]
_Steps = Annotated[int, Field(ge=1, le=10**6)]
_Positive = Annotated[float, Field(gt=0)]
_CodeHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _one_line(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be text of one line")
    return text


class _Section(BaseModel):
    # Strict: true is not 1, "3" is not 3. A typo must not become a default.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Ceilings(_Section):
    """What may be spent of the data set's privacy."""

    epsilon: _Positive | None = Field(
        None, description="for life, over every release ever made from this data; none only in a simulation"
    )
    epsilon_per_run: _Positive | None = Field(None, description="for the rounds of one run; none: only that for life")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="at which epsilon is read; a real owner's is at most 1 / max_users"
    )


class Limits(_Section):
    """How far a plan may go, whatever it costs."""

    min_noise_multiplier: _Positive = Field(0.3, description="least noise of a release, in clipping norms")
    max_sample_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="highest chance that a user is in the batch of a step"
    )
    max_steps_per_round: _Steps = Field(100, description="optimizer steps in one round")
    max_steps_per_run: _Steps = Field(10_000, description="optimizer steps in all rounds of a run")
    min_owners: _Count = Field(
        2, description="fewest owners a run may be planned with; the server's word, not checkable here"
    )
    max_message_mib: _Count = Field(1024, description="largest set of weights that is sent or answered")
    max_weights: _Count = Field(500_000_000, description="largest generator, in numbers")


class Allowed(_Section):
    """Kinds of request that are answered at all."""

    # TOML has arrays, not tuples: only the outside of these is not strict.
    generators: Annotated[tuple[Literal["vae", "gan", "sequence", "spectral"], ...], Field(strict=False)] = Field(
        ("vae", "gan", "sequence", "spectral"), description="kinds of generator"
    )
    releases: Annotated[tuple[Literal["dp_sgd_poisson", "gaussian"], ...], Field(strict=False)] = Field(
        ("dp_sgd_poisson", "gaussian"), description="kinds of release: training, and statistics of all users"
    )
    code: Annotated[tuple[_CodeHash, ...], Field(strict=False)] = Field(
        (), description="SHA-256 of the versions of this program that may train; empty: any that is installed here"
    )


class Approval(_Section):
    """Whether runs may begin without the owner's word. A simulation's always may."""

    auto_approve: bool = Field(False, description="approve runs within the next two limits unseen")
    auto_epsilon_per_run: _Positive | None = Field(
        None, description="most that a whole run may cost to be approved unseen; needed with auto_approve"
    )
    auto_epsilon_total: _Positive | None = Field(
        None, description="most that may be spent for life once that run is over; needed with auto_approve"
    )


class DpSgd(_Section):
    """How this owner computes; every choice gives the same sums."""

    engine: EngineName = Field("bookkeeping", description="how gradients are clipped by user: or ghost, hooks")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")] = Field(
        "cpu", description="where generators are trained: auto, cpu, cuda or cuda:N"
    )


class Policy(_Section):
    """An owner's own terms. Frozen: what was read is what is enforced."""

    data_source: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")] = Field(
        description="permanent id of the data set; what is spent is spent for it"
    )
    catalogue_hash: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,200}$")] = Field(
        description="of the public catalogue that the owner's item positions refer to"
    )
    # Were it the server's to choose, refusals would tell the private count.
    max_users: _Count = Field(description="public bound on the owner's users, which every plan must name")
    max_items_per_user: _Count = Field(1000, description="contribution bound: the newest so many are kept")
    behaviours: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="public names of the behaviours that sequence generators may tell apart; empty: none are"
    )
    expires: date | None = Field(None, description="last day on which requests are answered; none: no last day")
    opt_out: Annotated[str, AfterValidator(_one_line)] | None = Field(
        None, description="text file, beside this one, of the user ids that never train, one a line; none: nobody"
    )
    simulated: bool = Field(
        False, description="written by simulations only: allows seeded noise and private figures; never set it"
    )
    ceilings: Ceilings
    limits: Limits = Limits()
    allowed: Allowed = Allowed()
    approval: Approval = Approval()
    dpsgd: DpSgd = DpSgd()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        problems = []
        if not self.simulated and self.ceilings.epsilon is None:
            problems.append("ceilings.epsilon: missing, and only a simulation goes without a ceiling")
        if not self.simulated and self.ceilings.delta > 1 / self.max_users:
            problems.append(
                f"ceilings.delta: {self.ceilings.delta:g} is above 1 / max_users = {1 / self.max_users:g}, which would"
                " allow a user's whole history to be published"
            )
        if not self.simulated and self.dpsgd.engine == "ghost":
            problems.append(
                "dpsgd.engine: 'ghost' draws anew for everybody where one user is not finite, which tells of that user;"
                " only a simulation may use it"
            )
        for name in ("auto_epsilon_per_run", "auto_epsilon_total"):
            if self.approval.auto_approve and getattr(self.approval, name) is None:
                problems.append(f"approval.{name}: missing, and auto_approve approves nothing without a limit")
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of every key with its value, defaults too; not of the opt-out list, which is private."""
        return sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True, allow_nan=False).encode())

    def save(self, directory: Path) -> None:
        """Write ``directory/policy.toml``, each key under its description.

        Raises:
            InputError: the disk is full or the folder cannot be written.
        """
        write_atomically(directory / FILE_NAME, ("\n".join(_toml(self)) + "\n").encode())

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ``directory/policy.toml``.

        Raises:
            InputError: it is missing, not TOML, or has keys missing, unknown or out of range; each is named.
        """
        path = directory / FILE_NAME
        advice = "nothing is trained without one"
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            lines = [
                f"  {'.'.join(map(str, p['loc']))}: {p['msg']} (got {p['input']!r:.80})"
                if p["loc"] and p["type"] != "missing"
                else f"  {'.'.join(map(str, p['loc']))}: missing"
                if p["loc"]
                else f"  {p['msg'].removeprefix('Value error, ')}"
                for p in error.errors()
            ]
            num_problems = sum(line.count("\n") + 1 for line in lines)
            raise InputError(
                f"no usable policy at {path} ({num_problems} problem(s)): {advice}.\n" + "\n".join(lines)
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"no usable policy at {path} ({error}): {advice}.") from None


def _toml(section: BaseModel, table: str = "") -> Iterator[str]:
    if table:
        yield f"\n[{table}]"
    fields = [(name, field, getattr(section, name)) for name, field in type(section).model_fields.items()]
    for name, field, value in fields:
        if not isinstance(value, BaseModel):
            yield f"# {field.description}"
            yield f"# {name} = (none)" if value is None else f"{name} = {_literal(value)}"
    for name, _, value in fields:
        if isinstance(value, BaseModel):
            yield from _toml(value, name)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # as TOML has it, for text of one line
    return repr(value)
