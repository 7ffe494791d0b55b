"""The adversarial generator: what its discriminator sees of users, and that its generator sees none."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from shared.data.histories import Histories
from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import ENGINES, build_engine
from shared.errors import InputError
from shared.generators.base import initial_weights_of, load_weights
from shared.generators.gan import EncodedForGan, Gan, GanSpec, UsersAndFakes, draw_through
from tests.shared.dpsgd.stepping import ALL_ENGINES, TINY, Descent, difference, norm, release_of

SPEC = GanSpec(
    num_items=30,
    hidden_size=12,
    latent_size=4,
    discriminator_size=8,
    loss="hinge",
    weight_clip=0.05,
    fakes=5,
    generator_steps=2,
    generator_rate_share=1.0,
    items_shown=6,
    popularity_scale=5.0,
    input_scale=3.0,
    discriminators="aggregated",
)
CLIP = 0.5


def model(kind=Gan, **changes):
    spec = dataclasses.replace(SPEC, **changes)
    one = kind(spec)
    load_weights(one, initial_weights_of(one, 1))
    return one


def histories(count=7, seed=2):
    rng = np.random.default_rng(seed)
    return Histories.from_rows([rng.permutation(30)[: rng.integers(1, 12)] for _ in range(count)], 30)


def positions(*users):
    return np.array(users, dtype=np.int64)


def step(one, users, *, engine="bookkeeping", noise_multiplier=TINY, seed=0):
    """What one private step of a copy of ``one`` applies, times its public normaliser."""
    one = copy.deepcopy(one)
    descent, release = Descent(one.private_part), release_of(noise_multiplier=noise_multiplier)
    built = build_engine(
        engine, one.private_part, descent, release, max_grad_norm=CLIP, chance=Chance.seeded(seed, "noise")
    )
    chance = Chance.seeded(3, "latent")
    built.step(users, lambda batch: one.loss(batch, share_done=0.0, chance=chance))
    assert built.executed() == release
    return {name: value * release.expected_batch for name, value in descent.given[0].items()}


@pytest.mark.parametrize("loss", ["bce", "hinge", "wasserstein"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_private_step_is_that_of_a_loop_over_users_and_fakes(engine, loss):
    assert set(ALL_ENGINES) == set(ENGINES)
    one = model(loss=loss).double()
    users = one.encode(histories()).batch(positions(0, 2, 3, 6))
    total = {name: torch.zeros_like(p) for name, p in one.discriminator.named_parameters()}
    losses = one.loss(users, share_done=0.0, chance=Chance.seeded(3, "latent"))
    for row in range(len(users)):
        gradients = torch.autograd.grad(losses[row], list(one.discriminator.parameters()), retain_graph=True)
        length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient * min(1.0, CLIP / (length + 1e-6))
    assert norm(difference(step(one, users, engine=engine), total)) <= 1e-9 * norm(total)


class AsManyFakesAsUsers(Gan):
    """Each user brings a fake along, clipped apart."""

    def encode(self, histories):
        return AsManyFakes(histories.to_csr(), 0)


class AsManyFakes(EncodedForGan):
    def batch(self, drawn):
        return UsersAndFakes(Bags.from_rows(self.matrix, drawn), len(drawn))


def largest_move(kind):
    """The most that one user, added to a batch, moves the sum, in clips; gradients are far above the clip."""
    one = model(kind, loss="wasserstein", input_scale=300.0).double()
    encoded = one.encode(histories())
    most = 0.0
    for others in [(), (0,), (0, 1, 2)]:
        for user in (3, 4, 5, 6):
            without = step(one, encoded.batch(positions(*others)))
            moved = difference(step(one, encoded.batch(positions(*others, user))), without)
            most = max(most, norm(moved) / CLIP)
    return most


def test_one_user_moves_the_sum_by_at_most_the_clip():
    # Fakes are drawn before any user is looked at, so that the last user's absence leaves all other rows as they were.
    assert 0.99 < largest_move(Gan) <= 1 + 1e-9


def test_a_fake_for_every_user_is_caught():
    assert largest_move(AsManyFakesAsUsers) > 1.3


def test_a_step_without_users_still_has_all_its_fakes():
    one = model()
    nobody = one.encode(histories()).batch(positions())
    assert len(nobody) == SPEC.fakes
    assert norm(step(one, nobody)) > 0


def test_rows_can_be_kept_by_a_mask():
    users = model().encode(histories()).batch(positions(0, 2, 3))
    kept = users[torch.tensor([True, False, True, True, False, True, False, True])]
    assert (len(kept.users), kept.num_fakes, len(kept)) == (2, 3, 5)
    assert torch.equal(kept.users.lengths, users.users.lengths[[0, 2]])


class WrongSignForUsers(Gan):
    """Teaches the discriminator that users are fakes as well."""

    def loss(self, users, **options):
        seen = []
        hook = self.discriminator.register_forward_hook(lambda _, inputs, scores: seen.append(scores))
        losses = super().loss(users, **options)
        hook.remove()
        count = len(users.users)
        return torch.cat([self._margin_loss(-seen[0][:count]), losses[count:]])


def separation(kind, loss):
    """How far a trained discriminator scores users above fakes, in standard deviations of all scores."""
    one = model(kind, loss=loss, fakes=40, weight_clip=0.5)
    with torch.no_grad():
        one.generator.to_logits.bias[:15] += 1.0  # fakes are of the first half, users of the second
    users = Histories.from_rows([range(15 + user % 9, 22 + user % 9) for user in range(40)], 30)
    batch, chance = one.encode(users).batch(np.arange(40)), Chance.seeded(0)
    optimizer = torch.optim.SGD(one.discriminator.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        one.loss(batch, share_done=0.0, chance=chance).mean().backward()
        optimizer.step()
        one.after_step(learning_rate=0.0, share_done=0.0, chance=chance)
    _, scores = recorded(one, batch, Chance.seeded(5))
    return float((scores[:40].mean() - scores[40:].mean()) / scores.std())


@pytest.mark.parametrize("loss", ["bce", "hinge", "wasserstein"])
def test_the_discriminator_learns_to_score_users_above_fakes(loss):
    # Two groups without spread, of one size, lie two standard deviations apart.
    assert separation(Gan, loss) > 1.5
    assert not separation(WrongSignForUsers, loss) > 1.5


def recorded(one, batch, chance):
    """The rows that the discriminator is shown, and its scores."""
    seen = []
    hook = one.discriminator.register_forward_hook(lambda _, inputs, scores: seen.append((inputs[0], scores)))
    with torch.no_grad():
        one.loss(batch, share_done=0.0, chance=chance)
    hook.remove()
    assert len(seen) == 1
    return seen[0]


def test_users_and_fakes_are_rows_of_one_kind():
    one = model(items_shown=4, fakes=3000)
    everything = Histories.from_rows([range(30)] * 3000, 30)  # long enough for any length asked for
    rows, _ = recorded(one, one.encode(everything).batch(np.arange(3000)), Chance.seeded(0))
    lengths = (rows != 0).sum(1)
    assert torch.allclose(rows.norm(dim=1), torch.full((6000,), SPEC.input_scale))
    assert torch.allclose(rows[rows != 0], (SPEC.input_scale * lengths.rsqrt()).repeat_interleave(lengths))
    # A geometric length of mean 4 has variance 12, so the mean of 3,000 is known to 0.063; four of those.
    for part in (lengths[:3000], lengths[3000:]):
        assert float(part.float().mean()) == pytest.approx(4.0, abs=4 * 0.063)


def test_a_user_shows_its_own_items_alone():
    real = histories()
    rows, _ = recorded(model(items_shown=3), model().encode(real).batch(np.arange(7)), Chance.seeded(0))
    for user in range(7):
        assert set(torch.nonzero(rows[user]).ravel().tolist()) <= set(real.row(user).tolist())
        assert rows[user].any()


def test_a_user_without_items_is_a_row_of_zeros():
    nobody = Histories.from_rows([[], [3]], 30)
    one = model()
    rows, _ = recorded(one, one.encode(nobody).batch(positions(0, 1)), Chance.seeded(0))
    assert not rows[0].any()
    assert rows[1].any()


class ShowsTheGeneratorAUser(Gan):
    """Matches the features of a user of the last batch: a generator that is no post-processing."""

    def loss(self, users, **options):
        self.shown = self._rows_of(users.users, Chance.seeded(0))
        return super().loss(users, **options)

    def _generator_loss(self, chance):
        return super()._generator_loss(chance) + (self._fakes(3, chance).mean(0) - self.shown[0]).square().sum()


def after_two_different_batches(kind):
    """The generator's weights after a step whose batch differed, with the discriminator held fixed."""
    for users in (positions(0, 1), positions(4, 5)):
        one = model(kind)
        one.loss(one.encode(histories()).batch(users), share_done=0.0, chance=Chance.seeded(9))
        one.after_step(learning_rate=0.1, share_done=0.0, chance=Chance.seeded(8))
        yield torch.cat([p.detach().ravel() for p in one.generator.parameters()])


