"""The owner's rules: what is just inside passes, what is just outside is refused by its rule's name."""

import ast
import builtins
import inspect
import math
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import client.rules
from client.policy import Policy
from client.rules import OverBudget, Refusal, Spending, check_budget, check_request, num_weights
from shared.errors import BudgetExceeded, RefusedError
from shared.generators.family import initial_weights, travelling_shapes
from shared.generators.multvae import VaeSpec
from shared.wire.messages import TrainJob
from tests.client.test_policy import values
from tests.small_federation import CATALOGUE, RELEASE, SPEC, a_job, terms

TODAY = date(2026, 11, 22)
CODE = "c" * 64
NUM_OWNERS = 3


def a_policy(**changes: Any) -> Policy:
    return Policy.model_validate(values(catalogue_hash=CATALOGUE, **changes))


def a_real_job(**changes: Any) -> TrainJob:
    return a_job(**{"noise_seed": None, **changes})


def planned(**changes: Any) -> TrainJob:
    """A job whose plan has ``changes``, and whose release prices them."""
    release = replace(
        RELEASE, **{name: value for name, value in changes.items() if name in {"num_steps", "sample_rate", "max_users"}}
    )
    return a_real_job(plan=terms(**{"release": release, **changes}))


def check(job: TrainJob, policy: Policy, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "today": TODAY,
        "code_hash": CODE,
        "num_owners": NUM_OWNERS,
        "simulated": policy.simulated,
    }
    check_request(job, policy, **{**settings, **changes})


def rule_of(job: TrainJob, policy: Policy, **changes: Any) -> str | None:
    refusals: list[Refusal] = []
    try:
        check(job, policy, **changes)
    except Refusal as refusal:
        refusals.append(refusal)
    for refusal in refusals:
        assert refusal.exit_code == 3
        assert max(len(refusal.asked), len(refusal.allowed)) <= 200  # fit for the log
        assert (refusal.asked + refusal.allowed).isprintable()
    return refusals[0].rule if refusals else None


def with_weights(**changes: Any) -> TrainJob:
    return a_real_job(weights={**initial_weights(SPEC, 7), **changes})


def spoilt(number: float) -> np.ndarray:
    bias = np.zeros(6, dtype=np.float32)
    bias[5] = number
    return bias


SIZE = num_weights(SPEC)
WITHOUT_NOISE = planned(release=None)

