"""Engines with one mistake each, of kinds that were published or shipped; the check named beside each must see it."""

import pytest
import torch

from shared.dpsgd.bookkeeping import BookKeepingDpSgd
from shared.dpsgd.chance import Chance
from shared.dpsgd.rules import RULES
from tests.shared.dpsgd import checks


class NoClip(BookKeepingDpSgd):
    def _clip(self, counted):
        counted = super()._clip(counted)
        self._optimizer.clip_by(torch.ones_like(counted))
        return counted


class ClipsEachLayer(BookKeepingDpSgd):
    """As libraries that clip by parameter: the joint norm of L layers reaches sqrt(L) clips."""

    def _clip(self, counted):
        counted = super()._clip(counted)
        for rule in self._rules:
            factors = (self._optimizer.max_grad_norm / rule.squared_norms().sqrt()).clamp(max=1.0)
            rule._gradient = rule._gradient * factors[:, None]
            rule.squared_norms()
        self._optimizer.clip_by(torch.ones_like(counted))
        return counted


class ClipsTheMean(BookKeepingDpSgd):
    """``clip_grad_norm_`` before the noise: one user turns the others' gradient around."""

    def _clip(self, counted):
        counted = super()._clip(counted)
        for parameter in self._optimizer.params:
            parameter.grad = torch.zeros_like(parameter)
        for rule in self._rules:
            rule.add_clipped(torch.ones_like(counted))
        total = torch.cat([parameter.grad.ravel() for parameter in self._optimizer.params]).norm()
        self._optimizer.clip_by((self._optimizer.max_grad_norm / total).clamp(max=1.0).expand(len(counted)))
        return counted


class Normalises(BookKeepingDpSgd):
    """Stretches small gradients to the clip as well: private, but another mechanism."""

    def _clip(self, counted):
        counted = super()._clip(counted)
        norms = sum(rule.squared_norms() for rule in self._rules if rule.recorded).sqrt()
        self._optimizer.clip_by(self._optimizer.max_grad_norm / norms)
        return counted


class WithFakes(BookKeepingDpSgd):
    """A discriminator's step: rows of a generator are classified beside the users."""

    def num_fakes(self, num_users):
        return 8

    def step(self, users, losses, **options):
        fakes = checks.FAKES + torch.arange(self.num_fakes(len(users)))
        return super().step(torch.cat([users, fakes]), losses, **options)


class AsManyFakesAsUsers(WithFakes):
    """Each user brings a fake along, clipped apart: together they move the sum by two clips."""

    def num_fakes(self, num_users):
        return num_users


class MeanOfTheBatch(BookKeepingDpSgd):
    def _clip(self, counted):
        counted = super()._clip(counted)
        self._optimizer.clip_by(self._optimizer._factors * self._release.expected_batch / len(counted))
        return counted


class NoiseOncePerRelease(BookKeepingDpSgd):
    def step(self, users, losses, **options):
        if self._num_steps:
            self._optimizer._chance = Scaled(0.0)
        return super().step(users, losses, **options)


class Scaled(Chance):
    def __init__(self, factor):
        super().__init__(bytes(32))
        self.factor = factor

    def fill_normal(self, values, *, stddev):
        super().fill_normal(values, stddev=stddev)
        values.mul_(self.factor)


class FivePercentTooLittleNoise(BookKeepingDpSgd):
    def __init__(self, *arguments, chance, **options):
        super().__init__(*arguments, chance=Scaled(0.95), **options)


class NoNoiseWithoutUsers(BookKeepingDpSgd):
    """Skips the steps in which nobody was drawn, as a loader that has no empty batches does."""

    def step(self, users, losses, **options):
        if len(users):
            return super().step(users, losses, **options)
        return torch.zeros(0)


class NoNoiseOnWhatIsUnused(BookKeepingDpSgd):
    def _backward(self, users, losses):
        counted = super()._backward(users, losses)
        used = {id(p) for rule in self._rules if rule.recorded for p in rule.module.parameters()}
        for group in self._optimizer.original_optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in used] or group["params"]
        return counted


class TheSameNoiseEveryStep(BookKeepingDpSgd):
    def step(self, users, losses, **options):
        self._optimizer._chance = Chance.seeded(7)
        return super().step(users, losses, **options)


class TheSameNoiseForEveryParameterHalf(BookKeepingDpSgd):
    """A generator seeded per chunk of the same size."""

    def __init__(self, *arguments, chance, **options):
        super().__init__(*arguments, chance=Repeating(), **options)


class Repeating(Chance):
    def fill_normal(self, values, *, stddev):
        super().fill_normal(values, stddev=stddev)
        flat = values.view(-1)
        half = len(flat) // 2
        flat[half : 2 * half] = flat[:half]


