"""A run with a schedule, on two processes, is stopped and goes on: it ends with the bits of one that was left alone.

Each process runs a whole training run of its rank, writes its state at the end, and can be killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from tests.launch import Launch
from utils.arguments import parse
from utils.errors import Interrupted
from utils.loop.hooks import Hook
from utils.loop.precision import cpu_has_bf16

# Prunes weights and filters, thins in epoch 1, quantizes in epoch 2, regularizes, distils, sets the learning rate.
EVERYTHING = """
version: 1
pruners:
  elements:
    class: AutomatedGradualPruner
    initial_sparsity: 0.1
    final_sparsity: 0.6
    weights: ['layer[23].?.conv2.weight']
  filters:
    class: L1RankedStructureParameterPruner_AGP
    initial_sparsity: 0.25
    final_sparsity: 0.5
    group_type: Filters
    weights: ['layer?.?.conv1.weight']
regularizers:
  small: {class: L1Regularizer, reg_regims: {'layer1.?.conv2.weight': 1.0e-4}}
distillers:
  dense: {class: KnowledgeDistillation, resume: TEACHER, temperature: 2}
quantizers:
  int8: {class: QuantAwareTrainRangeLinearQuantizer, ema_decay: 0.9, per_channel_wts: true}
extensions:
  thinning: {class: FilterRemover}
lr_schedulers:
  steps: {class: MultiStepLR, milestones: [2], gamma: 0.1}
policies:
  - pruner: {instance_name: elements}
    starting_epoch: 0
    ending_epoch: 4
  - pruner: {instance_name: filters}
    starting_epoch: 0
    ending_epoch: 2
  - extension: {instance_name: thinning}
    epochs: [1]
  - quantizer: {instance_name: int8}
    starting_epoch: 2
  - regularizer: {instance_name: small}
    starting_epoch: 0
    ending_epoch: 3
  - distiller: {instance_name: dense}
    starting_epoch: 0
  - lr_scheduler: {instance_name: steps}
    starting_epoch: 0
"""
# Masks that hide weights that go on learning, drawn anew before every batch.
SURGERY = """
version: 1
pruners:
  surgery: {class: SplicingPruner, sensitivities: {'layer?.?.conv?.weight': 0.3}, low_thresh_mult: 0.8, hi_thresh_mult: 1.0}
policies:
  - pruner:
      instance_name: surgery
      args: {mini_batch_pruning_frequency: 1, mask_on_forward_only: true, use_double_copies: true, keep_mask: true}
    starting_epoch: 0
    ending_epoch: 3
"""
SMALL = ("--data", "digits", "--imgsz", 16, "--batch-size", 128, "--workers", 0, "--device", "cpu", "--effective-train-size", 0.3)
FLAGS = (*SMALL, "--accumulate", 2, "--epochs", 4, "--print-freq", 1, "--lr0", 0.002)


class Pause(Hook):
    """Waits after a batch (epoch and step counted from 1) until the process is killed or asked to stop."""

    def __init__(self, epoch: int, step: int) -> None:
        self.place = epoch, step

    def on_minibatch_end(self, run):
        if (run.epoch + 1, run.step + 1) == self.place:
            print("waits")
            while not run.interrupted:
                time.sleep(0.005)


def work(name: str, argv: tuple[object, ...], pause: tuple[int, int] | None) -> None:
    """Train, and write this rank's state to NAME.RANK.pt."""
    rank = int(os.environ.get("RANK", 0))
    arguments, given = parse(TrainArguments, "", list(map(str, argv)))
    compressor = ClassifierCompressor(arguments, given=given)
    print(compressor.summary())
    if pause and rank == 0:  # the others wait for it
        compressor.hooks.append(Pause(*pause))
    try:
        compressor.run_training_loop()
    except Interrupted:
        sys.exit(130)
    run, scheduler = compressor.run, compressor.scheduler
    state = {"model": run.model.state_dict(), "average": run.averaged.state_dict(), "masks": scheduler.masks.state_dict()}
    torch.save({**state, "optimizer": run.optimizer.state_dict()}, f"{name}.{rank}.pt")


def training(folder: Path, name: str, *argv: object, world: int = 2, pause: tuple[int, int] | None = None) -> Launch:
    """Return a launch of a training run."""
    return Launch(folder, name, work, name, argv, pause, world=world)


def stop_where_it_waits(launch: Launch, number: int) -> None:
    launch.wait_until(lambda: "waits\n" in launch.outputs[0])
    launch.stop(number)


