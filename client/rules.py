"""Say no to what the owner's policy does not allow, from the request and the policy alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np

from client.policy import Policy
from shared.errors import BudgetExceeded, RefusedError
from shared.generators.family import GeneratorSpec, travelling_shapes, weight_shapes
from shared.generators.gan import GanSpec
from shared.generators.sequence import SequenceSpec
from shared.privacy.releases import Release
from shared.wire.arrays import HEAD, answered_shapes, asked_shapes, num_numbers
from shared.wire.messages import TrainJob

Rule = Literal[
    "simulation",
    "expired",
    "code",
    "run-id",
    "catalogue",
    "generator",
    "size",
    "owners",
    "max-users",
    "sample-rate",
    "steps",
    "clip",
    "no-noise",
    "release-kind",
    "noise-floor",
    "seeded-noise",
    "private-figures",
    "weights",
    "not-approved",
    "epsilon-per-run",
    "epsilon-for-life",
]

RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
# Under a clip of 1e-40 gradient and noise are a few of the smallest float32 numbers: rounding then moves a sum by more
# than the clip, and the price no longer holds. Far inside this range it does not.
_CLIPS = (1e-6, 1e6)
_BYTES_PER_WEIGHT = 4


class Refusal(RefusedError):
    """A rule says no. The text is for the owner's own log; a server is told the rule's name.

    Args:
        asked: what the server wants, in at most 200 printable characters.
        allowed: what the policy says of it.
        advice: what to do next.
    """

    def __init__(self, rule: Rule, *, asked: str, allowed: str, advice: str) -> None:
        super().__init__(f"refused by rule '{rule}': asked for {asked}, allowed is {allowed}. {advice}")
        self.rule: Rule = rule
        self.asked, self.allowed = asked, allowed


class OverBudget(Refusal, BudgetExceeded):
    """The rule is a ceiling on epsilon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """Epsilon without the release asked for, and with it."""

    before: float
    after: float


def check_request(
    job: TrainJob, policy: Policy, *, today: date, code_hash: str, num_owners: int | None, simulated: bool
) -> None:
    """Return if every rule lets ``job`` pass.

    Args:
        code_hash: of the program that would train.
        num_owners: that the run is planned with; None where the server does not say, which is refused.
        simulated: a simulation started this node.
    Guarantee:
        No refusal depends on a user: nothing but the request, the policy, the date and the program is looked at.
        What passes, satisfies every rule; no rule excuses from another.
    Raises:
        Refusal: the first rule that says no. Whether the budget suffices is :func:`check_budget`'s to say.
    """
    _check_who_may_ask(job, policy, today=today, code_hash=code_hash, simulated=simulated)
    _check_generator(job, policy)
    _check_plan(job, policy, num_owners)
    _check_release(job, policy)
    _check_weights(job)


def check_budget(policy: Policy, *, life: Spending, run: Spending, alternative: Callable[[], str | None]) -> None:
    """Return if the release asked for leaves epsilon within the policy's ceilings.

    Args:
        life: over all releases ever made from the data.
        run: over the releases of this run.
        alternative: says what would fit, such as "noise_multiplier 1.8 or 40 rounds would fit", or None where nothing
            would; asked only for a refusal, since finding it takes time.
    Guarantee:
        What is no number, or infinite, is above every ceiling.
    Raises:
        OverBudget: a ceiling would be crossed.
    """
    ceilings: tuple[tuple[Rule, Spending, float | None, str], ...] = (
        ("epsilon-for-life", life, policy.ceilings.epsilon, "ceilings.epsilon"),
        ("epsilon-per-run", run, policy.ceilings.epsilon_per_run, "ceilings.epsilon_per_run"),
    )
    for rule, spending, ceiling, key in ceilings:
        # Written so that NaN is refused.
        if ceiling is not None and not spending.after <= ceiling:
            raise OverBudget(
                rule,
                asked=f"epsilon {spending.after:.6g} ({spending.before:.6g} of it spent before)",
                allowed=f"at most {ceiling:g} ({key}) at delta {policy.ceilings.delta:g}",
                advice=f"{fitting}." if (fitting := alternative()) else "Keep the last generator and stop.",
            )


def _dense_rows(spec: GeneratorSpec) -> int:
    """Numbers that a step holds besides weights, whoever is drawn: the fakes of a GAN."""
    return spec.fakes * spec.num_items if isinstance(spec, GanSpec) else 0


def num_weights(spec: GeneratorSpec) -> int:
    """Numbers of a generator that leave after a round."""
    return num_numbers(travelling_shapes(spec))


