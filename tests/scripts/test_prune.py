from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from compression.pruning import narrowing
from compression.pruning import report as pruning_report
from compression.pruning.plan import Entry, PruningPlan
from compression.tracing.channels import trace
from compression.tracing.costs import Cost
from compression.tracing.cutting import apply_cut_, plan_cut
from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from compression.training.setup import set_up
from models.loading import load_classifier
from models.networks import build
from tests.conftest import CLASSES, ROOT, write_images
from tests.launch import Launch, as_paused_script, as_script
from utils.arguments import to_record
from utils.files.checkpoint import read_tensor_file, save_checkpoint
from utils.measures.profile import example_input
from utils.spec import ModelSpec

DIGITS = ROOT / "weights/digits.pt"
KEYS = [
    "params", "macs", "top1", "latency_ms", "bytes", "labels", "max_relative_difference",
    "compress_rate", "criterion", "tied_share", "rank_seconds", "groups", "steps",
]  # fmt: skip
# Groups: model.0 (16); model.1: cv1 (8), m.0.cv1 (8), cv2 (8), cv3 (16); model.2 (40)
YOLO = {"layers": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "C3", [16]], [-1, 1, "Classify", ["nc", 40]]]}


def write_dense(path, name="resnet20", num_classes=3, definition=None, seed=0, **more):
    """A network as a training run would have left it, untrained."""
    torch.manual_seed(seed)
    spec = ModelSpec(name, num_classes, 16, class_names=tuple(CLASSES)[:num_classes], definition=definition)
    model = build(spec)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    content = {
        "spec": spec.to_dict(),
        "plan": None,
        "state_dict": model.state_dict(),
        "metrics": {},
        "arguments": to_record(TrainArguments()),
    }
    save_checkpoint(path, {**content, **more})
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """resnet20 (ReLU) and a small network of YOLO's layers (SiLU)."""
    folder = tmp_path_factory.mktemp("dense")
    return {
        "resnet": write_dense(folder / "resnet.pt"),
        "yolo": write_dense(folder / "yolo.pt", "tiny", definition=YOLO),
        "two": write_dense(folder / "two.pt", num_classes=2),
    }


@pytest.fixture(autouse=True)
def _quick_damage(monkeypatch):
    """Damage is measured on few images and at two widths."""
    monkeypatch.setattr("compression.pruning.widths.DAMAGE_IMAGES", (8, 8))
    monkeypatch.setattr("compression.pruning.damage.PROBED", (0.6, 0.3))


@pytest.fixture
def prune(script, photos, tmp_path, monkeypatch):
    """prune.py on the photos without its pictures, which take longer than the rest; returns (results, checkpoint, plan, output)."""
    monkeypatch.setattr(pruning_report, "plot_scores", lambda *_: None)
    monkeypatch.setattr(pruning_report, "plot_widths", lambda *_: None)

    def run(weights, *flags):
        before = set((tmp_path / "runs/prune").glob("*"))
        done = script("prune.py", "--weights", weights, "--data", photos, "--workers", 0, "--images", 24, *flags)
        assert done.code == 0, done.err
        (folder,) = set((tmp_path / "runs/prune").glob("*")) - before
        content = read_tensor_file(folder / "weights/pruned.pt")
        return read_json(folder / "results.json"), content, read_json(folder / "plan.json"), done.out

    return run


def read_json(path):
    return json.loads(Path(path).read_text())


def kept(results):
    return {group["name"]: group["kept"] for group in results["groups"]}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what a run leaves


