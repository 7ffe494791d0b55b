"""No run begins before its owner approved exactly what it asks."""

import math
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.approvals import (
    Proposal,
    approve,
    approves_itself,
    is_approved,
    proposals,
    propose,
    require_approval,
    withdraw,
)
from client.rules import Refusal
from shared.errors import InputError
from tests.client.test_rules import a_policy, a_real_job
from tests.small_federation import RELEASE, SPEC, a_job, terms

NOW = datetime(2026, 11, 22, 9, 30, tzinfo=UTC)


def a_proposal(*, now: datetime = NOW, of_run: float = 2.0, after: float = 3.0, **changes: Any) -> Proposal:
    return Proposal.of(a_real_job(**changes), now=now, delta=1e-3, epsilon_of_run=of_run, epsilon_after=after)


def auto_policy(**changes: Any):
    limits = {"auto_approve": True, "auto_epsilon_per_run": 2.0, "auto_epsilon_total": 5.0}
    return a_policy(**{f"approval__{name}": value for name, value in limits.items()}, **changes)


def approve_it(directory: Path, proposal: Proposal) -> None:
    approve(directory, proposal.run_id, shown_digest=proposal.terms_digest, by="Ada")


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_a_run_waits_for_its_owner_and_then_goes_on(tmp_path):
    proposal, policy = a_proposal(), a_policy()
    with pytest.raises(Refusal, match=r"not-approved.*'a-test' at epsilon 2.*client approve 'a-test'") as told:
        require_approval(tmp_path, proposal, policy)
    assert told.value.rule == "not-approved"
    assert proposals(tmp_path) == (proposal,)
    approve_it(tmp_path, proposal)
    require_approval(tmp_path, proposal, policy)
    # From disk alone: nothing is remembered between calls, so a restart changes nothing.
    assert is_approved(tmp_path, proposal.terms_digest)


def test_every_round_of_a_run_has_the_same_terms():
    digests = {a_proposal(plan=terms(server_round=number)).terms_digest for number in (1, 2, 3)}
    weights = {name: value + 1 for name, value in a_job().weights.items()}
    later = a_proposal(weights=weights, now=NOW + timedelta(days=1), of_run=2.5, after=4.0)
    assert digests == {later.terms_digest}


OTHER_TERMS: dict[str, dict[str, Any]] = {
    "another run": {"run_id": "b-test"},
    "less noise": {"plan": terms(release=replace(RELEASE, noise_multiplier=0.99))},
    "no noise": {"plan": terms(release=None)},
    "more rounds": {"plan": terms(num_rounds=4)},
    "fewer owners": {"plan": terms(num_owners=2)},
    "larger steps": {"plan": terms(learning_rate=0.6)},
    "a pull": {"plan": terms(proximal_mu=0.1)},
    "another clip": {"plan": terms(max_grad_norm=0.9)},
    "another generator": {"spec": replace(SPEC, dropout=0.4)},
    "another catalogue": {"catalogue_hash": "b"},
    "seeded noise": {"noise_seed": 7},
    "another seed": {"noise_seed": 8},
    "figures": {"collect_metrics": True},
}


@pytest.mark.parametrize("name", OTHER_TERMS)
def test_a_round_with_other_terms_needs_a_new_approval(name, tmp_path):
    agreed, other = a_proposal(), a_proposal(**OTHER_TERMS[name])
    propose(tmp_path, agreed)
    approve_it(tmp_path, agreed)
    assert not is_approved(tmp_path, other.terms_digest)
    with pytest.raises(Refusal, match="not-approved"):
        require_approval(tmp_path, other, a_policy())
    assert len({a_proposal(**change).terms_digest for change in OTHER_TERMS.values()}) == len(OTHER_TERMS)


def test_terms_swapped_after_they_were_read_are_not_approved(tmp_path):
    read, swapped = a_proposal(), a_proposal(plan=terms(num_rounds=300), of_run=50.0)
    propose(tmp_path, read)
    propose(tmp_path, swapped)
    with pytest.raises(InputError, match=r"'a-test' has other terms by now.*read it before"):
        approve_it(tmp_path, read)
    assert not is_approved(tmp_path, read.terms_digest)
    assert not is_approved(tmp_path, swapped.terms_digest)


