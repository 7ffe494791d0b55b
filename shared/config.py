"""A scenario: every choice of a run, checked once where text becomes values."""

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from shared.errors import InputError

Share = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _weights_contain_zero(weights: tuple[float, ...]) -> tuple[float, ...]:
    if 0 not in weights:
        raise ValueError("the grid must contain 0, so that augmentation can be declined")
    return weights


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("must be a number greater than 0, or inf")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")  # a typo must not become a default


class Columns(_Section):
    """Names of the columns in the source."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    rating: str = "rating"
    behaviour: str = "behaviour"
    institution: str = "institution"


class DataSection(_Section):
    path: str = Field("", description="file or database; empty for the built-in sample")
    format: Literal["auto", "parquet", "csv", "sql", "recbole", "movielens"] = "auto"
    table: str = Field("", description="table or view, for SQL sources")
    columns: Columns = Columns()
    catalogue: str = Field("", description="public catalogue file; empty to take the items seen in the data")
    outside_catalogue: Literal["refuse", "count"] = "refuse"
    top_items: PositiveInt | None = Field(None, description="keep the most used items (simulation only)")
    min_interactions: PositiveInt = Field(5, description="users with fewer items are left out, each looked at alone")
    max_items_per_user: PositiveInt = Field(1000, description="contribution bound: the newest so many are kept")
    num_owners: Annotated[int, Field(ge=1)] = 8
    users_per_owner: PositiveInt | None = None
    split: Literal["institution", "random", "dirichlet"] = "institution"
    dirichlet_alpha: Finite = 0.5
    behaviours: tuple[str, ...] | None = Field(None, description="those that count; default: all but returns")
    skip_bad_rows: bool = False


class FederationSection(_Section):
    rounds: PositiveInt = 100
    local_steps: PositiveInt = Field(1, description="DP-SGD steps of each owner in a round")
    strategy: Literal["fedavg", "fedavgm", "fedadam", "fedprox"] = "fedadam"
    client_learning_rate: Finite = 1.0
    server_learning_rate: Finite = 0.01
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    proximal_mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.0, description="for fedprox")
    min_owners: Annotated[int, Field(ge=2)] = 2
    engine: Literal["inprocess", "flower"] = "inprocess"
    deadline_seconds: Finite = Field(600.0, description="how long a round waits for its owners")
    declared_users: PositiveInt | None = Field(None, description="public total of users; sets delta")


class PrivacySection(_Section):
    epsilon: Annotated[PositiveFloat, AfterValidator(_not_nan)] = Field(8.0, description="inf trains without privacy")
    delta: Share | None = Field(None, description="default: declared_users ** -1.1")
    unit: Literal["user"] = "user"
    noise: Literal["local"] = Field("local", description="every owner adds full noise")
    max_users: PositiveInt | None = Field(None, description="public bound on the users of one owner")
    max_grad_norm: Finite = 0.3
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.2


class GeneratorSection(_Section):
    kind: Literal["vae"] = "vae"
    hidden_size: PositiveInt = 100
    latent_size: PositiveInt = 32
    prior: Literal["gaussian", "mixture"] = "mixture"
    num_components: PositiveInt = 32
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    kl_anneal_share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="share of the steps that ramp the KL")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    popularity_scale: Finite = Field(5.0, description="how much of the clipped gradient goes to item popularity")


class AugmentationSection(_Section):
    users: PositiveInt = Field(30_000, description="synthetic users drawn by every owner")
    items_per_user: PositiveInt = Field(50, description="public mean length of a synthetic history")
    weights: Annotated[tuple[Weight, ...], AfterValidator(_weights_contain_zero)] = (0.0, 0.1, 0.3, 1.0, 3.0)
    folds: Annotated[int, Field(ge=2)] = 3


class RecommenderSection(_Section):
    kind: Literal["ease", "multvae", "sasrec"] = "ease"
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    l2: tuple[Finite, ...] = Field(
        (0.0003, 0.001, 0.003, 0.01, 0.03), description="EASE: ridge penalty ÷ real interactions"
    )
    epochs: PositiveInt = 50
    hidden_size: PositiveInt = 64
    learning_rate: Finite = 1e-3


Arm = Literal["local", "federated", "federated_no_dp", "central"]


class StudySection(_Section):
    arms: tuple[Arm, ...] = ("local", "federated", "federated_no_dp", "central")
    seeds: PositiveInt = 3
    metric: Literal["ndcg@20", "recall@20"] = "ndcg@20"
    holdout: Literal["users", "last", "time"] = "users"
    holdout_share: Share = 0.2
    fold_in_share: Share = 0.8
    bootstrap: PositiveInt = 2000


class Scenario(_Section):
    """Everything a run is told. Frozen: what run.json records is what ran."""

    seed: Annotated[int, Field(ge=0)] = 0
    data: DataSection = DataSection()
    federation: FederationSection = FederationSection()
    privacy: PrivacySection = PrivacySection()
    generator: GeneratorSection = GeneratorSection()
    augmentation: AugmentationSection = AugmentationSection()
    recommender: RecommenderSection = RecommenderSection()
    study: StudySection = StudySection()


def scenario_from(values: dict[str, Any], *, source: str) -> Scenario:
    """Check nested ``values``; every problem is named at once.

    Raises:
        InputError: a key is unknown or a value is out of range.
    """
    try:
        return Scenario.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"  {'.'.join(map(str, p['loc']))}: {p['msg']} (got {p['input']!r})" for p in problems]
        raise InputError(
            f"{source}: {len(problems)} problem(s)\n"
            + "\n".join(lines)
            + "\nSee docs/cli.md for every key, its range and its default."
        ) from None


def load_scenario(path: Path | None, overrides: list[str], *, seed: int | None = None) -> Scenario:
    """Read a TOML scenario, then apply ``KEY=VALUE`` overrides (dotted keys, TOML values or plain text).

    Raises:
        InputError: the file is missing or not TOML, an override has no ``=``, or a value is refused.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"no scenario at {path}. Give the path of a TOML file, or none to run the built-in sample."
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{path}: not readable as TOML: {error}.") from None
    for override in overrides:
        _apply(values, override)
    if seed is not None:
        values["seed"] = seed
    return scenario_from(values, source=str(path) if path else "options")


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override}: expected KEY=VALUE, for example --set data.num_owners=20.")
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise InputError(f"--set {override}: {section} is not a section.")
    try:
        target[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        target[last] = text
