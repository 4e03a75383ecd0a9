from __future__ import annotations

import csv
import errno
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml

from tests.conftest import write_images
from utils.files.checkpoint import save_checkpoint

SMALL = ("--model", "resnet20", "--imgsz", 16, "--batch-size", 12, "--workers", 0, "--optimizer", "SGD", "--lr0", 0.05)
RESULT_KEYS = {"top1", "top5", "loss", "epochs", "best_epoch", "params", "macs", "seconds", "checkpoint", "data"}


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.usefixtures("plots")
def test_a_run_learns_and_leaves_every_file_and_val_repeats_its_numbers(script, photos, tmp_path):
    done = script("train.py", "--data", photos, *SMALL, "--epochs", 4)
    assert done.code == 0, done.err
    run = tmp_path / "runs/train/exp"
    results = json.loads((run / "results.json").read_text())
    assert set(results) == RESULT_KEYS
    assert results["epochs"] == 4
    assert results["top1"] >= 0.9
    assert results["params"] == 269_267  # ResNet-20 with 3 classes: 269,722 - 7 * 65
    # 3x3 convs: stem 3*16, then 6 of 16*16 on 16x16; 16*32 and 5 of 32*32 on 8x8; 32*64 and 5 of 64*64 on 4x4; fc 64*3
    stages = 9 * (256 * (3 * 16 + 6 * 256) + 64 * (512 + 5 * 1024) + 16 * (2048 + 5 * 4096))
    assert results["macs"] == stages + 64 * 3
    assert results["checkpoint"] == "runs/train/exp/weights/best.pt"
    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    best = max(rows, key=lambda row: (float(row["top1"]), -float(row["val_loss"])))
    assert int(best["epoch"]) == results["best_epoch"]
    for name in ("results.png", "confusion_matrix.png", "train_batch.jpg", "val_predictions.jpg"):
        assert cv2.imread(str(run / name)).std() > 5, name
    assert list(run.glob("events.out.tfevents*"))
    recorded = yaml.safe_load((run / "opt.yaml").read_text())
    assert (recorded["imgsz"], recorded["channels"], recorded["augment"]) == (16, 3, "light")
    assert "python val.py --weights runs/train/exp/weights/best.pt" in done.out
    assert not list(tmp_path.rglob("*.tmp"))

    measured = script("val.py", "--weights", run / "weights/best.pt", "--data", photos, "--workers", 0)
    assert measured.code == 0, measured.err
    again = json.loads((tmp_path / "runs/val/exp/results.json").read_text())
    assert again["images"] == 15
    assert again["top1"] == results["top1"]
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-5)


