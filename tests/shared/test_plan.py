"""The terms of a round: which one it is, what it releases, what is still to come."""

import json
from dataclasses import replace

import pytest

from shared.errors import InputError
from shared.privacy.releases import GaussianRelease
from shared.sketch.terms import SketchTerms
from shared.wire.plan import RoundPlan
from tests.small_federation import RELEASE, terms


def a_sketch(statistic: str = "both", *, max_users: int = 40, private: bool = True) -> SketchTerms:
    release = GaussianRelease(statistic=statistic, noise_multiplier=2.0, max_users=max_users) if private else None
    return SketchTerms(statistic=statistic, head_items=12, length_edges=(1, 5), release=release)


OTHER = GaussianRelease(statistic="ages", noise_multiplier=1.0, max_users=40)
SKETCHES = (a_sketch("popularity"), a_sketch("cooccurrence"))


def sketched(**changes) -> RoundPlan:
    return terms(**{"num_rounds": 5, "sketches": SKETCHES, **changes})


def test_without_sketches_every_round_trains():
    plan = terms(server_round=2)
    assert (plan.sketch, plan.round_release, plan.num_training_rounds) == (None, RELEASE, 3)
    assert plan.rest_of_run == (replace(RELEASE, num_steps=4),)
    assert plan.whole_run == (replace(RELEASE, num_steps=6),)
    assert terms(release=None).whole_run == (None,)


def test_sketches_come_first_and_count_until_they_are_over():
    plans = [sketched(server_round=number) for number in range(1, 6)]
    assert [plan.sketch for plan in plans] == [*SKETCHES, None, None, None]
    of_sketches = [sketch.release for sketch in SKETCHES]
    assert [plan.round_release for plan in plans] == [*of_sketches, RELEASE, RELEASE, RELEASE]
    training = replace(RELEASE, num_steps=6)
    assert plans[0].rest_of_run == plans[4].whole_run == (*of_sketches, training)
    assert plans[1].rest_of_run == (of_sketches[1], training)
    assert plans[3].rest_of_run == (replace(RELEASE, num_steps=4),)


def test_training_is_half_done_after_half_its_rounds_whatever_came_before():
    assert [sketched(server_round=3).share_done(step) for step in (0, 1)] == [0.0, pytest.approx(1 / 6)]
    assert sketched(server_round=4).share_done(1) == pytest.approx(0.5)


def test_a_run_may_be_sketches_alone():
    plan = sketched(num_rounds=2, release=None)
    assert plan.is_private
    assert plan.whole_run == tuple(sketch.release for sketch in SKETCHES)
    with pytest.raises(InputError, match="no round that trains"):
        sketched(num_rounds=2)


def test_no_run_is_private_in_some_rounds_only():
    with pytest.raises(InputError, match="in all its rounds or in none"):
        sketched(release=None)
    with pytest.raises(InputError, match="in all its rounds or in none"):
        sketched(sketches=(a_sketch(private=False),))
    assert not sketched(sketches=(a_sketch(private=False),), release=None).is_private


def test_terms_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="2 sketches in only 1 round"):
        sketched(num_rounds=1)
    with pytest.raises(InputError, match="another max_users than 40"):
        sketched(sketches=(a_sketch(max_users=41),))


def test_plans_are_read_as_they_were_written():
    plan = sketched(server_round=2)
    assert RoundPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(InputError, match="sketches must be a list"):
        RoundPlan.from_dict({**plan.to_dict(), "sketches": "all"})


@pytest.mark.parametrize(
    ("spoilt", "advice"),
    [
        ({"statistic": "ages"}, "unknown statistic 'ages'"),
        ({"head_items": 0}, "head_items must lie between 1"),
        ({"head_items": True}, "must be whole numbers"),
        ({"length_edges": (2, 5)}, "rising numbers, from 1 on"),
        ({"length_edges": (1, 5, 5)}, "rising numbers"),
        ({"release": OTHER.to_dict()}, "the release prices 'ages'"),
        ({"more": 1}, "missing or unknown field"),
    ],
)
def test_terms_of_a_sketch_are_checked(spoilt, advice):
    values = {**a_sketch().to_dict(), **spoilt}
    with pytest.raises(InputError, match=advice):
        SketchTerms.from_dict(values)