def mib_of(num_weights: int) -> float:
    """What so many weights take in a message."""
    return num_weights * _BYTES_PER_WEIGHT / 2**20


def _check_who_may_ask(job: TrainJob, policy: Policy, *, today: date, code_hash: str, simulated: bool) -> None:
    if simulated != policy.simulated:
        raise Refusal(
            "simulation",
            asked="a simulation's owner" if simulated else "a deployed owner",
            allowed=f"what policy.toml says: simulated = {str(policy.simulated).lower()}",
            advice="Start a real owner's node with its owner and data-path, on a folder with the owner's own policy.",
        )
    if policy.expires is not None and today > policy.expires:
        raise Refusal(
            "expired",
            asked=f"an answer on {today}",
            allowed=f"up to {policy.expires} (expires)",
            advice="Set a later day in policy.toml, if the data may still be used.",
        )
    if policy.allowed.code and code_hash not in policy.allowed.code:
        raise Refusal(
            "code",
            asked=f"training by the program {shown(code_hash)}",
            allowed=f"one of {len(policy.allowed.code)} versions (allowed.code)",
            advice="Install an approved version, or review this one and add its hash to policy.toml.",
        )
    if not RUN_ID.fullmatch(job.run_id):
        raise Refusal(
            "run-id",
            asked=f"run {shown(job.run_id)}",
            allowed="1 to 100 characters of [A-Za-z0-9._-]",
            advice="Ask the server's operator for a run with such a name.",
        )
    if job.noise_seed is not None and not policy.simulated:
        raise Refusal(
            "seeded-noise",
            asked="noise from a seed",
            allowed="secret noise only: who knows the seed can subtract it",
            advice="Ask the server's operator to start the run without a seed.",
        )
    if job.collect_metrics and not policy.simulated:
        raise Refusal(
            "private-figures",
            asked="losses and user counts",
            allowed="none: they stay at home",
            advice="Ask the server's operator to start the run without them.",
        )


def _check_generator(job: TrainJob, policy: Policy) -> None:
    if job.catalogue_hash != policy.catalogue_hash:
        raise Refusal(
            "catalogue",
            asked=f"catalogue {shown(job.catalogue_hash)}",
            allowed=f"{shown(policy.catalogue_hash)} (catalogue_hash)",
            advice="Item positions would mean different items: give both sides the same catalogue file.",
        )
    if job.spec.kind not in policy.allowed.generators:
        raise Refusal(
            "generator",
            asked=f"a generator of kind {shown(job.spec.kind)}",
            allowed=f"{', '.join(policy.allowed.generators) or 'none'} (allowed.generators)",
            advice="Ask for one of these, or allow the kind in policy.toml.",
        )
    if isinstance(job.spec, SequenceSpec) and job.spec.num_behaviours != max(1, len(policy.behaviours)):
        raise Refusal(
            "generator",
            asked=f"{job.spec.num_behaviours} behaviours",
            allowed=f"{max(1, len(policy.behaviours))} (behaviours)",
            advice="Codes would mean other behaviours: give both sides the same public names, in the same order.",
        )
    if job.spec.kind == "spectral" and job.plan.num_training_rounds:
        raise Refusal(
            "generator",
            asked="training of a spectral generator",
            allowed="sketches alone: it is read off them",
            advice="Ask the server's operator to plan no rounds of training, or another kind.",
        )
    size = num_numbers(weight_shapes(job.spec)) + _dense_rows(job.spec)
    _at_most("size", "a generator of {} numbers", size, policy.limits.max_weights, key="limits.max_weights")
    largest = max(mib_of(num_numbers(shapes)) for shapes in (travelling_shapes(job.spec), answered_shapes(job)))
    _at_most("size", "messages of {} MiB", largest, policy.limits.max_message_mib, key="limits.max_message_mib")


