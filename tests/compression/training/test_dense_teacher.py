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
    assert options["lr0"] == pytest.approx(0.003)
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


def statistics(path):
    state = read_tensor_file(path)["state_dict"]
    return {name: value for name, value in state.items() if "running_" in name}


def kept(path, weights):
    before = statistics(weights)
    return all(torch.equal(value, before[name]) for name, value in statistics(path).items())


def test_a_refitted_networks_norms_are_frozen_unless_it_is_asked_otherwise_or_trained_before(script, tmp_path, pruned):
    _, weights = pruned
    last = tmp_path / "runs/train/exp/weights/last.pt"
    assert read_tensor_file(weights)["refitted"] is True
    _, options = fine_tune(script, weights, tmp_path)
    assert options["freeze_norms"] is True
    assert kept(last, weights)
    trained = shutil.copy(last, tmp_path / "trained.pt")
    (tmp_path / "s.yaml").write_text(
        "pruners: {p: {class: SensitivityPruner, sensitivities: {'*': 0.1}}}\npolicies: [{pruner: {instance_name: p}, epochs: [0]}]\n"
    )
    _, options = fine_tune(script, weights, tmp_path, "--compress", "s.yaml")
    assert options["freeze_norms"] is False
    assert not kept(last, weights)
    _, options = fine_tune(script, trained, tmp_path)  # it was trained since
    assert options["freeze_norms"] is False

    done = script(
        "prune.py", "--weights", "dense.pt", "--compress_rate", 0.5, "--criterion", "l1", "--images", 16, "--workers", 0, "--no-refit"
    )
    assert done.code == 0, done.err
    bare = tmp_path / "runs/prune/exp2/weights/pruned.pt"
    assert read_tensor_file(bare)["refitted"] is False
    _, options = fine_tune(script, bare, tmp_path)
    assert options["freeze_norms"] is False
