"""Load a scenario's data as a federation of owners, each with its held-out part apart."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.config import Columns, DataSection, Scenario
from shared.data.catalogue import Catalogue, catalogue_from
from shared.data.histories import Histories
from shared.data.indexing import IndexedUsers, events_of, index_events, index_users
from shared.data.interactions import Interactions
from shared.data.readers import read_interactions
from shared.data.splits import Split, split_histories, time_cut
from shared.errors import InputError
from shared.rng import stream
from simulations.partition import partition_users

SAMPLE = Path(__file__).parent / "sample" / "interactions.parquet"
SAMPLE_CATALOGUE = Path(__file__).parent / "sample" / "catalogue.json"


@dataclass(frozen=True, slots=True, eq=False)
class OwnerData:
    """One simulated owner of ``num_users`` users; ``name`` serves as a folder's name.

    Args:
        training: what its generator learns from: the training histories, or where behaviours are told apart, the
            events behind them.
    """

    name: str
    split: Split
    num_users: int
    training: Histories


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """Owners over one catalogue.

    Args:
        owners: sorted by name.
        assumed_public: what was computed across users and would have to be public in a real federation, JSON-able.
        counts: what was read and what was left out, by reason; private in a real federation.
    """

    catalogue: Catalogue
    owners: tuple[OwnerData, ...]
    assumed_public: dict[str, str | int]
    counts: dict[str, int]


def build_federation(scenario: Scenario, *, seed: int) -> Federation:
    """Read, index, deal and split the data of ``scenario``; the built-in sample where it names none.

    The same scenario and seed give the same federation.

    Raises:
        InputError: the data cannot be used as asked.
        LeakError: a split would leak.
    """
    data, study = scenario.data, scenario.study
    if data.num_owners < scenario.federation.min_owners:
        raise InputError(
            f"data.num_owners={data.num_owners}, but a federation has at least federation.min_owners="
            f"{scenario.federation.min_owners} owners. Raise data.num_owners; who is alone trains alone."
        )
    everything = _read(data)
    interactions = everything.counting(data.behaviours) if data.path else everything
    catalogue, assumed_public = _catalogue(data, interactions)
    users = index_users(
        interactions,
        catalogue,
        min_interactions=data.min_interactions,
        max_items_per_user=data.max_items_per_user,
        # A catalogue cut from this data leaves rows outside by intention.
        outside_catalogue=data.outside_catalogue if data.top_items is None else "count",
        by_institution=data.split == "institution",
    )
    events = _events(scenario, everything, users, catalogue)
    parts = partition_users(
        users,
        kind=data.split,
        num_owners=data.num_owners,
        users_per_owner=data.users_per_owner,
        dirichlet_alpha=data.dirichlet_alpha,
        rng=stream(seed, "partition"),
    )
    dealt = np.concatenate(list(parts.values()))
    cut = None
    if study.holdout == "time":
        cut = assumed_public["time_cut"] = time_cut(users.histories.select(dealt), study.holdout_share)
    # Who is a user of two owners would be tested at one and trained on at the other, through the generator.
    _, person, owners_of = np.unique(users.user_ids[dealt], return_inverse=True, return_counts=True)
    testable = np.zeros(users.histories.num_users, dtype=bool)
    testable[dealt] = owners_of[person] == 1
    owners = []
    for name, positions in parts.items():
        try:
            split = split_histories(
                users.histories.select(positions),
                holdout=study.holdout,
                holdout_share=study.holdout_share,
                fold_in_share=study.fold_in_share,
                rng=stream(seed, "holdout", name),
                cut=cut,
                testable=testable[positions],
            )
        except InputError as error:
            raise InputError(f"owner {name}: {error}") from None
        owners.append(OwnerData(name, split, len(positions), _training(split, events, positions, cut)))
    return Federation(catalogue, tuple(owners), assumed_public, _counts(interactions, users, parts))


def _events(
    scenario: Scenario, everything: Interactions, users: IndexedUsers, catalogue: Catalogue
) -> Histories | None:
    """Each user's events of the behaviours that the generator tells apart; None where it tells none apart."""
    behaviours = scenario.generator.sequence.behaviours
    if scenario.generator.kind != "sequence" or not behaviours:
        return None
    bound = scenario.data.max_items_per_user
    found = index_events(everything, users, catalogue, behaviours=behaviours, max_items_per_user=bound)
    return found.histories


def _training(split: Split, events: Histories | None, positions: np.ndarray, cut: int | None) -> Histories:
    if events is None or split.train_users is None:
        return split.train
    return events_of(events, split.train, positions[split.train_users], cut=cut)


def _read(data: DataSection) -> Interactions:
    if not data.path:
        return read_interactions(SAMPLE, columns=Columns())
    return read_interactions(
        data.path, columns=data.columns, format=data.format, table=data.table, skip_bad_rows=data.skip_bad_rows
    )


def _catalogue(data: DataSection, interactions: Interactions) -> tuple[Catalogue, dict[str, str | int]]:
    if data.catalogue and data.top_items is not None:
        raise InputError(
            "data.catalogue and data.top_items exclude each other: a public catalogue is used whole. Leave one out."
        )
    if data.catalogue:
        catalogue = Catalogue.load(Path(data.catalogue))
    elif not data.path and data.top_items is None:
        catalogue = Catalogue.load(SAMPLE_CATALOGUE)
    else:
        catalogue = catalogue_from(interactions, top_items=data.top_items)
    assumed: dict[str, str | int] = {}
    if catalogue.source == "assumed public":
        assumed["catalogue"] = catalogue.version
    if data.top_items is not None:
        assumed["top_items"] = data.top_items
    return catalogue, assumed


def _counts(interactions: Interactions, users: IndexedUsers, parts: dict[str, np.ndarray]) -> dict[str, int]:
    dealt = sum(len(part) for part in parts.values())
    return {
        "rows": interactions.num_rows + sum(interactions.skipped.values()),
        **interactions.skipped,
        **users.counts,
        "users": dealt,
        "users of no owner": users.histories.num_users - dealt,
        "interactions": int(sum(users.histories.lengths()[part].sum() for part in parts.values())),
    }
