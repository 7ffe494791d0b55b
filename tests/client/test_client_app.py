"""What a node may say to a server, through Flower's messages."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.owner
from client.app import app
from client.policy import Limits, Policy
from shared.errors import BudgetExceeded, RefusedError
from shared.wire.messages import Hello, OwnerFailed, TrainReply, raise_refusal
from simulations.engines.inprocess import InProcessGrid
from tests.client.test_owner import AUTOMATIC
from tests.small_federation import CATALOGUE, a_job, policy_of, prepare


def ask(kind: str, content: RecordDict, node_config: dict[str, Any], run_dir: Path) -> RecordDict:
    InProcessGrid(app, num_owners=0, run_dir=run_dir)  # gives messages of this process an identity
    context = Context(
        run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={"run-dir": str(run_dir)}
    )
    return app(Message(content, 2, kind), context).content


def train_content(**changes: Any) -> RecordDict:
    job = a_job(**changes)
    config = job.to_config()
    config["server-round"] = job.plan.server_round
    return RecordDict({"weights": job.to_arrays(), "job": config})


SIMULATED = {"partition-id": 1, "num-partitions": 3}


def deployed(run_dir: Path) -> dict[str, Any]:
    return {"owner": "shop", "data-path": str(run_dir / "owners" / "owner-001"), **SIMULATED}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    prepare(tmp_path)
    return tmp_path


def test_partitions_are_owners_in_order_of_name(run_dir):
    content = ask("query.hello", RecordDict({"question": ConfigRecord()}), SIMULATED, run_dir)
    hello = Hello.from_record(content)
    assert (hello.owner, hello.catalogue_hash) == ("owner-002", CATALOGUE)


def test_a_node_with_a_data_path_is_an_agent_whatever_the_run_says(run_dir):
    real = policy_of(1000.0).model_dump() | {"simulated": False, "limits": Limits(), "approval": AUTOMATIC}
    Policy(**real).save(run_dir / "owners" / "owner-001")
    with pytest.raises(RefusedError, match=r"rule 'seeded-noise'. Its own log says more.$"):
        raise_refusal(ask("train", train_content(noise_seed=7), deployed(run_dir), run_dir))
    reply = ask("train", train_content(noise_seed=None), deployed(run_dir), run_dir)
    assert TrainReply.from_record(reply, metrics_expected=False).owner == "shop"
    assert not reply.metric_records


@pytest.mark.parametrize("missing", ["owner", "data-path"])
def test_an_agent_started_half_configured_is_not_taken_for_a_simulation(run_dir, missing):
    node = {name: value for name, value in deployed(run_dir).items() if name != missing}
    with pytest.raises(Exception, match="code 'input'"):
        raise_refusal(ask("train", train_content(), node, run_dir))


def test_an_unexpected_error_does_not_leak_its_text(run_dir, monkeypatch, caplog):
    def leak(*args, **kwargs):
        raise KeyError("user 4711 bought a wheelchair")

    monkeypatch.setattr(client.owner, "train_generator", leak)
    content = ask("train", train_content(), SIMULATED, run_dir)
    with pytest.raises(OwnerFailed, match="its own log says why") as told:
        raise_refusal(content)
    assert "4711" not in str(told.value)
    assert "4711" not in str(content)
    assert "4711" in caplog.text  # the owner's own log says it


def test_our_own_refusals_keep_their_words_and_kind(run_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise BudgetExceeded("epsilon=9 of 8")

    monkeypatch.setattr(client.owner, "check_budget", refuse)
    with pytest.raises(RefusedError, match="epsilon=9 of 8") as told:
        raise_refusal(ask("train", train_content(), SIMULATED, run_dir))
    assert told.value.exit_code == 3


def test_a_simulation_of_another_size_is_refused(run_dir):
    with pytest.raises(Exception, match="holds 3 owners, the simulation has 2 nodes"):
        raise_refusal(ask("train", train_content(), {"partition-id": 0, "num-partitions": 2}, run_dir))