@pytest.mark.usefixtures("plots")
def test_every_file_of_a_run_is_there_and_right(script, tmp_path, monkeypatch):
    rates = "[0.]+[0.1]*2+[0.25]*9"
    flags = ("--weights", DIGITS, "--data", "digits", "--compress_rate", rates, "--workers", 0, "--no-refit")
    done = script("prune.py", *flags, "--images", 64)
    assert done.code == 0, done.err
    run = tmp_path / "runs/prune/exp"
    assert sorted(p.name for p in run.iterdir()) == [
        "channels.csv", "opt.yaml", "plan.json", "ranks", "ranks.png", "results.json", "weights", "widths.png",
    ]  # fmt: skip
    pruned, results, plan = run / "weights/pruned.pt", read_json(run / "results.json"), read_json(run / "plan.json")
    content = read_tensor_file(pruned)

    # results.json. floor(16 * .9) = 14, floor(32 * .9) = 28; floor(16 * .75) = 12, 24, 48
    assert list(results)[: len(KEYS)] == KEYS
    assert all(len(results[key]) == 2 for key in KEYS[:5])
    assert [(g["kept"], g["channels"]) for g in sorted(results["groups"], key=lambda g: 99 if g["index"] is None else g["index"])] == [
        (16, 16), (14, 16), (28, 32), *[(12, 16)] * 3, *[(24, 32)] * 3, *[(48, 64)] * 3, (64, 64), (10, 10),
    ]  # fmt: skip
    assert set(results["groups"][0]) == {"index", "name", "channels", "kept", "prunable", "reason"}
    assert results["groups"][-1] == {
        "index": None,
        "name": "fc",
        "channels": 10,
        "kept": 10,
        "prunable": False,
        "reason": "the network's output",
    }
    # Stem 9 * 16; stage 1: 9 * (12 * 16 + 14 * 12) and 2 x 9 * 2 * (12 * 14); norms 2 per channel; and so on; the head 650.
    stages = ((16, 14, 12), (14, 28, 24), (28, 64, 48))
    convolutions = 9 * 16 + sum(9 * (c_in * mid + mid * out) + 2 * 9 * 2 * mid * out for c_in, out, mid in stages)
    norms = 2 * (16 + sum(3 * (out + mid) for _, out, mid in stages))
    assert results["params"] == [269434, convolutions + norms + 650]
    sizes = (32, 16, 8)
    macs = 9 * 16 * 32**2 + sum(
        9 * (c_in * mid + mid * out + 4 * mid * out) * s**2 for (c_in, out, mid), s in zip(stages, sizes, strict=True)
    )
    assert results["macs"] == [40256128, macs + 640]
    assert results["top1"][0] >= 0.97
    assert results["bytes"][1] == pytest.approx(pruned.stat().st_size, rel=0.01)
    assert results["bytes"][0] == pytest.approx(DIGITS.stat().st_size, rel=0.02)
    assert all(value > 0 for value in results["latency_ms"])
    assert 0 <= results["max_relative_difference"] <= 1e-4
    assert (results["compress_rate"], results["criterion"]) == (rates, "rank")
    assert 0 <= results["tied_share"] <= 1
    assert 0 < results["rank_seconds"] < 100

    # plan.json cuts the dense network into what pruned.pt holds.
    assert plan.pop("digest") == PruningPlan.from_dict(plan).digest()
    assert content["plan"] == plan
    assert {name: len(units) for name, units in plan["kept"].items()} == {
        n: k for n, k in kept(results).items() if k < plan["sizes"].get(n, 0)
    }
    loaded = load_classifier(DIGITS)
    apply_cut_(loaded.model, plan_cut(trace(loaded.model, example_input(loaded.model, loaded.spec)), plan["kept"]))
    assert same_state(loaded.model.state_dict(), content["state_dict"])
    assert content["metrics"] == {"top1": results["top1"][1], "params": results["params"][1], "macs": results["macs"][1]}
    assert content["arguments"] == read_tensor_file(DIGITS)["arguments"]

    # channels.csv
    rows = list(csv.DictReader((run / "channels.csv").read_text().splitlines()))
    assert list(rows[0]) == ["group", "index", "channel", "score", "place", "kept"]
    prunable = {g["name"]: g for g in results["groups"] if g["prunable"]}
    assert len(rows) == sum(g["channels"] for g in prunable.values()) == 16 * 2 + 32 + 16 * 3 + 32 * 3 + 64 * 4
    for name, group in prunable.items():
        mine = [row for row in rows if row["group"] == name]
        assert [int(row["channel"]) for row in mine] == list(range(group["channels"]))
        assert tuple(int(row["channel"]) for row in mine if row["kept"] == "1") == tuple(plan["kept"].get(name, range(group["channels"])))
        assert {row["index"] for row in mine} == {"" if group["index"] is None else str(group["index"])}
        lowest = group["channels"] - group["kept"]  # places count from the least important
        assert all((int(row["place"]) >= lowest) == (row["kept"] == "1") for row in mine)
        by_place = [float(row["score"]) for row in sorted(mine, key=lambda row: int(row["place"]))]
        assert by_place == sorted(by_place)

    # ranks/: a file for each of 19 convolutions, but one for those that are added up before anything reads them.
    files = sorted((run / "ranks").glob("rank_conv*.npy"))
    assert [np.load(file).dtype for file in files] == [np.float32] * len(files)
    assert np.load(run / "ranks/rank_conv1.npy").shape == (16,)
    assert np.load(run / "ranks/rank_conv1.npy").max() <= 32
    assert (run / "ranks/ranks.json").exists()
    for name in ("ranks.png", "widths.png"):
        assert cv2.imread(str(run / name)).std() > 5
    recorded = yaml.safe_load((run / "opt.yaml").read_text())
    assert (recorded["compress_rate"], recorded["images"], recorded["data"]) == (rates, 64, "digits")

    # What is printed.
    assert "next: python train.py --weights runs/prune/exp/weights/pruned.pt --data digits" in done.out
    assert "multiply-adds" in done.out
    assert "proved: narrow and masked outputs differ by" in done.out

    # The file loads by itself in a new process.
    with Launch(tmp_path, "val", as_script, "val.py", "--weights", pruned, "--data", "digits", "--workers", 0) as val:
        predicted = script("predict.py", "--weights", pruned, "--nosave")
        val.finish()
    assert "images; per image" in predicted.out, predicted.err
    assert read_json(tmp_path / "runs/val/exp/results.json")["top1"] == pytest.approx(results["top1"][1])

    # Its rank files give the same plan again, and nothing is measured.
    monkeypatch.setattr(pruning_report, "plot_scores", lambda *_: None)
    monkeypatch.setattr(pruning_report, "plot_widths", lambda *_: None)
    again = script("prune.py", *flags, "--images", 9, "--ranks", run / "ranks")
    assert again.code == 0, again.err
    assert read_json(tmp_path / "runs/prune/exp2/plan.json") == {**plan, "digest": PruningPlan.from_dict(plan).digest()}
    assert not (tmp_path / "runs/prune/exp2/ranks").exists()
    assert read_json(tmp_path / "runs/prune/exp2/results.json")["rank_seconds"] == 0

    # train.py makes the same initial weights of the dense network, the rates and the rank files.
    arguments = TrainArguments(weights=str(DIGITS), data="digits", compress_rate=rates, ranks=str(run / "ranks"), refit=False)
    made = set_up(arguments).network
    assert same_state(made.model.state_dict(), content["state_dict"])
    assert made.plan == {**plan, "widths": {name: width for name, width in kept(results).items() if name not in ("layer3.0.conv2", "fc")}}
    assert made.spec == ModelSpec.from_dict(content["spec"])


