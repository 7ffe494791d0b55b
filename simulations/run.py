"""One seed of a simulated federation: train the generators, then let every owner use them at home."""

import hashlib
import json
import math
import resource
import subprocess
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.numpy

from client.policy import DpSgd
from client.setup import begin_ledger, simulated_policy
from client.state import LEDGER
from client.store.lifetime import LifetimeLedger
from server.checkpoints import read_state
from server.plan import FederationPlan
from server.sketches import SKETCH_FILE
from shared.augmentation.lineage import encode_table, synthetic_table
from shared.augmentation.synthesis import synthesise_users
from shared.augmentation.weighting import default_weight, regime
from shared.config import Scenario, scenario_from
from shared.data.histories import Histories
from shared.errors import InputError
from shared.files import write_atomically, write_json
from shared.generators.card import Generator, GeneratorCard, load_generator, save_generator
from shared.generators.family import GeneratorSpec
from shared.generators.lengths import LengthShares
from shared.privacy.accounting import certified_epsilon
from shared.privacy.noise import NO_NOISE, SEEDED_NOISE
from shared.privacy.releases import Release
from shared.recommenders.base import Recommender, build_recommender
from simulations.engines import run_federation
from simulations.generator import spec_of
from simulations.home import Arms, train_owners
from simulations.outcomes import OwnerOutcome, SeedOutcome
from simulations.owners import Federation, build_federation
from simulations.pricing import Price, first_round, price_of
from simulations.talk import Talk

WITHOUT_PRIVACY = "without-privacy"


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What one seed leaves: its outcome, and run.json's content."""

    outcome: SeedOutcome
    run: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scenario whose input was read and found usable; nothing is written yet."""

    scenario: Scenario
    federation: Federation
    price: Price
    recommender: Recommender


def prepare(scenario: Scenario, *, talk: Talk) -> Prepared:
    """Read the data, price the run and build the recommender, so that bad input ends before anything is written.

    Raises:
        InputError: something of it cannot be used.
    """
    talk.say(f"Reading {scenario.data.path or 'the built-in sample'} ...")
    federation = build_federation(scenario, seed=scenario.seed)
    price = price_of(scenario, federation)
    return Prepared(
        scenario, federation, price, build_recommender(scenario.recommender, federation.catalogue.num_items)
    )


def start_run(scenario: Scenario, run_dir: Path, *, command: str) -> None:
    """Make ``run_dir`` and write down what is to run, so that it can be resumed from its first second on."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "run.json", {"status": "started", "command": command, **_configuration(scenario)})


def read_run(run_dir: Path) -> tuple[Scenario, dict[str, Any]]:
    """The scenario and the record of a run folder.

    Raises:
        InputError: there is no run, or its record cannot be read.
    """
    try:
        record = json.loads((run_dir / "run.json").read_text())
        return scenario_from(record["scenario"], source=str(run_dir / "run.json")), record
    except FileNotFoundError:
        raise InputError(f"{run_dir}: no run there (run.json is missing). Give the folder that --out named.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run_dir}/run.json cannot be read ({error}). Start a new run.") from None


