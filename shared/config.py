"""A scenario: every choice of a run, checked once where text becomes values."""

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from shared.errors import InputError

Share = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
EngineName = Literal["bookkeeping", "ghost", "hooks"]
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

    user_id: str = Field("user_id", description="column of the user")
    item_id: str = Field("item_id", description="column of the item")
    timestamp: str = Field("timestamp", description="optional: epoch seconds")
    rating: str = Field("rating", description="optional: only checked, every row counts")
    behaviour: str = Field("behaviour", description="optional: returns do not count")
    institution: str = Field("institution", description="optional: names the owner")


class DataSection(_Section):
    path: str = Field("", description="file or database; empty for the built-in sample")
    format: Literal["auto", "parquet", "csv", "sql", "recbole", "movielens"] = Field(
        "auto", description="auto goes by the name of the source"
    )
    table: str = Field("", description="table or view, for SQL sources")
    columns: Columns = Columns()
    catalogue: str = Field("", description="public catalogue file; empty to take the items seen in the data")
    outside_catalogue: Literal["refuse", "count"] = Field("refuse", description="what to do with items not in it")
    top_items: PositiveInt | None = Field(None, description="keep the most used items (simulation only)")
    min_interactions: PositiveInt = Field(5, description="users with fewer items are left out, each looked at alone")
    max_items_per_user: PositiveInt = Field(1000, description="contribution bound: the newest so many are kept")
    num_owners: Annotated[int, Field(ge=1)] = Field(8, description="owners of the simulated federation")
    users_per_owner: PositiveInt | None = Field(None, description="keep so many users of each owner")
    split: Literal["institution", "random", "dirichlet"] = Field(
        "institution", description="how users are dealt to owners"
    )
    dirichlet_alpha: Finite = Field(0.5, description="for dirichlet: small values make owners differ")
    behaviours: tuple[str, ...] | None = Field(None, description="those that count; default: all but returns")
    skip_bad_rows: bool = Field(False, description="count bad rows and leave them out")


class FederationSection(_Section):
    rounds: PositiveInt = Field(100, description="federated rounds")
    local_steps: PositiveInt = Field(1, description="DP-SGD steps of each owner in a round")
    strategy: Literal["fedavg", "fedavgm", "fedadam", "fedprox"] = Field(
        "fedadam", description="how the server turns replies into new weights"
    )
    client_learning_rate: Finite = Field(1.0, description="of the owners' SGD")
    server_learning_rate: Finite = Field(0.01, description="for fedavgm and fedadam")
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="for fedavgm; the first decay of fedadam"
    )
    proximal_mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.0, description="for fedprox")
    min_owners: Annotated[int, Field(ge=2)] = Field(2, description="fewer owners than this do not train")
    engine: Literal["inprocess", "flower"] = Field(
        "inprocess", description="one process, or Flower's simulation on Ray"
    )
    deadline_seconds: Finite = Field(600.0, description="how long a round waits for its owners")
    average_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="deliver an average of the weights over the rounds, which forgets by this; 0: the last ones"
    )
    declared_users: PositiveInt | None = Field(None, description="public total of users; sets delta")


class PrivacySection(_Section):
    epsilon: Annotated[PositiveFloat, AfterValidator(_not_nan)] = Field(8.0, description="inf trains without privacy")
    delta: Share | None = Field(None, description="default: declared_users ** -1.1")
    unit: Literal["user"] = Field("user", description="whose presence is hidden")
    noise: Literal["local"] = Field("local", description="every owner adds full noise")
    max_users: PositiveInt | None = Field(None, description="public bound on the users of one owner")
    max_grad_norm: Finite = Field(0.3, description="L2 bound on the gradient of one user")
    sample_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="chance that a user is in the batch of a step"
    )
    max_batch: PositiveInt | None = Field(
        None, description="hard cap on a batch; default: so high that it costs no epsilon"
    )
    sketch_share: Share | None = Field(
        None,
        description="part of epsilon for the sketch before training; default: 0.5, or 0.1 for popularity alone",
    )


class DpSgdSection(_Section):
    engine: EngineName = Field(
        "bookkeeping", description="how gradients are clipped by user; ghost and hooks are Opacus' own, and slower"
    )
    device: str = Field("cpu", description="where generators are trained: auto, cpu, cuda or cuda:N")


class GanSection(_Section):
    """Keys of a generator that learns from a discriminator, which alone sees users."""

    loss: Literal["bce", "hinge", "wasserstein"] = Field("hinge", description="of the discriminator")
    weight_clip: Finite = Field(0.1, description="for wasserstein: largest weight of the discriminator")
    discriminator_size: PositiveInt = Field(128, description="width of the discriminator")
    discriminators: Literal["aggregated", "local"] = Field(
        "aggregated", description="averaged like the generator, or kept by every owner"
    )
    fakes: PositiveInt = Field(40, description="rows of the generator in every step of the discriminator")
    generator_steps: PositiveInt = Field(1, description="steps of the generator after each of the discriminator")
    generator_rate_share: Finite = Field(1.0, description="learning rate of the generator ÷ the discriminator's")
    items_shown: PositiveInt = Field(40, description="public mean length of what the discriminator is shown of a user")
    input_scale: Finite = Field(10.0, description="L2 norm of what the discriminator is shown of a user")