def test_a_refit_gives_back_most_of_what_the_cut_took(script, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning_report, "plot_scores", lambda *_: None)
    monkeypatch.setattr(pruning_report, "plot_widths", lambda *_: None)
    flags = ("--weights", DIGITS, "--macs", 0.5, "--allocation", "uniform", "--criterion", "rank", "--workers", 0, "--images", 96)
    done = script("prune.py", *flags)
    assert done.code == 0, done.err
    results = read_json(tmp_path / "runs/prune/exp/results.json")
    names = [step["name"] for step in results["steps"]]
    assert names in (["cut", "refitted"], ["cut", "refitted", "recalibrated"])
    cut, refitted = (step["top1"] for step in results["steps"][:2])
    assert cut < 0.7  # of 0.99; at 0.5 it is 0.1 to 0.3
    assert refitted > 0.9
    assert results["steps"][1]["seconds"] > 0
    assert results["top1"][1] == results["steps"][-1]["top1"]
    assert all(f"\n{name} " in done.out for name in ("dense", *names))

    # train.py refits what it cuts by rank files; without, it starts at the cut.
    ranks = str(tmp_path / "runs/prune/exp/ranks")
    rates = results["compress_rate"]
    monkeypatch.setattr("compression.training.setup.REFIT_IMAGES", 96)
    for refit in (True, False):
        arguments = TrainArguments(weights=str(DIGITS), data="digits", compress_rate=rates, ranks=ranks, refit=refit, workers=0)
        compressor = ClassifierCompressor(arguments)
        assert any(note.startswith("refitted on 96 training images, in ") for note in compressor.notes) == refit
        assert (compressor.validate().top1 > 0.9) == refit


def test_images_without_labels_are_enough(script, tmp_path, photos, dense, monkeypatch):
    monkeypatch.setattr(pruning_report, "plot_scores", lambda *_: None)
    monkeypatch.setattr(pruning_report, "plot_widths", lambda *_: None)
    folder = tmp_path / "loose"
    folder.mkdir()
    for path in photos.rglob("train/*/*.*"):
        shutil.copy(path, folder / f"{path.parent.name}_{path.name}")
    (folder / "notes.txt").write_text("no image")
    done = script("prune.py", "--weights", dense["resnet"], "--data", folder, "--workers", 0, "--images", 20, "--macs", 0.6)
    assert done.code == 0, done.err
    results = read_json(tmp_path / "runs/prune/exp/results.json")
    # 36 images: a fifth is held out, of the others as many as --images says are used
    assert f"{folder} has no class folders: 20 images to score and refit on, 7 held out" in done.out
    assert results["labels"] == "dense network"
    assert results["top1"][0] == 1  # the dense network agrees with itself
    assert results["top1"][1] * 7 == pytest.approx(round(results["top1"][1] * 7))
    assert [step["name"] for step in results["steps"]][:2] == ["cut", "refitted"]
    assert "agreement (val)" in done.out
    assert "top-1" not in done.out
    assert "--data FOLDER" in done.out


def test_one_image_without_labels_is_too_few(script, tmp_path, photos, dense):
    folder = tmp_path / "loose"
    folder.mkdir()
    shutil.copy(next(photos.rglob("train/*/*.png")), folder)
    done = script("prune.py", "--weights", dense["resnet"], "--data", folder, "--workers", 0, "--macs", 0.6)
    assert done.code == 2
    assert "has 1 readable image(s); at least two are needed" in done.err


def test_a_refit_needs_some_images(prune, dense):
    results, _, _, output = prune(dense["resnet"], "--compress_rate", 0.3, "--criterion", "l1", "--images", 3)
    assert [step["name"] for step in results["steps"]] == ["cut"]
    assert "not refitted: that takes at least 4 images, and there are 3" in output


def test_same_seed_same_bits_and_another_seed_another_cut(prune, dense):
    first, second, other = (
        prune(dense["resnet"], "--macs", 0.6, "--criterion", "random", "--allocation", "uniform", "--seed", seed) for seed in (1, 1, 2)
    )
    assert same_state(first[1]["state_dict"], second[1]["state_dict"])
    timed = ("latency_ms", "rank_seconds", "steps")
    assert {k: v for k, v in first[0].items() if k not in timed} == {k: v for k, v in second[0].items() if k not in timed}
    assert first[2] == second[2] != other[2]
    assert kept(first[0]) == kept(other[0])


# ---- flags


def test_budgets_are_kept_and_the_equivalent_rates_reported(prune, dense):
    results, _, plan, _ = prune(dense["resnet"], "--params", 0.5, "--round-to", 1, "--allocation", "uniform", "--criterion", "rank")
    assert 0.49 <= results["params"][1] / results["params"][0] <= 0.5
    again = prune(dense["resnet"], "--compress-rate", results["compress_rate"])
    assert again[2] == plan
    results, *_ = prune(dense["resnet"], "--macs", 0.5)
    assert 0.45 <= results["macs"][1] / results["macs"][0] <= 0.5
    assert all(width % 8 == 0 for name, width in kept(results).items() if name != "fc")
    results, *_ = prune(dense["resnet"], "--macs", 0.4, "--round-to", 1, "--min-channels", 9, "--allocation", "uniform")
    assert min(width for name, width in kept(results).items() if name != "fc") == 9