def test_same_seed_gives_the_same_weights_for_any_number_of_workers(script, photos, tmp_path):
    common = ("--data", photos, *SMALL, "--epochs", 1, "--augment", "strong", "--mixup", 0.5)
    for name, extra in (("a", ("--workers", 0)), ("b", ("--workers", 2)), ("c", ("--workers", 0, "--seed", 1))):
        assert script("train.py", *common, *extra, "--name", name).code == 0
    a, b, c = (weights_of(tmp_path / f"runs/train/{name}/weights/last.pt") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_a_cache_changes_nothing_but_the_time(script, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("compression.training.setup.DATA_DIR", tmp_path / "data")
    assert script("train.py", "--data", photos, *SMALL, "--epochs", 1, "--name", "plain").code == 0
    plain = weights_of(tmp_path / "runs/train/plain/weights/last.pt")
    for cache in ("ram", "disk"):
        assert script("train.py", "--data", photos, *SMALL, "--epochs", 1, "--name", cache, "--cache", cache).code == 0
        cached = weights_of(tmp_path / f"runs/train/{cache}/weights/last.pt")
        assert all(torch.equal(plain[key], cached[key]) for key in plain), cache


@pytest.mark.parametrize("optimizer", ["Adam", "RMSProp"])  # the tests here use SGD, those of test_resume.py AdamW
def test_every_optimizer_trains(script, photos, optimizer):
    assert script("train.py", "--data", photos, *SMALL, "--optimizer", optimizer, "--lr0", 0.001, "--epochs", 1).code == 0


def test_everything_at_once_trains(script, photos, tmp_path):
    flags = ("--mixup", 0.3, "--cutmix", 0.3, "--balance", "weights", "--cos-lr", "--warmup-epochs", 1, "--no-amp", "--no-ema")
    more = ("--accumulate", 2, "--dropout", 0.2, "--save-period", 1, "--auto-augment", "rand", "--erasing", 0.5, "--channels", 1)
    assert script("train.py", "--data", photos, *SMALL, "--epochs", 2, *flags, *more).code == 0
    assert sorted(p.name for p in (tmp_path / "runs/train/exp/weights").iterdir()) == ["best.pt", "epoch1.pt", "epoch2.pt", "last.pt"]
    assert weights_of(tmp_path / "runs/train/exp/weights/best.pt")["conv1.weight"].shape == (16, 1, 3, 3)


def test_nosave_writes_checkpoints_at_the_end_only(script, photos, tmp_path, monkeypatch):
    written = []

    def recording(path, content):
        written.append((path.name, content["metrics"]["epoch"]))
        save_checkpoint(path, content)

    monkeypatch.setattr("compression.training.compressor.save_checkpoint", recording)
    done = script("train.py", "--data", photos, *SMALL, "--epochs", 3, "--nosave")
    assert done.code == 0
    results = json.loads((tmp_path / "runs/train/exp/results.json").read_text())
    assert written == [("last.pt", 3), ("best.pt", results["best_epoch"])]


def test_a_last_batch_of_one_image_trains(script, photos):
    # 36 images in batches of 5 leave one over
    assert (
        script("train.py", "--data", photos, *SMALL, "--batch-size", 5, "--lr0", 0.001, "--epochs", 1, "--model", "yolov5n-cls").code == 0
    )


def test_freeze_keeps_weights_and_statistics(script, photos, tmp_path):
    first = script("train.py", "--data", photos, *SMALL, "--epochs", 1)
    assert first.code == 0
    start = tmp_path / "runs/train/exp/weights/best.pt"
    frozen = ("--weights", start, "--freeze", "conv1", "bn1", "layer1*")
    assert script("train.py", "--data", photos, *SMALL, "--model", "", *frozen, "--epochs", 1).code == 0
    before, after = weights_of(start), weights_of(tmp_path / "runs/train/exp2/weights/last.pt")
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith(("conv1", "bn1", "layer1")) or key.endswith(("source", "tracked")), (
            key
        )


def test_early_stopping_stops_after_patience_epochs(script, photos, tmp_path):
    # a learning rate that changes nothing: no epoch after the first can be better, except by batch norm's statistics
    flags = ("--lr0", 1e-30, "--patience", 1, "--epochs", 30, "--augment", "none", "--freeze", "*")
    done = script("train.py", "--data", photos, *SMALL, *flags)
    assert done.code == 2
    assert "every parameter is frozen" in done.err
    done = script(
        "train.py", "--data", photos, *SMALL, "--lr0", 1e-30, "--patience", 2, "--epochs", 30, "--freeze", "conv1", "bn*", "layer*"
    )
    assert done.code == 0
    assert json.loads((tmp_path / "runs/train/exp/results.json").read_text())["epochs"] == 3


def test_weights_of_another_class_count_get_a_fresh_head_and_it_is_said(script, photos, tmp_path):
    assert script("train.py", "--data", photos, *SMALL, "--epochs", 1).code == 0
    two = tmp_path / "two"
    write_images(two, 6, seed=3, classes=("blue", "red"))
    start = tmp_path / "runs/train/exp/weights/best.pt"
    done = script("train.py", "--data", two, "--weights", start, "--workers", 0, "--epochs", 1, "--batch-size", 4)
    assert done.code == 0, done.err
    assert "the head 'fc' has 3 classes in the weights and 2 here: it starts fresh" in done.out
    other = script("train.py", "--data", photos, "--weights", start, "--model", "resnet32", "--epochs", 1)
    assert other.code == 2
    assert "is a resnet20" in other.err


def test_class_order_of_the_weights_is_kept_by_name(script, photos, tmp_path):
    config = tmp_path / "photos.yaml"
    config.write_text(yaml.safe_dump({"path": str(photos), "names": ["red", "blue", "green"]}))
    assert script("train.py", "--data", config, *SMALL, "--epochs", 3).code == 0
    start = tmp_path / "runs/train/exp/weights/best.pt"
    assert torch.load(start)["spec"]["class_names"] == ["red", "blue", "green"]
    evaluated = script("train.py", "--data", photos, "--weights", start, "--evaluate")  # sorted: blue, green, red
    assert "top-1 100.00%" in evaluated.out or float(evaluated.out.split("top-1 ")[1].split("%")[0]) > 80


def test_unreadable_images_are_listed_skipped_and_counted(script, photos, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    whole = (broken / "train/red/001.jpg").read_bytes()
    (broken / "train/red/001.jpg").write_bytes(whole[: len(whole) // 2])
    (broken / "val/blue/000.png").write_bytes(b"")
    done = script("train.py", "--data", broken, *SMALL, "--epochs", 1)
    assert done.code == 0
    assert "2 images can't be read" in done.out
    assert "35 train, 14 val" in done.out
    listed = (tmp_path / "runs/train/exp/unreadable.txt").read_text()
    assert "001.jpg: truncated JPEG" in listed
    assert "000.png: empty file" in listed


BAD = [
    (("--data", "nowhere"), "unknown data (and no such folder): 'nowhere'"),
    (("--data", "cifar11"), "Did you mean 'cifar10'?"),
    (("--data", "./nowhere"), "no folder ./nowhere"),
    (("--data", "cifar10"), "add --download"),
    (("--model", "resnet65"), "Did you mean"),
    (("--model", "no.yaml"), "no model file no.yaml"),
    (("--epochs", "0"), "epochs is 0; it must be at least 1"),
    (("--epochs", "many"), "--epochs is 'many'; it must be a whole number"),
    (("--epoch", "3"), "unknown flag --epoch. Did you mean '--epochs'?"),
    (("--batch-size", "0"), "batch-size is 0"),
    (("--optimizer", "Sgd2"), "--optimizer is 'Sgd2'. Did you mean 'SGD'?"),
    (("--augment", "storng"), "Did you mean 'strong'?"),
    (("--cache", "rum"), "Did you mean 'ram'?"),
    (("--balance", "weight"), "Did you mean 'weights'?"),
    (("--imgsz", "4"), "image size is 4"),
    (("--imgsz", "8", "--model", "vgg16-cifar"), "does not take images of 8 px"),
    (("--device", "gpu"), "unknown device 'gpu'"),
    (("--device", "0,1"), "torchrun --nproc_per_node 2"),
    (("--weights", "no.pt"), "no weights file no.pt"),
    (("--lr0", "-1"), "lr0 -1.0 must be above 0"),
    (("--lrf", "2"), "lrf is 2.0"),
    (("--mixup", "0.7", "--cutmix", "0.7"), "together at most 1"),
    (("--label-smoothing", "1"), "label-smoothing is 1.0"),
    (("--dropout", "1.5"), "dropout is 1.5"),
    (("--freeze", "layer9"), "matches no module"),
    (("--val-fraction", "0"), "val-fraction is 0.0"),
    (("--channels", "2"), "--channels is '2'. Valid: 1, 3"),
    (("--resume",), "nothing to resume"),
    (("--pretrained", "--model", "resnet20"), "--pretrained is for torchvision's"),
    (("--cutoff", "3", "--model", "resnet20"), "not described by a YAML"),
    (("--workers", "-1"), "workers is -1"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_what_a_user_can_mend_is_one_line_exit_2_and_no_run_directory(script, tmp_path, flags, message):
    done = script("train.py", "--epochs", 1, *flags)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_folders_that_can_not_be_trained_on(script, tmp_path):
    empty, one = tmp_path / "empty", tmp_path / "one"
    empty.mkdir()
    write_images(one, 3, seed=0, classes=("red",))
    assert "no class folders with images" in script("train.py", "--data", empty).err
    assert "has one class (red)" in script("train.py", "--data", one).err


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line_and_leaves_nothing(script, photos, tmp_path):
    done = script("train.py", "--data", photos, *SMALL, "--lr0", 1e30, "--epochs", 2)
    assert done.code == 2
    assert "the loss became" in done.err
    assert "lower --lr0" in done.err
    assert not list((tmp_path / "runs/train").iterdir())


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_stood(script, photos, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def failing(content, path):
        calls.append(path)
        if len(calls) > 3:  # the first last.pt, then best.pt and last.pt of the first epoch
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(content, path)

    monkeypatch.setattr("utils.files.checkpoint.torch.save", failing)
    done = script("train.py", "--data", photos, *SMALL, "--epochs", 3)
    assert done.code == 2
    assert "the disk is full" in done.err
    weights = tmp_path / "runs/train/exp/weights"
    assert sorted(p.name for p in weights.iterdir()) == ["best.pt", "last.pt"]
    assert torch.load(weights / "last.pt")["training"]["epoch"] == 1


def test_skewed_classes_are_drawn_equally_often_by_the_balanced_sampler():
    from utils.data.loaders import TrainOrder, class_weights, sampling_probabilities

    labels = np.array([0] * 90 + [1] * 10)
    order = TrainOrder(len(labels), 10, seed=0, rank=0, world_size=1)
    order.weights = sampling_probabilities(labels, 2)
    drawn = []
    for order.epoch in range(40):
        drawn += [labels[draw.position] for batch in order for draw in batch]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.04)  # 4,000 draws: 5 standard deviations
    # 100 / (2 * 90) and 100 / (2 * 10)
    assert class_weights(labels, 3).tolist() == pytest.approx([5 / 9, 5, 0])