def test_new_terms_end_the_old_approval(tmp_path):
    first, second = a_proposal(), a_proposal(plan=terms(num_rounds=4))
    for proposal in (first, second):
        propose(tmp_path, proposal)
        approve_it(tmp_path, proposal)
    assert not is_approved(tmp_path, first.terms_digest)
    assert is_approved(tmp_path, second.terms_digest)


def test_an_approval_needs_a_proposal_and_a_name(tmp_path):
    with pytest.raises(InputError, match="'a-test' is not proposed"):
        approve_it(tmp_path, a_proposal())
    propose(tmp_path, a_proposal())
    for by in ("", "two\nlines", "x" * 101):
        with pytest.raises(InputError, match="needs the name of who"):
            approve(tmp_path, "a-test", shown_digest=a_proposal().terms_digest, by=by)
    assert not is_approved(tmp_path, a_proposal().terms_digest)


def test_a_withdrawn_run_stops_whatever_its_terms_and_whoever_approved_it(tmp_path):
    proposal = a_proposal()
    propose(tmp_path, proposal)
    approve_it(tmp_path, proposal)
    assert withdraw(tmp_path, "a-test", by="Ada")
    assert not is_approved(tmp_path, proposal.terms_digest)
    assert approves_itself(auto_policy(), proposal)  # would, and still may not:
    for terms_now in (proposal, a_proposal(plan=terms(num_rounds=4))):
        with pytest.raises(Refusal, match=r"not-approved.*withdrew"):
            require_approval(tmp_path, terms_now, auto_policy())
    require_approval(tmp_path, a_proposal(run_id="another"), auto_policy())
    approve_it(tmp_path, proposal)
    require_approval(tmp_path, proposal, a_policy())


def test_a_typing_error_does_not_look_like_a_withdrawal(tmp_path):
    propose(tmp_path, a_proposal())
    assert not withdraw(tmp_path, "a-tset", by="Ada")


def test_an_old_approval_does_not_come_back_with_a_new_one(tmp_path):
    first, second = a_proposal(), a_proposal(plan=terms(num_rounds=4))
    propose(tmp_path, first)
    approve_it(tmp_path, first)
    kept = (tmp_path / "approvals" / f"{first.terms_digest}.json").read_bytes()
    withdraw(tmp_path, "a-test", by="Ada")
    (tmp_path / "approvals" / f"{first.terms_digest}.json").write_bytes(kept)  # as if killed half-way
    assert not is_approved(tmp_path, first.terms_digest)
    propose(tmp_path, second)
    approve_it(tmp_path, second)
    assert not is_approved(tmp_path, first.terms_digest)


def test_a_damaged_or_renamed_approval_approves_nothing(tmp_path):
    proposal, other = a_proposal(), a_proposal(plan=terms(num_rounds=4))
    propose(tmp_path, proposal)
    approve_it(tmp_path, proposal)
    path = tmp_path / "approvals" / f"{proposal.terms_digest}.json"
    (tmp_path / "approvals" / f"{other.terms_digest}.json").write_bytes(path.read_bytes())
    assert not is_approved(tmp_path, other.terms_digest)
    path.write_bytes(path.read_bytes()[:-20])
    assert not is_approved(tmp_path, proposal.terms_digest)


@given(
    run=st.floats(0, 10, allow_nan=False) | st.sampled_from([math.inf, math.nan]),
    after=st.floats(0, 10, allow_nan=False) | st.sampled_from([math.inf, math.nan]),
    switched_on=st.booleans(),
)
def test_a_run_approves_itself_only_within_both_limits(run, after, switched_on):
    policy = auto_policy() if switched_on else a_policy()
    approved = approves_itself(policy, a_proposal(of_run=run, after=after))
    assert approved == (switched_on and 0 <= run <= 2.0 and 0 <= after <= 5.0)


def test_runs_approved_by_themselves_are_listed_and_measured_anew_each_round(tmp_path):
    require_approval(tmp_path, a_proposal(after=5.0), auto_policy())
    assert [proposal.run_id for proposal in proposals(tmp_path)] == ["a-test"]
    with pytest.raises(Refusal):
        require_approval(tmp_path, a_proposal(plan=terms(server_round=2), after=5.1), auto_policy())


