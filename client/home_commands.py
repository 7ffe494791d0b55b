"""What an owner's commands at home do, and the screen they leave."""

from pathlib import Path
from typing import Literal

from client.augmenting import Recipe, augment
from client.augmenting_tables import augment_table, read_noise
from client.home_tuning import fine_tune, save_tuned
from client.owned_rows import read_owned
from client.screen import print_json, results, say, warn
from client.synthesizing import synthesize
from shared.augmentation.lineage import INTERNAL, Form
from shared.augmentation.synthesis import Condition
from shared.errors import InputError
from shared.generators.card import load_generator


def show_synthesize(
    generator: Path,
    users: int,
    out: Path,
    *,
    form: Form,
    items_per_user: int,
    seed: int,
    condition: Condition,
    segment: tuple[Path, str] | None,
    export: bool,
    as_json: bool,
) -> None:
    """Draw users into a file, and say what they are."""
    found = synthesize(
        generator,
        users,
        out,
        form=form,
        items_per_user=items_per_user,
        seed=seed,
        condition=condition,
        segment=segment,
        export=export,
    )
    if as_json:
        print_json(found)
        return
    rows = f"{found['interactions']:,} {found['lineage']} interactions"
    _print(f"{found['users']:,} synthetic users, {rows}, written to {out}")


def show_augment(
    data: Path,
    generator: Path,
    out: Path,
    recipe: Recipe,
    *,
    form: Form,
    seed: int,
    export: bool,
    skip_bad_rows: bool,
    as_json: bool,
) -> None:
    """Write real and synthetic rows into a file that stays at home, and say how many of each."""
    found = augment(data, generator, out, recipe, form=form, seed=seed, export=export, skip_bad_rows=skip_bad_rows)
    if as_json:
        print_json(found)
        return
    for reason, count in found["left_out"].items():
        say(f"Left out: {count:,} {reason}")
    rows = ", ".join(f"{count:,} {kind}" for kind, count in found["rows"].items())
    _print(f"Rows: {rows}; {found['lineage'][INTERNAL]:,} of them internal. Written to {out}, which must stay at home.")


def show_augment_table(
    data: Path, out: Path, noise: str, *, copies: int, form: Literal["parquet", "csv"], seed: int, as_json: bool
) -> None:
    """Write a table with noised copies of its rows, and say how many of each."""
    found = augment_table(data, out, read_noise(noise.split(",")), copies=copies, form=form, seed=seed)
    if as_json:
        print_json(found)
        return
    rows = ", ".join(f"{count:,} {kind}" for kind, count in found["rows"].items())
    _print(f"Rows: {rows}, all internal. Written to {out}, which must stay at home.")


def tune(
    data: Path,
    generator: Path,
    out: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    skip_bad_rows: bool,
    as_json: bool,
) -> None:
    """Fit a received generator to an owner's own training users; what comes out is internal for ever.

    Raises:
        RefusedError: generators of this kind have nothing to tune.
        InputError: something of the input cannot be used, or ``out`` is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty. Choose another --out.")
    received = load_generator(generator)
    owned = read_owned(data, received, skip_bad_rows=skip_bad_rows)
    histories = owned.events if received.card.behaviours else owned.users.histories
    weights = fine_tune(received, histories, steps=steps, learning_rate=learning_rate, seed=seed)
    identity = save_tuned(out, received, weights)
    if as_json:
        print_json(
            {"out": str(out), "generator_id": identity, "tuned_from": received.generator_id, "exportable": False}
        )
        return
    warn(
        "This generator knows your users as they are. It and all that is drawn from it are internal and must not leave."
    )
    _print(f"Generator {identity}, tuned from {received.generator_id} by {steps:,} steps, written to {out}")


def _print(text: str) -> None:
    results().print(text, soft_wrap=True, markup=False)


def segment_of(path: Path | None, attribute: str | None) -> tuple[Path, str] | None:
    """The segment asked for; InputError where half of it is missing."""
    if path is None and attribute is None:
        return None
    if path is None or attribute is None:
        raise InputError("--segment FILE and --attribute NAME belong together: the items of FILE that have NAME.")
    return path, attribute