def test_a_budget_by_sensitivity(prune, dense):
    results, *_ = prune(dense["yolo"], "--macs", 0.5, "--round-to", 1)
    assert results["macs"][1] <= 0.5 * results["macs"][0]
    uniform, *_ = prune(dense["yolo"], "--macs", 0.5, "--round-to", 1, "--allocation", "uniform")
    assert kept(results) != kept(uniform)
    assert results["criterion"] == uniform["criterion"] == "reconstruction"


def test_a_compress_rate_is_hranks_and_takes_ranks_where_they_do_not_tie(prune, dense):
    # Ranks need exact zeros, which SiLU has not.
    assert [prune(dense[name], "--compress_rate", 0.3)[0]["criterion"] for name in ("resnet", "yolo")] == ["rank", "taylor"]


def test_what_is_excluded_stays_whole(prune, dense):
    results, *_ = prune(dense["resnet"], "--macs", 0.6, "--exclude", "layer3.*", "conv1")
    groups = {group["name"]: group for group in results["groups"]}
    for name in ("conv1", "layer3.0.conv1", "layer3.2.conv1"):
        assert groups[name]["kept"] == groups[name]["channels"]
        assert (groups[name]["prunable"], "excluded by" in groups[name]["reason"]) == (False, True)
    assert results["macs"][1] <= 0.6 * results["macs"][0]
    results, *_ = prune(dense["resnet"], "--compress_rate", "0.5", "--exclude", "layer1.1.conv2")  # the stream of stage 1
    found = kept(results)
    assert (found["layer1.0.conv2"], found["layer1.0.conv1"], found["conv1"]) == (16, 8, 8)
    assert results["compress_rate"] == "[0.5]+[0.]+[0.5]*10"