def test_a_simulation_approves_itself_and_writes_nothing(tmp_path):
    require_approval(tmp_path, a_proposal(of_run=math.inf, after=math.inf), a_policy(simulated=True))
    assert files(tmp_path) == []


def test_the_same_terms_keep_their_first_day_and_take_new_figures(tmp_path):
    propose(tmp_path, a_proposal())
    propose(tmp_path, a_proposal(now=NOW + timedelta(days=2), after=4.0))
    assert proposals(tmp_path) == (a_proposal(after=4.0),)


@pytest.mark.parametrize(
    "proposal",
    [
        a_proposal(),
        a_proposal(of_run=math.inf, after=math.inf, plan=terms(release=None)),
        a_proposal(plan=terms(release=replace(RELEASE, max_batch=20)), noise_seed=3),
    ],
)
def test_a_proposal_survives_the_disk(proposal, tmp_path):
    propose(tmp_path, proposal)
    (stored,) = proposals(tmp_path)
    assert stored == proposal
    assert stored.terms_digest == proposal.terms_digest


@pytest.mark.parametrize("run_id", ["../../../etc/passwd", "/etc/cron.d/x", "a\x00b", "." * 300, ""])
def test_a_run_cannot_choose_where_it_is_stored(run_id, tmp_path):
    owner = tmp_path / "owner"
    propose(owner, a_proposal(run_id=run_id))
    approve(owner, run_id, shown_digest=a_proposal(run_id=run_id).terms_digest, by="Ada")
    withdraw(owner, run_id, by="Ada")
    assert {path.parent.parent for path in files(tmp_path)} == {owner}
    assert all(len(path.name) < 80 and path.name.endswith(".json") for path in files(tmp_path))


def test_proposals_cannot_fill_the_disk_and_push_out_no_approval(tmp_path):
    agreed = a_proposal(run_id="agreed")
    propose(tmp_path, agreed)
    approve_it(tmp_path, agreed)
    for number in range(130):
        propose(tmp_path, a_proposal(run_id=f"flood-{number:03d}", now=NOW + timedelta(seconds=number)))
        newest = max((tmp_path / "proposals").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, ns=(number, number))  # disks with coarse clocks would tie
    assert len(list((tmp_path / "proposals").iterdir())) == 100
    assert is_approved(tmp_path, agreed.terms_digest)
    listed = [proposal.run_id for proposal in proposals(tmp_path)]
    assert set(listed) >= {"agreed", "flood-129"}
    with pytest.raises(InputError, match=r"takes .* bytes, above 16,384"):
        propose(tmp_path, a_proposal(run_id="r" * 20_000))
    assert sum(path.stat().st_size for path in files(tmp_path)) < 101 * 16_384


def test_the_words_say_what_leaves_and_what_it_costs():
    # By hand: encoder 78, two heads 42, decoder 24, outputs 84, prior 14 numbers.
    assert a_proposal().in_words() == (
        "Run 'a-test', planned with 3 owners: 3 rounds of 2 training step(s) each.\n"
        "In a step every user takes part with a chance of 0.3. What one user can add is bounded, and noise of 1 times"
        " that bound covers it.\n"
        "After every round of training the weights of a vae generator over 12 items (242 numbers, 0.0 MiB) leave this"
        " machine.\n"
        "No exact count, no loss and no row leaves.\n"
        "Price: epsilon 2 for this run alone, 3 for life once it is over, at delta 0.001."
    )
    assert "NOT private" in a_proposal(noise_seed=7).in_words()
    assert "nothing about your users is protected" in a_proposal(plan=terms(release=None)).in_words()
    assert "user counts leave" in a_proposal(collect_metrics=True).in_words()
    assert "\x1b" not in a_proposal(run_id="\x1b[2J").in_words()


def test_limits_that_are_not_stated_approve_nothing():
    with pytest.raises(ValueError, match="approves nothing without a limit"):
        a_policy(approval__auto_approve=True)
