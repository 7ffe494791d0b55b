import pytest
import torch

from shared.recommenders.epochs import share_of_weight
from shared.recommenders.multvae import MultVae


@pytest.mark.parametrize(
    ("epochs", "stops"), [(1, [1]), (3, [1, 2, 3]), (12, [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]), (50, range(5, 51, 5))]
)
def test_early_stopping_chooses_among_tenths(epochs, stops):
    recommender = MultVae(10, 4, epochs=epochs, learning_rate=0.01, device=torch.device("cpu"))
    assert [variant.stop_after for variant in recommender.variants()] == list(stops)


def test_fading_goes_from_all_to_nothing():
    assert [share_of_weight("fade", done) for done in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [share_of_weight("constant", done) for done in (0.0, 0.25, 1.0)] == [1.0, 1.0, 1.0]
