"""What a run reports of its epochs, with figures that are worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD

from compression.schedule.schedule import PolicyEntry, Schedule
from compression.schedule.windows import Window
from compression.training.arguments import TrainArguments
from compression.training.reporting import ParameterHistograms, SparsityReport, reports_of
from utils.data.loaders import TrainOrder
from utils.errors import UserError
from utils.loop.engine import gather_loss
from utils.loop.hooks import LoopState
from utils.measures.metrics import Evaluation
from utils.output.logs import EarlyStopping, History, StepLog


def network():
    """Two linear layers: 1 of 4 weights is zero, 1 of 2."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    model[1].weight.data = torch.tensor([[0.0, 1.0]])
    return model


def state(top1=0.5, epoch=0, loss=1.0, model=None):
    """A loop's state at the end of an epoch of 4 images whose losses add up to 8: 6 by the labels, 2 by a regularizer."""
    model = model or network()
    run = LoopState(model=model, optimizer=SGD(model.parameters(), lr=0.25), epochs=9, steps_per_epoch=2, epoch=epoch)
    run.evaluation = Evaluation(top1, 1.0, loss, 4, torch.eye(2, dtype=torch.int64))
    run.loss_sums, run.images_seen, run.stop = {"loss": 8.0, "classification": 6.0, "small": 2.0}, 4, ""
    return run


def test_sparsity_csv_and_the_table_of_masks(tmp_path, capsys):
    scheduler = SimpleNamespace(masks=SimpleNamespace(values={"0.weight": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}))
    report = SparsityReport(History(tmp_path, print), scheduler, prints_masks=True)
    run = state()
    report.on_epoch_end(run)
    assert run.metrics == {"sparsity": 2 / 6, "sparsity/0.weight": 0.25, "sparsity/1.weight": 0.5}
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("0.weight"))
    assert line.split()[:5] == ["0.weight", "2x2", "1", "4", "25.00"]

    resumed = SparsityReport(History(tmp_path, print), scheduler, prints_masks=False)
    resumed.load_state_dict(report.state_dict())
    run = state(epoch=1)
    run.model[0].weight.data.zero_()
    resumed.on_epoch_end(run)
    # 2 of 6 is 0.333333; then 4 + 1 of 6, 0.833333
    assert (tmp_path / "sparsity.csv").read_text() == "epoch,total,0.weight,1.weight\n1,0.333333,0.25,0.5\n2,0.833333,1,0.5\n"
    assert capsys.readouterr().out == ""


def test_the_average_is_what_is_reported(tmp_path):
    run = state()
    run.ema = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)))
    run.ema.model[0].weight.data.fill_(1)
    report = SparsityReport(History(None, print), SimpleNamespace(), prints_masks=False)
    report.on_epoch_end(run)
    assert report.rows == [{"epoch": 1, "total": 0.0, "0.weight": 0.0}]


def test_histograms_go_to_tensorboard_alone():
    drawn = []
    history = History(None, print)
    report = ParameterHistograms(history)
    report.on_epoch_end(state())  # without a writer nothing happens
    history.writer = SimpleNamespace(add_histogram=lambda *values: drawn.append(values))
    report.on_epoch_end(state(epoch=2))
    assert [(name, epoch) for name, _, epoch in drawn] == [(f"{i}.{kind}", 3) for i in (0, 1) for kind in ("weight", "bias")]
    assert torch.equal(drawn[0][1], torch.tensor([[1.0, 0.0], [2.0, 3.0]]))


def scheduler_of(kind):
    schedule = Schedule("", [PolicyEntry(kind, "a", "A", None, Window(range(1), 1))])
    return SimpleNamespace(schedule=schedule)


def test_which_reports_a_run_makes():
    feed, history = SimpleNamespace(data=SimpleNamespace(split=lambda name: name)), History(None, print)
    flags = TrainArguments(param_hist=True, act_stats="val")
    made = [type(report).__name__ for report in reports_of(flags, history, scheduler_of("pruner"), feed)]
    assert made == ["SparsityReport", "ParameterHistograms", "ActivationReport"]
    assert reports_of(TrainArguments(), history, scheduler_of("distiller"), feed) == []  # nothing gets sparse
    assert reports_of(TrainArguments(), history, None, feed) == []
    for scheduler in (None, scheduler_of("distiller")):
        with pytest.raises(UserError, match="--masks-sparsity shows a schedule's masks; give --compress FILE with a pruner"):
            reports_of(TrainArguments(masks_sparsity=True), history, scheduler, feed)
    with pytest.raises(UserError, match="act-stats is 'vall'; it is the images to measure on: train, val, test"):
        reports_of(TrainArguments(act_stats="vall"), history, None, feed)


def after(history, top1s, stopping=None):
    """Play epochs with these top-1; return the states."""
    runs = [state(top1, epoch) for epoch, top1 in enumerate(top1s)]
    for run in runs:
        history.on_epoch_end(run)
        if stopping:
            stopping.on_epoch_end(run)
    return runs