# Rule, just inside, just outside; each a job and changes to policy or surroundings.
EDGES: list[tuple[str, tuple[TrainJob, dict[str, Any]], tuple[TrainJob, dict[str, Any]]]] = [
    (
        "noise-floor",
        (a_real_job(), {"limits__min_noise_multiplier": 1.0}),
        (a_real_job(), {"limits__min_noise_multiplier": math.nextafter(1.0, 2)}),
    ),
    (
        "sample-rate",
        (a_real_job(), {"limits__max_sample_rate": 0.3}),
        (a_real_job(), {"limits__max_sample_rate": math.nextafter(0.3, 0)}),
    ),
    ("steps", (a_real_job(), {"limits__max_steps_per_round": 2}), (a_real_job(), {"limits__max_steps_per_round": 1})),
    ("steps", (a_real_job(), {"limits__max_steps_per_run": 6}), (a_real_job(), {"limits__max_steps_per_run": 5})),
    ("size", (a_real_job(), {"limits__max_weights": SIZE}), (a_real_job(), {"limits__max_weights": SIZE - 1})),
    ("owners", (a_real_job(), {"limits__min_owners": 3}), (a_real_job(), {"limits__min_owners": 4})),
    ("owners", (a_real_job(), {"limits__min_owners": 1}), (a_real_job(), {"num_owners": None})),
    ("expired", (a_real_job(), {"expires": TODAY}), (a_real_job(), {"expires": TODAY - timedelta(days=1)})),
    ("code", (a_real_job(), {"allowed__code": ["a" * 64, CODE]}), (a_real_job(), {"allowed__code": ["a" * 64]})),
    ("max-users", (planned(max_users=41), {"max_users": 41}), (planned(max_users=41), {})),
    ("max-users", (a_real_job(), {}), (planned(max_users=39), {})),
    ("clip", (planned(max_grad_norm=1e-6), {}), (planned(max_grad_norm=math.nextafter(1e-6, 0)), {})),
    (
        "clip",
        (planned(max_grad_norm=1e6, learning_rate=1e-6), {}),
        (planned(max_grad_norm=math.nextafter(1e6, math.inf), learning_rate=1e-6), {}),
    ),
    ("run-id", (a_real_job(run_id="r" * 100), {}), (a_real_job(run_id="r" * 101), {})),
    ("run-id", (a_real_job(run_id="a.B-9_"), {}), (a_real_job(run_id="../a\x1b[2J"), {})),
    ("run-id", (a_real_job(run_id="0"), {}), (a_real_job(run_id="a\n"), {})),
    ("catalogue", (a_real_job(), {}), (a_real_job(catalogue_hash="other\x1b" * 100), {})),
    ("generator", (a_real_job(), {}), (a_real_job(), {"allowed__generators": []})),
    ("release-kind", (a_real_job(), {}), (a_real_job(), {"allowed__releases": []})),
    ("seeded-noise", (a_job(noise_seed=7), {"simulated": True}), (a_job(noise_seed=7), {})),
    (
        "private-figures",
        (a_real_job(collect_metrics=True), {"simulated": True}),
        (a_real_job(collect_metrics=True), {}),
    ),
    (
        "no-noise",
        (WITHOUT_NOISE, {"simulated": True, "ceilings__epsilon": None}),
        (WITHOUT_NOISE, {"simulated": True}),
    ),
    ("no-noise", (a_real_job(), {}), (WITHOUT_NOISE, {})),
    ("simulation", (a_job(), {"simulated": True}), (a_real_job(), {"node": True})),
    ("simulation", (a_real_job(), {}), (a_real_job(), {"simulated": True, "node": False})),
    (
        "weights",
        (with_weights(**{"encoder.bias": spoilt(3e38)}), {}),
        (with_weights(**{"encoder.bias": spoilt(math.inf)}), {}),
    ),
    ("weights", (a_real_job(), {}), (with_weights(**{"encoder.bias": spoilt(math.nan)}), {})),
    ("weights", (a_real_job(), {}), (with_weights(**{"encoder.bias": np.zeros(7, dtype=np.float32)}), {})),
    ("weights", (a_real_job(), {}), (with_weights(**{"encoder.bias": np.zeros((6, 1), dtype=np.float32)}), {})),
    ("weights", (a_real_job(), {}), (with_weights(**{"encoder.bias": np.zeros(6)}), {})),
    ("weights", (a_real_job(), {}), (with_weights(**{"encoder.bias": np.zeros(6, dtype=">f4")}), {})),
    ("weights", (a_real_job(), {}), (with_weights(**{"\x1b[2J" * 50: np.zeros(1, dtype=np.float32)}), {})),
    ("weights", (a_real_job(), {}), (a_real_job(weights={}), {})),
    (
        "weights",
        (a_real_job(), {}),
        (a_real_job(weights=dict(reversed(initial_weights(SPEC, 7).items()))), {}),
    ),
]


@pytest.mark.parametrize(("rule", "inside", "outside"), EDGES, ids=[f"{n}-{edge[0]}" for n, edge in enumerate(EDGES)])
def test_what_is_just_inside_passes_and_just_outside_names_its_rule(rule, inside, outside):
    found = []
    for job, changes in (inside, outside):
        policy = a_policy(**{name: value for name, value in changes.items() if name not in {"num_owners", "node"}})
        around = {
            "num_owners": changes.get("num_owners", NUM_OWNERS),
            "simulated": changes.get("node", policy.simulated),
        }
        found.append(rule_of(job, policy, **around))
    assert found == [None, rule]


def test_the_size_of_a_message_is_bounded_too():
    spec = replace(SPEC, num_items=100_000)  # 4.96 MiB by hand: 100,000 x (6 + 6 + 1) numbers of 4 bytes, and few more
    job = a_real_job(spec=spec, weights=initial_weights(spec, 1))
    assert 4.9 < num_weights(spec) * 4 / 2**20 < 5.0
    assert rule_of(job, a_policy(limits__max_message_mib=5)) is None
    assert rule_of(job, a_policy(limits__max_message_mib=4)) == "size"


def test_declared_shapes_are_those_of_a_generator():
    shapes = travelling_shapes(SPEC)
    assert list(shapes) == list(initial_weights(SPEC, 1))
    assert shapes == {name: value.shape for name, value in initial_weights(SPEC, 1).items()}


class UnknownSpec(VaeSpec):
    kind = "exec"  # the message reader refuses it too


def hostile_kind() -> TrainJob:
    return a_real_job(spec=UnknownSpec.from_dict(SPEC.to_dict()))