def run_seed(prepared: Prepared, run_dir: Path, *, talk: Talk) -> FinishedRun:
    """Run, or go on with, one seed in ``run_dir``, which :func:`start_run` made.

    Guarantee:
        Every phase is whole or done again with the same result, so a killed run that is resumed
        ends like one that was not.
    Raises:
        FedAugError: input, budget or disk; what was finished stays and can be resumed.
    """
    scenario, federation, price = prepared.scenario, prepared.federation, prepared.price
    seconds: dict[str, float] = {}
    _refuse_changed_data(run_dir, federation)
    _announce(scenario, federation, price, talk)
    generators: dict[str, Generator] = {}
    for arm in ("federated", "federated_no_dp"):
        if arm not in scenario.study.arms:
            continue
        private = arm == "federated" and price.is_private
        if arm == "federated_no_dp" and not price.is_private and "federated" in generators:
            continue  # the same generator: copied below
        with _timed(seconds, arm):
            folder = run_dir if arm == "federated" else run_dir / WITHOUT_PRIVACY
            generators[arm] = _train(scenario, federation, price, folder, private=private, talk=talk)
    with _timed(seconds, "home"):
        synthetic = {arm: _synthesise(scenario, generator) for arm, generator in generators.items()}
        defaults = {
            "federated": default_weight(price.users_times_epsilon, price.num_owners),
            "federated_no_dp": default_weight(math.inf, price.num_owners),
        }
        talk.start("Recommenders at home", len(federation.owners) * max(1, len(synthetic)))
        owners = train_owners(
            federation.owners,
            Arms(synthetic=synthetic, default_weights=defaults, central="central" in scenario.study.arms),
            prepared.recommender,
            scenario=scenario,
            epsilons=_spent(run_dir, federation, price.delta),
            progress=talk.advance,
        )
        if "federated_no_dp" in scenario.study.arms and "federated_no_dp" not in generators:
            owners = tuple(_copy_arm(owner, "federated", "federated_no_dp") for owner in owners)
    outcome = SeedOutcome(seed=scenario.seed, owners=owners, seconds=sum(seconds.values()))
    _write_owner_files(run_dir, federation, outcome, synthetic.get("federated"), generators.get("federated"))
    run = _record(scenario, run_dir, federation, price, generators, outcome, seconds)
    write_json(run_dir / "run.json", run)
    return FinishedRun(outcome, run)


def _train(
    scenario: Scenario, federation: Federation, price: Price, run_dir: Path, *, private: bool, talk: Talk
) -> Generator:
    spec = _spec(scenario, federation)
    label = f"Generator, epsilon {price.epsilon:.2f}" if private else "Generator without privacy"
    _prepare(scenario, federation, price, run_dir, private=private)
    talk.start(label, first_round(scenario, price, private=private).num_rounds)
    weights = run_federation(
        run_dir,
        engine=scenario.federation.engine,
        num_owners=len(federation.owners),
        progress=talk.advance,
    )
    spent = _spent(run_dir, federation, price.delta)
    card = GeneratorCard(
        spec=spec,
        catalogue=_catalogue_record(federation),
        epsilon=max(spent.values()),
        delta=price.delta,
        noise=SEEDED_NOISE if private else NO_NOISE,
        privacy_unit=scenario.privacy.unit,
        releases={owner.name: _releases(run_dir, owner.name) for owner in federation.owners},
        max_items_per_user=scenario.data.max_items_per_user,
        lengths=_released_lengths(scenario, run_dir),
        behaviours=_behaviours(scenario),
    )
    save_generator(run_dir / "generator", weights, card, tuple(map(str, federation.catalogue.items)))
    return load_generator(run_dir / "generator")


def _prepare(scenario: Scenario, federation: Federation, price: Price, run_dir: Path, *, private: bool) -> None:
    plan = FederationPlan(
        run_id=f"simulation-seed-{scenario.seed}",
        seed=scenario.seed,
        spec=_spec(scenario, federation),
        terms=first_round(scenario, price, private=private),
        strategy=scenario.federation.strategy,
        server_learning_rate=scenario.federation.server_learning_rate,
        server_momentum=scenario.federation.server_momentum,
        catalogue_hash=federation.catalogue.hash,
        owners=tuple(owner.name for owner in federation.owners),
        min_owners=scenario.federation.min_owners,
        deadline_seconds=scenario.federation.deadline_seconds,
        noise_seed=scenario.seed,
        collect_metrics=True,
        average_decay=scenario.federation.average_decay,
    )
    ceiling = scenario.privacy.epsilon if private else None
    for owner in federation.owners:
        folder = run_dir / "owners" / owner.name
        folder.mkdir(parents=True, exist_ok=True)
        policy = simulated_policy(
            data_source=owner.name,
            catalogue_hash=federation.catalogue.hash,
            max_users=price.max_users,
            epsilon=ceiling,
            delta=price.delta,
            max_items_per_user=scenario.data.max_items_per_user,
            behaviours=_behaviours(scenario),
            dpsgd=DpSgd(engine=scenario.dpsgd.engine, device=scenario.dpsgd.device),
        )
        policy.save(folder)
        # Not on resuming: a ledger that was lost since must stop the run, not begin again at epsilon 0.
        if not (run_dir / "plan.json").exists():
            begin_ledger(folder, policy)
        owner.training.save(folder / "train.npz")
    plan.save(run_dir)


