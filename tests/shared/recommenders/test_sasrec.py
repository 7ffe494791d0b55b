import numpy as np
import pytest

from shared.data.histories import Histories
from shared.recommenders.sasrec import sample_users


@pytest.mark.parametrize("mass", [10, 75, 500, 1234])
def test_sampled_users_have_the_mass_that_was_asked_for(mass):
    rng = np.random.default_rng(0)
    histories = Histories.from_rows([rng.integers(0, 50, size=rng.integers(1, 12)) for _ in range(60)], 50)
    drawn = sample_users(histories, mass, rng=rng)
    total = histories.lengths()[drawn].sum()
    assert abs(total - mass) <= 6  # half of the longest history
    times = np.bincount(drawn, minlength=60)
    assert times.max() - times.min() <= 1