class SequenceSection(_Section):
    """Keys of a generator of ordered histories."""

    behaviours: tuple[str, ...] = Field(
        (), description="public names of the behaviours to tell apart, such as view, cart, buy; empty: none are"
    )
    architecture: Literal["transformer", "gru"] = Field("gru", description="what reads a history in order")
    size: PositiveInt = Field(64, description="width")
    num_layers: PositiveInt = Field(1, description="layers")
    num_heads: PositiveInt = Field(2, description="heads of the transformer's attention")
    max_length: PositiveInt = Field(50, description="events of a user that a training step reads")
    gap_edges: tuple[PositiveInt, ...] = Field(
        (1, 60, 3600, 86_400, 604_800, 2_592_000, 31_536_000),
        description="where buckets of the time between events end, in seconds",
    )


class GeneratorSection(_Section):
    kind: Literal["vae", "gan", "sequence", "spectral"] = Field("vae", description="model of user behaviour")
    warm_start: Literal["none", "popularity", "spectral"] = Field(
        "none", description="begin training from a released statistic: how popular items are, or which go together too"
    )
    head_items: PositiveInt = Field(
        8000, description="most items whose co-occurrence is released: the most popular ones by an earlier release"
    )
    hidden_size: PositiveInt = Field(100, description="width of encoder and decoder")
    latent_size: PositiveInt = Field(32, description="dimensions of the latent space")
    prior: Literal["gaussian", "mixture", "flow"] = Field(
        "mixture", description="of latents: mixture and flow are trained with the model"
    )
    num_components: PositiveInt = Field(32, description="Gaussians of the mixture")
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.2, description="weight of the divergence from the prior"
    )
    kl_anneal_share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="share of the steps that ramp the KL")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="of the items a user shows the encoder")
    popularity_scale: Finite = Field(5.0, description="how much of the clipped gradient goes to item popularity")
    gan: GanSection = GanSection()
    sequence: SequenceSection = SequenceSection()


class AugmentationSection(_Section):
    users: PositiveInt = Field(30_000, description="synthetic users drawn by every owner")
    items_per_user: PositiveInt = Field(50, description="public mean length of a synthetic history")
    weights: Annotated[tuple[Weight, ...], AfterValidator(_weights_contain_zero)] = Field(
        (0.0, 0.1, 0.3, 1.0, 3.0, 10.0), description="synthetic ÷ real training mass, to choose from"
    )
    folds: Annotated[int, Field(ge=2)] = Field(3, description="parts of the training users, for choosing the weight")


class RecommenderSection(_Section):
    kind: Literal["ease", "multvae", "sasrec"] = Field("ease", description="what owners train at home")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    l2: tuple[Finite, ...] = Field(
        (0.0003, 0.001, 0.003, 0.01, 0.03), description="EASE: ridge penalty ÷ real interactions"
    )
    epochs: PositiveInt = Field(50, description="multvae and sasrec: passes over the training data")
    hidden_size: PositiveInt = Field(64, description="multvae and sasrec: width")
    learning_rate: Finite = Field(1e-3, description="multvae and sasrec: of Adam")


Arm = Literal["local", "federated", "federated_no_dp", "central"]


class StudySection(_Section):
    arms: tuple[Arm, ...] = Field(
        ("local", "federated", "federated_no_dp", "central"), description="ways of training to compare"
    )
    seeds: PositiveInt = Field(3, description="runs of a study, from `seed` on")
    metric: Literal["ndcg@20", "recall@20"] = Field("ndcg@20", description="ranked over the whole catalogue")
    holdout: Literal["users", "last", "time"] = Field(
        "users", description="test on held-out users, everyone's last item, or what follows a date"
    )
    holdout_share: Share = Field(0.2, description="share of users, or of time, held out")
    fold_in_share: Share = Field(0.8, description="share of a test user's items that the recommender is shown")
    bootstrap: PositiveInt = Field(2000, description="resamples behind every interval")


class Scenario(_Section):
    """Everything a run is told. Frozen: what run.json records is what ran."""

    seed: Annotated[int, Field(ge=0)] = Field(0, description="of every stream of chance")
    data: DataSection = DataSection()
    federation: FederationSection = FederationSection()
    privacy: PrivacySection = PrivacySection()
    dpsgd: DpSgdSection = DpSgdSection()
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
