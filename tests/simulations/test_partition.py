"""Users are dealt whole, once, and as asked; too few of them is said in numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import load_scenario, scenario_from
from shared.data.histories import Histories
from shared.data.indexing import IndexedUsers
from shared.errors import InputError
from shared.rng import stream
from simulations.owners import build_federation
from simulations.partition import owner_names, partition_users


def users_with(lengths, institutions=None) -> IndexedUsers:
    histories = Histories.from_rows([np.arange(length) for length in lengths], 50)
    ids = np.array([f"u{i}" for i in range(len(lengths))], dtype=object)
    places = None if institutions is None else np.array(institutions, dtype=object)
    return IndexedUsers(histories, ids, places, {})


def deal(users, kind, num_owners, users_per_owner=None, alpha=0.5, seed=0):
    return partition_users(
        users,
        kind=kind,
        num_owners=num_owners,
        users_per_owner=users_per_owner,
        dirichlet_alpha=alpha,
        rng=stream(seed, "t"),
    )


@settings(max_examples=60, deadline=None)
@given(num_users=st.integers(20, 80), num_owners=st.integers(2, 5), kind=st.sampled_from(["random", "dirichlet"]))
def test_every_user_has_one_owner(num_users, num_owners, kind):
    parts = deal(users_with([1 + i % 20 for i in range(num_users)]), kind, num_owners, alpha=5.0)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(num_users))
    assert list(parts) == [f"owner-{i:02}" for i in range(1, num_owners + 1)]
    if kind == "random":
        assert np.ptp([len(part) for part in parts.values()]) <= 1


def test_smaller_alpha_makes_owners_differ_more_in_activity():
    users = users_with([1 + i // 50 for i in range(2000)])
    lengths = users.histories.lengths()

    def spread(alpha):
        means = [lengths[part].mean() for part in deal(users, "dirichlet", 8, alpha=alpha).values()]
        return np.std(means)

    assert spread(0.3) > 3 * spread(100.0)


def test_users_per_owner_is_exact_at_random_and_a_bound_elsewhere():
    users = users_with([5] * 30, ["a"] * 20 + ["b"] * 10)
    assert [len(part) for part in deal(users, "random", 3, 7).values()] == [7, 7, 7]
    assert {name: len(part) for name, part in deal(users, "institution", 2, 15).items()} == {"a": 15, "b": 10}
    with pytest.raises(InputError, match=r"3 owners with 11 users each need 33 users; the data has 30"):
        deal(users, "random", 3, 11)


def test_institutions_become_owners_the_largest_first():
    users = users_with([5] * 9, ["Café Nord"] * 4 + ["x"] * 2 + ["Süd & Co."] * 3)
    assert {name: part.tolist() for name, part in deal(users, "institution", 2).items()} == {
        "cafe-nord": [0, 1, 2, 3],
        "sud-co": [6, 7, 8],
    }
    with pytest.raises(InputError, match=r"3 institution\(s\) with users.*Set data.num_owners=3"):
        deal(users, "institution", 4)


def test_owner_names_are_folder_names_and_distinct():
    names = owner_names(["../etc", "ETC", "etc", "日本", "中国", "x" * 90, "a/b"])
    assert names[:5] == ["etc", "etc--2", "etc--3", "owner", "owner--2"]
    assert len(names[5]) == 40
    assert names[6] == "a-b"


def test_too_few_users_are_named():
    with pytest.raises(InputError, match=r"5 users do not suffice for 3 owners"):
        deal(users_with([5] * 5), "random", 3)
    with pytest.raises(InputError, match=r"owner b has 1 user\(s\)"):
        deal(users_with([5] * 5, ["a"] * 4 + ["b"]), "institution", 2)
    with pytest.raises(InputError, match=r"Raise data.dirichlet_alpha"):
        deal(users_with([5] * 20), "dirichlet", 10, alpha=0.001)


def write(tmp_path, rows, header="user_id,item_id,timestamp,institution"):
    path = tmp_path / "events.csv"
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def federation(path, seed=0, **data):
    return build_federation(scenario_from({"data": {"path": str(path), **data}}, source="test"), seed=seed)


def test_one_owner_is_refused_and_names_min_owners():
    with pytest.raises(InputError, match=r"federation.min_owners=2"):
        federation("", num_owners=1)


def test_a_federation_from_a_file(tmp_path):
    rows = [(user, item, 10 * item + user, f"shop {user % 2}") for user in range(12) for item in range(6)]
    path = write(tmp_path, rows)
    made = federation(path, num_owners=2)
    assert [owner.name for owner in made.owners] == ["shop-0", "shop-1"]
    assert made.assumed_public == {"catalogue": "events-seen"}
    assert made.counts["users"] == 12
    assert made.counts["rows"] == 72
    top = federation(path, num_owners=3, split="random", top_items=5)
    assert top.assumed_public == {"catalogue": "events-top-5", "top_items": 5}
    assert top.counts["rows outside the catalogue"] == 12
    assert top.catalogue.num_items == 5


def test_a_person_at_two_institutions_is_a_user_of_each(tmp_path):
    rows = [(user, item, item, place) for user in range(4) for item in range(6) for place in ("a", "b")]
    rows += [(user, item, item, "ab"[user % 2]) for user in range(10, 16) for item in range(6)]
    made = federation(write(tmp_path, rows), num_owners=2)
    assert made.counts["users"] == 8 + 6
    assert federation(write(tmp_path, rows), num_owners=2, split="random").counts["users"] == 4 + 6


def test_a_public_catalogue_is_used_whole(tmp_path):
    path = write(tmp_path, [(user, item, item, user % 2) for user in range(8) for item in range(5)])
    (tmp_path / "items.txt").write_text("".join(f"{item}\n" for item in range(9)))
    made = federation(path, num_owners=2, catalogue=str(tmp_path / "items.txt"))
    assert made.catalogue.num_items == 9
    assert made.assumed_public == {}
    with pytest.raises(InputError, match=r"exclude each other"):
        federation(path, num_owners=2, catalogue=str(tmp_path / "items.txt"), top_items=3)
    (tmp_path / "items.txt").write_text("0\n1\n2\n3\n")
    with pytest.raises(InputError, match=r"8 of 40 rows name 1 item"):
        federation(path, num_owners=2, catalogue=str(tmp_path / "items.txt"))


def test_a_user_of_two_owners_is_trained_on_but_never_held_out(tmp_path):
    lines = ["user_id,item_id,institution"]
    for user in range(40):
        for owner in ("a", "b") if user % 2 else ("a",) if user % 4 else ("b",):
            lines += [f"u{user},i{item},{owner}" for item in range(user % 7, user % 7 + 6)]
    (tmp_path / "shops.csv").write_text("\n".join(lines) + "\n")
    scenario = load_scenario(None, [f"data.path={tmp_path / 'shops.csv'}", "data.num_owners=2"])
    for owner in build_federation(scenario, seed=0).owners:
        # Ten users of each owner are its own: a fifth of those, and none of the twenty shared ones.
        assert (owner.num_users, owner.split.fold_in.num_users) == (30, 2)
