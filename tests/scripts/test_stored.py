"""Files from before the modules moved into folders still work: weights/digits.pt, and stored/run.

stored/run was interrupted after the first of three epochs. Its schedule cuts half of a convolution's filters out in that epoch, prunes
another's weights up to the third and halves the learning rate after each.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

STORED = Path(__file__).with_name("stored") / "run"
DIGITS = ROOT / "weights/digits.pt"


def test_a_stored_run_goes_on_to_its_end(script, tmp_path):
    run = tmp_path / "runs/train/exp"
    shutil.copytree(STORED, run)
    done = script("train.py", "--resume", run)
    assert done.code == 0, done.err
    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.01, 0.005, 0.0025])
    assert (run / "results.csv").read_text().startswith((STORED / "results.csv").read_text().strip())  # the first epoch's row
    weights = torch.load(run / "weights/last.pt", weights_only=True)["state_dict"]
    assert weights["model.0.conv.weight"].shape == (4, 1, 3, 3)
    assert int((weights["model.1.conv.weight"] == 0).sum()) == 16 * 4 * 9 // 2  # widths are multiples of 8


def test_a_stored_checkpoint_is_measured(script, tmp_path):
    done = script("val.py", "--weights", STORED / "weights/best.pt", "--data", "digits", "--workers", 0)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "runs/val/exp/results.json").read_text())
    recorded = torch.load(STORED / "weights/best.pt", weights_only=True)["metrics"]
    assert results["images"] == 143
    assert results["loss"] == pytest.approx(recorded["loss"], rel=0.01)  # it was measured in bfloat16


def test_a_stored_schedule_is_read(script, tmp_path):
    (tmp_path / "network.yaml").write_text("layers: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [12, 3]], [-1, 1, Classify, [nc, 16]]]\n")
    flags = ("--data", "digits", "--model", "network.yaml", "--imgsz", 16, "--epochs", 3, "--workers", 0)
    done = script("train.py", *flags, "--compress", STORED / "schedule.yaml", "--dry-run")
    assert done.code == 0, done.err
    assert "filters (50.0%)" in done.out
    assert "elements (50.0%), falling" in done.out


def test_the_shipped_weights_predict_and_can_be_cut(script, tmp_path):
    done = script("predict.py", "--weights", DIGITS, "--source", ROOT / "data/images", "--save-json", "--nosave")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "runs/predict/exp/predictions.json").read_text())
    assert [entry["topk"][0][0] for entry in found] == list("0123456789")
    done = script("prune.py", "--weights", DIGITS, "--macs", 0.5, "--dry-run", "--json", "cut.json")
    assert done.code == 0, done.err
    before, after = json.loads((tmp_path / "cut.json").read_text())["macs"]
    assert before == 40_256_128
    assert 0.4 * before < after <= 0.5 * before