def assert_same(expected, found, where=""):
    """Assert that two trees of mappings, lists, tensors and values are the same, bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert expected.dtype == found.dtype, where
        assert torch.equal(expected, found), where
    elif isinstance(expected, dict):
        assert set(expected) == set(found), where
        for key, value in expected.items():
            assert_same(value, found[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found), where
        for i, value in enumerate(expected):
            assert_same(value, found[i], f"{where}/{i}")
    else:
        assert expected == found, where


def last(folder, name):
    """The checkpoint of a finished run, without its path and its times."""
    content = torch.load(folder / f"runs/train/{name}/weights/last.pt", weights_only=True)
    del content["arguments"]
    for row in content["training"]["hooks"]["History"].pop("rows"):
        content["metrics"] |= {f"{row['epoch']} {key}": value for key, value in row.items() if "second" not in key}
    del content["training"]["hooks"]["History"]["seconds"]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two schedules, and teacher.pt: a network that has learnt for an epoch, which also is where the runs begin."""
    folder = tmp_path_factory.mktemp("schedules")
    flags = (*SMALL, "--model", "resnet20-b", "--epochs", 1, "--project", folder / "teacher")
    ClassifierCompressor(parse(TrainArguments, "", list(map(str, flags)))[0]).run_training_loop()
    (folder / "teacher/exp/weights/best.pt").rename(folder / "teacher.pt")
    (folder / "everything.yaml").write_text(EVERYTHING.replace("TEACHER", str(folder / "teacher.pt")))
    (folder / "surgery.yaml").write_text(SURGERY)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run with every kind of policy on two processes that is left alone."""
    with training(folder, "whole", *FLAGS, "--weights", "teacher.pt", "--compress", "everything.yaml", "--name", "whole") as launch:
        launch.finish()
    return folder


def test_ranks_agree_and_the_sparsity_is_what_the_schedule_says(whole):
    first, second = (torch.load(whole / f"whole.{rank}.pt", weights_only=True) for rank in range(2))
    # Of the model each rank has its own statistics, and images of the weights on grids that norms are folded into; of the
    # average all have rank 0's.
    own = ("running_mean", "running_var", "input_low", "input_high")
    for state in (first, second):
        images = {name.replace(".float_", ".") for name in state["model"] if ".float_" in name}
        assert len(images) == 22  # 19 convolutions, two shortcuts, one linear layer
        state["model"] = {name: value for name, value in state["model"].items() if not name.endswith(own) and name not in images}
    assert_same(first, second)
    content = last(whole, "whole")
    assert_same(content["state_dict"], first["average"])
    log = (whole / "whole.0.log").read_text()
    assert ("bfloat16" in log) == cpu_has_bf16()
    weights = content["state_dict"]
    # Half of the first convolutions' filters are gone: 16 -> 8, 32 -> 16, 64 -> 32.
    assert [weights[f"layer{stage}.1.conv1.weight"].shape[0] for stage in (1, 2, 3)] == [8, 16, 32]
    for block in range(3):
        # 60 % of what is left: 32 * 16 * 9 = 4,608, of which 2,764.8; 64 * 32 * 9 = 18,432, of which 11,059.2
        for stage, zeros in ((2, 2_764), (3, 11_059)):
            assert int((weights[f"layer{stage}.{block}.conv2.float_weight"] == 0).sum()) == zeros
            assert int((weights[f"layer{stage}.{block}.conv2.weight"] == 0).sum()) >= zeros
    rates = [content["metrics"][f"{epoch} lr"] for epoch in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.002, 0.002, 0.0002, 0.0002])  # a tenth from epoch 2, counted from 0, on
    assert {"1 loss_small", "1 loss_classification", "4 loss_distillation"} <= set(content["metrics"])
    assert "4 loss_small" not in content["metrics"]  # its window has ended


STOPS = {
    "before the cut": ((2, 3), signal.SIGKILL),  # goes on from the end of epoch 1, and cuts again
    "quantized": ((4, 2), signal.SIGKILL),
    "asked to": ((3, 1), signal.SIGINT),  # the quantized network is saved after step 2, which ends the accumulation
}


@pytest.mark.parametrize("when", STOPS)
def test_two_processes_with_every_policy_go_on_to_the_same_bits(whole, when):
    pause, number = STOPS[when]
    name = when.replace(" ", "_")
    with training(whole, name, *FLAGS, "--weights", "teacher.pt", "--compress", "everything.yaml", "--name", name, pause=pause) as launch:
        stop_where_it_waits(launch, number)
    with training(whole, f"{name}_resumed", "--resume-from", f"runs/train/{name}") as launch:
        launch.finish()
    log = launch.outputs[0]
    begin = {"before the cut": "epoch 2 step 1/4", "quantized": "epoch 4 step 1/4", "asked to": "epoch 3 step 3/4"}[when]
    assert next(line for line in log.splitlines() if " step " in line and ": loss" in line).startswith(begin)
    assert_same(last(whole, "whole"), last(whole, name))
    for rank in range(2):
        expected, found = (torch.load(whole / f"{run}.{rank}.pt", weights_only=True) for run in ("whole", f"{name}_resumed"))
        assert_same(expected, found)


def test_hidden_weights_survive_a_kill(folder):
    flags = (*FLAGS, "--weights", "teacher.pt", "--compress", "surgery.yaml")
    for name in ("surgery", "killed"):
        pause = (2, 3) if name == "killed" else None
        with training(folder, name, *flags, "--name", name, world=1, pause=pause) as launch:
            _ = stop_where_it_waits(launch, signal.SIGKILL) if pause else launch.finish()
    saved = torch.load(folder / "runs/train/killed/weights/last.pt", weights_only=True)["training"]["hooks"]["CompressionScheduler"]
    hidden, masks = saved["masks"]["hidden"], saved["masks"]["values"]
    assert any(bool(hidden[name][~mask].any()) for name, mask in masks.items())  # behind the masks there is something to lose
    (folder / "surgery.yaml").unlink()  # the run has its own copy
    with training(folder, "killed_resumed", "--resume-from", "runs/train/killed", world=1) as launch:
        launch.finish()
    assert_same(last(folder, "surgery"), last(folder, "killed"))