def test_no_user_reaches_the_generator_past_the_discriminator():
    first, second = after_two_different_batches(Gan)
    assert torch.equal(first, second)
    first, second = after_two_different_batches(ShowsTheGeneratorAUser)
    assert not torch.equal(first, second)


def test_training_the_generator_leaves_the_discriminator_and_its_records_alone():
    one = model()
    descent, release = Descent(one.private_part), release_of(2)
    engine = build_engine(
        "bookkeeping", one.private_part, descent, release, max_grad_norm=CLIP, chance=Chance.seeded(0)
    )
    encoded, chance = one.encode(histories()), Chance.seeded(1)
    for _ in range(2):
        engine.step(encoded.batch(positions(0, 1)), lambda users: one.loss(users, share_done=0.0, chance=chance))
        before = {name: p.detach().clone() for name, p in one.named_parameters()}
        grads = [p.grad.clone() for p in one.discriminator.parameters()]
        one.after_step(learning_rate=0.1, share_done=0.0, chance=chance)
        after = dict(one.named_parameters())
        assert all(torch.equal(p.grad, g) for p, g in zip(one.discriminator.parameters(), grads, strict=True))
        assert not any(rule.recorded or rule._called for rule in engine._rules)
        assert all(p.grad is None for p in one.generator.parameters())
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert moved == {name for name in before if name.startswith("generator.")}
    assert engine.executed() == release  # the generator's steps are not among those charged


