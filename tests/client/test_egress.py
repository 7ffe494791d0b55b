"""Only what was declared leaves, in arrays and in words."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.egress import EgressError, check_egress, public_words
from client.rules import OverBudget, Refusal
from shared.errors import BudgetExceeded, FedAugError, InputError, LeakError, RefusedError
from shared.generators.family import initial_weights
from shared.wire.messages import CatalogueMismatch, OwnerFailed, TrainReply, raise_refusal, refusal_record
from tests.small_federation import RELEASE, SPEC, a_job, terms

SECRET = 4711.25  # stands for a value that no message may quote


def a_reply(**changes: Any) -> TrainReply:
    values: dict[str, Any] = {
        "owner": "shop",
        "server_round": 1,
        "weights": initial_weights(SPEC, 8),
        "release": RELEASE,
        "receipt": None,
        "simulation_only": {},
    }
    return TrainReply(**{**values, **changes})


def with_array(name: str, values: np.ndarray) -> TrainReply:
    return a_reply(weights={**initial_weights(SPEC, 8), name: values})


def check(reply: TrainReply, *, simulated: bool = False, **job: Any) -> RecordDict:
    return check_egress(reply, a_job(**{"noise_seed": None, **job}), owner="shop", simulated=simulated)


def test_a_declared_reply_leaves_as_it_is():
    record = check(a_reply())
    assert sorted(record) == ["reply", "weights"]
    assert record == a_reply().to_record()
    assert TrainReply.from_record(record, metrics_expected=False).release == RELEASE


def test_a_reply_without_privacy_leaves_a_simulation():
    check(a_reply(release=None), simulated=True, plan=terms(release=None))


def test_private_figures_leave_only_a_simulation_that_was_asked():
    figures = {"loss": float("nan"), "num_users": 30.0, "zeroed_users": 0.0}
    record = check(a_reply(simulation_only=figures), simulated=True, collect_metrics=True)
    assert "simulation-only" in record
    for simulated, asked in ((False, True), (True, False), (False, False)):
        with pytest.raises(EgressError, match=r"3 private figure\(s\)"):
            check(a_reply(simulation_only=figures), simulated=simulated, collect_metrics=asked)
    with pytest.raises(EgressError, match=r"1 undeclared figure\(s\)") as told:
        check(a_reply(simulation_only={"user 4711": 1.0}), simulated=True, collect_metrics=True)
    assert "4711" not in str(told.value)


class Tagged(np.ndarray):
    """An array that carries something else along."""


FULL = np.full(6, SECRET, dtype=np.float32)
WEIGHTS = initial_weights(SPEC, 8)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (a_reply(owner="another"), "another owner's name"),
        (a_reply(server_round=2), "another round"),
        (a_reply(release=None), "another release"),
        (a_reply(release=replace(RELEASE, noise_multiplier=2.0)), "another release"),
        (a_reply(release=replace(RELEASE, max_batch=20)), "another release"),
        (with_array("encoder.bias", FULL.astype(np.float64)), "encoder.bias not as a plain array of float32"),
        (with_array("encoder.bias", FULL.astype(np.float16)), "encoder.bias not as a plain array of float32"),
        (with_array("encoder.bias", FULL.astype(">f4")), "encoder.bias not as a plain array of float32"),
        (with_array("encoder.bias", FULL.view(Tagged)), "encoder.bias not as a plain array of float32"),
        (with_array("encoder.bias", np.ma.masked_array(FULL)), "encoder.bias not as a plain array of float32"),
        (with_array("encoder.bias", FULL[:5]), r"encoder.bias in another shape than \(6,\)"),
        (with_array("encoder.bias", FULL[None]), r"encoder.bias in another shape than \(6,\)"),
        (with_array("encoder.bias", np.array(SECRET, dtype=np.float32)), "encoder.bias in another shape"),
        (with_array("encoder.bias", np.append(FULL[:5], np.float32(np.nan))), "encoder.bias that is not finite"),
        (with_array("encoder.bias", np.append(FULL[:5], np.float32(np.inf))), "encoder.bias that is not finite"),
        (with_array("user 4711", FULL), r"1 undeclared array\(s\) and lacks 0"),
        (a_reply(weights={}), r"0 undeclared array\(s\) and lacks 13"),
        (a_reply(weights=dict(reversed(WEIGHTS.items()))), "another order"),
    ],
)
def test_anything_else_stays_at_home_and_is_not_quoted(reply, words):
    with pytest.raises(EgressError, match=words) as told:
        check(reply)
    assert "4711" not in str(told.value)
    assert told.value.exit_code == 1
    assert "Nothing left this owner" in str(told.value)


def extra_record(record: RecordDict) -> None:
    record["user 4711"] = MetricRecord({"n": 4711})


def extra_field(record: RecordDict) -> None:
    record.config_records["reply"]["note"] = "user 4711"


def missing_field(record: RecordDict) -> None:
    del record.config_records["reply"]["owner"]


def other_field(record: RecordDict) -> None:
    record.config_records["reply"]["server-round"] = 4711


def other_release(record: RecordDict) -> None:
    record.config_records["reply"]["release"] = "null"


def figures_unasked(record: RecordDict) -> None:
    record["simulation-only"] = MetricRecord({"num_users": 4711})


def config_in_place_of_weights(record: RecordDict) -> None:
    del record["weights"]
    record["notes"] = ConfigRecord({"weights": "4711"})


def another_array(record: RecordDict) -> None:
    record.array_records["weights"]["user 4711"] = Array(FULL)


def other_numbers(record: RecordDict) -> None:
    record.array_records["weights"]["encoder.bias"] = Array(FULL)


def bytes_behind_the_numbers(record: RecordDict) -> None:
    record.array_records["weights"]["encoder.bias"].data += b"user 4711"


def another_type_declared(record: RecordDict) -> None:
    record.array_records["weights"]["encoder.bias"].stype = "user 4711"


def arrays_sorted(record: RecordDict) -> None:
    arrays = record.array_records["weights"]
    record["weights"] = ArrayRecord({name: arrays[name] for name in sorted(arrays)})


@pytest.mark.parametrize(
    "change",
    [
        extra_record,
        extra_field,
        missing_field,
        other_field,
        other_release,
        figures_unasked,
        config_in_place_of_weights,
        another_array,
        other_numbers,
        bytes_behind_the_numbers,
        another_type_declared,
        arrays_sorted,
    ],
)
def test_what_a_message_would_add_on_its_way_stays_at_home(change, monkeypatch):
    made = TrainReply.to_record

    def leaky(reply: TrainReply) -> RecordDict:
        record = made(reply)
        change(record)
        return record

    monkeypatch.setattr(TrainReply, "to_record", leaky)
    with pytest.raises(EgressError, match="the reply") as told:
        check(a_reply())
    assert "4711" not in str(told.value)


REFUSAL = Refusal("noise-floor", asked="noise_multiplier 0.01", allowed="at least 0.3", advice="More noise, please.")
BUDGET = OverBudget("epsilon-for-life", asked="epsilon 9", allowed="at most 8", advice="Stop.")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (REFUSAL, RefusedError, "refused by the owner's policy: rule 'noise-floor'. Its own log says more."),
        (BUDGET, RefusedError, "refused by the owner's policy: rule 'epsilon-for-life'. Its own log says more."),
        (BudgetExceeded("4711"), RefusedError, "refused by the owner (code 'refused'). Its own log says more."),
        (InputError("4711"), InputError, "an owner cannot answer as it is set up (code 'input')."),
        (CatalogueMismatch("4711", server_hash="a", owner_hash="b"), InputError, "(code 'input')"),
        (EgressError("4711"), OwnerFailed, "an owner's program failed (code 'failed')"),
        (LeakError("4711"), OwnerFailed, "an owner's program failed (code 'failed')"),
        (FedAugError("4711"), OwnerFailed, "an owner's program failed (code 'failed')"),
        (KeyError("user 4711"), OwnerFailed, "an owner's program failed (code 'failed')"),
        (MemoryError(4711), OwnerFailed, "an owner's program failed (code 'failed')"),
    ],
)
def test_a_deployed_owner_tells_a_rule_or_a_code(error, kind, words):
    told = public_words(error, simulated=False)
    assert type(told) is kind
    assert words in str(told)
    assert not any(secret in str(told) for secret in ("4711", "0.01", "0.3", "epsilon 9"))
    assert told.__cause__ is None
    with pytest.raises(kind, match="owner"):
        raise_refusal(refusal_record(told))


def test_a_simulated_owner_tells_our_own_errors_and_nobody_elses():
    for error in (REFUSAL, InputError("items 4711"), EgressError("does")):
        assert public_words(error, simulated=True) is error
    told = public_words(KeyError("user 4711"), simulated=True)
    assert type(told) is OwnerFailed
    assert "4711" not in str(told)
