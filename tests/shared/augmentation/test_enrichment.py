"""What is made with private users stays internal, and what is exportable does not depend on them."""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.augmentation.enrichment import densified, new_users, of_mass, transformed
from shared.augmentation.filters import coherent, novel, unlike
from shared.augmentation.neighbours import neighbour_table
from shared.augmentation.operators import Operators
from shared.augmentation.tracing import Traced, derive, private, public, released
from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.card import Generator, GeneratorCard
from shared.privacy.noise import NO_NOISE, SEEDED_NOISE
from tests.shared.generators.test_card import ITEMS, card
from tests.shared.generators.test_multvae import SPEC, model

ROOT = Path(__file__).parents[3]
NUM_ITEMS = SPEC.num_items


def a_generator(one: GeneratorCard | None = None) -> Generator:
    return Generator(model(), card() if one is None else one, "0123456789abcdef", ITEMS)


def drawn(seed: int, *, num_users: int = 30, generator: Generator | None = None) -> Traced[Histories]:
    return new_users(generator or a_generator(), num_users=num_users, items_per_user=5, seed=seed)


def real_users(seed: int) -> Histories:
    rng = np.random.default_rng(seed)
    return Histories.from_rows(
        [rng.choice(NUM_ITEMS, size=rng.integers(1, 9), replace=False) for _ in range(25)], NUM_ITEMS
    )


# --- classes -------------------------------------------------------------------------------------------------

Users = Traced[Histories]
Step = Callable[[Users, Users], Users]

STEPS: dict[str, Step] = {
    "mask": lambda one, _: transformed(one, Operators.parse(["mask:0.3"]), seed=1),
    "insert": lambda one, other: transformed(
        one,
        Operators.parse(["insert:0.5"]),
        seed=2,
        neighbours=derive(lambda users: neighbour_table(users, num_neighbours=3), other),
    ),
    "densified": lambda one, other: densified(one, other, shorter_than=6, added=2, seed=3),
    "novel": lambda one, _: novel(one, max_similarity=0.8),
    "unlike": lambda one, other: unlike(one, other, max_similarity=0.9),
    "coherent": lambda one, _: coherent(one, min_lift=0.2),
    "of_mass": lambda one, other: of_mass(one, other, weight=0.0 if one.value.num_interactions == 0 else 1e-3),
}
BINARY = {"insert", "densified", "unlike", "of_mass"}


def run_chain(chain: list[tuple[str, int, int]], real: Histories) -> list[tuple[Users, bool]]:
    """Values in the order made, each with whether a private one was among its sources, worked out apart."""
    made: list[tuple[Users, bool]] = [(drawn(1), False), (private(real), True), (drawn(2), False)]
    for name, first, second in chain:
        (one, tainted), (other, also) = made[first % len(made)], made[second % len(made)]
        made.append((STEPS[name](one, other), tainted or (also and name in BINARY)))
    return made


chains = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 20), st.integers(0, 20)), max_size=5)


@settings(max_examples=40, deadline=None)
@given(chain=chains)
def test_once_internal_always_internal_and_nothing_else_is(chain):
    for value, tainted in run_chain(chain, real_users(0)):
        assert value.exportable is not tainted


@settings(max_examples=40, deadline=None)
@given(chain=chains, seed=st.integers(1, 50))
def test_what_is_exportable_is_the_same_beside_any_private_users(chain, seed):
    for (one, _), (other, _) in zip(run_chain(chain, real_users(0)), run_chain(chain, real_users(seed)), strict=True):
        assert one.exportable is other.exportable
        if one.exportable:
            assert np.array_equal(one.value.indptr, other.value.indptr)
            assert np.array_equal(one.value.items, other.value.items)


def test_every_step_is_in_the_chains():
    public_steps = set()
    for name in ("enrichment", "filters"):
        tree = ast.parse((ROOT / f"shared/augmentation/{name}.py").read_text())
        for node in tree.body:
            returns_users = isinstance(node, ast.FunctionDef) and "Traced" in ast.unparse(node.returns or node)
            if returns_users and not node.name.startswith("_"):
                public_steps.add(node.name)
    assert public_steps == {*STEPS, "new_users", "transformed"} - {"mask", "insert"}


def givers_of_class(root: Path) -> set[tuple[str, str]]:
    """(call, file) of everything that can say "exportable" without asking what it was made of."""
    found = set()
    for package in ("shared", "client", "server", "simulations"):
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "shared.augmentation.tracing" not in text and path.stem != "tracing":
                continue
            for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
                name = ast.unparse(call.func).split(".")[-1]
                changes = name == "replace" and any(keyword.arg == "exportable" for keyword in call.keywords)
                if changes or name in {"Traced", "public", "released", "__setattr__"}:
                    found.add((name, str(path.relative_to(root))))
    return found


def test_classes_are_given_where_somebody_looked():
    """Who adds a place to this list has made sure that no user was looked at."""
    assert givers_of_class(ROOT) == {
        ("Traced", "shared/augmentation/tracing.py"),
        ("released", "shared/augmentation/enrichment.py"),
    }


def test_the_search_for_givers_has_teeth(tmp_path):
    for number, call in enumerate(
        [
            "tracing.Traced(x, True)",
            "public(x)",
            "replace(x, exportable=True)",
            "object.__setattr__(x, 'exportable', 1)",
        ]
    ):
        path = tmp_path / "client" / f"bad{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"from shared.augmentation.tracing import Traced\n{call}\n")
    assert len(givers_of_class(tmp_path)) == 4