def _synthesise(scenario: Scenario, generator: Generator) -> Histories:
    section, bound = scenario.augmentation, generator.card.max_items_per_user
    # One public seed for all owners: the users drawn depend on the generator alone, so they may be
    # the same everywhere, and linear recommenders factor them once.
    return synthesise_users(
        generator.model,
        num_users=section.users,
        items_per_user=min(section.items_per_user, bound),
        max_items_per_user=bound,
        seed=scenario.seed,
        lengths=generator.card.lengths,
    )


def _spec(scenario: Scenario, federation: Federation) -> GeneratorSpec:
    has_times = all(owner.training.timestamps is not None for owner in federation.owners)
    return spec_of(scenario, federation.catalogue.num_items, has_times=has_times)


def _behaviours(scenario: Scenario) -> tuple[str, ...]:
    return scenario.generator.sequence.behaviours if scenario.generator.kind == "sequence" else ()


def _released_lengths(scenario: Scenario, run_dir: Path) -> LengthShares | None:
    """How long histories are, where the run released it; it is of items, so not where behaviours make them events."""
    path = run_dir / SKETCH_FILE
    if not path.exists() or _behaviours(scenario):
        return None
    sketch = safetensors.numpy.load_file(path)
    return LengthShares(tuple(sketch["length_edges"].tolist()), tuple(sketch["length_shares"].tolist()))


def _releases(run_dir: Path, owner: str) -> list[dict[str, Any]]:
    """The owner's ledger as run.json and the card show it: equal releases joined, steps added."""
    charged = [release.to_dict() for release in _charged(run_dir, owner) if release is not None]
    joined: list[dict[str, Any]] = []
    for release in charged:
        if joined and {**joined[-1], "num_steps": 0} == {**release, "num_steps": 0}:
            joined[-1]["num_steps"] += release["num_steps"]
        else:
            joined.append(release)
    return joined


def _charged(run_dir: Path, owner: str) -> tuple[Release | None, ...]:
    if not (run_dir / "plan.json").exists():  # arms that train no generator; else a lost ledger must not read as 0
        return ()
    with LifetimeLedger(run_dir / "owners" / owner / LEDGER) as ledger:
        return ledger.releases()


def _spent(run_dir: Path, federation: Federation, delta: float) -> dict[str, float]:
    """What every owner's ledger says was spent: derived from its releases, not from the plan."""
    spent = {}
    for owner in federation.owners:
        charged = _charged(run_dir, owner.name)
        private = [release for release in charged if release is not None]
        spent[owner.name] = certified_epsilon(private, delta) if len(private) == len(charged) else math.inf
    return spent


def _write_owner_files(
    run_dir: Path,
    federation: Federation,
    outcome: SeedOutcome,
    synthetic: Histories | None,
    generator: Generator | None,
) -> None:
    content = None
    if synthetic is not None and generator is not None:
        table = synthetic_table(
            synthetic,
            generator.item_ids,
            generator_id=generator.generator_id,
            exportable=generator.card.exportable,
            behaviours=generator.card.behaviours,
        )
        content = encode_table(table, "parquet")
    for owner in outcome.owners:
        folder = run_dir / "owners" / owner.name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", _metrics(owner))
        if content is not None:
            write_atomically(folder / "synthetic.parquet", content)


def _copy_arm(owner: OwnerOutcome, source: str, target: str) -> OwnerOutcome:
    return replace(
        owner,
        chosen_weight={**owner.chosen_weight, target: owner.chosen_weight[source]},
        chosen_schedule={**owner.chosen_schedule, target: owner.chosen_schedule[source]},
        per_user={**owner.per_user, target: owner.per_user[source]},
        coverage={**owner.coverage, target: owner.coverage[source]},
    )


def _metrics(owner: OwnerOutcome) -> dict[str, Any]:
    return {
        "simulation_only": True,
        "num_users": owner.num_users,
        "epsilon": owner.epsilon,
        "chosen_weight": owner.chosen_weight,
        "chosen_schedule": owner.chosen_schedule,
        "arms": {arm: float(values.mean()) for arm, values in owner.per_user.items()},
        "coverage": owner.coverage,
    }


