from __future__ import annotations

import json

import cv2
import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT, write_images

WEIGHTS = ROOT / "weights/digits.pt"


@pytest.mark.usefixtures("plots")
def test_the_report_is_consistent_with_itself(script, tmp_path):
    done = script("val.py", "--weights", WEIGHTS, "--split", "test", "--workers", 0)
    assert done.code == 0, done.err
    run = tmp_path / "runs/val/exp"
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"top1", "top5", "loss", "images", "per_class", "speed_ms"}
    assert results["images"] == 355  # a fifth of each class of the 1,797, rounded down
    assert results["top1"] >= 0.97
    assert set(results["speed_ms"]) == {"preprocess", "inference", "postprocess"}
    assert all(value > 0 for value in results["speed_ms"].values())
    confusion = pd.read_csv(run / "confusion_matrix.csv", index_col=0).to_numpy()
    assert confusion.sum() == 355
    assert np.trace(confusion) / 355 == pytest.approx(results["top1"])
    table = pd.read_csv(run / "per_class.csv", dtype={"class": str})
    assert list(table.columns) == ["class", "precision", "recall", "f1", "support"]
    assert table["support"].sum() == 355
    assert table["recall"].to_numpy() == pytest.approx(np.diag(confusion) / confusion.sum(1))
    assert table["precision"].to_numpy() == pytest.approx(np.diag(confusion) / confusion.sum(0))
    assert [entry["class"] for entry in results["per_class"]] == list("0123456789")
    assert cv2.imread(str(run / "confusion_matrix.png")).std() > 5
    assert "top-1" in done.out


def test_val_is_the_part_that_training_held_out(script, tmp_path):
    # The checkpoint records seed and fraction: a tenth of each class of the 1,442 training images, rounded.
    assert script("val.py", "--weights", WEIGHTS, "--workers", 0).code == 0
    recorded = json.loads((tmp_path / "runs/val/exp/results.json").read_text())
    assert recorded["images"] == 143
    assert script("val.py", "--weights", WEIGHTS, "--workers", 0, "--seed", 5).code == 0
    assert json.loads((tmp_path / "runs/val/exp2/results.json").read_text())["loss"] != recorded["loss"]


def test_without_data_it_is_measured_on_what_it_was_trained_on(script, tmp_path, photos):
    trained = script("train.py", "--model", "resnet20", "--data", photos, "--imgsz", 16, "--epochs", 1, "--workers", 0)
    assert trained.code == 0, trained.err
    done = script("val.py", "--weights", "runs/train/exp/weights/last.pt", "--workers", 0)
    assert done.code == 0, done.err
    assert f"last.pt on {photos}, split val, " in done.out


def test_classes_are_matched_by_name_and_strangers_are_refused(script, tmp_path):
    two = tmp_path / "two"
    write_images(two / "val", 2, seed=0, classes=("red", "blue"))
    refused = script("val.py", "--weights", WEIGHTS, "--data", two)
    assert refused.code == 2
    assert "has 2 classes, the weights know 10; unknown to them: blue, red" in refused.err
    (two / "val/red").rename(two / "val/7")
    (two / "val/blue").rename(two / "val/3")
    done = script("val.py", "--weights", WEIGHTS, "--data", two, "--workers", 0)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "runs/val/exp/results.json").read_text())["per_class"]
    assert [row["support"] for row in rows] == [0, 0, 0, 2, 0, 0, 0, 2, 0, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "tset"), "--split is 'tset'. Did you mean 'test'? Valid: train, val, test"),
        (("--batch-size", "0"), "batch-size is 0"),
        (("--weights", "no.pt"), "no weights file no.pt"),
        (("--data", "digit"), "Did you mean 'digits'?"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(script, tmp_path, flags, message):
    weights = () if "--weights" in flags else ("--weights", WEIGHTS)
    done = script("val.py", *weights, *flags)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