def test_batch_norm_is_measured_anew(prune, dense):
    flags = ("--compress_rate", "0.3", "--criterion", "l1", "--no-refit")
    plain, anew = prune(dense["resnet"], *flags)[1], prune(dense["resnet"], *flags, "--recalibrate-bn", "--batch-size", 8)[1]
    a, b = plain["state_dict"], anew["state_dict"]
    changed = {name.rpartition(".")[2] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert b["bn1.num_batches_tracked"] == 3  # 24 images
    # The first norm reads the kept filters of the images: their mean lies where the statistics say.
    assert torch.isfinite(b["bn1.running_var"]).all()


def test_controls_are_measured_too(prune, dense):
    results, _, _, output = prune(dense["resnet"], "--macs", 0.6, "--controls", "--allocation", "uniform")
    assert list(results["controls"]) == ["l1", "random", "random widths"]
    assert all(0 <= top1 <= 1 for top1 in results["controls"].values())
    assert output.count("\ncontrol ") == 3


@pytest.mark.parametrize("criterion", ["rank", "effective_rank", "taylor"])
def test_criteria_that_need_images(prune, dense, criterion):
    results, *_ = prune(dense["yolo"], "--macs", 0.7, "--round-to", 1, "--criterion", criterion)
    assert results["criterion"] == criterion


def test_a_pruned_network_is_pruned_again_and_its_file_loads(prune, dense, tmp_path, script, photos):
    prune(dense["resnet"], "--compress_rate", "0.3")
    first = tmp_path / "runs/prune/exp/weights/pruned.pt"
    results, content, plan, _ = prune(first, "--macs", 0.5, "--round-to", 1, "--allocation", "uniform")
    assert results["macs"][0] == read_tensor_file(first)["metrics"]["macs"]
    assert content["plan"]["before"] == read_tensor_file(first)["plan"]
    assert {name: plan["sizes"][name] for name in ("conv1", "layer3.0.conv1")} == {"conv1": 11, "layer3.0.conv1": 44}
    assert len(load_classifier(tmp_path / "runs/prune/exp2/weights/pruned.pt").model.state_dict()) == len(content["state_dict"])


def test_a_plain_state_dict_takes_the_datas_class_names(prune, dense, tmp_path):
    torch.save(read_tensor_file(dense["resnet"])["state_dict"], tmp_path / "plain.pth")
    _, content, _, output = prune(tmp_path / "plain.pth", "--macs", 0.7, "--imgsz", 16)
    assert content["spec"]["class_names"] == ["blue", "green", "red"]
    assert "note   the weights carry no class names" in output


def test_grouped_and_depthwise_networks_go_through(prune, tmp_path):
    rows = [[-1, 1, "Conv", [32, 3, 2]], [-1, 1, "DWConv", [32, 3]], [-1, 1, "Conv", [32, 3, 1, 1, 4]], [-1, 1, "Classify", ["nc", 40]]]
    weights = write_dense(tmp_path / "grouped.pt", "grouped", definition={"layers": rows})
    results, content, *_ = prune(weights, "--macs", 0.5, "--round-to", 1)
    assert results["macs"][1] <= 0.5 * results["macs"][0]
    assert content["spec"]["groups"]["model.1.conv"] == content["state_dict"]["model.1.conv.weight"].shape[0] < 32
    again = load_classifier(tmp_path / "runs/prune/exp/weights/pruned.pt")
    assert again.model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


# ---- dry runs


@pytest.mark.parametrize(
    ("model", "imgsz", "entries"),
    [
        ("yolov5n-cls", 32, 25),
        ("resnet20", 16, 12),
        pytest.param("resnet20-b", 16, 12, marks=pytest.mark.exhaustive),
        pytest.param("resnet18", 32, 12, marks=pytest.mark.exhaustive),
        ("vgg16-cifar", 32, 12),
        ("squeezenet1_1", 32, 25),
    ],
)
def test_a_dry_run_needs_neither_weights_nor_data(script, tmp_path, model, imgsz, entries):
    flags = ("--dry-run", "--model", model, "--num-classes", 7, "--imgsz", imgsz, "--macs", 0.5, "--json", "out.json")
    done = script("prune.py", *flags)
    assert done.code == 0, done.err
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    results = read_json(tmp_path / "out.json")
    assert list(results) == KEYS
    assert results["macs"][1] <= 0.5 * results["macs"][0]
    assert results["top1"] == [None, None]
    numbers = [group["index"] for group in results["groups"] if group["index"] is not None]
    assert sorted(set(numbers)) == list(range(entries))
    assert all(group["prunable"] or group["reason"] for group in results["groups"])
    assert f"compress_rate takes {entries} entries here" in done.out
    assert f"\ncompress_rate {results['compress_rate']}\n" in done.out
    lines = [line.split() for line in done.out.split("\n")[2 : 2 + len(results["groups"])]]
    assert [(line[0], int(line[1]), int(line[2])) for line in lines] == [
        ("-" if g["index"] is None else str(g["index"]), g["channels"], g["kept"]) for g in results["groups"]
    ]
    # The rates that are reported give these widths again.
    again = script("prune.py", *flags[:-4], "--compress_rate", results["compress_rate"], "--json", "again.json")
    assert again.code == 0, again.err
    assert read_json(tmp_path / "again.json")["groups"] == results["groups"]


def test_a_dry_run_without_an_amount_and_one_whose_widths_need_images(script, tmp_path, dense):
    for flags in ((), ("--macs", 0.5, "--allocation", "sensitivity")):
        done = script("prune.py", "--dry-run", "--weights", dense["resnet"], "--json", "out.json", *flags)
        assert done.code == 0, done.err
        results = read_json(tmp_path / "out.json")
        assert results["macs"][1] is None
        assert results["compress_rate"] == "[0.]*12"
        assert all(group["kept"] == group["channels"] for group in results["groups"])


def test_a_dry_run_tells_what_a_run_does(script, prune, dense, tmp_path):
    flags = ("--params", 0.6, "--exclude", "layer2.*.conv1", "--allocation", "uniform")
    assert script("prune.py", "--dry-run", "--weights", dense["resnet"], "--json", "out.json", *flags).code == 0
    told, (done, *_) = read_json(tmp_path / "out.json"), prune(dense["resnet"], *flags)
    assert all(told[key] == done[key] for key in ("params", "macs", "compress_rate", "criterion", "groups"))
    assert script("prune.py", "--dry-run", "--weights", dense["resnet"], "--ranks", "any", "--json", "ranks.json", *flags).code == 0
    assert read_json(tmp_path / "ranks.json")["criterion"] == "rank"
    # The run would measure where to cut; a dry run measures nothing, and says so.
    evenly = script("prune.py", "--dry-run", "--weights", dense["resnet"], *flags[:-2])
    assert "widths are spread evenly here; without --dry-run they are measured" in evenly.out


class LastStay(torch.nn.Module):
    """The head reads the last four of the stem's channels again, at fixed places, so these stay."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.head = torch.nn.Linear(20, 3)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        return self.head(torch.cat((x, x[:, -4:]), 1))


def test_channels_that_must_stay_may_stand_anywhere(script, tmp_path, monkeypatch):
    monkeypatch.setattr("compression.pruning.traced_classifier.build", lambda _: LastStay())
    done = script("prune.py", "--dry-run", "--model", "resnet20", "--imgsz", 8, "--compress_rate", "x")
    assert done.code == 2
    monkeypatch.setattr("compression.pruning.traced_classifier.entries_of", lambda graph, _: [Entry((group,)) for group in graph.prunable])
    done = script("prune.py", "--dry-run", "--model", "resnet20", "--imgsz", 8, "--compress_rate", "[0.5]", "--json", "out.json")
    assert done.code == 0, done.err
    # 8 of 16 filters of 27 weights and a bias; the head reads 8 + 4 channels.
    assert read_json(tmp_path / "out.json")["params"] == [16 * 28 + 21 * 3, 8 * 28 + 13 * 3]
    done = script("prune.py", "--dry-run", "--model", "resnet20", "--imgsz", 8, "--compress_rate", "[0.9]")
    assert "compress_rate 0.9 for 'stem' is impossible: it stays (4 of its 16 channels must)" in done.err


def test_a_budget_holds_where_the_chosen_channels_cost_more_than_the_mean(prune, dense, monkeypatch):
    exact = Cost.of
    monkeypatch.setattr(Cost, "of", lambda self, keep: 1.03 * exact(self, keep))
    results, *_ = prune(dense["resnet"], "--macs", 0.5, "--round-to", 1)
    assert 0.47 < 1.03 * results["macs"][1] / results["macs"][0] <= 0.5


def test_the_criteria_are_listed(script, tmp_path):
    done = script("prune.py", "--criterion", "list")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.strip().split("\n")][:4] == ["rank", "effective_rank", "nuclear_norm", "l1"]


# ---- fine-tuning


def test_a_pruned_network_trains_on_and_keeps_its_plan(script, prune, dense, photos, tmp_path):
    results, content, *_ = prune(dense["yolo"], "--macs", 0.5, "--round-to", 1)
    pruned = tmp_path / "runs/prune/exp/weights/pruned.pt"
    flags = ("--weights", pruned, "--epochs", 1, "--batch-size", 12, "--workers", 0)
    done = script("train.py", *flags, "--data", photos)
    assert done.code == 0, done.err
    tuned = read_tensor_file(tmp_path / "runs/train/exp/weights/best.pt")
    assert tuned["plan"] == content["plan"]
    assert {n: t.shape for n, t in tuned["state_dict"].items()} == {n: t.shape for n, t in content["state_dict"].items()}
    assert not torch.equal(tuned["state_dict"]["model.0.conv.weight"], content["state_dict"]["model.0.conv.weight"])
    assert tuned["metrics"]["params"] == results["params"][1]
    assert script("val.py", "--weights", tmp_path / "runs/train/exp/weights/best.pt", "--data", photos, "--workers", 0).code == 0
    # Other classes: a fresh head on the narrow layer before it.
    write_images(tmp_path / "two/train", 6, 0, classes=("red", "blue"))
    write_images(tmp_path / "two/val", 3, 1, classes=("red", "blue"))
    done = script("train.py", *flags, "--data", tmp_path / "two")
    assert done.code == 0, done.err
    assert "it starts fresh" in done.out
    width = content["state_dict"]["model.2.linear.weight"].shape[1]
    assert width < 40
    best = tmp_path / "runs/train/exp2/weights/best.pt"
    assert read_tensor_file(best)["state_dict"]["model.2.linear.weight"].shape == (2, width)
    assert load_classifier(best).spec.class_names == ("blue", "red")


def test_fine_tuning_that_is_killed_goes_on_to_the_same_bits_without_tracing(script, prune, dense, photos, tmp_path, monkeypatch):
    prune(dense["resnet"], "--macs", 0.5)
    pruned = tmp_path / "runs/prune/exp/weights/pruned.pt"
    flags = ("--weights", pruned, "--data", photos, "--batch-size", 6, "--workers", 0, "--epochs", 3, "--mixup", 0.3)
    with Launch(tmp_path, "killed", as_paused_script, (2, 3), "train.py", *flags, "--name", "killed") as killed:
        killed.stop_where_it_waits(signal.SIGKILL)
    assert script("train.py", *flags, "--name", "whole").code == 0
    pruned.unlink()  # neither the pruned nor the dense file is needed to go on
    monkeypatch.setattr(narrowing, "trace", lambda *_: pytest.fail("it was traced again"))
    assert (tmp_path / "runs/train/killed/results.csv").read_text().count("\n") == 2  # the header and one epoch
    done = script("train.py", "--resume", tmp_path / "runs/train/killed")
    assert done.code == 0, done.err
    whole, killed = (read_tensor_file(tmp_path / f"runs/train/{name}/weights/last.pt") for name in ("whole", "killed"))
    assert same_state(whole["state_dict"], killed["state_dict"])
    assert same_state(whole["training"]["model"], killed["training"]["model"])
    assert whole["plan"] == killed["plan"]


@pytest.mark.parametrize("flag", ["--compress_rate", "--compress-rate"])
def test_a_narrow_network_is_trained_from_scratch(script, photos, tmp_path, flag):
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(YOLO))
    flags = ("--data", photos, "--imgsz", 16, "--epochs", 1, "--batch-size", 12, "--workers", 0)
    done = script("train.py", "--model", "net.yaml", flag, "[0.25]+[0.5]*4+[0.75]", *flags)
    assert done.code == 0, done.err
    best = tmp_path / "runs/train/exp/weights/best.pt"
    content = read_tensor_file(best)
    assert list(content["plan"]["widths"].values()) == [12, 4, 4, 4, 8, 10]
    assert list(content["plan"]["sizes"].values()) == [16, 8, 8, 8, 16, 40]
    assert content["state_dict"]["model.1.cv3.conv.weight"].shape == (8, 8, 1, 1)
    assert script("val.py", "--weights", best, "--data", photos, "--workers", 0).code == 0
    described = script("utils/files/checkpoint.py", best)
    assert "  model.0.conv          12 of 16\n" in described.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compress_rate", "[0.5]*3"), "compress_rate has 3 entries, this network takes 12:\n    0  conv1 (16)"),
        (("--compress_rate", "[0.5"), "compress_rate: expected ']'"),
        (("--compress_rate", "0.5", "--weights", "{resnet}"), "--compress_rate with --weights needs --ranks FOLDER"),
        (("--compress_rate", "0.5", "--weights", "{resnet}", "--ranks", "none"), "'none' is no folder with rank files"),
        (("--compress_rate", "0.5", "--ranks", "."), "--ranks needs --weights"),
        (("--ranks", "."), "--ranks goes with --compress_rate"),
    ],
)
def test_what_train_py_refuses_of_rates(script, photos, dense, tmp_path, flags, message):
    flags = [flag.format(**dense) for flag in flags]
    model = () if "--weights" in flags else ("--model", "resnet20")
    done = script("train.py", *model, "--data", photos, "--imgsz", 16, *flags)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


# ---- several processes


def test_two_processes_make_the_plan_of_one(prune, dense, photos, tmp_path):
    flags = ("--compress_rate", "0.4", "--criterion", "rank")
    *_, plan, _ = prune(dense["resnet"], *flags)
    more = ("--weights", dense["resnet"], "--data", photos, "--workers", 0, "--images", 24, "--device", "cpu", "--name", "two", *flags)
    with Launch(tmp_path, "two", as_script, "prune.py", *more, world=2) as processes:
        output = processes.finish()
    assert output.count("compress_rate 0.4") == 1
    assert sorted(p.name for p in (tmp_path / "runs/prune").iterdir()) == ["exp", "two"]
    assert read_json(tmp_path / "runs/prune/two/plan.json") == plan
    one, two = (read_tensor_file(tmp_path / f"runs/prune/{name}/weights/pruned.pt")["state_dict"] for name in ("exp", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # each process has a thread of its own, which adds up in another order
        torch.testing.assert_close(two[name].double(), tensor.double(), atol=1e-3 * float(tensor.double().abs().max()) + 1e-6, rtol=0)


# ---- what is refused


def refused(done, message, tmp_path, before):
    assert done.code == 2, done.out
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.err.startswith(("prune.py: error: ", "val.py: error: "))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "say how much goes: --compress_rate"),
        (("--macs", "0.5", "--params", "0.5"), "--macs and --params exclude each other"),
        (("--macs", "0.5", "--compress_rate", "0.5"), "--compress_rate and --macs exclude each other"),
        (("--macs", "0"), "macs is 0.0; it is the share that stays, in (0, 1]"),
        (("--macs", "1.2"), "macs is 1.2"),
        (("--params", "nan"), "params is nan"),
        (("--macs", "half"), "half"),
        (("--macs", "0.0001"), "the budget macs 0.0001 can't be reached"),
        (("--params", "0.2", "--min-channels", "16"), "the budget params 0.2 can't be reached"),
        (("--macs", "1"), "these rates cut nothing"),
        (("--compress_rate", "0"), "these rates cut nothing"),
        (("--compress_rate", "[0.]*12"), "these rates cut nothing"),
        (("--compress_rate", "[0.5]*11"), "compress_rate has 11 entries, this network takes 12:\n    0  conv1 (16)\n"),
        (("--compress_rate", "[1]*12"), "the rate 1 is the share that goes"),
        (("--compress_rate", "0.5", "--allocation", "sensitivity"), "--allocation sensitivity is for a budget"),
        (("--macs", "0.5", "--allocation", "sensitive"), "--allocation is 'sensitive'. Did you mean 'sensitivity'?"),
        (("--macs", "0.5", "--criterion", "ranks"), "--criterion is 'ranks'. Did you mean 'rank'?"),
        (("--macs", "0.5", "--exclude", "layer9.*"), "exclude: 'layer9.*' matches no channel group."),
        (("--macs", "0.5", "--round-to", "0"), "round-to is 0; it must be at least 1"),
        (("--macs", "0.5", "--images", "0"), "images is 0"),
        (("--macs", "0.5", "--batch-size", "-3"), "batch-size is -3"),
        (("--macs", "0.5", "--seed", "-1"), "seed is -1; it must be at least 0"),
        (("--macs", "0.5", "--recalibrate-bn", "--batch-size", "1"), "--recalibrate-bn needs --images and --batch-size of at least 2"),
        (("--macs", "0.5", "--imgsz", "0"), "image size is 0; it must lie in 8..4096"),
        (("--macs", "0.5", "--imgsz", "5000"), "image size is 5000"),
        (("--macs", "0.5", "--ranks", "absent"), "'absent' is no folder with rank files"),
        (("--macs", "0.5", "--ranks", "empty"), "rank_conv1.npy is missing"),
        (
            ("--macs", "0.5", "--ranks", "other"),
            "other/rank_conv1.npy has shape [64]: it is of another network; expected 16 finite numbers, the scores of conv1.weight",
        ),
        (("--macs", "0.5", "--ranks", "empty", "--criterion", "l1"), "--ranks gives the scores, so --criterion l1 can't be used too"),
        (("--macs", "0.5", "--json", "x.json"), "--json needs --dry-run"),
        (("--macs", "0.5", "--data", "nowhere"), "nowhere"),
        (("--macs", "0.5", "--data", "test-only"), "data 'test-only' has no split 'val'; it has: test"),
        (("--macs", "0.5", "--data", "val-only"), "data 'val-only' has no split 'train'; it has: val"),
        (("--macs", "0.5", "--weights", "absent.pt"), "no weights file absent.pt"),
        (("--macs", "0.5", "--weights", "text.pt"), "text.pt is not a weights file"),
        (("--macs", "0.5", "--device", "tpu"), "unknown device 'tpu'"),
        (("--macs", "0.5", "--model", "resnet9000"), "unknown model 'resnet9000'"),
        (("--macs", "0.5", "--model", "resnet56"), "--model resnet56 does not go with"),
        (("--macs", "0.5", "--mac", "0.5"), "unknown flag --mac. Did you mean '--macs'?"),
        (("--macs", "0.5", "--project", "text.pt"), "a file is in the way"),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_nothing_is_written(script, photos, dense, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for i in range(1, 20):
        np.save(tmp_path / f"other/rank_conv{i}.npy", np.ones(64, np.float32))
    write_images(tmp_path / "test-only/test", 1, 0)
    write_images(tmp_path / "val-only/val", 1, 0)
    (tmp_path / "text.pt").write_text("hello")
    before = set(tmp_path.rglob("*"))
    data = () if "--data" in flags else ("--data", photos)
    weights = () if "--weights" in flags else ("--weights", dense["resnet"])
    done = script("prune.py", *weights, *data, "--workers", 0, "--images", 8, *flags)
    refused(done, message, tmp_path, before)
    assert done.err.count("\n") == 1 or "compress_rate" in message or "the rate" in message


def test_without_weights_and_with_other_classes(script, photos, dense, tmp_path):
    before = set(tmp_path.rglob("*"))
    refused(script("prune.py", "--macs", 0.5, "--data", photos), "give --weights", tmp_path, before)
    refused(script("prune.py", "--macs", 0.5, "--model", "resnet20"), "give --weights", tmp_path, before)
    refused(script("prune.py", "--dry-run"), "give --weights", tmp_path, before)
    done = script("prune.py", "--macs", 0.5, "--data", photos, "--weights", dense["two"])
    refused(done, "has 3 classes, the weights know 2; unknown to them: red", tmp_path, before)
    done = script("prune.py", "--dry-run", "--model", "vgg16-cifar", "--imgsz", 8)
    refused(done, "vgg16-cifar does not take images of 8 px", tmp_path, before)
    done = script("prune.py", "--dry-run", "--model", "resnet20", "--num-classes", 0)
    refused(done, "num-classes is 0", tmp_path, before)


def test_a_full_disk_leaves_no_folder(script, photos, dense, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pruning_report, "save_ranks", fail)
    done = script("prune.py", "--weights", dense["resnet"], "--data", photos, "--workers", 0, "--images", 8, "--compress_rate", 0.5)
    assert done.code == 2
    assert "the disk is full" in done.err
    assert list((tmp_path / "runs/prune").iterdir()) == []


def hostile(content, change):
    state, spec = dict(content["state_dict"]), dict(content["spec"])
    return {
        "plan is text": lambda: {"plan": "cut"},
        "plan is a list": lambda: {"plan": [1, 2]},
        "plan is a number": lambda: {"plan": 7},
        "columns that nobody makes": lambda: {"state_dict": {**state, "layer1.0.conv1.weight": torch.zeros(8, 5, 3, 3)}},
        "streams that do not meet": lambda: {
            "state_dict": {
                **state,
                "layer2.1.conv2.weight": torch.zeros(5, state["layer2.1.conv2.weight"].shape[1], 3, 3),
                **{f"layer2.1.bn2.{key}": torch.ones(5) for key in ("weight", "bias", "running_mean", "running_var")},
            }
        },
        "norm of another size": lambda: {"state_dict": {**state, "layer1.0.bn1.weight": torch.ones(3)}},
        "another number of dimensions": lambda: {"state_dict": {**state, "layer1.0.conv1.weight": torch.zeros(8)}},
        "no channels": lambda: {"state_dict": {**state, "conv1.weight": torch.zeros(0, 3, 3, 3)}},
        "shortcut that points outside": lambda: {
            "state_dict": {**state, "layer2.0.downsample.source": torch.full_like(state["layer2.0.downsample.source"], 999)}
        },
        "tensors that are missing": lambda: {"state_dict": {name: t for name, t in state.items() if "layer3" not in name}},
        "no tensors": lambda: {"state_dict": {}},
        "text for a tensor": lambda: {"state_dict": {**state, "conv1.weight": "text"}},
        "numbers for names": lambda: {"state_dict": dict(enumerate(state.values()))},
        "groups of an unknown module": lambda: {"spec": {**spec, "groups": {"nowhere": 2}}},
        "groups of a module without": lambda: {"spec": {**spec, "groups": {"fc": 2}}},
        "negative groups": lambda: {"spec": {**spec, "groups": {"conv1": -1}}},
        "no groups": lambda: {"spec": {**spec, "groups": {"conv1": 0}}},
        "groups that do not divide": lambda: {"spec": {**spec, "groups": {"layer1.0.conv1": 7}}},
        "groups in words": lambda: {"spec": {**spec, "groups": {"conv1": "two"}}},
        "true groups": lambda: {"spec": {**spec, "groups": {"conv1": True}}},
        "groups that are no mapping": lambda: {"spec": {**spec, "groups": [1]}},
        "groups by number": lambda: {"spec": {**spec, "groups": {1: 1}}},
    }[change]()


CHANGES = (
    "plan is text", "plan is a list", "plan is a number", "columns that nobody makes", "streams that do not meet", "norm of another size",
    "another number of dimensions", "no channels", "shortcut that points outside", "tensors that are missing", "no tensors",
    "text for a tensor", "numbers for names", "groups of an unknown module", "groups of a module without", "negative groups", "no groups",
    "groups that do not divide", "groups in words", "true groups", "groups that are no mapping", "groups by number",
)  # fmt: skip


@pytest.fixture(scope="module")
def pruned_content(dense):
    loaded = load_classifier(dense["resnet"])
    graph = trace(loaded.model, example_input(loaded.model, loaded.spec))
    plan = PruningPlan({g.name: tuple(range(g.size // 2)) for g in graph.prunable}, {g.name: g.size for g in graph.prunable})
    apply_cut_(loaded.model, plan_cut(graph, plan.kept))
    return {**read_tensor_file(dense["resnet"]), "plan": plan.to_dict(), "state_dict": loaded.model.state_dict()}


def test_the_unharmed_file_is_measured(script, photos, pruned_content, tmp_path):
    save_checkpoint(tmp_path / "fine.pt", pruned_content)
    assert script("val.py", "--weights", "fine.pt", "--data", photos, "--workers", 0).code == 0


@pytest.mark.parametrize("change", CHANGES)
def test_hostile_pruned_files_are_refused_in_one_line(script, photos, pruned_content, tmp_path, change):
    save_checkpoint(tmp_path / "bad.pt", {**pruned_content, **hostile(pruned_content, change)})
    before = set(tmp_path.rglob("*"))
    done = script("val.py", "--weights", "bad.pt", "--data", photos, "--workers", 0)
    refused(done, "", tmp_path, before)
    assert done.err.count("\n") == 1
    assert len(done.err) < 600
