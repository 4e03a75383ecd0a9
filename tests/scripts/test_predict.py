from __future__ import annotations

import csv
import json
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from models.networks import build
from models.writers import _cell
from tests.conftest import ROOT
from utils.files.checkpoint import save_checkpoint
from utils.spec import ModelSpec

DIGITS = sorted((ROOT / "data/images").glob("*.png"))


def test_it_works_straight_after_cloning(script, tmp_path):
    done = script("predict.py", "--source", ROOT / "data/images", "--save-json", "--save-csv", "--save-txt")
    assert done.code == 0, done.err
    run = tmp_path / "runs/predict/exp"
    predictions = json.loads((run / "predictions.json").read_text())
    assert [entry["path"] for entry in predictions] == [str(path) for path in DIGITS]
    for entry, path in zip(predictions, DIGITS, strict=True):
        names, probabilities = zip(*entry["topk"], strict=True)
        assert names[0] == path.stem[-1], "the shipped classifier reads its ten sample digits"
        assert len(set(names)) == 5
        assert list(probabilities) == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.00001
        lines = (run / "labels" / f"{path.stem}.txt").read_text().splitlines()
        assert lines == [f"{p:.2f} {n}" for n, p in entry["topk"]]
        assert cv2.imread(str(run / path.name)) is not None
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    assert rows[0]["class"] == predictions[0]["topk"][0][0]
    first = done.out.splitlines()[0]
    assert first.startswith(f"image 1/10 {DIGITS[0]}: 32x32 0 0.")
    assert first.endswith("ms")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_change_what_is_predicted(script, tmp_path, batch_size):
    for name, size in (("a", 10), ("b", batch_size)):
        flags = ("--source", ROOT / "data/images", "--nosave", "--save-json", "--batch-size", size, "--name", name)
        assert script("predict.py", *flags).code == 0
    a, b = (json.loads((tmp_path / f"runs/predict/{name}/predictions.json").read_text()) for name in "ab")
    for left, right in zip(a, b, strict=True):
        assert [n for n, _ in left["topk"]] == [n for n, _ in right["topk"]]
        assert [p for _, p in left["topk"]] == pytest.approx([p for _, p in right["topk"]], abs=1e-4)


