"""A run with a schedule, on two processes, is stopped and goes on: it ends with the bits of one that was left alone.

Each process runs a whole training run of its rank, writes its state at the end, and can be killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from tests.launch import Launch, Pause
from tests.schedules import THINNING, elements, filters, once, policy
from utils.arguments import parse
from utils.errors import Interrupted
from utils.loop.precision import cpu_has_bf16

# Convolutions: model.0 (16 filters); model.1: cv1, cv2 (8), m.0.cv1, m.0.cv2 (8, with a shortcut), cv3 (16); model.2 (40)
NETWORK = {"layers": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "C3", [16]], [-1, 1, "Classify", ["nc", 40]]]}


def everything(teacher):
    """Prune weights and filters, thin in epoch 1, quantize in epoch 2, regularize, distil, set the learning rate."""
    return {
        "version": 1,
        "pruners": {
            "elements": elements(["model.1.m.0.cv2.conv.weight", "model.1.cv3.conv.weight"], 0.1, 0.6),
            "filters": filters(["model.0.conv.weight", "model.1.m.0.cv1.conv.weight"], 0.5, begin=0.25),
        },
        "regularizers": {"small": {"class": "L1Regularizer", "reg_regims": {"model.1.cv2.conv.weight": 1e-4}}},
        "distillers": {"dense": {"class": "KnowledgeDistillation", "resume": str(teacher), "temperature": 2}},
        "quantizers": {"int8": {"class": "QuantAwareTrainRangeLinearQuantizer", "ema_decay": 0.9, "per_channel_wts": True}},
        "extensions": THINNING,
        "lr_schedulers": {"steps": {"class": "MultiStepLR", "milestones": [2], "gamma": 0.1}},
        "policies": [
            policy("pruner", "elements", 0, 4),
            policy("pruner", "filters", 0, 2),
            once("extension", "thinning", 1),
            policy("quantizer", "int8", 2),
            policy("regularizer", "small", 0, 3),
            policy("distiller", "dense", 0),
            policy("lr_scheduler", "steps", 0),
        ],
    }


# Masks that hide weights that go on learning, drawn anew before every batch.
SURGERY = """
version: 1
pruners:
  surgery: {class: SplicingPruner, sensitivities: {'model.*.conv.weight': 0.3}, low_thresh_mult: 0.8, hi_thresh_mult: 1.0}
policies:
  - pruner:
      instance_name: surgery
      args: {mini_batch_pruning_frequency: 1, mask_on_forward_only: true, use_double_copies: true, keep_mask: true}
    starting_epoch: 0
    ending_epoch: 3
"""
SMALL = ("--data", "digits", "--imgsz", 16, "--batch-size", 128, "--workers", 0, "--device", "cpu", "--effective-train-size", 0.3)
FLAGS = (*SMALL, "--accumulate", 2, "--epochs", 4, "--print-freq", 1, "--lr0", 0.002)


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
    (folder / "network.yaml").write_text(yaml.safe_dump(NETWORK))
    flags = (*SMALL, "--model", folder / "network.yaml", "--epochs", 1, "--project", folder / "teacher")
    ClassifierCompressor(parse(TrainArguments, "", list(map(str, flags)))[0]).run_training_loop()
    (folder / "teacher/exp/weights/best.pt").rename(folder / "teacher.pt")
    (folder / "everything.yaml").write_text(yaml.safe_dump(everything(folder / "teacher.pt")))
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
        assert len(images) == 8  # 7 convolutions, one linear layer
        state["model"] = {name: value for name, value in state["model"].items() if not name.endswith(own) and name not in images}
    assert_same(first, second)
    content = last(whole, "whole")
    assert_same(content["state_dict"], first["average"])
    log = (whole / "whole.0.log").read_text()
    assert ("bfloat16" in log) == cpu_has_bf16()
    weights = content["state_dict"]
    # Half of the filters of two convolutions are gone: 16 -> 8, 8 -> 4.
    assert [weights[f"model.{name}.conv.weight"].shape[0] for name in ("0", "1.m.0.cv1")] == [8, 4]
    # 60 % of what is left: 8 * 4 * 9 = 288, of which 172.8; 16 * 16 = 256, of which 153.6
    for name, zeros in (("m.0.cv2", 172), ("cv3", 153)):
        assert int((weights[f"model.1.{name}.conv.float_weight"] == 0).sum()) == zeros
        assert int((weights[f"model.1.{name}.conv.weight"] == 0).sum()) >= zeros
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
        launch.stop_where_it_waits(number)
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
            _ = launch.stop_where_it_waits(signal.SIGKILL) if pause else launch.finish()
    saved = torch.load(folder / "runs/train/killed/weights/last.pt", weights_only=True)["training"]["hooks"]["CompressionScheduler"]
    hidden, masks = saved["masks"]["hidden"], saved["masks"]["values"]
    assert any(bool(hidden[name][~mask].any()) for name, mask in masks.items())  # behind the masks there is something to lose
    (folder / "surgery.yaml").unlink()  # the run has its own copy
    with training(folder, "killed_resumed", "--resume-from", "runs/train/killed", world=1) as launch:
        launch.finish()
    assert_same(last(folder, "surgery"), last(folder, "killed"))
