"""Every engine gives every guarantee."""

import pytest

from shared.dpsgd.engines import ENGINES
from tests.shared.dpsgd.checks import CHECKS, largest_move


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("engine", ENGINES)
def test_guarantee(engine, check):
    check(ENGINES[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_clip_is_reached_so_that_the_bound_is_no_idle_one(engine):
    assert largest_move(ENGINES[engine]) > 1 - 1e-6