def test_the_best_epoch_is_one_that_has_reached_the_target():
    kept = []
    history = History(None, lambda run: kept.append(run.epoch + 1), counts=lambda run: run.epoch >= 2)
    after(history, [0.9, 0.95, 0.6, 0.5, 0.7])
    # epochs 1 and 2 are better, but not what was asked for: epoch 3 takes their place whatever it reaches
    assert kept == [1, 2, 3, 5]
    assert history.best_epoch == 5
    assert history.best.top1 == 0.7


def test_the_best_of_a_resumed_run_counts_where_it_counted():
    history = History(None, print, counts=lambda run: run.epoch >= 1)
    after(history, [0.9, 0.6])
    resumed = History(None, print, counts=lambda run: run.epoch >= 1)
    resumed.load_state_dict(history.state_dict())
    resumed.on_epoch_end(state(0.5, 2))
    assert (resumed.counting, resumed.best_epoch, resumed.best.top1) == (True, 2, 0.6)
    early = History(None, print, counts=lambda run: run.epoch >= 1)
    after(early, [0.9])
    resumed.load_state_dict(early.state_dict())
    resumed.on_epoch_end(state(0.1, 1))
    assert (resumed.counting, resumed.best_epoch, resumed.best.top1) == (True, 2, 0.1)


def test_unreadable_images_of_the_best_epoch_survive_a_restart():
    history = History(None, print)
    history.best = Evaluation(0.5, 1.0, 1.0, 4, torch.eye(2, dtype=torch.int64), unreadable=("a.jpg",))
    resumed = History(None, print)
    resumed.load_state_dict(history.state_dict())
    assert resumed.best.unreadable == ("a.jpg",)


def test_early_stopping_waits_for_the_target():
    history = History(None, lambda run: None, counts=lambda run: run.epoch >= 3)
    runs = after(history, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], EarlyStopping(2, history))
    # the best counts from epoch 4 on, which is it; two epochs without a better one are over after epoch 6
    assert [run.stop for run in runs] == ["", "", "", "", "", "no improvement for 2 epochs"]
    never = History(None, lambda run: None)
    assert not any(run.stop for run in after(never, [0.9, 0.8, 0.7], EarlyStopping(0, never)))


def test_loss_parts_are_columns_as_soon_as_there_are_two(tmp_path):
    history = History(tmp_path, lambda run: None)
    history.writer = SimpleNamespace(add_scalar=lambda *_: None)
    plain = state()
    plain.loss_sums = {"loss": 8.0, "classification": 8.0}
    history.on_epoch_end(plain)
    parts = state(epoch=1)
    parts.metrics = {"sparsity": 0.5, "sparsity/0.weight": 0.25}
    history.on_epoch_end(parts)
    head, first, second = ((line.split(",")) for line in (tmp_path / "results.csv").read_text().splitlines())
    assert head[8:] == ["sparsity", "loss_classification", "loss_small"]  # one of many stays out
    assert first[8:] == ["", "", ""]
    assert second[1] == "2"  # 8 / 4 images
    assert second[8:] == ["0.5", "1.5", "0.5"]  # 6 / 4, 2 / 4


def test_loss_parts_are_gathered_from_all_ranks(monkeypatch):
    monkeypatch.setattr("utils.loop.engine.distributed.sum_", lambda tensor: tensor * 2)  # a second rank with the same figures
    run = state()
    run.precision = SimpleNamespace(device=torch.device("cpu"))
    run.device = torch.device("cpu")
    gather_loss(run)
    assert run.loss_sums == {"classification": 12.0, "loss": 16.0, "small": 4.0}
    assert run.images_seen == 8
    run = state()
    run.device = torch.device("cpu")
    monkeypatch.setattr("utils.loop.engine.distributed.is_main", lambda: False)
    gather_loss(run)
    assert (run.loss_sums, run.images_seen) == ({}, 0)  # rank 0 has them


def test_a_line_every_so_many_batches(capsys):
    run = state(epoch=1)
    run.loss, run.loss_parts = torch.tensor(2.0), {"classification": torch.tensor(1.5), "small": torch.tensor(0.5)}
    log = StepLog(2)
    for run.step in range(2):
        log.on_minibatch_end(run)
    assert capsys.readouterr().out == "epoch 2 step 2/2: loss 2.0000 (classification 1.5000, small 0.5000), lr 0.25\n"
    StepLog(0).on_minibatch_end(run)
    assert capsys.readouterr().out == ""


def test_a_share_of_the_training_images_is_another_one_in_each_epoch():
    seen = []
    for rank in range(2):
        order = TrainOrder(10, batch_size=2, seed=0, rank=rank, world_size=2, share=0.6)
        assert order.batch_sizes() == [3]  # 6 images, 3 a rank: the last one joins the batch before it
        epochs = []
        for order.epoch in range(30):
            epochs.append([draw.position for batch in order for draw in batch])
        seen.append(epochs)
    for first, second in zip(*seen, strict=True):
        assert len({*first, *second}) == 6  # none twice
    assert {position for epoch in seen[0] for position in epoch} == set(range(10))
    assert len({tuple(epoch) for epoch in seen[0]}) > 20
    assert TrainOrder(3, 2, 0, 0, 1, share=0.01).images == 1  # never none