def _record(
    scenario: Scenario,
    run_dir: Path,
    federation: Federation,
    price: Price,
    generators: dict[str, Generator],
    outcome: SeedOutcome,
    seconds: dict[str, float],
) -> dict[str, Any]:
    _, before = read_run(run_dir)
    name, sentence = regime(price.users_times_epsilon, price.num_owners)
    private = price.is_private and "federated" in generators
    return {
        **before,
        "status": "finished",
        "data_fingerprint": _fingerprint(federation),
        "simulation_only": {"data_counts": federation.counts},
        "catalogue": federation.catalogue.source,
        "catalogue_details": _catalogue_record(federation),
        "assumed_public": federation.assumed_public,
        "public_numbers": price.to_dict(),
        "noise": SEEDED_NOISE if private else NO_NOISE,
        "regime": {"name": name, "sentence": sentence, "users_times_epsilon": price.users_times_epsilon},
        "owners": [
            {
                "name": owner.name,
                "epsilon": owner.epsilon,
                "delta": price.delta,
                "releases": _releases(run_dir, owner.name) if private else [],
            }
            for owner in outcome.owners
        ],
        "generators": {arm: generator.generator_id for arm, generator in generators.items()},
        "rounds": read_state(run_dir).get("rounds", []) if "federated" in generators else [],
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def _configuration(scenario: Scenario) -> dict[str, Any]:
    packages = ("flwr", "opacus", "torch", "numpy", "dp-accounting", "cornac")
    return {
        "scenario": scenario.model_dump(mode="json"),
        "seed": scenario.seed,
        "commit": _commit(),
        "versions": {"fedaug": version("fedaug"), **{name: version(name) for name in packages}},
    }


def _commit() -> str | None:
    """The commit of the code that runs, with ``+changes`` where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent.parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _catalogue_record(federation: Federation) -> dict[str, Any]:
    catalogue = federation.catalogue
    return {
        "hash": catalogue.hash,
        "version": catalogue.version,
        "source": catalogue.source,
        "num_items": catalogue.num_items,
    }


def _fingerprint(federation: Federation) -> str:
    digest = hashlib.sha256(federation.catalogue.hash.encode())
    for owner in federation.owners:
        digest.update(owner.name.encode())
        for part in (owner.split.train, owner.split.fold_in, owner.split.targets, owner.training):
            for values in (part.indptr, part.items, part.timestamps, part.behaviours):
                if values is not None:
                    digest.update(values.tobytes())
    return digest.hexdigest()


def _refuse_changed_data(run_dir: Path, federation: Federation) -> None:
    """Write down what the data are, or refuse to go on with others."""
    scenario, record = read_run(run_dir)
    found = _fingerprint(federation)
    known = record.setdefault("data_fingerprint", found)
    if known != found:
        raise InputError(
            f"the data of {run_dir} have changed since the run began (fingerprint {known[:12]}, now {found[:12]})."
            f" Put {scenario.data.path or 'the built-in sample'} back as it was, or start a new run."
        )
    write_json(run_dir / "run.json", record)


def _announce(scenario: Scenario, federation: Federation, price: Price, talk: Talk) -> None:
    users = sum(owner.split.train.num_users for owner in federation.owners)
    talk.say(
        f"{len(federation.owners)} owners, {users} training users, {federation.catalogue.num_items} items"
        f" (catalogue {federation.catalogue.source}). Engine: {scenario.federation.engine}."
    )
    if not price.is_private:
        talk.warn("epsilon is infinite: the generator is trained WITHOUT privacy and may never leave this machine.")
        return
    talk.say(
        f"Price: epsilon {price.epsilon:.3f} at delta {price.delta:.2g} per user and owner, for"
        f" {' and '.join(price.in_words())}. Noise is {SEEDED_NOISE}: this is a simulation."
    )


class _timed:
    """Add the seconds of a block to ``into[name]``."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self._into, self._name = into, name

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._into[self._name] = self._into.get(self._name, 0.0) + time.monotonic() - self._start
