import re
from html.parser import HTMLParser

import numpy as np
import pytest

from simulations.outcomes import OwnerOutcome, SeedOutcome
from simulations.report import render_report
from simulations.study import collect

SEEDED = {
    "noise": "seeded, not private",
    "regime": {"sentence": "Expect <little>."},
    "catalogue": "assumed public",
    "rounds": [{"server_round": r, "simulation_only": {"loss": 10.0 / r}} for r in (1, 2, 3)],
}


def study(*, gain=0.05, weight=0.3, epsilon=8.0, arms=("local", "federated", "federated_no_dp", "central"), seeds=2):
    outcomes = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        owners = []
        for name in ("shop & co", "owner-02"):
            local = rng.uniform(0.2, 0.6, size=30)
            shifts = {"local": 0.0, "federated": gain, "federated_no_dp": 2 * gain, "central": 0.1}
            per_user = {arm: local + shifts[arm] for arm in arms}
            schedule, coverage = {"federated": "constant"}, dict.fromkeys(arms, 0.4)
            owners.append(OwnerOutcome(name, 150, 7.9, {"federated": weight}, schedule, per_user, coverage))
        outcomes.append(SeedOutcome(seed, tuple(owners), 10.0))
    return collect(outcomes, metric="ndcg@20", epsilon=epsilon, delta=1e-4, num_resamples=200, peak_rss_mib=500.0)


class Tags(HTMLParser):
    """Which tags are open, so that a page with a missing end is caught."""

    VOID = frozenset({"meta", "br", "path", "use", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags.seen


def test_the_page_is_well_formed_and_loads_nothing():
    page = render_report(study(), SEEDED)
    tags = parse(page)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert "url(http" not in page
    assert "@import" not in page


def test_every_drawing_speaks_to_people_who_cannot_see_it():
    page = render_report(study(), SEEDED)
    drawings = [attributes for tag, attributes in parse(page) if tag == "svg"]
    assert len(drawings) == 3
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert re.search(r"\d", attributes["aria-label"])


def test_drawings_share_no_ids_and_no_fixed_ink():
    page = render_report(study(), SEEDED)
    ids = [attributes["id"] for _, attributes in parse(page) if "id" in attributes]
    assert ids
    assert len(ids) == len(set(ids))
    assert "#010203" not in page
    assert "#000000" not in page


def test_the_header_says_what_happened_and_what_it_cost():
    page = render_report(study(), SEEDED)
    assert "Augmentation helped" in page
    assert "ε = 8" in page
    assert "no owner spent more than ε = 7.90" in page
    assert "Expect &lt;little&gt;." in page
    assert "shop &amp; co" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gain": -0.05}, "Augmentation hurt"),
        ({"gain": 0.0, "weight": 0.0}, "Every owner declined the synthetic users"),
    ],
)
def test_bad_news_is_told_as_plainly(changes, said):
    assert said in render_report(study(**changes), SEEDED)


def test_what_is_not_private_is_marked():
    seeded = render_report(study(), SEEDED)
    assert "Noise: seeded, not private" in seeded
    assert "Catalogue: assumed public" in seeded
    assert "(simulation only)" in seeded
    without = render_report(study(epsilon=float("inf")), {**SEEDED, "noise": "none, not private"})
    assert "trained without privacy" in without
    assert "Noise: none, not private" in without


def test_a_run_with_nothing_to_mark_marks_nothing():
    page = render_report(study(), {})
    assert 'class="warning"' not in page
    assert "Training of the generator" not in page


@pytest.mark.parametrize("arms", [("local",), ("local", "federated"), ("local", "central"), ("federated",)])
def test_any_set_of_arms_can_be_shown(arms):
    parse(render_report(study(arms=arms, seeds=1), SEEDED))
