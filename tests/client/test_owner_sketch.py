"""An owner answers a sketch as it does a round of training: by its policy, charged first, declared arrays only."""

from dataclasses import replace

import numpy as np
import pytest

import client.owner
from client.egress import EgressError, check_egress
from client.owner import Owner
from client.policy import Allowed, Approval, Ceilings, Limits, Policy
from client.rules import Refusal
from client.store.lifetime import LifetimeLedger
from shared.errors import BudgetExceeded
from shared.privacy.accounting import epsilon
from shared.privacy.releases import GaussianRelease
from shared.sketch.terms import SketchTerms
from shared.wire.arrays import HEAD, answered_shapes, asked_shapes
from shared.wire.messages import TrainJob, TrainReply
from tests.small_federation import DELTA, NUM_ITEMS, RELEASE, a_job, prepare, terms

EDGES = (1, 3, 6)


def sketch_of(statistic: str, head_items: int = NUM_ITEMS, **changes) -> SketchTerms:
    release = GaussianRelease(statistic=statistic, noise_multiplier=2.0, max_users=40)
    values = {"statistic": statistic, "head_items": head_items, "length_edges": EDGES, "release": release}
    return SketchTerms(**{**values, **changes})


BOTH = (sketch_of("both"),)
IN_TWO = (sketch_of("popularity", 5), sketch_of("cooccurrence", 5))


def a_sketch_job(server_round: int = 1, sketches: tuple[SketchTerms, ...] = BOTH, **changes) -> TrainJob:
    plan = terms(server_round=server_round, num_rounds=len(sketches) + 3, sketches=sketches)
    return a_job(**{"plan": plan, "weights": {}, **changes})


def head_of(*items: int) -> dict[str, np.ndarray]:
    marks = np.zeros(NUM_ITEMS, dtype=np.float32)
    marks[list(items)] = 1
    return {HEAD: marks}


@pytest.fixture
def owner(tmp_path) -> Owner:
    prepare(tmp_path)
    return Owner(name="owner-001", directory=tmp_path / "owners" / "owner-001", simulated=True)


def releases(owner: Owner):
    with LifetimeLedger(owner.directory / "ledger.sqlite") as ledger:
        return ledger.releases()


def with_policy(owner: Owner, **changes) -> Owner:
    policy = Policy.load(owner.directory)
    replace_in = policy.model_copy(update=changes)
    replace_in.save(owner.directory)
    return owner


def test_a_sketch_is_charged_as_one_gaussian_release_before_it_is_computed(owner, monkeypatch):
    def crash(*args, **kwargs):
        assert releases(owner) == (BOTH[0].release,)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(client.owner, "compute_sketch", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            owner.answer(a_sketch_job())
    reply = owner.answer(a_sketch_job())
    assert reply.release == BOTH[0].release
    assert releases(owner) == (BOTH[0].release,)


def test_the_answer_is_what_the_terms_declare(owner):
    job = a_sketch_job()
    assert asked_shapes(job) == {}
    record = owner.record(job)
    reply = TrainReply.from_record(record, metrics_expected=False)
    assert {name: values.shape for name, values in reply.weights.items()} == answered_shapes(job)
    assert reply.release == BOTH[0].release


@pytest.mark.parametrize("seed", [7, None])
def test_a_sketch_is_resent_byte_for_byte_and_charged_once(owner, seed, monkeypatch):
    first = owner.answer(a_sketch_job(noise_seed=seed))
    monkeypatch.setattr(client.owner, "compute_sketch", None)  # computing it again would fail
    assert owner.answer(a_sketch_job(noise_seed=seed)).to_record() == first.to_record()
    assert len(releases(owner)) == 1


def test_noise_is_secret_without_a_seed_and_repeats_with_one(tmp_path):
    answers = []
    for number, seed in enumerate((7, 7, 8, None, None)):
        prepare(tmp_path / str(number))
        one = Owner(name="owner-001", directory=tmp_path / str(number) / "owners" / "owner-001", simulated=True)
        answers.append(one.answer(a_sketch_job(noise_seed=seed)).weights["popularity"].tobytes())
    assert answers[0] == answers[1]
    assert len(set(answers)) == 4


def test_the_head_is_what_the_server_marks(owner):
    owner.answer(a_sketch_job(1, IN_TWO))
    reply = owner.answer(a_sketch_job(2, IN_TWO, weights=head_of(0, 2, 4, 6, 8)))
    assert {name: values.shape for name, values in reply.weights.items()} == {"cooccurrence": (15,)}
    assert releases(owner) == tuple(sketch.release for sketch in IN_TWO)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        head_of(0, 2, 4),
        {HEAD: np.full(NUM_ITEMS, 5 / NUM_ITEMS, dtype=np.float32)},
        {HEAD: np.where(head_of(0, 2, 4, 6, 8)[HEAD], 2, 0).astype(np.float32)},
        {**head_of(0, 2, 4, 6, 8), "more": np.zeros(2, dtype=np.float32)},
    ],
)
def test_another_head_than_the_terms_say_is_refused_uncharged(owner, weights):
    with pytest.raises(Refusal) as told:
        owner.answer(a_sketch_job(2, IN_TWO, weights=weights))
    assert told.value.rule == "weights"
    assert releases(owner) == ()


