"""What an owner answers does not depend on which kind of generator is trained, nor on single users."""

from dataclasses import replace

import numpy as np
import pytest

from client.owner import Owner
from client.policy import Limits, Policy
from client.rules import Refusal
from client.store.lifetime import LifetimeLedger
from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.family import initial_weights, travelling_shapes
from shared.wire.messages import TrainJob
from tests.contracts.generators import SPECS
from tests.small_federation import NUM_ITEMS, a_job, prepare


@pytest.fixture
def owner(tmp_path) -> Owner:
    prepare(tmp_path)
    return Owner(name="owner-001", directory=tmp_path / "owners" / "owner-001", simulated=True)


def job_of(kind: str, **changes) -> TrainJob:
    spec = replace(SPECS[kind], num_items=NUM_ITEMS, **changes)
    first = initial_weights(spec, 1)
    return a_job(spec=spec, weights={name: first[name] for name in travelling_shapes(spec)})


def charges(owner: Owner) -> int:
    with LifetimeLedger(owner.directory / "ledger.sqlite") as ledger:
        return len(ledger.releases())


def with_policy(owner: Owner, **changes) -> None:
    Policy.load(owner.directory).model_copy(update=changes).save(owner.directory)


@pytest.mark.parametrize("kind", ["gan", "gan with discriminators at home", "sequence", "vae with a flow prior"])
def test_every_kind_that_trains_is_answered_with_what_travels(owner, kind):
    job = job_of(kind)
    reply = owner.answer(job)
    assert list(reply.weights) == list(job.weights)
    assert charges(owner) == 1


def test_whether_an_owner_answers_does_not_tell_of_an_event(tmp_path):
    # Neighbours: one event of one user is of a behaviour that the policy does not name.
    answers = []
    for code in (1, 2):
        prepare(tmp_path / str(code))
        folder = tmp_path / str(code) / "owners" / "owner-001"
        codes = [[0, 1], [1, code]]
        Histories.from_rows([[1, 2], [3, 4]], NUM_ITEMS, behaviours=codes).save(folder / "train.npz")
        one = Owner(name="owner-001", directory=folder, simulated=True)
        with_policy(one, behaviours=("view", "buy"))
        answers.append(one.answer(job_of("sequence", num_behaviours=2)).server_round)
    assert answers == [1, 1]


def test_behaviours_are_the_policys_to_name(owner):
    for named, asked in (((), 3), (("view", "buy"), 3), (("view", "buy"), 1)):
        with_policy(owner, behaviours=named)
        with pytest.raises(Refusal, match="behaviours"):
            owner.answer(job_of("sequence", num_behaviours=asked))
    assert charges(owner) == 0


def test_what_cannot_be_trained_is_refused_before_it_is_charged(owner):
    with pytest.raises(Refusal, match="read off"):
        owner.answer(job_of("spectral"))
    job = job_of("gan with discriminators at home")
    owner.answer(job)
    (kept,) = (owner.directory / "home-weights").rglob("*.safetensors")
    kept.write_bytes(b"torn")
    with pytest.raises(InputError, match="Restore"):
        owner.answer(replace(job, plan=replace(job.plan, server_round=2)))
    assert charges(owner) == 1


def test_weights_that_stay_home_and_fakes_count_as_size(owner):
    local = job_of("gan with discriminators at home")
    travelling = sum(int(np.prod(shape)) for shape in travelling_shapes(local.spec).values())
    with_policy(owner, limits=Limits(max_weights=travelling + 10, min_owners=1, min_noise_multiplier=0.1))
    with pytest.raises(Refusal) as told:
        owner.answer(local)
    assert told.value.rule == "size"
