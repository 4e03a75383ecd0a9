"""A pruned network is distilled from the dense network that its file names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from compression.training.dense_teacher import DISTILL, STUDENT, TEMPERATURE
from utils.files.checkpoint import read_tensor_file, save_checkpoint

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def pruned(script, tmp_path, few_digits):
    """A dense network's file, and that of a network cut from it."""
    dense = shutil.copy(ROOT / "weights/digits.pt", tmp_path / "dense.pt")
    done = script("prune.py", "--weights", "dense.pt", "--compress_rate", 0.5, "--criterion", "l1", "--images", 16, "--workers", 0)
    assert done.code == 0, done.err
    return Path(dense), tmp_path / "runs/prune/exp/weights/pruned.pt"


def fine_tune(script, weights, tmp_path, *flags):
    done = script("train.py", "--weights", weights, "--epochs", 1, "--workers", 0, "--exist-ok", *flags)
    assert done.code == 0, done.err
    return done.out, yaml.safe_load((tmp_path / "runs/train/exp/opt.yaml").read_text())


def test_it_is_found_checked_and_left_out(script, tmp_path, pruned):
    dense, weights = pruned
    assert read_tensor_file(weights)["dense"]["path"] == str(dense)
    output, options = fine_tune(script, weights, tmp_path)
    assert f"distils from the dense network {dense}; --no-distill trains without" in output
    taught = [options[f"kd_{name}"] for name in ("resume", "temperature", "distill_wt", "student_wt")]
    assert taught == [str(dense), TEMPERATURE, DISTILL, STUDENT]
    assert options["lr0"] == pytest.approx(0.02)
    distilled = read_tensor_file(tmp_path / "runs/train/exp/weights/last.pt")["state_dict"]

    output, options = fine_tune(script, weights, tmp_path, "--no-distill")
    assert "distil" not in output
    assert options["kd_resume"] == ""
    plain = read_tensor_file(tmp_path / "runs/train/exp/weights/last.pt")["state_dict"]
    assert any(not torch.equal(plain[name], distilled[name]) for name in plain)

    # A teacher of the user's own, and its weights of the loss
    _, options = fine_tune(script, weights, tmp_path, "--kd-resume", ROOT / "weights/digits.pt")
    assert (options["kd_resume"], options["kd_distill_wt"]) == (str(ROOT / "weights/digits.pt"), 0.5)

    content = read_tensor_file(dense)
    save_checkpoint(dense, {name: value for name, value in content.items() if name not in ("format", "version")} | {"metrics": {}})
    output, options = fine_tune(script, weights, tmp_path)
    assert f"not distilled: {dense} is no longer the dense network that was cut" in output
    assert options["kd_resume"] == ""
    dense.unlink()
    output, _ = fine_tune(script, weights, tmp_path)
    assert f"not distilled: the dense network {dense} is gone; --kd-resume FILE names another teacher" in output