def test_the_whole_run_must_fit_the_budget_before_its_first_sketch(owner):
    job = a_sketch_job()
    whole = [BOTH[0].release, replace(RELEASE, num_steps=6)]
    price = epsilon(whole, DELTA)
    assert epsilon(whole[:1], DELTA) < price - 0.5
    enough = Policy.load(owner.directory).ceilings.model_copy(update={"epsilon": price + 1e-6})
    little = enough.model_copy(update={"epsilon": price - 0.01})
    with pytest.raises(BudgetExceeded):
        with_policy(owner, ceilings=little).answer(job)
    assert releases(owner) == ()
    with_policy(owner, ceilings=enough).answer(job)


def test_an_owner_may_forbid_statistics_and_little_noise(owner):
    with_policy(owner, allowed=Allowed(releases=("dp_sgd_poisson",)))
    with pytest.raises(Refusal) as told:
        owner.answer(a_sketch_job())
    assert told.value.rule == "release-kind"
    with_policy(owner, allowed=Allowed(), limits=Limits(min_noise_multiplier=2.5, min_owners=1))
    with pytest.raises(Refusal) as told:
        owner.answer(a_sketch_job())
    assert told.value.rule == "noise-floor"
    assert releases(owner) == ()


def test_a_sketch_too_large_for_the_policy_is_refused_unbuilt(owner):
    # A triangle of 200,000 items: 75 GiB. Nothing of that size may be made to find out.
    big = replace(sketch_of("both"), head_items=200_000)
    spec = replace(a_job().spec, num_items=200_000)
    with pytest.raises(Refusal) as told:
        owner.answer(a_sketch_job(sketches=(big,), spec=spec))
    assert told.value.rule == "size"


def test_nothing_undeclared_leaves_with_a_sketch(owner):
    job = a_sketch_job()
    reply = owner.answer(job)
    for spoilt in (
        {**reply.weights, "exact": np.zeros(3, dtype=np.float32)},
        {name: values for name, values in reply.weights.items() if name != "lengths"},
        {**reply.weights, "lengths": reply.weights["lengths"].astype(np.float64)},
    ):
        with pytest.raises(EgressError):
            check_egress(replace(reply, weights=spoilt), job, owner=owner.name, simulated=True)


def test_a_run_that_changes_its_terms_is_priced_by_what_it_was_charged(tmp_path):
    """A limit on a whole run holds although each request claims other earlier rounds than there were."""
    prepare(tmp_path)
    folder = tmp_path / "owners" / "owner-001"
    sketch = sketch_of("both")
    price = epsilon([sketch.release], 0.02)
    Policy(
        data_source="owner-001",
        catalogue_hash=a_job().catalogue_hash,
        max_users=40,
        ceilings=Ceilings(epsilon=100.0, delta=0.02),
        limits=Limits(min_owners=1),
        approval=Approval(auto_approve=True, auto_epsilon_per_run=1.2 * price, auto_epsilon_total=100.0),
    ).save(folder)
    real = Owner(name="owner-001", directory=folder, simulated=False)
    real.answer(a_sketch_job(1, noise_seed=None, plan=only_sketches(1, (sketch,))))
    other = replace(sketch, release=replace(sketch.release, noise_multiplier=2.1))
    cheap = replace(sketch, release=replace(sketch.release, noise_multiplier=50.0))
    with pytest.raises(Refusal) as told:  # it claims that round 1 was nearly free
        real.answer(a_sketch_job(2, noise_seed=None, plan=only_sketches(2, (cheap, other))))
    assert told.value.rule == "not-approved"
    assert releases(real) == (sketch.release,)


def only_sketches(server_round: int, sketches: tuple[SketchTerms, ...]):
    return terms(server_round=server_round, num_rounds=len(sketches), sketches=sketches, release=None)