HUGE = {"num_items": 10_000_000, "hidden_size": 10_000, "latent_size": 10_000}
HOSTILE = {
    "tiny noise": (planned(release=replace(RELEASE, noise_multiplier=1e-9)), "noise-floor"),
    "a million steps": (planned(num_steps=10**6), "steps"),
    "a million rounds": (planned(num_rounds=10**6), "steps"),
    "nan weights": (with_weights(**{"encoder.bias": spoilt(math.nan)}), "weights"),
    "unknown generator": (hostile_kind(), "generator"),
    "huge generator": (a_real_job(spec=replace(SPEC, **HUGE)), "size"),
    "wrong catalogue": (a_real_job(catalogue_hash="b"), "catalogue"),
    "seeded noise": (a_job(noise_seed=0), "seeded-noise"),
    "private figures": (a_real_job(collect_metrics=True), "private-figures"),
    "no release": (WITHOUT_NOISE, "no-noise"),
    "probing the number of users": (planned(max_users=1), "max-users"),
    "rounding away the noise": (planned(max_grad_norm=1e-40, learning_rate=1e38), "clip"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_server_meets_a_rule_and_no_resources(name):
    job, rule = HOSTILE[name]
    assert rule_of(job, a_policy()) == rule


def test_a_hostile_server_meets_the_rule_even_where_the_price_would_be_small():
    # Sampling everyone costs little under enough noise; a policy against it holds all the same.
    job = planned(sample_rate=1.0, release=replace(RELEASE, sample_rate=1.0, noise_multiplier=1e6))
    assert rule_of(job, a_policy()) is None
    assert rule_of(job, a_policy(limits__max_sample_rate=0.5)) == "sample-rate"


def test_the_text_names_the_rule_both_values_and_the_next_step():
    with pytest.raises(RefusedError) as told:
        check(a_real_job(), a_policy(limits__min_noise_multiplier=1.5))
    assert str(told.value) == (
        "refused by rule 'noise-floor': asked for noise_multiplier 1, allowed is at least 1.5"
        " (limits.min_noise_multiplier). Ask the server's operator for more noise, or for fewer rounds at the same"
        " epsilon."
    )


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(Refusal, match=r"asked for 'extra' as 'float32 \(6,\)', allowed is absent"):
        check(with_weights(extra=spoilt(0.0)), a_policy())
    with pytest.raises(Refusal, match=r"'encoder.bias' as 'float64 \(6,\)', allowed is float32 \(6,\)"):
        check(with_weights(**{"encoder.bias": np.zeros(6)}), a_policy())


def test_a_refusal_cannot_depend_on_a_user(monkeypatch):
    # By construction: the rules are given no data, import nothing that reads any, and open no file.
    for function in (check_request, check_budget):
        annotations = {str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()}
        assert not any(word in text for text in annotations for word in ("Path", "Histories", "Owner", "Ledger", "Any"))
    tree = ast.parse(Path(client.rules.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {module for module in imported if module and module.split(".")[0] in {"client", "shared", "pathlib", "os"}}
    assert ours == {
        "client.policy",
        "shared.errors",
        "shared.generators.family",
        "shared.generators.gan",
        "shared.generators.sequence",
        "shared.privacy.releases",
        "shared.wire.arrays",
        "shared.wire.messages",
    }
    policy, good, bad = a_policy(), a_real_job(), a_real_job(catalogue_hash="b")
    check(good, policy)  # torch may load code the first time

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the rules opened a file")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr("os.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    outcomes = rule_of(good, policy), rule_of(bad, policy)
    monkeypatch.undo()
    assert outcomes == (None, "catalogue")


def mostly(good: Any, *others: Any) -> st.SearchStrategy[Any]:
    # So many limits are drawn that few jobs would pass if each were met half the time.
    return st.sampled_from([good] * 12 * max(1, len(others)) + list(others))


@st.composite
def jobs(draw: st.DrawFn) -> TrainJob:
    release = replace(
        RELEASE,
        noise_multiplier=draw(mostly(1.0, 1e-9, 0.299, 0.3, 50.0)),
        sample_rate=draw(mostly(0.3, 0.01, 0.31, 1.0)),
        num_steps=draw(mostly(2, 1, 99, 100, 101, 10**6)),
        max_users=draw(mostly(40, 41)),
    )
    plan = terms(
        num_rounds=draw(mostly(3, 1, 100, 101, 5000, 10**6)),
        num_steps=release.num_steps,
        sample_rate=release.sample_rate,
        max_users=release.max_users,
        max_grad_norm=draw(mostly(1.0, 1e-9, 0.3, 1e9)),
        learning_rate=1e-5,
        release=draw(mostly(release, None)),
    )
    return a_job(
        plan=plan,
        weights={**initial_weights(SPEC, 1), "encoder.bias": draw(mostly(spoilt(0.0), spoilt(math.nan)))},
        noise_seed=draw(mostly(None, 7)),
        collect_metrics=draw(mostly(False, True)),
        catalogue_hash=draw(mostly(CATALOGUE, "other")),
    )


some_policies = st.builds(
    a_policy,
    simulated=mostly(False, True),
    expires=mostly(None, TODAY, TODAY - timedelta(days=1)),
    limits__min_noise_multiplier=mostly(0.3, 0.1, 2.0),
    limits__max_sample_rate=mostly(1.0, 0.1, 0.3),
    limits__max_steps_per_round=mostly(100, 1, 10**6),
    limits__max_steps_per_run=mostly(10_000, 1, 10**6),
    limits__min_owners=mostly(2, 1, 3),
    limits__max_weights=mostly(SIZE, SIZE - 1, 10**9),
    allowed__code=mostly((), (CODE,), ("a" * 64,)),
)


@given(job=jobs(), policy=some_policies, num_owners=mostly(3, None, 1, 2, 100), node=mostly(False, True))
def test_what_passes_satisfies_every_limit(job, policy, num_owners, node):
    # Counted here a second time, in other words and without the rules' helpers.
    plan, release, limits = job.plan, job.plan.release, policy.limits
    secret = job.noise_seed is None and not job.collect_metrics
    satisfied = {
        "simulation": node == policy.simulated,
        "expired": policy.expires is None or policy.expires >= TODAY,
        "code": CODE in (policy.allowed.code or [CODE]),
        "secrecy": policy.simulated or secret,
        "catalogue": job.catalogue_hash == CATALOGUE,
        "size": sum(value.size for value in job.weights.values()) <= limits.max_weights,
        "owners": (num_owners or 0) >= limits.min_owners,
        "max-users": plan.max_users == 40,
        "sample-rate": plan.sample_rate <= limits.max_sample_rate,
        "steps": plan.num_steps <= limits.max_steps_per_round
        and plan.num_steps * plan.num_rounds <= limits.max_steps_per_run,
        "clip": 1e-6 <= plan.max_grad_norm <= 1e6,
        "noise": release is not None and release.noise_multiplier >= limits.min_noise_multiplier,
        "weights": bool(np.isfinite(job.weights["encoder.bias"]).all()),
    }
    rule = rule_of(job, policy, num_owners=num_owners, simulated=node)
    assert (rule is None) == all(satisfied.values()), (rule, satisfied)


def budget(*, life: float = 1.0, run: float = 1.0, alternative: str | None = None, **changes: Any) -> None:
    policy = a_policy(**{"ceilings__epsilon_per_run": 2.0, **changes})
    spending = {name: Spending(before=0.5, after=after) for name, after in (("life", life), ("run", run))}
    check_budget(policy, **spending, alternative=lambda: alternative)


def test_a_release_within_the_ceilings_passes():
    budget(life=8.0, run=2.0)
    budget(life=math.inf, run=math.inf, simulated=True, ceilings__epsilon=None, ceilings__epsilon_per_run=None)


@pytest.mark.parametrize("above", [math.nextafter(8.0, 9.0), 9.5, math.inf, math.nan])
def test_the_ceiling_for_life_holds(above):
    with pytest.raises(OverBudget, match=r"epsilon-for-life.*0\.5 of it spent before.*at most 8 \(ceilings\.epsilon\)"):
        budget(life=above)


@pytest.mark.parametrize("above", [math.nextafter(2.0, 3.0), math.inf, math.nan])
def test_the_ceiling_of_a_run_holds(above):
    with pytest.raises(BudgetExceeded, match=r"epsilon-per-run.*at most 2 \(ceilings\.epsilon_per_run\)") as told:
        budget(run=above)
    assert isinstance(told.value, Refusal)
    assert (told.value.rule, told.value.exit_code) == ("epsilon-per-run", 3)
    budget(run=above, ceilings__epsilon_per_run=None)


def test_a_ceiling_says_what_would_fit():
    with pytest.raises(OverBudget, match=r"delta 0\.001\. noise_multiplier 1\.8 or 40 rounds would fit\.$"):
        budget(life=9.0, alternative="noise_multiplier 1.8 or 40 rounds would fit")
    with pytest.raises(OverBudget, match=r"Keep the last generator and stop\.$"):
        budget(life=9.0)