def test_weights_are_clipped_after_a_step_of_wasserstein_only():
    for loss, bounded in (("wasserstein", True), ("hinge", False)):
        one = model(loss=loss)
        one.after_step(learning_rate=0.1, share_done=0.0, chance=Chance.seeded(0))
        largest = max(float(p.detach().abs().max()) for p in one.discriminator.parameters())
        assert (largest <= np.float32(SPEC.weight_clip)) == bounded


def test_the_gradient_of_the_draw_is_that_of_the_chance_to_be_drawn():
    # The score of a row is a fixed sum over its items, so the gradient of its mean over draws is known by finite
    # differences of the chances, themselves means over many draws.
    values = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64)
    logits = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64).flip(0).requires_grad_()
    draws = 20_000
    rows = draw_through(logits.expand(draws, -1), torch.full((draws,), 6), Chance.seeded(0))
    per_draw = rows @ values
    assert torch.equal(rows.sum(1), torch.full((draws,), 6.0, dtype=torch.float64))
    (found,) = torch.autograd.grad(per_draw.mean(), logits)

    def mean_score(shifted, seed):
        with torch.no_grad():
            drawn = draw_through(shifted.expand(draws, -1), torch.full((draws,), 6), Chance.seeded(seed))
            return float((drawn @ values).mean())

    direction = torch.sign(torch.arange(30, dtype=torch.float64) % 3 - 1.0)
    # One seed for both sides: the same Gumbel noise, so that the draws differ by the shift alone.
    slope = (mean_score(logits.detach() + 0.1 * direction, 1) - mean_score(logits.detach() - 0.1 * direction, 1)) / 0.2
    assert float(found @ direction) == pytest.approx(slope, rel=0.1)
    assert float(found @ direction) != pytest.approx(-slope, rel=0.1)
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-9)  # a constant added to all logits changes nothing


def test_a_draw_that_leaves_no_choice_has_a_gradient_of_zero():
    logits = torch.tensor([[600.0, 0.0, -600.0], [0.0, 0.0, 0.0]], requires_grad=True)
    rows = draw_through(logits, torch.tensor([1, 3]), Chance.seeded(0))
    assert rows.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    (gradient,) = torch.autograd.grad((rows * torch.tensor([1.0, 2.0, 3.0])).sum(), logits)
    assert torch.isfinite(gradient).all()
    assert not gradient[0].any()


