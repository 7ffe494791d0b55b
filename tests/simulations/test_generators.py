"""A whole federation with every kind of generator: what it releases, what is charged, what it leaves."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy

import server.rounds
from client.store.lifetime import LifetimeLedger
from shared.config import load_scenario
from shared.generators.card import load_generator
from shared.privacy.accounting import epsilon
from shared.rng import stream
from simulations import commands
from simulations.owners import build_federation

NUM_USERS, NUM_ITEMS = 120, 40
BEHAVIOURS = ("view", "cart", "buy")
KINDS: dict[str, list[str]] = {
    "vae": [],
    "vae, spectral start": ["generator.kind=vae", "generator.warm_start=spectral"],
    "vae, popularity start": ["generator.warm_start=popularity", "federation.average_decay=0.5"],
    "gan": ["generator.kind=gan", "generator.warm_start=popularity"],
    "gan, discriminators at home": ["generator.kind=gan", "generator.gan.discriminators=local"],
    "sequence": [
        "generator.kind=sequence",
        "generator.sequence.size=8",
        'generator.sequence.behaviours=["view","buy"]',
    ],
    "spectral": ["generator.kind=spectral"],
    "spectral of a head": ["generator.kind=spectral", "generator.head_items=15"],
}
NUM_SKETCHES = {
    "vae, spectral start": 1,
    "vae, popularity start": 1,
    "gan": 1,
    "spectral": 1,
    "spectral of a head": 2,
}
ROUNDS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tastes, each for half of the items; every item is viewed, some are put in the cart, some bought."""
    rng = stream(4, "events")
    rows: dict[str, list] = {"user_id": [], "item_id": [], "timestamp": [], "behaviour": []}
    for user in range(NUM_USERS):
        now = 1_600_000_000 + int(rng.integers(10**6))
        for item in rng.choice(NUM_ITEMS // 2, size=9, replace=False) + NUM_ITEMS // 2 * (user % 2):
            for behaviour in BEHAVIOURS[: rng.integers(1, 4)]:
                now += int(rng.integers(1, 10**5))
                rows["user_id"].append(f"user {user}")
                rows["item_id"].append(f"item {item}")
                rows["timestamp"].append(now)
                rows["behaviour"].append(behaviour)
    path = tmp_path_factory.mktemp("data") / "events.parquet"
    pyarrow.parquet.write_table(pa.table(rows), path)
    return path


def simulated(data: Path, out: Path, *settings: str, kind: str = "vae") -> dict:
    small = [
        f'data.path="{data}"',
        "data.split=random",
        "data.num_owners=3",
        f"federation.rounds={ROUNDS}",
        "generator.hidden_size=12",
        "generator.latent_size=4",
        "generator.num_components=3",
        "generator.gan.fakes=8",
        "generator.gan.items_shown=6",
        "augmentation.users=200",
        "augmentation.items_per_user=8",
        "augmentation.weights=[0.0, 0.3]",
        "study.bootstrap=20",
        'study.arms=["local","federated"]',
        *KINDS[kind],
        *settings,
    ]
    commands.simulate(load_scenario(None, small), out, as_json=True)
    return json.loads((out / "run.json").read_text())


def model_bytes(run: Path) -> bytes:
    return (run / "generator" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vae"])  # which test_cli.py runs
def test_every_kind_runs_charges_what_it_released_and_leaves_users(kind, data, tmp_path, capsys):
    record = simulated(data, tmp_path / "run", kind=kind)
    trains = 0 if kind.startswith("spectral") else ROUNDS
    num_sketches = NUM_SKETCHES.get(kind, 0)
    for owner in record["owners"]:
        mechanisms = [release["mechanism"] for release in owner["releases"]]
        assert mechanisms.count("gaussian") == num_sketches
        assert sum(r["num_steps"] for r in owner["releases"] if r["mechanism"] == "dp_sgd_poisson") == trains
        with LifetimeLedger(tmp_path / "run" / "owners" / owner["name"] / "ledger.sqlite") as ledger:
            charged = [release for release in ledger.releases() if release is not None]
        assert len(charged) == num_sketches + trains
        assert owner["epsilon"] == pytest.approx(epsilon(charged, owner["delta"]), abs=1e-6)
        assert 7.5 < owner["epsilon"] <= 8.0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["average_decay"] == (0.5 if kind == "vae, popularity start" else 0.0)
    generator = load_generator(tmp_path / "run" / "generator")
    assert not generator.card.exportable
    table = pyarrow.parquet.read_table(tmp_path / "run" / "owners" / "owner-01" / "synthetic.parquet")
    assert len(set(table["user_id"].to_pylist())) == 200
    assert set(table["item_id"].to_pylist()) <= {f"item {item}" for item in range(NUM_ITEMS)}
    assert set(table["lineage"].to_pylist()) == {"internal"}
    json.loads(capsys.readouterr().out)


def test_sequences_have_the_behaviours_named_and_time(data, tmp_path):
    simulated(data, tmp_path / "run", kind="sequence")
    table = pyarrow.parquet.read_table(tmp_path / "run" / "owners" / "owner-01" / "synthetic.parquet")
    assert set(table["behaviour"].to_pylist()) == {"view", "buy"}
    users, stamps = np.array(table["user_id"].to_pylist()), np.array(table["timestamp"].to_pylist())
    same = users[1:] == users[:-1]
    assert (np.diff(stamps)[same] >= 0).all()


def test_nothing_held_out_is_in_the_events_of_a_sequence(data, tmp_path):
    simulated(data, tmp_path / "run", "study.holdout=last", kind="sequence")
    with np.load(tmp_path / "run" / "owners" / "owner-01" / "train.npz") as stored:
        assert set(np.unique(stored["behaviours"])) == {0, 1}
    # The last item of everyone is a target, so no user's events may name it; seen where the parts are made.
    settings = [f'data.path="{data}"', "data.split=random", "data.num_owners=3", "study.holdout=last"]
    for owner in build_federation(load_scenario(None, [*settings, *KINDS["sequence"]]), seed=0).owners:
        for user in range(owner.split.targets.num_users):
            assert not set(owner.training.row(user)) & set(owner.split.targets.row(user))


@pytest.mark.parametrize("kind", ["vae, spectral start", "gan, discriminators at home"])
def test_a_run_that_was_killed_ends_like_one_that_was_not(kind, data, tmp_path, monkeypatch):
    simulated(data, tmp_path / "whole", kind=kind)
    keep, calls = server.rounds.save_checkpoint, []

    def killed(*args, **kwargs):
        keep(*args, **kwargs)
        calls.append(args)
        if len(calls) == 2:  # after the first round
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(server.rounds, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            simulated(data, tmp_path / "killed", kind=kind)
    commands.resume(tmp_path / "killed", as_json=True)
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")


def test_without_privacy_the_sketch_is_exact_and_so_is_its_popularity(data, tmp_path):
    record = simulated(data, tmp_path / "run", "privacy.epsilon=inf", kind="spectral")
    assert all(math.isinf(float(owner["epsilon"])) and owner["releases"] == [] for owner in record["owners"])
    sketch = safetensors.numpy.load_file(tmp_path / "run" / "sketch.safetensors")
    assert sketch["noise_stddev"] == 0
    # Two tastes of twenty items: the first direction beside the mean tells them apart.
    second = sketch["vectors"][:, 1]
    half = np.array(
        [int(name.split()[1]) < NUM_ITEMS // 2 for name in load_generator(tmp_path / "run" / "generator").item_ids]
    )
    assert abs(np.corrcoef(second, half)[0, 1]) > 0.9


def test_a_sketch_costs_its_share(data, tmp_path, capsys):
    priced = {}
    for share in (0.2, 0.7):
        settings = [f'data.path="{data}"', "data.split=random", "data.num_owners=3", "generator.warm_start=spectral"]
        commands.price(load_scenario(None, [*settings, f"privacy.sketch_share={share}"]), as_json=True)
        priced[share] = json.loads(capsys.readouterr().out)
    assert all(7.9 < price["epsilon"] <= 8.0 for price in priced.values())
    sketch = {share: price["sketches"][0]["release"]["noise_multiplier"] for share, price in priced.items()}
    training = {share: price["release"]["noise_multiplier"] for share, price in priced.items()}
    assert sketch[0.2] > sketch[0.7] > 0.3
    assert training[0.2] < training[0.7]


def test_a_strategy_that_remembers_goes_on_from_a_sketch(data, tmp_path):
    record = simulated(data, tmp_path / "run", "federation.strategy=fedavgm", kind="vae, spectral start")
    assert [entry["server_round"] for entry in record["rounds"]] == [1, 2, 3]
