"""The round loop hears only its owners, waits only so long, and averages by public numbers."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from server.checkpoints import load_checkpoint, read_state
from server.lock import run_lock
from server.plan import FederationPlan
from server.rounds import latest_checkpoint, run_rounds
from shared.errors import FedAugError, InputError
from shared.generators.family import initial_weights
from shared.privacy.chain import Receipt, head_message
from shared.wire.messages import WIRE_VERSION, CatalogueMismatch, Hello, TrainJob, TrainReply
from simulations.engines.inprocess import InProcessGrid
from tests.small_federation import CATALOGUE, RELEASE, SPEC, plan_for, policy_of, prepare, terms

OWNERS = ("a", "b", "c")
Change = Callable[[str, RecordDict], RecordDict]


def receipt_of(owner: str, number: int) -> Receipt:
    key = Ed25519PrivateKey.generate()
    head_hash = f"{number:064x}"
    return Receipt(
        data_source=owner,
        number=number,
        head_hash=head_hash,
        signature=key.sign(head_message(owner, number, head_hash)).hex(),
        public_key=key.public_key().public_bytes_raw().hex(),
    )


def unchanged(owner: str, record: RecordDict) -> RecordDict:
    return record


def federation(
    tmp_path,
    *,
    hello: Change = unchanged,
    reply: Change = unchanged,
    nodes=3,
    **changes,
) -> tuple[InProcessGrid, FederationPlan]:
    """Owners that add 1, 2 and 3 to every weight instead of training."""
    app = ClientApp()

    def name_of(context: Context) -> str:
        return OWNERS[int(context.node_config["partition-id"])]

    @app.query("hello")
    def say_hello(message: Message, context: Context) -> Message:
        owner = name_of(context)
        said = Hello(owner=owner, catalogue_hash=CATALOGUE, versions={"wire": WIRE_VERSION}, capabilities=("vae",))
        return Message(hello(owner, said.to_record()), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        owner, job = name_of(context), TrainJob.from_record(message.content)
        moved = {name: value + np.float32(OWNERS.index(owner) + 1) for name, value in job.weights.items()}
        made = TrainReply(
            owner=owner,
            server_round=job.plan.server_round,
            weights=moved,
            release=job.plan.release,
            receipt=receipt_of(owner, job.plan.server_round),
            simulation_only={},
        )
        return Message(reply(owner, made.to_record()), reply_to=message)

    values = {"collect_metrics": False, "strategy": "fedavg", "terms": terms(num_rounds=1), "deadline_seconds": 0.5}
    plan = plan_for(OWNERS, **{**values, **changes})
    plan.save(tmp_path)
    return InProcessGrid(app, num_owners=nodes, run_dir=tmp_path), plan


def moved_by(tmp_path) -> float:
    start, (_, end) = initial_weights(SPEC, 7), latest_checkpoint(tmp_path)
    return float(np.mean([np.mean(end[name] - start[name]) for name in start]))


def test_owners_count_alike_unless_public_weights_say_otherwise(tmp_path):
    grid, _ = federation(tmp_path)
    run_rounds(grid, tmp_path)
    assert moved_by(tmp_path) == pytest.approx(2.0, abs=1e-6)  # (1 + 2 + 3) / 3


def test_public_weights_decide(tmp_path):
    grid, _ = federation(tmp_path, weights={"a": 8.0})
    run_rounds(grid, tmp_path)
    assert moved_by(tmp_path) == pytest.approx((8 * 1 + 2 + 3) / 10, abs=1e-6)


def test_what_is_delivered_may_be_an_average_that_training_does_not_see(tmp_path):
    # Owners move every weight by 2 a round. By hand, keeping 1/10, 2/11 and min(0.2, 3/12) of the average before:
    average = 0.0
    for kept, weight in ((1 / 10, 2.0), (2 / 11, 4.0), (0.2, 6.0)):
        average = kept * average + (1 - kept) * weight
    grid, plan = federation(tmp_path, average_decay=0.2, terms=terms(num_rounds=3))
    run_rounds(grid, tmp_path)
    assert moved_by(tmp_path) == pytest.approx(average, abs=1e-5)
    last = load_checkpoint(tmp_path, plan_digest=plan.digest)
    start = initial_weights(SPEC, 7)
    assert all(np.allclose(last.weights[name] - start[name], 6.0, atol=1e-5) for name in start)


def test_an_average_that_never_forgets_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"average_decay must lie in \[0, 1\)"):
        federation(tmp_path, average_decay=1.0)


class FirstToLast(InProcessGrid):
    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


class LastToFirst(FirstToLast):
    def send_and_receive(self, messages, *, timeout=None):
        return super().send_and_receive(messages, timeout=timeout)[::-1]


def test_the_order_of_arrival_changes_no_bit(tmp_path):
    def uneven(owner, record):  # sums of these round differently in another order
        arrays = record["weights"].items()
        factor = np.float32(1.0 + 0.37 * OWNERS.index(owner))
        record["weights"] = ArrayRecord({name: Array(array.numpy() * factor) for name, array in arrays})
        return record

    results = []
    for folder, kind in ((tmp_path / "one", FirstToLast), (tmp_path / "two", LastToFirst)):
        grid, _ = federation(folder, reply=uneven)
        grid.__class__ = kind
        run_rounds(grid, folder)
        results.append(latest_checkpoint(folder)[1])
    assert all(results[0][name].tobytes() == results[1][name].tobytes() for name in results[0])


def with_reply(**changes):
    def change(owner, record):
        if owner == "b":
            for name, value in changes.items():
                record["reply"][name.replace("_", "-")] = value
        return record

    return change


def with_weights(change):
    def changed(owner, record):
        if owner == "b":
            arrays = {name: array.numpy() for name, array in record["weights"].items()}
            record["weights"] = ArrayRecord({name: Array(value) for name, value in change(arrays).items()})
        return record

    return changed


def with_record(name, value):
    def change(owner, record):
        if owner == "b":
            record[name] = value
        return record

    return change


def with_first(change):
    def changed(arrays):
        name = next(iter(arrays))
        return {**arrays, name: change(arrays[name])}

    return with_weights(changed)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (with_reply(owner="a"), "reply of b is signed 'a'"),
        (with_reply(server_round=2), "reply of b answers round 2"),
        (with_reply(num_users=3), "unknown or mistyped"),
        (with_reply(release="null"), "charged None, the plan asked for"),
        (
            with_first(lambda v: v[:-1]),
            r"float32 \(11, 6\), expected float32 \(12, 6\)",
        ),
        (with_first(lambda v: v.astype(np.float64)), "is float64"),
        (
            with_first(lambda v: v * np.float32("nan")),
            "not finite; nothing was averaged",
        ),
        (with_weights(lambda arrays: {"surprise": np.zeros(1, np.float32), **arrays}), "has the arrays"),
        (with_weights(lambda arrays: dict(list(arrays.items())[1:])), "has the arrays"),
        (with_record("metrics", MetricRecord({"num-examples": 9})), "expected the records"),
        (with_record("more", ConfigRecord({"loss": 0.5})), "expected the records"),
    ],
)
def test_a_reply_that_was_not_asked_for_stops_the_round(tmp_path, reply, words):
    grid, plan = federation(tmp_path, reply=reply)
    with pytest.raises(InputError, match=words):
        run_rounds(grid, tmp_path)
    assert load_checkpoint(tmp_path, plan_digest=plan.digest).server_round == 0


def with_hello(**changes):
    def change(owner, record):
        if owner == "b":
            for name, value in changes.items():
                record["hello"][name.replace("_", "-")] = value
        return record

    return change


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (with_hello(owner="stranger"), "'stranger' said hello but is not among the plan's 3 owners"),
        (with_hello(owner="a"), "two nodes say they are 'a'"),
        (with_hello(versions='{"wire": "0"}'), "b speaks message version '0', the server '3'"),
        (with_hello(capabilities=["gan"]), "cannot train a 'vae'"),
        (with_hello(catalogue_hash="other"), f"b holds catalogue other, the server plans with {CATALOGUE}"),
    ],
)
def test_a_hello_that_does_not_fit_stops_the_run(tmp_path, hello, words):
    grid, _ = federation(tmp_path, hello=hello)
    with pytest.raises(InputError, match=words):
        run_rounds(grid, tmp_path)


def test_a_catalogue_mismatch_has_its_own_kind(tmp_path):
    prepare(tmp_path)
    folder = tmp_path / "owners" / "owner-002"
    policy_of(9.0, catalogue_hash="another").save(folder)
    from client.app import app

    with pytest.raises(CatalogueMismatch, match=f"another, the server plans with {CATALOGUE}"):
        run_rounds(InProcessGrid(app, num_owners=3, run_dir=tmp_path), tmp_path)


def broken(owner, record):
    if owner == "b":
        raise RuntimeError("the node went away")
    return record


def test_a_missing_owner_is_named_where_the_others_suffice(tmp_path):
    grid, _ = federation(tmp_path, reply=broken, min_owners=2)
    run_rounds(grid, tmp_path)
    assert read_state(tmp_path)["rounds"][0]["missing"] == ["b"]
    assert moved_by(tmp_path) == pytest.approx((1 + 3) / 2, abs=1e-6)


def test_an_owner_that_never_said_hello_is_not_asked_to_train(tmp_path):
    grid, _ = federation(tmp_path, hello=broken, min_owners=2)
    run_rounds(grid, tmp_path)
    assert read_state(tmp_path)["rounds"][0]["missing"] == ["b"]


def test_too_few_replies_stop_the_run_with_advice(tmp_path):
    grid, _ = federation(tmp_path, reply=broken, min_owners=3)
    with pytest.raises(FedAugError, match=r"2 of 3 owners answered round 1 within deadline_seconds=0\.5.*min_owners=3"):
        run_rounds(grid, tmp_path)


def test_waiting_for_owners_ends_at_the_deadline(tmp_path):
    grid, _ = federation(tmp_path, nodes=2)
    started = time.monotonic()
    with pytest.raises(FedAugError, match=r"2 of 3 owners connected.*Start the missing owners"):
        run_rounds(grid, tmp_path)
    assert 0.4 < time.monotonic() - started < 5


def test_a_resumed_finished_run_asks_nobody(tmp_path):
    grid, _ = federation(tmp_path)
    run_rounds(grid, tmp_path)
    before = latest_checkpoint(tmp_path)[1]
    nobody, _ = federation(tmp_path, nodes=0)
    run_rounds(nobody, tmp_path)
    assert all(before[name].tobytes() == value.tobytes() for name, value in latest_checkpoint(tmp_path)[1].items())


def test_a_run_folder_has_one_server(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(InputError, match=r"in use by another server \(\{\"pid\": \d+"),
        run_lock(tmp_path, wait_seconds=0.1),
    ):
        pass
    with run_lock(tmp_path, wait_seconds=0.1):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": "krum"}, "choose one of fedavg, fedavgm, fedadam, fedprox"),
        ({"terms": terms(proximal_mu=0.1)}, "no effect with fedadam"),
        ({"min_owners": 4}, "3 different owners for min_owners=4"),
        ({"owners": ("a", "a", "b")}, "2 different owners"),
        ({"weights": {"a": 0.0}}, "weights must be finite"),
        ({"weights": {"z": 1.0}}, "weights must be finite"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        replace(plan_for(OWNERS), **change)


def test_a_plan_survives_its_file_and_its_digest_covers_the_result(tmp_path):
    plan = plan_for(OWNERS)
    plan.save(tmp_path)
    assert FederationPlan.load(tmp_path) == plan
    assert replace(plan, deadline_seconds=1.0).digest == plan.digest
    assert replace(plan, server_learning_rate=0.06).digest != plan.digest
    assert replace(plan, terms=terms(release=replace(RELEASE, noise_multiplier=2.0))).digest != plan.digest