class KeepsWhoIsNotFinite(BookKeepingDpSgd):
    def _clip(self, counted):
        norms = sum(rule.squared_norms() for rule in self._rules if rule.recorded).sqrt()
        self._optimizer.clip_by((self._optimizer.max_grad_norm / (norms + 1e-6)).clamp(max=1.0))
        return counted


class DoesNotCountWhoIsNotFinite(BookKeepingDpSgd):
    def _clip(self, counted):
        super()._clip(counted)
        return counted


class MissesTheTie(BookKeepingDpSgd):
    """Each layer's norm by itself, without the cross term of a weight that two of them share."""

    def _prepare(self, module, optimizer, max_grad_norm, chance):
        apart = torch.nn.ModuleList()
        wrapped = super()._prepare(apart, optimizer, max_grad_norm, chance)
        self._rules += [
            RULES[type(layer)](name, layer) for name, layer in module.named_modules() if type(layer) in RULES
        ]
        return wrapped


class StepsForEver(BookKeepingDpSgd):
    def step(self, users, losses, **options):
        self._num_steps = 0
        return super().step(users, losses, **options)


class NoisesTheWeights(BookKeepingDpSgd):
    """Adds the noise after the optimizer, whose memory then is of plain sums."""

    def step(self, users, losses, **options):
        secret, self._optimizer._chance = self._optimizer._chance, Scaled(0.0)
        counted = super().step(users, losses, **options)
        self._optimizer._chance = secret
        stddev = self._release.noise_multiplier * self._optimizer.max_grad_norm / self._release.expected_batch
        for parameter in self._optimizer.params:
            noise = torch.empty_like(parameter)
            secret.fill_normal(noise, stddev=stddev)
            parameter.data.sub_(noise)
        return counted


MUTANTS = [
    (NoClip, checks.check_one_user_moves_the_sum_by_at_most_the_clip),
    (ClipsEachLayer, checks.check_one_user_moves_the_sum_by_at_most_the_clip),
    (ClipsTheMean, checks.check_one_user_moves_the_sum_by_at_most_the_clip),
    (AsManyFakesAsUsers, checks.check_one_user_moves_the_sum_by_at_most_the_clip),
    (MeanOfTheBatch, checks.check_one_user_moves_the_sum_by_at_most_the_clip),
    (MeanOfTheBatch, checks.check_the_divisor_is_public),
    (Normalises, checks.check_the_sum_is_that_of_a_loop),
    (NoiseOncePerRelease, checks.check_every_number_gets_the_promised_noise_in_every_step),
    (FivePercentTooLittleNoise, checks.check_every_number_gets_the_promised_noise_in_every_step),
    (NoNoiseWithoutUsers, checks.check_every_number_gets_the_promised_noise_in_every_step),
    (NoNoiseOnWhatIsUnused, checks.check_every_number_gets_the_promised_noise_in_every_step),
    (TheSameNoiseEveryStep, checks.check_noise_is_fresh),
    (TheSameNoiseForEveryParameterHalf, checks.check_noise_is_fresh),
    (KeepsWhoIsNotFinite, checks.check_users_who_are_not_finite_count_as_zero),
    (DoesNotCountWhoIsNotFinite, checks.check_users_who_are_not_finite_count_as_zero),
    (MissesTheTie, checks.check_a_shared_weight_is_counted_or_refused),
    (StepsForEver, checks.check_no_step_beyond_the_release),
    (NoisesTheWeights, checks.check_an_optimizer_remembers_noised_gradients),
]


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda value: value.__name__.removeprefix("check_"))
def test_the_check_sees_the_mistake(mutant, check):
    with pytest.raises(AssertionError) as raised:
        check(mutant)
    # By the check's own words, not by an assertion inside an engine that was broken otherwise than meant.
    assert raised.traceback[-1].path.name == "checks.py"


def test_every_check_has_a_mutant():
    assert {check for _, check in MUTANTS} == set(checks.CHECKS)


def test_how_far_one_user_gets():
    # sqrt(2) and 2 by the arguments in the mutants' descriptions.
    assert checks.largest_move(AsManyFakesAsUsers) == pytest.approx(2.0, rel=1e-3)
    assert checks.largest_move(ClipsTheMean) == pytest.approx(2.0, rel=1e-3)
    assert checks.largest_move(ClipsEachLayer) == pytest.approx(2**0.5, rel=1e-3)
    assert checks.largest_move(WithFakes) == pytest.approx(1.0, rel=1e-3)


def test_fakes_of_a_fixed_number_are_no_mistake():
    checks.check_one_user_moves_the_sum_by_at_most_the_clip(WithFakes)