def test_the_same_seed_draws_the_same_users_within_the_catalogue():
    one, lengths = model(), np.array([1, 5, 30], dtype=np.int64)
    first, again, other = (one.draw(lengths, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, other.items)
    assert np.array_equal(first.lengths(), lengths)
    assert all(len(set(first.row(user).tolist())) == lengths[user] for user in range(3))


def test_saved_and_loaded_weights_draw_the_same_users():
    one, lengths = model(), np.array([4, 6], dtype=np.int64)
    saved = {name: value.numpy().copy() for name, value in one.state_dict().items()}
    other = Gan(SPEC)
    load_weights(other, saved)
    draws = [m.draw(lengths, generator=torch.Generator().manual_seed(0)).items for m in (one, other)]
    assert np.array_equal(*draws)


def test_initial_weights_are_a_function_of_the_seed():
    first, again, other = (initial_weights_of(Gan(SPEC), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_a_local_discriminator_stays_home():
    names = [name for name, _ in model().named_parameters()]
    assert not any(model().stays_home(name) for name in names)
    local = model(discriminators="local")
    assert {name for name in names if local.stays_home(name)} == {n for n in names if n.startswith("discriminator.")}


def test_specs_out_of_range_are_refused():
    assert GanSpec.from_dict(SPEC.to_dict()) == SPEC
    with pytest.raises(InputError, match="loss must be one of bce, hinge, wasserstein"):
        dataclasses.replace(SPEC, loss="gradient-penalty")
    with pytest.raises(InputError, match="fakes must be a whole number from 1"):
        dataclasses.replace(SPEC, fakes=0)


@pytest.mark.parametrize("loss", ["bce", "hinge", "wasserstein"])
def test_the_generator_climbs_the_discriminators_scores(loss):
    one = model(loss=loss, fakes=200, weight_clip=100.0)

    def score_of_fakes():
        nobody = one.encode(histories()).batch(positions())
        return float(recorded(one, nobody, Chance.seeded(5))[1].mean())

    before = score_of_fakes()
    for step in range(20):
        one.after_step(learning_rate=0.5, share_done=0.0, chance=Chance.seeded(step))
    assert score_of_fakes() > before + 0.1


def test_fakes_that_pass_for_users_teach_the_generator_nothing_under_bce_only():
    for loss, moves in (("bce", False), ("hinge", True), ("wasserstein", True)):
        one = model(loss=loss, weight_clip=1000.0)
        with torch.no_grad():
            one.discriminator.to_score.bias.fill_(200.0)
        before = one.generator.to_logits.weight.detach().clone()
        one.after_step(learning_rate=1.0, share_done=0.0, chance=Chance.seeded(0))
        assert torch.equal(before, one.generator.to_logits.weight.detach()) != moves


def test_training_learns_which_items_go_together():
    one = model(hidden_size=16, discriminator_size=32, fakes=128, items_shown=6, generator_steps=1, loss="bce")
    rng = np.random.default_rng(0)
    # Users are of the first ten items or of the second; nobody ever has one of the last ten.
    real = Histories.from_rows([10 * (user % 2) + rng.choice(10, 6, replace=False) for user in range(400)], 30)
    encoded, chance = one.encode(real), Chance.seeded(0, "training")
    adam = torch.optim.Adam(one.parameters(), lr=0.01, betas=(0.5, 0.99))
    descent = torch.optim.SGD(one.discriminator.parameters(), lr=0.01)
    for _ in range(300):
        before = [p.detach().clone() for p in one.parameters()]
        batch = encoded.batch(np.flatnonzero(rng.random(400) < 0.32))
        descent.zero_grad()
        one.loss(batch, share_done=0.0, chance=chance).mean().backward()
        descent.step()
        one.after_step(learning_rate=0.01, share_done=0.0, chance=chance)
        for p, start in zip(one.parameters(), before, strict=True):
            p.grad = start - p.detach()  # as the server's FedAdam follows the difference of a round
            p.data.copy_(start)
        adam.step()
    with torch.no_grad():
        shares = torch.softmax(one.decode(one.sample_latent(500, generator=torch.Generator().manual_seed(0))), 1)
    first, second, nobodys = shares[:, :10].sum(1), shares[:, 10:20].sum(1), shares[:, 20:].sum(1)
    # A generator of popularity alone has a half of both in every user.
    assert float((torch.maximum(first, second) / (first + second)).mean()) > 0.8
    assert 0.3 < float((first > second).float().mean()) < 0.7
    assert float(nobodys.mean()) < 0.1