def _check_plan(job: TrainJob, policy: Policy, num_owners: int | None) -> None:
    plan, limits = job.plan, policy.limits
    if num_owners is None or not num_owners >= limits.min_owners:
        raise Refusal(
            "owners",
            asked="an unsaid number of owners" if num_owners is None else f"{_number(num_owners)} owners",
            allowed=f"at least {limits.min_owners} (limits.min_owners)",
            advice="Wait for a run with more owners.",
        )
    if plan.max_users != policy.max_users:
        raise Refusal(
            "max-users",
            asked=f"at most {_number(plan.max_users)} users",
            allowed=f"{_number(policy.max_users)} (max_users)",
            advice="Tell the server's operator the number in policy.toml, and plan with it.",
        )
    _at_most("sample-rate", "sample_rate {}", plan.sample_rate, limits.max_sample_rate, key="limits.max_sample_rate")
    _at_most("steps", "{} steps a round", plan.num_steps, limits.max_steps_per_round, key="limits.max_steps_per_round")
    steps = plan.num_steps * plan.num_training_rounds
    _at_most("steps", "{} steps a run", steps, limits.max_steps_per_run, key="limits.max_steps_per_run")
    low, high = _CLIPS
    if not low <= plan.max_grad_norm <= high:
        raise Refusal(
            "clip",
            asked=f"max_grad_norm {plan.max_grad_norm:g}",
            allowed=f"{low:g} to {high:g}, where float32 rounding is far below the noise",
            advice="Ask the server's operator to scale max_grad_norm and learning_rate.",
        )


def _check_release(job: TrainJob, policy: Policy) -> None:
    for release in job.plan.rest_of_run:
        _check_one_release(release, policy)


def _check_one_release(release: Release | None, policy: Policy) -> None:
    if release is None:
        if not policy.simulated or policy.ceilings.epsilon is not None:
            raise Refusal(
                "no-noise",
                asked="a round without noise",
                allowed=f"epsilon {policy.ceilings.epsilon} (ceilings.epsilon)",
                advice="Plan the rounds with a finite privacy.epsilon.",
            )
        return
    if release.mechanism not in policy.allowed.releases:
        raise Refusal(
            "release-kind",
            asked=f"a release of kind {shown(release.mechanism)}",
            allowed=f"{', '.join(policy.allowed.releases) or 'none'} (allowed.releases)",
            advice="Ask for one of these, or allow the kind in policy.toml.",
        )
    if not release.noise_multiplier >= policy.limits.min_noise_multiplier:
        raise Refusal(
            "noise-floor",
            asked=f"noise_multiplier {release.noise_multiplier:g}",
            allowed=f"at least {policy.limits.min_noise_multiplier:g} (limits.min_noise_multiplier)",
            advice="Ask the server's operator for more noise, or for fewer rounds at the same epsilon.",
        )


def _check_weights(job: TrainJob) -> None:
    declared = {name: f"float32 {shape}" for name, shape in asked_shapes(job).items()}
    given = {name: f"{values.dtype} {values.shape}" for name, values in job.weights.items()}
    for name in [*declared, *given]:
        if declared.get(name) != given.get(name):
            raise Refusal(
                "weights",
                asked=f"{shown(name)} as {shown(given.get(name, 'absent'))}",
                allowed=f"{declared.get(name, 'absent')}, by the generator's own sizes",
                advice="The server sent weights of another generator; ask its operator for a new run.",
            )
    if list(declared) != list(given):
        raise Refusal(
            "weights",
            asked="weights in another order",
            allowed="the generator's own order, in which replies repeat",
            advice="The server is of another version; install the same release of fedaug on both.",
        )
    for name, values in job.weights.items():
        if not np.isfinite(values).all():
            raise Refusal(
                "weights",
                asked=f"{name} with a number that is not finite",
                allowed="finite numbers",
                advice="Ask the server's operator to go on from the last good checkpoint.",
            )
    if job.plan.sketch is not None and HEAD in job.weights:
        marks, size = job.weights[HEAD], job.plan.sketch.head_items
        if not (np.isin(marks, (0.0, 1.0)).all() and np.count_nonzero(marks) == size):
            raise Refusal(
                "weights",
                asked=f"a head of {np.count_nonzero(marks):,} items",
                allowed=f"{size:,} items, each marked by 1, as the terms say",
                advice="The server is of another version; install the same release of fedaug on both.",
            )


def _at_most(rule: Rule, what: str, asked: float, limit: float, *, key: str) -> None:
    if not asked <= limit:
        raise Refusal(
            rule,
            asked=what.format(_number(asked)),
            allowed=f"at most {_number(limit)} ({key})",
            advice=f"Ask the server's operator for a plan within it, or raise {key} in policy.toml.",
        )


def _number(value: float) -> str:
    if isinstance(value, int):
        # A stranger's number may have thousands of digits, which Python refuses to print.
        return f"{value:,}" if value < 10**15 else "over 10**15"
    return f"{value:g}"


def shown(text: str) -> str:
    """A stranger's words, fit for a log: quoted, escaped and cut to 80 characters."""
    quoted = ascii(text[:80])
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."