def test_a_heic_photo_is_predicted_as_the_same_pixels_in_a_png(script, tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    (tmp_path / "in").mkdir()
    for path in DIGITS[:3]:
        with Image.open(path) as image:
            image.convert("RGB").resize((64, 64)).save(tmp_path / f"in/{path.stem}.heic", "HEIF", quality=90)
        with Image.open(tmp_path / f"in/{path.stem}.heic") as photo:
            photo.save(tmp_path / f"in/{path.stem}.png")
    done = script("predict.py", "--source", tmp_path / "in", "--nosave", "--save-json")
    assert done.code == 0, done.err
    entries = json.loads((tmp_path / "runs/predict/exp/predictions.json").read_text())
    assert [entry["path"].rsplit(".")[-1] for entry in entries] == ["heic", "png"] * 3
    for photo, png in zip(entries[::2], entries[1::2], strict=True):
        assert photo["topk"] == png["topk"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text_or_no_name_for_a_terminal_or_a_spreadsheet(script, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    names = [b"latin_\xe9.png", b"red_\x1b[31m.png", b"=1+1.png"]
    for name in names:
        shutil.copy(DIGITS[0], os.path.join(os.fsencode(source), name))
    done = script("predict.py", "--source", source, "--save-csv", "--save-json", "--save-txt", "--project", tmp_path / "runs")
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    assert "red_\\x1b[31m.png" in done.out
    rows = (tmp_path / "runs/exp/predictions.csv").read_bytes()
    assert all(name in rows for name in names)
    assert b"\n'=1+1.png," in rows or b"\n=1+1.png," not in rows
    assert len(list((tmp_path / "runs/exp/labels").iterdir())) == 3


def test_a_cell_is_no_formula():
    assert [_cell(text) for text in ("=1+1", "+a", "-a", "@a", "a=b", "")] == ["'=1+1", "'+a", "'-a", "'@a", "a=b", ""]


@pytest.mark.parametrize("script_name", ["predict.py", "train.py", "prune.py", "export.py", "val.py"])
def test_a_limit_of_no_pixels_is_refused(script_name, script):
    done = script(script_name, "--max-pixels", 0)
    assert (done.code, done.err.strip()) == (2, f"{script_name}: error: max-pixels is 0; it must be at least 1")


def test_folders_are_mirrored_and_equal_names_do_not_overwrite(script, tmp_path):
    source = tmp_path / "in"
    for i, place in enumerate(("a/x.png", "b/x.png", "b/x.jpg", "x.png")):
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(source / place), cv2.imread(str(DIGITS[i])))
    assert script("predict.py", "--source", source, "--save-txt").code == 0
    run = tmp_path / "runs/predict/exp"
    written = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    assert written == ["a/x.png", "b/x.jpg", "b/x.png", "labels/a/x.txt", "labels/b/x.png.txt", "labels/b/x.txt", "labels/x.txt", "x.png"]


def test_unreadable_images_are_skipped_and_a_source_without_any_readable_one_is_refused(script, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(DIGITS[3], source / "good.png")
    (source / "bad.png").write_bytes(DIGITS[4].read_bytes()[:60])
    (source / "text.jpg").write_text("not an image")
    done = script("predict.py", "--source", source, "--nosave", "--save-json")
    assert done.code == 0
    assert "bad.png: skipped, truncated PNG" in done.out
    assert "text.jpg: skipped, not an image" in done.out
    assert "1 images, 2 unreadable" in done.out
    assert len(json.loads((tmp_path / "runs/predict/exp/predictions.json").read_text())) == 1
    (source / "good.png").unlink()
    none = script("predict.py", "--source", source, "--nosave")
    assert none.code == 2
    assert "none of the 2 images" in none.err


def test_a_list_a_glob_and_a_video(script, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{DIGITS[0]}\n\n{DIGITS[1]}\n")
    assert "image 2/2" in script("predict.py", "--source", listed, "--nosave").out
    assert "image 3/3" in script("predict.py", "--source", str(ROOT / "data/images/digit_[0-2].png"), "--nosave").out
    video = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 64))
    for i in range(7):
        writer.write(cv2.imread(str(DIGITS[i])))
    writer.release()
    done = script("predict.py", "--source", video, "--vid-stride", 3, "--save-json", "--save-txt")
    assert done.code == 0, done.err
    run = tmp_path / "runs/predict/exp"
    assert [entry["frame"] for entry in json.loads((run / "predictions.json").read_text())] == [1, 4, 7]
    assert sorted(p.name for p in (run / "labels").iterdir()) == ["clip_1.txt", "clip_4.txt", "clip_7.txt"]
    annotated = cv2.VideoCapture(str(run / "clip.mp4"))
    assert annotated.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    annotated.release()


def test_topk_is_bounded_by_the_classes_and_an_rgb_model_takes_grey_files(script, tmp_path):
    spec = ModelSpec("resnet20", 3, 16, 3, ("a", "b", "c"))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "rgb.pt", {"spec": spec.to_dict(), "state_dict": build(spec).state_dict()})
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((20, 30), 100, np.uint8))
    done = script(
        "predict.py", "--weights", tmp_path / "rgb.pt", "--source", tmp_path / "grey.png", "--save-json", "--topk", 9, "--imgsz", 24
    )
    assert done.code == 0, done.err
    assert "24x24" in done.out
    (entry,) = json.loads((tmp_path / "runs/predict/exp/predictions.json").read_text())
    assert {name for name, _ in entry["topk"]} == {"a", "b", "c"}
    assert sum(p for _, p in entry["topk"]) == pytest.approx(1, abs=1e-5)


BAD = [
    (("--source", "nowhere"), "no file or folder nowhere"),
    (("--source", "*.nothing"), "matches no images"),
    (("--source", "rtsp://127.0.0.1:1/x"), "can't open rtsp://127.0.0.1:1/x"),
    (("--weights", "no.pt"), "no weights file no.pt"),
    (("--weights", "model.xyz"), "no weights file model.xyz"),
    (("--weights", __file__), "is not a weights file, or is damaged"),
    (("--weights", ""), "--weights is empty"),
    (("--imgsz", "0"), "image size is 0"),
    (("--topk", "0"), "topk is 0"),
    (("--batch-size", "0"), "batch-size is 0"),
    (("--imgsz", "2"), "image size is 2"),
    (("--vid-stride", "0"), "vid-stride is 0"),
    (("--devise", "cpu"), "Did you mean '--device'?"),
    (("--device", "7"), "CUDA sees"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_what_a_user_can_mend_is_one_line_exit_2_and_no_run_directory(script, tmp_path, flags, message):
    source = () if "--source" in flags else ("--source", DIGITS[0])
    done = script("predict.py", *source, *flags)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
