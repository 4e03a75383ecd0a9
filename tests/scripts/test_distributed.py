from __future__ import annotations

import json
import os
import signal
import socket
import tarfile
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.launch import Launch, as_script

# 37 training images of which two ranks get 19 each, one twice; 15 validation images, 8 and 7.
FLAGS = ("--device", "cpu", "--model", "resnet20", "--imgsz", 16, "--batch-size", 12, "--workers", 0, "--optimizer", "SGD", "--lr0", 0.02)


def as_torchrun(restarts: int, *command: object) -> None:
    """Be ``torchrun --standalone --nproc_per_node 2 --max-restarts RESTARTS COMMAND``; its workers are forked, so they import nothing."""
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    elastic_launch(LaunchConfig(1, 1, 2, **rendezvous, max_restarts=restarts, start_method="fork"), as_script)(*command)


def test_two_processes_train_write_once_count_exactly_and_survive_a_kill(script, photos, tmp_path):
    flags = ("--data", photos, "--epochs", 4, "--accumulate", 2, "--mixup", 0.3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    with Launch(whole, "whole", as_script, "train.py", *FLAGS, *flags, world=2) as processes:
        output = processes.finish()
    assert "x 2 processes" in output
    assert output.count("best epoch") == 1
    assert [p.name for p in (whole / "runs/train").iterdir()] == ["exp"]
    results = json.loads((whole / "runs/train/exp/results.json").read_text())

    # What two processes counted is what one counts.
    measured = script("val.py", "--weights", whole / results["checkpoint"], "--data", photos, "--workers", 0)
    assert measured.code == 0, measured.err
    alone = json.loads((tmp_path / "runs/val/exp/results.json").read_text())
    assert alone["images"] == 15
    assert alone["top1"] == results["top1"]
    assert alone["loss"] == pytest.approx(results["loss"], rel=1e-5)

    # A worker dies after the first epoch; torchrun starts new ones, and the run goes on to the same bits.
    with Launch(killed, "killed", as_torchrun, 1, "train.py", *FLAGS, *flags) as launch:
        launch.wait_until((killed / "runs/train/exp/results.csv").exists)
        os.kill(workers_of(launch.processes[0].pid)[-1], signal.SIGKILL)
        output = launch.finish()
    assert "resume runs/train/exp at epoch" in output
    assert [p.name for p in (killed / "runs/train").iterdir()] == ["exp"]
    expected, state = (torch.load(folder / "runs/train/exp/weights/last.pt")["state_dict"] for folder in (whole, killed))
    assert all(torch.equal(expected[key], state[key]) for key in expected)


def as_node(port: int, *command: object) -> None:
    """Be ``torchrun --nnodes 2 --nproc_per_node 1 --rdzv_endpoint localhost:PORT COMMAND`` on one of two machines."""
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": f"localhost:{port}", "run_id": "nodes"}
    elastic_launch(LaunchConfig(2, 2, 1, **rendezvous, max_restarts=0, start_method="fork"), as_script)(*command)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_two_nodes_train_on_shards_are_killed_and_go_on_to_the_same_bits(photos, tmp_path):
    for split in ("train", "val"):
        files = sorted((photos / split).rglob("*.png"))
        for k in range(2):
            with tarfile.open(tmp_path / f"{split}-{k:02d}.tar", "w") as archive:
                for path in files[k::2]:
                    archive.add(path, f"{path.parent.name}/{path.name}")
    flags = ("train.py", *FLAGS, "--data", f"{tmp_path}/train-{{00..01}}.tar", "--epochs", 3)
    folders = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    port = free_port()
    with Launch(whole, "a", as_node, port, *flags) as one, Launch(whole, "b", as_node, port, *flags) as other:
        output = one.finish() + other.finish()
    assert "x 2 processes" in output
    port = free_port()
    with Launch(killed, "a", as_node, port, *flags) as one, Launch(killed, "b", as_node, port, *flags) as other:
        one.wait_until((killed / "runs/train/exp/results.csv").exists)
        for launch in (one, other):
            for worker in workers_of(launch.processes[0].pid):
                os.kill(worker, signal.SIGKILL)
    assert not (killed / "runs/train/exp/results.json").exists()
    port, again = free_port(), ("train.py", "--resume", "runs/train/exp", "--device", "cpu")
    with Launch(killed, "c", as_node, port, *again) as one, Launch(killed, "d", as_node, port, *again) as other:
        output = one.finish() + other.finish()
    assert output.count("best epoch") == 1
    expected, state = (torch.load(folder / "runs/train/exp/weights/last.pt")["state_dict"] for folder in folders)
    assert all(torch.equal(expected[key], state[key]) for key in expected)


def workers_of(launcher: int) -> list[int]:
    return sorted(int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())


def test_a_batch_that_can_not_be_shared_is_refused(tmp_path, photos):
    flags = (*FLAGS, "--data", photos, "--epochs", 1, "--batch-size", 13)
    with Launch(tmp_path, "odd", as_script, "train.py", *flags, world=2) as processes:
        output = processes.finish(code=2)
    assert "batch-size 13 must be a multiple of the 2 processes" in output
    assert not (tmp_path / "runs").exists()
