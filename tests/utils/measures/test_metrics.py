import math

import pytest
import torch

from utils.errors import UserError
from utils.measures.metrics import Evaluation, Tally, accuracy_text, per_class

# true 0: predicted 0, 0, 1; true 1: predicted 1; true 2: predicted 0, 2
ANSWERS = [(0, 0), (0, 0), (0, 1), (1, 1), (2, 0), (2, 2)]


def logits_of(predictions, classes=3, height=2.0):
    return height * torch.eye(classes)[torch.tensor(predictions)]


def tally_of(answers, batch_size=10, classes=3):
    tally = Tally.empty(classes)
    for begin in range(0, len(answers), batch_size):
        truth, guesses = zip(*answers[begin : begin + batch_size], strict=True)
        tally.add(logits_of(guesses, classes), torch.tensor(truth))
    return tally


@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_counts_do_not_depend_on_the_batches(batch_size):
    tally = tally_of(ANSWERS, batch_size)
    assert tally.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert tally.top5 == 6  # of three classes all are among the first five
    # logits (2, 0, 0): -log p is log(e^2 + 2) - 2 when right, log(e^2 + 2) when wrong; 4 right, 2 wrong
    assert tally.loss == pytest.approx(6 * math.log(math.e**2 + 2) - 8, rel=1e-6)


def test_fractions_by_hand():
    result = Evaluation.of(tally_of(ANSWERS), speed_ms={"inference": 1.5}, unreadable=("a.jpg",))
    assert result.top1 == pytest.approx(4 / 6)
    assert result.top5 == 1
    assert result.images == 6
    assert result.loss == pytest.approx(math.log(math.e**2 + 2) - 8 / 6, rel=1e-6)
    assert (result.speed_ms, result.unreadable) == ({"inference": 1.5}, ("a.jpg",))


def test_per_class_by_hand():
    table = per_class(Evaluation.of(tally_of(ANSWERS)), ("ant", "bee", "cat"))
    assert table["class"].tolist() == ["ant", "bee", "cat"]
    # predicted 3, 2, 1 times; right 2, 1, 1 times; of 3, 1, 2 images
    assert table["precision"].tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    assert table["recall"].tolist() == pytest.approx([2 / 3, 1, 1 / 2])
    # 2PR / (P + R): 2/3; 1 / 1.5; 1 / 1.5
    assert table["f1"].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert table["support"].tolist() == [3, 1, 2]


def test_class_that_never_occurs_and_is_never_predicted_counts_zero():
    table = per_class(Evaluation.of(tally_of([(0, 0), (1, 0)])), ("a", "b", "c"))
    assert table.loc[2, ["precision", "recall", "f1", "support"]].tolist() == [0, 0, 0, 0]
    assert table.loc[1, ["precision", "recall", "f1", "support"]].tolist() == [0, 0, 0, 1]
    assert table.loc[0, "precision"] == 0.5


def test_top5_counts_the_five_likeliest():
    tally = Tally.empty(8)
    # logits 7, 6, ... 0: the classes 0 to 4 are the first five
    tally.add(torch.arange(7.0, -1.0, -1.0).repeat(8, 1), torch.arange(8))
    assert tally.top5 == 5
    assert tally.confusion[:, 0].tolist() == [1] * 8
    assert Evaluation.of(tally).top5 == 5 / 8


def test_images_without_a_label_are_left_out():
    tally = Tally.empty(3)
    tally.add(logits_of([0, 1, 2]), torch.tensor([-1, 1, -1]))
    tally.add(logits_of([0]), torch.tensor([-1]))
    assert int(tally.confusion.sum()) == 1
    assert Evaluation.of(tally).top1 == 1


def test_loss_is_summed_in_double_precision():
    tally = Tally.empty(2)
    tally.add(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
    assert tally.loss == pytest.approx(2.0611536e-9, rel=1e-6, abs=0)  # log(1 + e^-20), which is 0 in float32


def test_one_process_is_its_own_sum():
    tally = tally_of(ANSWERS)
    total = tally.over_all_ranks(torch.device("cpu"))
    assert torch.equal(total.confusion, tally.confusion)
    assert (total.top5, total.loss) == (tally.top5, tally.loss)


def test_nothing_to_measure_is_refused():
    with pytest.raises(UserError, match="no image of this split could be read"):
        Evaluation.of(Tally.empty(3))


@pytest.mark.parametrize(
    ("first", "second", "better"),
    [((0.9, 1.0), (0.8, 0.1), True), ((0.8, 0.1), (0.9, 1.0), False), ((0.9, 0.1), (0.9, 0.2), True), ((0.9, 0.2), (0.9, 0.2), False)],
)
def test_better_is_a_higher_top1_or_a_lower_loss_at_the_same(first, second, better):
    make = lambda top1, loss: Evaluation(top1, 1.0, loss, 10, torch.zeros(2, 2))  # noqa: E731
    assert make(*first).better_than(make(*second)) is better
    assert make(*first).better_than(None)


def test_top5_of_five_classes_says_nothing():
    values = {"top1": 0.5, "top5": 1.0, "loss": 1.25}
    assert accuracy_text(values, 5) == "top-1 50.00%, loss 1.2500"
    assert accuracy_text(values, 6) == "top-1 50.00%, top-5 100.00%, loss 1.2500"
