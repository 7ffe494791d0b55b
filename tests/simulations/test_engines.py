"""Both engines end with the same bits, killed and resumed or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import client.owner
import server.rounds
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from server.checkpoints import read_state
from server.receipts import read_receipts
from shared.errors import FedAugError, InputError, RefusedError
from shared.privacy.accounting import epsilon
from shared.privacy.chain import Reserve
from simulations.engines import flower, run_federation
from tests.small_federation import DELTA, RELEASE, policy_of, prepare, terms

STRATEGIES = [
    {"strategy": "fedavg"},
    {"strategy": "fedavgm", "server_learning_rate": 0.5},
    {"strategy": "fedadam"},
    {"strategy": "fedprox", "terms": terms(proximal_mu=0.1)},
]


def run(run_dir: Path, engine="inprocess", num_owners=3) -> dict[str, bytes]:
    weights = run_federation(run_dir, engine=engine, num_owners=num_owners, progress=lambda *told: None)
    return {name: value.tobytes() for name, value in weights.items()}


def charges(run_dir: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(run_dir.glob("owners/*/ledger.sqlite")):
        with LifetimeLedger(path) as ledger:
            found[path.parent.name] = tuple(
                (entry.content.server_round, entry.content.release)
                for entry in ledger.entries()
                if isinstance(entry.content, Reserve)
            )
    return found


def test_rounds_are_told_once_each_in_order(tmp_path):
    prepare(tmp_path)
    told = []
    run_federation(tmp_path, engine="inprocess", num_owners=3, progress=lambda *round_: told.append(round_))
    assert [(server_round, num_rounds) for server_round, num_rounds, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[0][2]["simulation_only"]["num_users"] == 90
    assert told[0][2]["missing"] == []


@pytest.mark.parametrize("engine", ["inprocess", "flower"])
def test_a_finished_run_is_not_started_again(tmp_path, engine, monkeypatch):
    prepare(tmp_path)
    finished = run(tmp_path)
    monkeypatch.setattr("simulations.engines.run_flower", None)
    monkeypatch.setattr("simulations.engines.server_app", None)
    assert run(tmp_path, engine=engine) == finished


def test_every_round_is_on_every_ledger(tmp_path):
    prepare(tmp_path)
    run(tmp_path)
    assert [len(rows) for rows in charges(tmp_path).values()] == [3, 3, 3]
    path = tmp_path / "owners" / "owner-001" / "ledger.sqlite"
    with LifetimeLedger(path) as ledger:
        assert epsilon(ledger.releases(), DELTA) == epsilon([RELEASE] * 3, DELTA)
    state = verify(path, receipt=read_receipts(tmp_path)["owner-001"])
    assert (state.ok, state.reserved, state.committed) == (True, 3, 3)


def test_strategies_differ(tmp_path):
    results = []
    for number, strategy in enumerate(STRATEGIES):
        prepare(tmp_path / str(number), **strategy)
        results.append(run(tmp_path / str(number)))
    assert all(one != other for number, one in enumerate(results) for other in results[:number])


# Where a run can be killed in round 2: what is replaced, and on which of its calls the process dies.
Moment = tuple[object, str, Callable[[tuple], bool]]
MOMENTS: dict[str, Moment] = {
    "charged, not trained": (client.owner, "train_generator", lambda a: a[3].server_round == 2),
    "trained, reply not kept": (client.owner, "save_reply", lambda a: a[1].plan.server_round == 2),
    "reply kept, not committed": (LifetimeLedger, "commit", lambda a: a[1] == 4),
    "aggregated, no checkpoint": (server.rounds, "save_checkpoint", lambda a: a[1].server_round == 2),
    "arrays written, no state": (
        server.checkpoints,
        "write_atomically",
        lambda a: a[0].name == "state.json" and json.loads(a[1])["server_round"] == 2,
    ),
}


def killed(run_dir: Path, moment: Moment) -> None:
    """Run in a process that dies by SIGKILL the first time ``moment`` comes."""
    place, name, is_now = moment
    child = os.fork()
    if child == 0:
        try:
            original = getattr(place, name)

            def or_die(*args, **kwargs):
                if is_now(args):
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(place, name, or_die)
            torch.set_num_threads(1)  # a forked process has lost the threads an earlier test may have started
            run(run_dir)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_in_round_2_and_resumed_equals_the_uninterrupted(tmp_path, moment):
    for name in ("straight", "killed"):
        prepare(tmp_path / name)
    straight = run(tmp_path / "straight")
    killed(tmp_path / "killed", MOMENTS[moment])
    assert read_state(tmp_path / "killed")["server_round"] == 1
    assert run(tmp_path / "killed") == straight
    assert charges(tmp_path / "killed") == charges(tmp_path / "straight")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy["strategy"])
def test_every_strategy_resumes_with_what_it_remembered(tmp_path, strategy):
    for name in ("straight", "killed"):
        prepare(tmp_path / name, **strategy)
    straight = run(tmp_path / "straight")
    # In round 3: by then two rounds of momentum would be missing.
    killed(tmp_path / "killed", (server.rounds, "save_checkpoint", lambda a: a[1].server_round == 3))
    assert run(tmp_path / "killed") == straight


def test_a_forgotten_momentum_would_be_noticed(tmp_path, monkeypatch):
    for name in ("straight", "killed"):
        prepare(tmp_path / name)
    straight = run(tmp_path / "straight")
    killed(tmp_path / "killed", (server.rounds, "save_checkpoint", lambda a: a[1].server_round == 3))
    monkeypatch.setattr(server.rounds, "restore", lambda *args: None)
    assert run(tmp_path / "killed") != straight


def test_secret_noise_is_charged_again_where_the_reply_was_lost(tmp_path):
    prepare(tmp_path, noise_seed=None)
    killed(tmp_path, MOMENTS["trained, reply not kept"])
    run(tmp_path)
    # One owner was killed before its reply was kept; another was at work beside it, or was not.
    assert sorted(len(rows) for rows in charges(tmp_path).values()) in ([3, 3, 4], [3, 4, 4])


def test_a_bug_at_an_owner_stops_the_run_and_names_the_owner_alone(tmp_path, monkeypatch):
    prepare(tmp_path)
    train = client.owner.train_generator

    def stumble(*args, owner, **kwargs):
        if owner == "owner-002":
            raise KeyError("user 4711")
        return train(*args, owner=owner, **kwargs)

    monkeypatch.setattr(client.owner, "train_generator", stumble)
    with pytest.raises(FedAugError, match="round 1, owner-002: an owner's program failed") as stopped:
        run(tmp_path)
    assert "4711" not in str(stopped.value)
    assert stopped.value.exit_code == 1


def test_a_run_that_would_exceed_a_budget_is_refused(tmp_path):
    prepare(tmp_path)
    budget = epsilon([RELEASE] * 2, DELTA) * (1 + 1e-6)
    policy_of(budget, data_source="owner-002").save(tmp_path / "owners" / "owner-002")
    with pytest.raises(RefusedError, match="round 1, owner-002: refused by rule 'epsilon-for-life'") as refused:
        run(tmp_path)
    assert refused.value.exit_code == 3
    assert read_state(tmp_path)["server_round"] == 0
    assert json.loads((tmp_path / "failure.json").read_text())["exit_code"] == 3


@pytest.mark.parametrize(("exit_code", "kind"), [(1, FedAugError), (2, InputError), (3, RefusedError)])
def test_a_failure_in_flower_keeps_its_kind_and_names_the_log(tmp_path, exit_code, kind):
    (tmp_path / "failure.json").write_text(json.dumps({"exit_code": exit_code, "text": "why"}))
    error = flower._failure(tmp_path, "finished:failed", tmp_path / "logs" / "flower.log")
    assert isinstance(error, kind)
    assert error.exit_code == exit_code
    assert "why" in str(error)
    assert "flower.log" in str(error)


def test_what_the_keeper_started_dies_with_who_asked(tmp_path):
    """Even a daemon that left its parent, when the asker is killed and can clean up nothing itself."""
    token = uuid.uuid4().hex
    (tmp_path / "work").mkdir()
    daemon = f"import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True); print('{token}')"
    keeper = [sys.executable, flower.__file__.replace("flower.py", "keeper.py"), str(tmp_path / "work")]
    command = [*keeper, "sh", "-c", f'{sys.executable} -c "{daemon}"; sleep 600']
    asker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, time; p = subprocess.Popen({command!r}, stdin=-1); time.sleep(600)",
        ],
        env={**os.environ, "FEDAUG_TEST": token},
    )
    wait_until(lambda: len(processes_with(token)) >= 5, seconds=20)  # asker, keeper, sh, and two sleeps
    asker.kill()
    asker.wait()
    wait_until(lambda: not processes_with(token), seconds=10)
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_flower_gives_the_same_bits(tmp_path):
    for name in ("inprocess", "flower"):
        prepare(tmp_path / name)
    project = Path(flower.__file__).parents[2] / "pyproject.toml"
    before = project.read_bytes()
    told = []
    token = uuid.uuid4().hex
    os.environ["FEDAUG_TEST"] = token
    try:
        weights = run_federation(
            tmp_path / "flower", engine="flower", num_owners=3, progress=lambda *round_: told.append(round_[0])
        )
    finally:
        del os.environ["FEDAUG_TEST"]
    assert {name: value.tobytes() for name, value in weights.items()} == run(tmp_path / "inprocess")
    assert charges(tmp_path / "flower") == charges(tmp_path / "inprocess")
    assert told == [1, 2, 3]
    assert "ServerApp finished running" in (tmp_path / "flower" / "logs" / "flower.log").read_text()
    assert project.read_bytes() == before
    assert not processes_with(token)  # whose environment at their start held it: Flower's and Ray's, not this one


@pytest.mark.slow
def test_flower_killed_in_round_2_and_resumed_equals_the_uninterrupted(tmp_path):
    long = terms(num_rounds=6)
    for name in ("straight", "killed"):
        prepare(tmp_path / name, terms=long)
    token = uuid.uuid4().hex
    script = (
        "import sys; from pathlib import Path; from simulations.engines import run_federation;"
        "run_federation(Path(sys.argv[1]), engine='flower', num_owners=3, progress=print)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "killed")],
        env={**os.environ, "FEDAUG_TEST": token},
        cwd=Path(flower.__file__).parents[2],
    )
    wait_until(lambda: read_state(tmp_path / "killed").get("server_round", 0) >= 1, seconds=240)
    process.kill()
    process.wait()
    wait_until(lambda: not processes_with(token), seconds=10)
    assert 1 <= read_state(tmp_path / "killed")["server_round"] < 6
    assert run(tmp_path / "killed", engine="flower") == run(tmp_path / "straight")
    assert charges(tmp_path / "killed") == charges(tmp_path / "straight")


def processes_with(token: str) -> list[int]:
    """Processes other than this one that were started with ``token`` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if token.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(is_so: Callable[[], bool], *, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up, f"not so after {seconds} seconds"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_ray_cluster_that_is_named_is_used_and_left_running(tmp_path, monkeypatch):
    for name in ("inprocess", "flower"):
        prepare(tmp_path / name)
    ray = str(Path(sys.executable).with_name("ray"))
    port, folder = flower._free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    cluster = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--temp-dir={folder}"],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with_address = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        wait_until(
            lambda: subprocess.run([ray, "status"], env=with_address, capture_output=True).returncode == 0, seconds=60
        )
        before = set(Path(folder).glob("session_latest/logs/worker-*"))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert run(tmp_path / "flower", engine="flower") == run(tmp_path / "inprocess")
        assert set(Path(folder).glob("session_latest/logs/worker-*")) - before  # the owners' work was done there
        assert cluster.poll() is None
    finally:
        os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait()
        shutil.rmtree(folder, ignore_errors=True)
