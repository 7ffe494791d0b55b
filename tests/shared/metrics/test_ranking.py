import numpy as np
import pytest

from shared.data.histories import Histories
from shared.errors import InputError, LeakError
from shared.metrics.ranking import parse_metric, rank

LOG2_3, LOG2_5 = np.log2(3), np.log2(5)


class Fixed:
    """A recommender whose scores are given; keeps the largest batch it was asked for."""

    def __init__(self, scores):
        self.by_first_item = scores
        self.largest_batch = 0

    def scores(self, fold_in):
        self.largest_batch = max(self.largest_batch, fold_in.num_users)
        return np.array(
            [self.by_first_item[int(fold_in.row(u)[0])] for u in range(fold_in.num_users)], dtype=np.float32
        )


def histories(*rows, num_items=6):
    return Histories.from_rows(rows, num_items)


def test_ndcg_and_recall_by_hand():
    # User 0 knows item 0 (score 9, masked) and ranks 1 2 3 4 5. Wanted 1, 3, 5: hits at places 1 and 3 of the first 3.
    # User 1 knows item 1 and ranks 5 4 3 2 0. Wanted 4 alone: a hit at place 2.
    recommender = Fixed({0: [9, 5, 4, 3, 2, 1], 1: [0, 9, 1, 2, 3, 4]})
    ranking = rank(recommender, histories([0], [1]), histories([1, 3, 5], [4]), k=3)
    ideal_of_three = 1 + 1 / LOG2_3 + 1 / 2
    np.testing.assert_allclose(ranking.ndcg, [(1 + 1 / 2) / ideal_of_three, 1 / LOG2_3])
    np.testing.assert_allclose(ranking.recall, [2 / 3, 1])
    assert ranking.coverage == 5 / 6  # 1 2 3 and 5 4 3


def test_recall_is_divided_by_what_a_short_list_can_hold():
    ranking = rank(Fixed({0: [0, 5, 4, 3, 2, 1]}), histories([0]), histories([1, 2, 4, 5]), k=2)
    assert ranking.recall.tolist() == [1.0]
    assert ranking.ndcg.tolist() == [1.0]


def test_lists_longer_than_the_catalogue_still_count_every_place():
    ranking = rank(Fixed({0: [9, 5, 4, 3, 2, 1]}), histories([0]), histories([4]), k=50)
    np.testing.assert_allclose(ranking.ndcg, [1 / LOG2_5])
    assert ranking.coverage == 5 / 6  # the known item is never shown


def test_known_items_are_masked_even_if_they_score_highest():
    ranking = rank(Fixed({0: [9, 8, 1, 0, 0, 0]}), histories([0, 1]), histories([2]), k=1)
    assert ranking.ndcg.tolist() == [1.0]


def test_catalogue_order_does_not_help_a_recommender_that_knows_nothing():
    num_items = 1000
    users = 200
    ranking = rank(
        Fixed({999: np.zeros(num_items)}),
        Histories.from_rows([[999]] * users, num_items),
        Histories.from_rows([range(20)] * users, num_items),  # the "most popular" head of the catalogue
    )
    assert ranking.recall.mean() < 0.2


@pytest.mark.parametrize("batch_users", [1, 2, 3, 100])
def test_batches_bound_the_memory_and_change_nothing(batch_users):
    rng = np.random.default_rng(0)
    table = {item: rng.permutation(30).astype(float) for item in range(7)}
    fold_in = Histories.from_rows([[u] for u in range(7)], 30)
    targets = Histories.from_rows([rng.choice(np.arange(7, 30), 4, replace=False) for _ in range(7)], 30)
    recommender = Fixed(table)
    batched, whole = (
        rank(recommender, fold_in, targets, k=5, batch_users=batch_users),
        rank(Fixed(table), fold_in, targets, k=5),
    )
    assert recommender.largest_batch <= batch_users
    np.testing.assert_array_equal(batched.ndcg, whole.ndcg)
    np.testing.assert_array_equal(batched.recall, whole.recall)
    assert batched.coverage == whole.coverage


def test_scores_match_ten_slow_obvious_lines():
    rng = np.random.default_rng(1)
    scores = rng.permutation(40).astype(float)
    targets = [3, 8, 21, 30]
    ranking = rank(Fixed({39: scores}), Histories.from_rows([[39, 5]], 40), Histories.from_rows([targets], 40), k=10)
    order = [item for item in sorted(range(40), key=lambda item: -scores[item]) if item not in (39, 5)][:10]
    dcg = sum(1 / np.log2(place + 2) for place, item in enumerate(order) if item in targets)
    ideal = sum(1 / np.log2(place + 2) for place in range(4))
    assert ranking.ndcg[0] == pytest.approx(dcg / ideal)
    assert ranking.recall[0] == pytest.approx(sum(item in targets for item in order) / 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match=r"learning_rate or raise recommender\.l2"):
        rank(Fixed({0: [0, 1, bad, 0, 0, 0]}), histories([0]), histories([1]))


def test_scores_of_a_part_of_the_catalogue_are_refused():
    with pytest.raises(InputError, match="the whole catalogue"):
        rank(Fixed({0: [0, 1, 2]}), histories([0]), histories([1]))


def test_users_without_targets_are_refused():
    with pytest.raises(InputError, match="Leave them out"):
        rank(Fixed({}), histories([0], [1]), histories([1], []))
    with pytest.raises(InputError, match="Hold out more users"):
        rank(Fixed({}), histories(), histories())


def test_a_target_in_the_fold_in_is_a_leak():
    with pytest.raises(LeakError, match="Split the histories again"):
        rank(Fixed({}), histories([0, 2]), histories([2]))


def test_metric_names():
    assert parse_metric("ndcg@20") == ("ndcg", 20)
    for wrong in ("ndcg", "ndcg@0", "map@20", "recall@-1", "ndcg@x"):
        with pytest.raises(InputError, match="for example ndcg@20"):
            parse_metric(wrong)
    ranking = rank(Fixed({0: [9, 5, 4, 3, 2, 1]}), histories([0]), histories([1]), k=3)
    with pytest.raises(InputError, match="ranked to 3"):
        ranking.metric("ndcg@20")
