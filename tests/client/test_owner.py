"""An owner answers within its own policy, and charges first."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import RecordDict

import client.owner
from client.owner import Owner
from client.store.ledger import Ledger
from client.store.policy import Policy
from shared.data.histories import Histories
from shared.errors import BudgetExceeded, FedAugError, InputError, RefusedError
from shared.privacy.accounting import epsilon
from shared.wire.messages import CatalogueMismatch, TrainJob
from tests.small_federation import CATALOGUE, DELTA, RELEASE, SPEC, a_job, prepare, terms


@pytest.fixture
def owner(tmp_path) -> Owner:
    prepare(tmp_path)
    return Owner(name="owner-001", directory=tmp_path / "owners" / "owner-001", simulated=True)


def releases(owner: Owner):
    with Ledger(owner.directory / "ledger.sqlite") as ledger:
        return ledger.releases()


def sent_bytes(reply) -> dict[str, bytes]:
    return {name: array.data for name, array in reply.to_record().array_records["weights"].items()}


def test_a_round_is_trained_and_charged(owner):
    reply = owner.answer(a_job())
    assert any((reply.weights[name] != value).any() for name, value in a_job().weights.items())
    assert reply.release == RELEASE
    assert releases(owner) == (RELEASE,)


def test_the_charge_is_on_disk_before_training_begins(owner, monkeypatch):
    def crash(*args, **kwargs):
        assert releases(owner) == (RELEASE,)
        raise RuntimeError("power cut")

    monkeypatch.setattr(client.owner, "train_generator", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        owner.answer(a_job())
    assert releases(owner) == (RELEASE,)


@pytest.mark.parametrize("seed", [7, None])
def test_a_committed_reply_is_resent_byte_for_byte_and_charged_once(owner, seed, monkeypatch):
    first = owner.answer(a_job(noise_seed=seed))
    monkeypatch.setattr(client.owner, "train_generator", None)  # training again would fail
    again = owner.answer(a_job(noise_seed=seed))
    assert sent_bytes(again) == sent_bytes(first)
    assert list(sent_bytes(again)) == list(sent_bytes(first))
    assert again.to_record() == first.to_record()
    assert releases(owner) == (RELEASE,)


@pytest.mark.parametrize(("seed", "charges"), [(7, 1), (None, 2)])
def test_a_round_cut_short_is_charged_again_only_if_its_noise_was_secret(owner, seed, charges, monkeypatch):
    train = client.owner.train_generator
    monkeypatch.setattr(client.owner, "train_generator", None)
    with pytest.raises(TypeError):
        owner.answer(a_job(noise_seed=seed))
    monkeypatch.setattr(client.owner, "train_generator", train)
    owner.answer(a_job(noise_seed=seed))
    assert releases(owner) == (RELEASE,) * charges


@pytest.mark.parametrize(("seed", "charges"), [(7, 1), (None, 2)])
def test_a_lost_reply_with_secret_noise_costs_another_release(owner, seed, charges):
    first = owner.answer(a_job(noise_seed=seed))
    for path in owner.directory.glob("replies/*/*"):
        path.write_bytes(path.read_bytes()[:100])
    again = owner.answer(a_job(noise_seed=seed))
    assert releases(owner) == (RELEASE,) * charges
    assert (sent_bytes(again) == sent_bytes(first)) == (seed is not None)


def test_two_different_requests_for_one_round_are_refused(owner):
    owner.answer(a_job())
    other = {name: value + 1 for name, value in a_job().weights.items()}
    with pytest.raises(RefusedError, match="asked something else for round 1"):
        owner.answer(a_job(weights=other))
    assert releases(owner) == (RELEASE,)


def test_epsilon_never_resets_between_rounds_or_runs(owner):
    budget = epsilon([RELEASE] * 3, DELTA)
    Policy(epsilon=budget, delta=DELTA, catalogue_hash=CATALOGUE, max_users=40, simulated=True).save(owner.directory)
    owner.answer(a_job(1))
    owner.answer(a_job(2))
    owner.answer(a_job(1, run_id="another-run"))
    with pytest.raises(BudgetExceeded, match=rf"promised {budget:g} and has spent {budget:.3f}.*more noise"):
        owner.answer(a_job(2, run_id="another-run"))
    assert releases(owner) == (RELEASE,) * 3  # what is refused is not charged


def test_a_budget_short_by_a_hair_refuses(owner):
    Policy(
        epsilon=epsilon([RELEASE], DELTA) * (1 - 1e-9),
        delta=DELTA,
        catalogue_hash=CATALOGUE,
        max_users=40,
        simulated=True,
    ).save(owner.directory)
    with pytest.raises(BudgetExceeded):
        owner.answer(a_job())


def test_a_job_without_noise_needs_an_owner_without_budget(owner):
    job = a_job(plan=terms(release=None))
    with pytest.raises(RefusedError, match="round 1 has no noise"):
        owner.answer(job)
    Policy(epsilon=None, delta=DELTA, catalogue_hash=CATALOGUE, max_users=40, simulated=True).save(owner.directory)
    assert owner.answer(job).release is None
    # It stays on the ledger: a budget set later finds it spent.
    Policy(epsilon=100.0, delta=DELTA, catalogue_hash=CATALOGUE, max_users=40, simulated=True).save(owner.directory)
    with pytest.raises(BudgetExceeded, match="epsilon=inf"):
        owner.answer(a_job(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise_seed": 7}, "refuses seeded noise.*can subtract it"),
        ({"noise_seed": None, "collect_metrics": True}, "keeps losses and user counts at home"),
        ({"noise_seed": None, "plan": terms(release=None)}, "has no noise"),
    ],
)
def test_a_deployed_owner_refuses_what_only_a_simulation_may_ask(owner, change, words):
    with pytest.raises(RefusedError, match=words):
        replace(owner, simulated=False).answer(a_job(**change))
    assert releases(owner) == ()


def test_a_deployed_owner_trains_with_secret_noise_and_sends_no_figures(owner):
    reply = replace(owner, simulated=False).answer(a_job(noise_seed=None))
    assert sorted(reply.to_record()) == ["reply", "weights"]
    assert reply.simulation_only == {}


def test_secret_noise_differs_each_time(owner):
    first, second = (owner.answer(a_job(noise_seed=None, run_id=run_id)) for run_id in ("a", "b"))
    assert sent_bytes(first) != sent_bytes(second)


def test_figures_leave_only_where_a_simulation_collects_them(owner):
    assert owner.answer(a_job(1)).simulation_only == {}
    asked = owner.answer(a_job(2, collect_metrics=True))
    assert set(asked.simulation_only) == {"loss", "num_users", "zeroed_users"}
    assert "simulation-only" in asked.to_record()


def test_a_catalogue_mismatch_names_both_hashes(owner):
    with pytest.raises(CatalogueMismatch, match=f"owner-001 holds catalogue {CATALOGUE}, the server plans with other"):
        owner.answer(a_job(catalogue_hash="other"))


def test_histories_over_another_catalogue_cost_nothing(owner):
    Histories.from_rows([[0, 13]], num_items=14).save(owner.directory / "train.npz")
    with pytest.raises(InputError, match="histories over 14 items, the generator has 12"):
        owner.answer(a_job())
    assert releases(owner) == ()


def test_the_bound_on_users_is_the_owners_not_the_servers(owner):
    for bound in (20, 39, 41, 10_000):  # 30 users: no refusal may depend on it
        plan = terms(max_users=bound, release=replace(RELEASE, max_users=bound))
        with pytest.raises(RefusedError, match=f"declares max_users=40, the plan says {bound}"):
            owner.answer(a_job(plan=plan))
    assert releases(owner) == ()


def test_a_real_owners_policy_is_not_a_simulations(owner):
    Policy(epsilon=1000.0, delta=DELTA, catalogue_hash=CATALOGUE, max_users=40).save(owner.directory)
    with pytest.raises(RefusedError, match="is not a simulation's"):
        owner.answer(a_job())
    assert releases(owner) == ()


def test_an_owner_without_a_policy_trains_nothing(owner):
    (owner.directory / "policy.json").unlink()
    with pytest.raises(InputError, match="nothing is trained without one"):
        owner.answer(a_job())


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": float("nan")},
        {"epsilon": 0.0},
        {"delta": 1.0},
        {"catalogue_hash": ""},
        {"max_users": 0},
        {"max_users": True},
        {"simulated": "yes"},
    ],
)
def test_a_policy_with_a_useless_number_is_refused(bad):
    with pytest.raises(InputError, match="policy"):
        Policy(**{"epsilon": 1.0, "delta": 1e-5, "catalogue_hash": "c", "max_users": 5, **bad})


def test_old_replies_do_not_pile_up(owner):
    for server_round in (1, 2, 3):
        owner.answer(a_job(server_round))
    assert sorted(path.name for path in owner.directory.glob("replies/*/*")) == [
        "00002.safetensors",
        "00003.safetensors",
    ]


def test_a_full_disk_costs_a_charge_and_says_so(owner, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.files.os.fsync", full)
    with pytest.raises(FedAugError, match=r"No space left on device.*Nothing was half-written"):
        owner.answer(a_job())
    monkeypatch.undo()
    assert not list(owner.directory.glob("replies/*/*"))
    owner.answer(a_job())
    assert releases(owner) == (RELEASE,)


def test_a_job_survives_the_wire_and_its_digest_covers_everything():
    job = a_job(collect_metrics=True)
    config = job.to_config()
    config["server-round"] = 1
    read = TrainJob.from_record(RecordDict({"weights": job.to_arrays(), "job": config}))
    assert read.digest == job.digest
    assert all(np.array_equal(read.weights[name], job.weights[name]) for name in job.weights)
    others = [
        a_job(collect_metrics=False),
        replace(job, noise_seed=None),
        replace(job, noise_seed=8),
        replace(job, run_id="b"),
        replace(job, catalogue_hash="b"),
        replace(job, plan=terms(learning_rate=0.4)),
        replace(job, plan=terms(proximal_mu=0.1)),
        replace(job, spec=replace(SPEC, dropout=0.4)),
        replace(job, weights={**job.weights, "encoder.bias": job.weights["encoder.bias"] + 1e-6}),
    ]
    assert len({other.digest for other in [job, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("surprise", 1, "unknown or mistyped fields"),
        ("plan", "{", "missing or unreadable"),
        ("server-round", 2, "sent for round 2 but planned for 1"),
        ("noise-seed", "7", "mistyped"),
    ],
)
def test_a_malformed_job_is_refused(field, value, words):
    config = a_job().to_config()
    config["server-round"] = 1
    config[field] = value
    with pytest.raises(InputError, match=words):
        TrainJob.from_record(RecordDict({"weights": a_job().to_arrays(), "job": config}))
