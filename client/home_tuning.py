"""Fit a received generator to an owner's own users, for use at that owner alone."""

from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import torch

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.errors import InputError, RefusedError
from shared.generators.base import Weights
from shared.generators.card import TUNED_AT_HOME, Generator, save_generator
from shared.generators.family import model_from


def fine_tune(
    generator: Generator,
    histories: Histories,
    *,
    steps: int,
    learning_rate: float,
    users_per_step: int = 256,
    seed: int,
) -> Weights:
    """The generator's weights after ``steps`` of Adam on the owner's users, without clipping or noise.

    The result is *internal*: it knows these users, and no ledger is charged since nothing of it may leave.
    :func:`save_tuned` writes it down as such. ``generator`` is not changed.

    Args:
        histories: the owner's training users, over the generator's catalogue.
        users_per_step: different users of each step; all of them where there are fewer.
        seed: of the users drawn and of what the loss draws; one seed gives one result.
    Raises:
        RefusedError: generators of this kind are not trained on users.
        InputError: the catalogues differ, there is no user, a number is out of range, or training left the finite
            numbers.
    """
    spec = generator.card.spec
    if spec.kind == "spectral":
        raise RefusedError(
            "a spectral generator is read off one released statistic and has no loss, so it cannot be tuned at home."
            " Use it as it is, or tune a generator that was trained in rounds, such as a vae."
        )
    if histories.num_items != spec.num_items:
        raise InputError(
            f"home tuning: the users' catalogue has {histories.num_items} items, the generator's {spec.num_items}."
            " Index the users by the generator's items."
        )
    if min(steps, users_per_step, histories.num_users) < 1 or not 0 < learning_rate < inf:
        raise InputError(
            f"home tuning: {steps} step(s) of {users_per_step} user(s) out of {histories.num_users} at learning rate"
            f" {learning_rate:g}. Give at least one of each, and a learning rate above 0."
        )
    model = model_from(spec, {name: value.numpy() for name, value in generator.model.state_dict().items()})
    model.train()
    encoded, optimizer = model.encode(histories), torch.optim.Adam(model.private_part.parameters(), lr=learning_rate)
    sampling, drawing, apart = (
        Chance.seeded(seed, "home-tuning", name) for name in ("sampling", "latent", "apart-from-users")
    )
    for _ in range(steps):
        drawn = np.sort(np.argsort(sampling.uniform(histories.num_users))[:users_per_step])
        optimizer.zero_grad()
        # The training lies behind: an annealed loss has all its terms.
        losses = model.loss(encoded.batch(drawn), share_done=1.0, chance=drawing)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.after_step(learning_rate=learning_rate, share_done=1.0, chance=apart)
    tuned = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    if not all(np.isfinite(value).all() for value in tuned.values()):
        raise InputError(
            f"home tuning left the finite numbers after {steps} step(s) at learning rate {learning_rate:g}. Lower it."
        )
    return tuned


def save_tuned(directory: Path, generator: Generator, weights: Weights) -> str:
    """Write ``weights``, tuned from ``generator``, as a generator that must stay; return its id.

    Guarantee:
        The card's noise is :data:`~shared.generators.card.TUNED_AT_HOME` and its epsilon infinite, so that neither it
        nor what is drawn from it is exportable, whatever ``generator`` was.
    """
    card = replace(generator.card, noise=TUNED_AT_HOME, epsilon=inf)
    return save_generator(directory, weights, card, generator.item_ids)
