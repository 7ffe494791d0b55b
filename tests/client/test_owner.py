"""An owner answers within its own policy, and charges first."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import RecordDict

import client.owner
from client.approvals import approve, proposals
from client.data import training_histories
from client.owner import Owner
from client.policy import Approval, Limits, Policy
from client.rules import Refusal
from client.security_log import SecurityLog
from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from shared.data.histories import Histories
from shared.errors import BudgetExceeded, FedAugError, InputError, RefusedError
from shared.privacy.accounting import epsilon
from shared.wire.messages import TrainJob
from tests.small_federation import CATALOGUE, DELTA, RELEASE, SPEC, a_job, policy_of, prepare, terms

AUTOMATIC = Approval(auto_approve=True, auto_epsilon_per_run=500.0, auto_epsilon_total=900.0)


@pytest.fixture
def owner(tmp_path) -> Owner:
    prepare(tmp_path)
    return Owner(name="owner-001", directory=tmp_path / "owners" / "owner-001", simulated=True)


def releases(owner: Owner):
    with LifetimeLedger(owner.directory / "ledger.sqlite") as ledger:
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
    budget = epsilon([RELEASE] * 4, DELTA) * (1 + 1e-6)
    policy_of(budget).save(owner.directory)
    for server_round in (1, 2, 3):
        owner.answer(a_job(server_round))
    owner.answer(a_job(3, run_id="another-run"))  # its last round, and the last that fits
    with pytest.raises(BudgetExceeded, match=r"epsilon-for-life.*spent before"):
        owner.answer(a_job(3, run_id="one-more"))
    assert releases(owner) == (RELEASE,) * 4  # what is refused is not charged


def test_a_run_that_cannot_end_within_the_budget_is_refused_before_it_trains(owner):
    policy_of(epsilon([RELEASE] * 2, DELTA) * 1.01).save(owner.directory)
    with pytest.raises(
        BudgetExceeded, match=r"Of the 3 round\(s\) to come, 2 would fit, or all with noise_multiplier"
    ) as no:
        owner.answer(a_job(1))
    assert no.value.exit_code == 3
    assert releases(owner) == ()


def test_a_budget_short_by_a_hair_refuses(owner):
    policy_of(epsilon([RELEASE], DELTA) * (1 - 1e-6)).save(owner.directory)
    with pytest.raises(BudgetExceeded):
        owner.answer(a_job())


def test_a_job_without_noise_needs_an_owner_without_budget(owner):
    job = a_job(plan=terms(release=None))
    with pytest.raises(RefusedError, match="no-noise"):
        owner.answer(job)
    policy_of(None).save(owner.directory)
    assert owner.answer(job).release is None
    # It stays on the ledger: a budget set later finds it spent.
    policy_of(100.0).save(owner.directory)
    with pytest.raises(BudgetExceeded, match="epsilon inf"):
        owner.answer(a_job(2))


@pytest.fixture
def deployed(owner) -> Owner:
    """The same folder with a real owner's policy, whose runs need no word of the owner up to a limit."""
    real = policy_of(1000.0).model_dump() | {"simulated": False, "limits": Limits(), "approval": AUTOMATIC}
    Policy(**real).save(owner.directory)
    return replace(owner, simulated=False)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"noise_seed": 7}, "seeded-noise"),
        ({"noise_seed": None, "collect_metrics": True}, "private-figures"),
        ({"noise_seed": None, "plan": terms(release=None)}, "no-noise"),
    ],
)
def test_a_deployed_owner_refuses_what_only_a_simulation_may_ask(deployed, change, rule):
    with pytest.raises(Refusal) as refused:
        deployed.answer(a_job(**change))
    assert refused.value.rule == rule
    assert releases(deployed) == ()


def test_a_deployed_owner_trains_with_secret_noise_and_sends_no_figures(deployed):
    record = deployed.record(a_job(noise_seed=None))
    assert sorted(record) == ["reply", "weights"]


def test_a_run_waits_for_the_owners_word(deployed):
    policy = Policy.load(deployed.directory)
    policy.model_copy(update={"approval": Approval()}).save(deployed.directory)
    job = a_job(noise_seed=None)
    with pytest.raises(Refusal, match="fedaug client approve 'a-test'"):
        deployed.answer(job)
    assert releases(deployed) == ()
    (proposal,) = proposals(deployed.directory)
    assert proposal.epsilon_of_run == pytest.approx(epsilon([RELEASE] * 3, DELTA), abs=1e-3)
    approve(deployed.directory, "a-test", shown_digest=proposal.terms_digest, by="an officer")
    deployed.answer(job)
    with pytest.raises(Refusal, match="not-approved"):  # the same run on other terms
        deployed.answer(a_job(2, noise_seed=None, plan=terms(server_round=2, learning_rate=0.1)))


