"""Images of any shape through all scripts: --imgsz HEIGHT WIDTH and --fit, from training to the exported file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models.backends import open_backend
from models.loading import load_classifier
from tests.conftest import write_images


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    """Pictures that are four times as wide as high."""
    root = tmp_path_factory.mktemp("strips")
    for split, count, seed in (("train", 8, 0), ("val", 4, 1)):
        write_images(root / split, count, seed)
    import cv2

    for path in root.rglob("*.png"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (96, 24)))
    return root


@pytest.mark.parametrize("fit", [pytest.param("crop", marks=pytest.mark.exhaustive), "letterbox"])
def test_a_run_of_oblong_images_goes_all_the_way(script, strips, tmp_path, fit):
    common = ("--data", strips, "--workers", 0, "--device", "cpu")
    flags = ("--model", "resnet20", "--imgsz", 16, 48, "--fit", fit, "--epochs", 1, "--batch-size", 8, "--name", "t", "--project", tmp_path)
    done = script("train.py", *common, *flags)
    assert done.code == 0, done.err
    assert "at 16 x 48 px" in done.out
    assert ("leaves out" in done.out) == (fit == "crop")
    assert "note   data: 12 classes" not in done.out
    weights = tmp_path / "t/weights/best.pt"
    spec = load_classifier(weights).spec
    assert (spec.size, spec.fit) == ((16, 48), fit)
    assert json.loads(json.dumps(spec.to_dict()))["imgsz"] == [16, 48]
    done = script("val.py", "--weights", weights, *common, "--project", tmp_path, "--name", "v")
    assert done.code == 0, done.err
    done = script(
        *("prune.py", "--weights", weights, *common, "--macs", 0.6, "--images", 16, "--project", tmp_path, "--name", "p"),
        *("--round-to", 1, "--allocation", "uniform"),
    )
    assert done.code == 0, done.err
    pruned = tmp_path / "p/weights/pruned.pt"
    done = script("export.py", "--weights", pruned, "--include", "onnx", "--project", tmp_path, "--name", "e")
    assert done.code == 0, done.err
    (file,) = (tmp_path / "e").rglob("*.onnx")
    exported, narrow = (open_backend(str(path), torch.device("cpu")) for path in (file, pruned))
    assert (exported.spec.size, exported.spec.fit) == ((16, 48), fit)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 16, 48, 3), np.uint8))
    torch.testing.assert_close(exported.logits(images), narrow.logits(images), rtol=1e-3, atol=1e-3)
    for path in (file, pruned):
        done = script("predict.py", "--weights", path, "--source", strips / "val", "--project", tmp_path, "--name", "s", "--exist-ok")
        assert done.code == 0, done.err
        assert ": 16x48 " in done.out
    done = script("train.py", "--resume", tmp_path / "t")
    assert "has finished" in done.out + done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--imgsz", "16", "32", "48"), "imgsz is 16 32 48; it takes one number, or height and width"),
        (("--imgsz", "16", "4"), "image size is 4; it must lie in 8..4096"),
        (("--imgsz", "16", "x"), "'x'"),
        (("--fit", "stretch"), "crop, squash, letterbox"),
    ],
)
def test_a_wrong_shape_is_one_line(script, flags, message):
    done = script("train.py", "--model", "resnet20", "--epochs", 1, *flags)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
