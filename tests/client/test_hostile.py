"""What a server may try: nothing leaves, and the ledger is as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from client.policy import Approval, Ceilings, Limits, Policy
from client.security_log import SecurityLog
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from shared.generators.family import initial_weights
from shared.privacy.releases import DpSgdRelease
from shared.wire.messages import TrainReply, raise_refusal
from tests.client.test_client_app import ask, deployed, train_content
from tests.small_federation import DELTA, RELEASE, SPEC, policy_of, prepare, terms

LIMITS = Limits(
    min_noise_multiplier=0.5, max_sample_rate=0.5, max_steps_per_round=10, max_steps_per_run=100, min_owners=3
)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    prepare(tmp_path)
    real = policy_of(10.0).model_dump() | {
        "simulated": False,
        "limits": LIMITS,
        "ceilings": Ceilings(epsilon=10.0, epsilon_per_run=8.0, delta=DELTA),
        "approval": Approval(auto_approve=True, auto_epsilon_per_run=8.0, auto_epsilon_total=10.0),
    }
    Policy(**real).save(tmp_path / "owners" / "owner-001")
    return tmp_path


def honest(**changes: Any) -> RecordDict:
    return train_content(**{"noise_seed": None, **changes})


def plan(**changes: Any) -> RecordDict:
    release = {name: changes[name] for name in ("num_steps", "sample_rate", "max_users") if name in changes}
    return honest(plan=terms(**{"release": replace(RELEASE, **release), **changes}))


def noised(noise_multiplier: float) -> RecordDict:
    return honest(plan=terms(release=replace(RELEASE, noise_multiplier=noise_multiplier)))


def with_field(name: str, value: Any) -> RecordDict:
    content = honest()
    content.config_records["job"][name] = value
    return content


def with_weights(change: Any) -> RecordDict:
    return honest(weights={name: change(name, value) for name, value in initial_weights(SPEC, 7).items()})


HOSTILE = {
    "no noise at all": lambda: honest(plan=terms(release=None)),
    "noise of nothing": lambda: noised(1e-9),
    "noise below the floor": lambda: noised(0.49),
    "a zero for the noise": lambda: with_field("plan", _raw_plan(noise_multiplier=0.0)),
    "a noise that is no number": lambda: with_field("plan", _raw_plan(noise_multiplier="NaN")),
    "everybody in each step": lambda: plan(sample_rate=1.0),
    "a million steps": lambda: plan(num_steps=10**6),
    "a million rounds": lambda: honest(plan=terms(num_rounds=10**6)),
    "a run beyond the ceiling": lambda: honest(plan=terms(num_rounds=50)),
    "weights that are no numbers": lambda: with_weights(lambda name, value: value * np.float32("nan")),
    "weights of another shape": lambda: with_weights(lambda name, value: value[:-1]),
    "weights in double precision": lambda: with_weights(lambda name, value: value.astype(np.float64)),
    "no weights": lambda: honest(weights={}),
    "an unknown generator": lambda: with_field("spec", '{"kind": "exfiltrator"}'),
    "a generator of ten billion numbers": lambda: honest(spec=replace(SPEC, num_items=10_000_000, hidden_size=1_000)),
    "seeded noise": lambda: honest(noise_seed=1),
    "private figures": lambda: honest(collect_metrics=True),
    "another catalogue": lambda: honest(catalogue_hash="other"),
    "another bound on users": lambda: plan(max_users=31),
    "too few owners": lambda: honest(plan=terms(num_owners=1)),
    "a clip without bound": lambda: honest(plan=terms(max_grad_norm=1e30, learning_rate=1e-30)),
    "a run with a path for a name": lambda: honest(run_id="../../etc/passwd"),
    "a hundred megabytes of configuration": lambda: with_field("spec", " " * 10**8),
    "ten thousand fields": lambda: _with_fields(10_000),
    "an undeclared record": lambda: RecordDict({**honest(), "more": ConfigRecord({"a": 1})}),
    "an undeclared array": lambda: _with_array("more"),
}


def _raw_plan(**release: Any) -> str:
    import json

    values = terms().to_dict()
    values.pop("proximal_mu")
    values["release"] |= release
    return json.dumps(values).replace('"NaN"', "NaN")


def _with_fields(count: int) -> RecordDict:
    content = honest()
    for number in range(count):
        content.config_records["job"][f"field-{number}"] = number
    return content


def _with_array(name: str) -> RecordDict:
    return honest(weights={**initial_weights(SPEC, 7), name: np.zeros(1, np.float32)})


def state_of(run_dir: Path) -> tuple[int, bool]:
    path = run_dir / "owners" / "owner-001" / "ledger.sqlite"
    with LifetimeLedger(path) as ledger:
        return len(list(ledger.entries())), verify(path).ok


def refused(content: RecordDict) -> str:
    assert not [record for record in content.values() if isinstance(record, ArrayRecord)]
    assert set(content) == {"refusal"}
    with pytest.raises(Exception) as told:  # noqa: PT011  # of whatever kind: the ledger is what is checked
        raise_refusal(content)
    return str(told.value)


@pytest.mark.parametrize("attempt", HOSTILE)
def test_what_a_policy_does_not_allow_leaves_no_trace_but_the_log(run_dir, attempt):
    before = state_of(run_dir)
    text = refused(ask("train", HOSTILE[attempt](), deployed(run_dir), run_dir))
    assert state_of(run_dir) == before == (1, True)
    # A rule's name or a code, and none of the owner's own words or numbers.
    assert text.endswith("Its own log says more.")
    assert not any(character.isdigit() for character in text)


def test_the_honest_round_beside_them_is_answered(run_dir):
    reply = TrainReply.from_record(ask("train", honest(), deployed(run_dir), run_dir), metrics_expected=False)
    assert reply.release == RELEASE
    assert state_of(run_dir) == (3, True)


def test_a_replayed_round_gives_the_same_bytes_and_other_terms_give_nothing(run_dir):
    first = ask("train", honest(), deployed(run_dir), run_dir)
    assert ask("train", honest(), deployed(run_dir), run_dir) == first
    assert state_of(run_dir) == (3, True)
    moved = with_weights(lambda name, value: value + 1)
    refused(ask("train", moved, deployed(run_dir), run_dir))
    assert state_of(run_dir) == (3, True)


def test_another_runs_messages_are_another_charge(run_dir):
    first = ask("train", honest(), deployed(run_dir), run_dir)
    second = ask("train", honest(run_id="another"), deployed(run_dir), run_dir)
    assert first.array_records["weights"] != second.array_records["weights"]
    assert state_of(run_dir) == (5, True)


def test_asking_for_ever_ends_at_the_ceiling(run_dir):
    answered = 0
    for number in range(60):
        content = ask("train", honest(run_id=f"run-{number}"), deployed(run_dir), run_dir)
        if "refusal" in content:
            break
        answered += 1
    assert 2 < answered < 60
    with LifetimeLedger(run_dir / "owners" / "owner-001" / "ledger.sqlite") as ledger:
        assert ledger.releases() == (RELEASE,) * answered
    last = list(SecurityLog(run_dir / "owners" / "owner-001").lines())[-1]
    assert last["rule"] in ("epsilon-for-life", "not-approved")


def test_a_release_is_what_it_says(run_dir):
    # A price far below its steps: what runs is what is charged, so such a plan cannot even be read.
    cheap = DpSgdRelease(noise_multiplier=1.0, sample_rate=0.001, num_steps=1, max_users=40)
    content = with_field("plan", _raw_plan(**cheap.to_dict()))
    refused(ask("train", content, deployed(run_dir), run_dir))
    assert state_of(run_dir) == (1, True)