def test_who_opted_out_is_never_trained_on(deployed, monkeypatch):
    policy = Policy.load(deployed.directory)
    policy.model_copy(update={"opt_out": "opted-out.txt"}).save(deployed.directory)
    with pytest.raises(InputError, match=r"opted-out\.txt"):  # a list that cannot be read stops everything
        deployed.answer(a_job(noise_seed=None))
    (deployed.directory / "opted-out.txt").write_text("user-3\nuser-7\nnobody\n")
    with pytest.raises(InputError, match=r"users\.txt"):
        deployed.answer(a_job(noise_seed=None))
    (deployed.directory / "users.txt").write_text("".join(f"user-{number}\n" for number in range(30)))
    assert releases(deployed) == ()
    seen = []
    train = client.owner.train_generator
    monkeypatch.setattr(client.owner, "train_generator", lambda *a, **k: seen.append(a[1]) or train(*a, **k))
    deployed.answer(a_job(noise_seed=None))
    everyone = Histories.load(deployed.directory / "train.npz")
    expected = everyone.select([user for user in range(30) if user not in (3, 7)])
    assert np.array_equal(seen[0].items, expected.items)


def test_only_the_newest_items_of_a_user_are_used(owner):
    histories = Histories.from_rows([[3, 1, 2], [], [5], [7, 8, 9, 4]], num_items=12)
    histories.save(owner.directory / "train.npz")
    policy = Policy.load(owner.directory).model_copy(update={"max_items_per_user": 2})
    used = training_histories(owner.directory, policy, num_items=12)
    assert [used.row(user).tolist() for user in range(4)] == [[1, 2], [], [5], [9, 4]]


def test_a_runs_releases_include_those_a_backup_brought_back(owner, tmp_path):
    path = owner.directory / "ledger.sqlite"
    earlier = path.read_bytes()
    owner.answer(a_job(1))
    with LifetimeLedger(path) as ledger:
        ledger.backup(tmp_path / "backup.sqlite")
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
        (owner.directory / name).unlink(missing_ok=True)
    path.write_bytes(earlier)
    key = OwnerKey.load(owner.directory / "owner.key")
    LifetimeLedger.restore(path, tmp_path / "backup.sqlite", key=key, data_source="owner-001")
    with LifetimeLedger(path) as ledger:
        assert ledger.releases_of("a-test") == ledger.releases() == (RELEASE,)
        assert ledger.releases_of("another") == ()


def test_every_decision_is_in_the_security_log(owner):
    owner.record(a_job(1))
    with pytest.raises(Refusal):
        owner.record(a_job(2, catalogue_hash="other"))
    lines = list(SecurityLog(owner.directory).lines())
    assert [line["event"] for line in lines] == ["message", "release", "message", "decision"]
    assert lines[1]["shapes"]["to_logits.bias"] == [12]
    assert lines[3]["rule"] == "catalogue"


def test_a_receipt_leaves_with_every_reply_and_verifies(owner):
    reply = owner.answer(a_job(1))
    owner.answer(a_job(2))
    assert verify(owner.directory / "ledger.sqlite", receipt=reply.receipt).ok
    assert owner.answer(a_job(1)).receipt == reply.receipt


def test_secret_noise_differs_each_time(owner):
    first, second = (owner.answer(a_job(noise_seed=None, run_id=run_id)) for run_id in ("a", "b"))
    assert sent_bytes(first) != sent_bytes(second)


def test_figures_leave_only_where_a_simulation_collects_them(owner):
    assert owner.answer(a_job(1)).simulation_only == {}
    asked = owner.answer(a_job(2, collect_metrics=True))
    assert set(asked.simulation_only) == {"loss", "num_users", "zeroed_users"}
    assert "simulation-only" in asked.to_record()


def test_a_catalogue_mismatch_names_both_hashes(owner):
    with pytest.raises(Refusal, match=f"catalogue.*other.*{CATALOGUE}"):
        owner.answer(a_job(catalogue_hash="other"))


def test_histories_over_another_catalogue_cost_nothing(owner):
    Histories.from_rows([[0, 13]], num_items=14).save(owner.directory / "train.npz")
    with pytest.raises(InputError, match="over 14 items, the generator has 12"):
        owner.answer(a_job())
    assert releases(owner) == ()


def test_the_bound_on_users_is_the_owners_not_the_servers(owner):
    for bound in (20, 39, 41, 10_000):  # 30 users: no refusal may depend on it
        plan = terms(max_users=bound, release=replace(RELEASE, max_users=bound))
        with pytest.raises(RefusedError, match="max-users"):
            owner.answer(a_job(plan=plan))
    assert releases(owner) == ()


def test_a_real_owners_policy_is_not_a_simulations(deployed):
    with pytest.raises(Refusal, match="simulation"):
        replace(deployed, simulated=True).answer(a_job())
    assert releases(deployed) == ()


@pytest.mark.parametrize("lost", ["policy.toml", "owner.key", "ledger.sqlite", "train.npz"])
def test_an_owner_without_one_of_its_files_trains_nothing(owner, lost):
    (owner.directory / lost).unlink()
    with pytest.raises(InputError):
        owner.answer(a_job())


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