@pytest.mark.parametrize(
    ("changes", "exportable"),
    [
        ({}, True),
        ({"noise": SEEDED_NOISE}, False),
        ({"noise": NO_NOISE, "epsilon": float("inf")}, False),
        ({"catalogue": {"source": "assumed public"}}, False),
    ],
)
def test_new_users_have_the_class_of_their_generator(changes, exportable):
    one = dataclasses.replace(card(), **changes)
    assert released(1, one).exportable is exportable
    assert drawn(0, generator=a_generator(one)).exportable is exportable


# --- what is made --------------------------------------------------------------------------------------------


def test_new_users_keep_the_bound_of_the_card():
    one = dataclasses.replace(card(), max_items_per_user=4)
    users = new_users(a_generator(one), num_users=50, items_per_user=30, seed=0).value
    assert users.num_users == 50
    assert users.lengths().max() == 4


def planted(num_users: int, seed: int) -> Histories:
    """Users of one of two tastes: the first or the second half of the catalogue."""
    rng = np.random.default_rng(seed)
    half = NUM_ITEMS // 2
    return Histories.from_rows(
        [rng.choice(half, size=4, replace=False) + half * (user % 2) for user in range(num_users)], NUM_ITEMS
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999), shorter_than=st.integers(1, 9), added=st.integers(1, 12), neighbours=st.integers(1, 40)
)
def test_densified_users_keep_what_they_had(seed, shorter_than, added, neighbours):
    users = real_users(seed)
    timed = dataclasses.replace(
        users,
        timestamps=np.arange(users.num_interactions) * 5,
        behaviours=(users.items % 3).astype(np.int8),
    )
    made = densified(
        private(timed), drawn(seed), shorter_than=shorter_than, added=added, seed=seed, num_neighbours=neighbours
    ).value
    for user, length in enumerate(users.lengths()):
        old, new = users.row(user).tolist(), made.row(user).tolist()
        assert len(set(new)) == len(new)
        assert [item for item in new if item in old] == old
        assert length <= len(new) <= length + (added if length < shorter_than else 0)
        stamps = made.timestamps[made.indptr[user] : made.indptr[user + 1]]
        assert set(stamps) <= set(timed.timestamps[users.indptr[user] : users.indptr[user + 1]])
        assert (np.diff(stamps) >= 0).all()


def test_short_users_are_given_items_of_their_taste():
    half = NUM_ITEMS // 2
    users = Histories.from_rows([[0, 1], [half, half + 1], [], [0, 1, 2, 3]], NUM_ITEMS)
    made = densified(private(users), public(planted(400, 0)), shorter_than=4, added=3, seed=0, num_neighbours=20).value
    assert made.lengths().tolist() == [5, 5, 0, 4]
    assert (made.row(0) < half).all()
    assert (made.row(1) >= half).all()


def test_items_are_added_in_proportion_to_neighbours():
    # All four synthetic users are as near to the user: three have item 2, one has item 3.
    pool = Histories.from_rows([[0, 2], [0, 2], [0, 2], [0, 3]], NUM_ITEMS)
    num_users = 3000
    users = Histories.from_rows([[0]] * num_users, NUM_ITEMS)
    made = densified(private(users), public(pool), shorter_than=2, added=1, seed=0, num_neighbours=4).value
    assert made.lengths().tolist() == [2] * num_users
    assert np.mean(made.items[1::2] == 2) == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / num_users))


@pytest.mark.parametrize("rows", [[[4, 5]], [[]], []])
def test_users_without_neighbours_are_given_nothing(rows):
    pool = Histories.from_rows(rows, NUM_ITEMS)
    users = Histories.from_rows([[0]], NUM_ITEMS)
    assert densified(private(users), public(pool), shorter_than=5, added=3, seed=0).value.row(0).tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), weight=st.floats(0, 0.5))
def test_synthetic_mass_is_at_most_what_was_asked_for(seed, weight):
    synthetic, real = drawn(seed, num_users=60), private(real_users(seed))
    wanted = weight * real.value.num_interactions
    if synthetic.value.num_interactions < wanted:
        return
    made = of_mass(synthetic, real, weight=weight)
    assert made.value.num_interactions <= wanted
    assert not made.exportable
    if made.value.num_users < 60:
        assert synthetic.value.indptr[made.value.num_users + 1] > wanted


def test_impossible_requests_say_what_to_do():
    users, pool = private(real_users(0)), drawn(0)
    with pytest.raises(InputError, match="must be 1 or more"):
        densified(users, pool, shorter_than=5, added=0, seed=0)
    with pytest.raises(InputError, match="generator of this catalogue"):
        densified(private(Histories.from_rows([[1]], NUM_ITEMS + 1)), pool, shorter_than=5, added=1, seed=0)
    with pytest.raises(InputError, match="Draw more users"):
        of_mass(pool, users, weight=1000.0)
    with pytest.raises(InputError, match="0 or more"):
        of_mass(pool, users, weight=float("nan"))


def test_chance_is_an_argument():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what must not matter
    one = densified(private(real_users(0)), drawn(1), shorter_than=5, added=2, seed=4).value
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    again = densified(private(real_users(0)), drawn(1), shorter_than=5, added=2, seed=4).value
    other = densified(private(real_users(0)), drawn(1), shorter_than=5, added=2, seed=5).value
    assert np.array_equal(one.items, again.items)
    assert not (len(one.items) == len(other.items) and np.array_equal(one.items, other.items))
