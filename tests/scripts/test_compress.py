"""Schedules, distillation and analyses by the scripts, as a user calls them."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from tests.conftest import ROOT
from tests.launch import Launch, as_script
from tests.schedules import THINNING, filters, once, policy

QUICK = ("--data", "digits", "--workers", 0, "--batch-size", 130, "--effective-train-size", 0.2)  # two batches an epoch
FILTERS = yaml.safe_dump(
    {
        "version": 1,
        "pruners": {"filters": filters(["layer?.?.conv1.weight"], 0.5, begin=0.25)},
        "regularizers": {"small": {"class": "L1Regularizer", "reg_regims": {"fc.weight": 1e-4}}},
        "extensions": THINNING,
        "lr_schedulers": {"falling": {"class": "ExponentialLR", "gamma": 0.5}},
        "policies": [
            policy("pruner", "filters", 0, 2),
            once("extension", "thinning", 1),
            policy("regularizer", "small", 0, 3),
            policy("lr_scheduler", "falling", 0),
        ],
    },
    sort_keys=False,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder: ResNet-20 with option-B shortcuts, at 16 px."""
    project = tmp_path_factory.mktemp("trained")
    ClassifierCompressor(
        TrainArguments(model="resnet20-b", imgsz=16, epochs=1, batch_size=256, workers=0, project=str(project))
    ).run_training_loop()
    return project / "exp"


@pytest.fixture
def weights(trained):
    return trained / "weights/best.pt"


@pytest.fixture
def schedule(tmp_path):
    path = tmp_path / "filters.yaml"
    path.write_text(FILTERS)
    return path


def rows_of(path):
    with path.open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_schedule_prunes_thins_regularizes_and_the_result_goes_everywhere(script, weights, schedule, tmp_path):
    done = script("train.py", *QUICK, "--weights", weights, "--compress", schedule, "--epochs", 3, "--lr0", 0.001)
    assert done.code == 0, done.err
    assert "pruners.filters.weights[0] -> layer1.0.conv1.weight, layer1.1.conv1.weight, layer1.2.conv1.weight" in done.out
    run = tmp_path / "runs/train/exp"
    results = json.loads((run / "results.json").read_text())
    # Inside the blocks half of the filters are gone: 8, 16, 32 of 16, 32, 64; maps of 16, 8 and 4 px.
    layer1 = 256 * 3 * (16 * 8 + 8 * 16) * 9
    layer2 = 64 * ((16 * 16 + 16 * 32) * 9 + 16 * 32 + 2 * (32 * 16 + 16 * 32) * 9)
    layer3 = 16 * ((32 * 32 + 32 * 64) * 9 + 32 * 64 + 2 * (64 * 32 + 32 * 64) * 9)
    channels = state_of(weights)["conv1.weight"].shape[1]
    assert results["macs"] == 256 * channels * 16 * 9 + layer1 + layer2 + layer3 + 64 * 10
    assert results["best_epoch"] >= 2  # the first epoch has not reached the target yet
    rows = rows_of(run / "results.csv")
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.001, 0.0005, 0.00025])
    assert float(rows[0]["train_loss"]) == pytest.approx(float(rows[0]["loss_classification"]) + float(rows[0]["loss_small"]), rel=1e-4)
    sparsity = rows_of(run / "sparsity.csv")
    assert [row["epoch"] for row in sparsity] == ["1", "2", "3"]
    assert [float(row["layer1.0.conv1.weight"]) for row in sparsity] == [0.25, 0, 0]  # then the zeros are cut out
    assert [row["total"] for row in sparsity] == [row.get("sparsity") for row in rows]
    assert (run / "schedule.yaml").read_text() == FILTERS
    best = run / "weights/best.pt"
    assert state_of(best)["layer1.0.conv1.weight"].shape[0] == 8

    measured = script("val.py", "--weights", best, "--data", "digits", "--workers", 0)
    assert measured.code == 0, measured.err
    again = json.loads((tmp_path / "runs/val/exp/results.json").read_text())
    assert again["top1"] == results["top1"]
    image = next(path for path in sorted((ROOT / "data/images").iterdir()) if path.suffix in (".jpg", ".png"))
    predicted = script("predict.py", "--weights", best, "--source", image)
    assert predicted.code == 0, predicted.err
    tuned = script("train.py", *QUICK, "--weights", best, "--epochs", 1, "--kd-resume", weights)
    assert tuned.code == 0, tuned.err
    assert state_of(tmp_path / "runs/train/exp2/weights/best.pt")["layer1.0.conv1.weight"].shape[0] == 8


def test_a_dry_run_prints_the_timeline_and_writes_nothing(script, weights, schedule, tmp_path):
    done = script("train.py", *QUICK, "--weights", weights, "--schedule", schedule, "--epochs", 3, "--dry-run")
    assert done.code == 0, done.err
    lines = [line.split(None, 2) for line in done.out.splitlines()[-3:]]
    assert [line[:2] for line in lines] == [["0", "0.02"], ["1", "0.01"], ["2", "0.005"]]
    assert "filters (25.0%)" in lines[0][2]
    assert "filters (50.0%), thinning" in lines[1][2]
    assert not (tmp_path / "runs").exists()


def test_a_teacher_checkpoint_distils_from_its_epoch_on(script, weights, tmp_path):
    flags = ("--kd-teacher", weights, "--kd-temp", 2, "--kd-dw", 0.7, "--kd-sw", 0.3, "--kd-tw", 0.1, "--kd-start-epoch", 1)
    done = script("train.py", *QUICK, "--model", "resnet20", "--imgsz", 16, "--epochs", 2, *flags, "--print-freq", 1)
    assert done.code == 0, done.err
    first, second = rows_of(tmp_path / "runs/train/exp/results.csv")
    assert "loss_distillation" not in first
    parts = ("loss_classification", "loss_distillation", "loss_teacher")
    assert float(second["train_loss"]) == pytest.approx(sum(float(second[part]) for part in parts), rel=1e-4)
    assert "sparsity" not in second  # nothing is pruned
    assert not (tmp_path / "runs/train/exp/sparsity.csv").exists()
    lines = [line for line in done.out.splitlines() if line.startswith("epoch 2 step 2/2: loss ")]
    assert len(lines) == 1
    assert "distillation" in lines[0]


def test_reports_of_an_epoch(script, weights, schedule, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # set by --deterministic; forgotten after the test
    flags = ("--act-stats", "val", "--param-hist", "--masks-sparsity", "--confusion", "--deterministic")
    try:
        done = script("train.py", *QUICK, "--weights", weights, "--compress", schedule, "--epochs", 1, *flags)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert done.code == 0, done.err
    run = tmp_path / "runs/train/exp"
    line = next(line for line in done.out.splitlines() if line.startswith("layer1.0.conv1.weight"))
    assert line.split()[1:] == ["16x16x3x3", "576", "2,304", "25.00", "25.00", "0.00"]  # 4 of 16 filters
    # a row a class; under the heads stands what rows and columns are
    matrix = [[int(cell) for cell in line.split()[1:]] for line in done.out.split("confusion matrix\n")[1].splitlines()[2:12]]
    assert sum(map(sum, matrix)) == 143
    statistics = yaml.safe_load((run / "activations.yaml").read_text())
    assert statistics["layer1.0.conv1"]["sparsity"] >= 0.25  # the maps of zero filters are zero
    table = rows_of(run / "activations.csv")
    assert [row["channel"] for row in table if row["module"] == "fc"] == [str(i) for i in range(10)]
    board = EventAccumulator(str(run)).Reload()
    assert "layer3.2.conv2.weight" in board.Tags()["histograms"]
    assert {"sparsity", "sparsity/fc.weight", "loss_small", "activations/apoz/fc"} <= set(board.Tags()["scalars"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sparsity", "layer1.0.conv1.weight"),
        ("compute", "Conv2d"),
        ("model", "(downsample): Sequential("),
        ("modules", "layer2.0.downsample.1"),
    ],
)
def test_summaries(script, weights, tmp_path, kind, expected):
    done = script("train.py", *QUICK, "--weights", weights, "--summary", kind)
    assert done.code == 0, done.err
    assert expected in done.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["element", "filter", "channel"])
def test_a_sensitivity_analysis_writes_a_schedule_that_runs(script, weights, tmp_path, kind):
    done = script("train.py", *QUICK, "--resume-from", weights.parent.parent, "--sense", kind, "--sense-range", 0, 0.13, 0.125)
    assert done.code == 0, done.err
    run = tmp_path / "runs/train/exp"
    assert sorted(path.name for path in run.iterdir()) == ["schedule.yaml", "sensitivity.csv", "sensitivity.png"]
    table = rows_of(run / "sensitivity.csv")
    assert sorted({row["sparsity"] for row in table}) == ["0.0", "0.125"]
    next_line = done.out.splitlines()[-1]
    assert next_line.startswith(f"next: python train.py --weights {weights.with_name('last.pt')} --data digits --compress runs/train/exp/")
    flags = next_line.split("train.py ")[1].split()
    assert script("train.py", *flags, *QUICK, "--epochs", 1).code == 0
    assert rows_of(tmp_path / "runs/train/exp2/sparsity.csv")


def test_an_analysis_of_which_no_schedule_comes_keeps_its_table(script, weights, tmp_path):
    # sparsity 0 alone: nothing can be pruned at all
    done = script("train.py", *QUICK, "--weights", weights, "--sense", "filter", "--sense-range", 0, 0.1, 0.1)
    assert done.code == 0, done.err
    assert "table and plot: runs/train/exp\nno schedule: no layer tolerates" in done.out
    assert sorted(path.name for path in (tmp_path / "runs/train/exp").iterdir()) == ["sensitivity.csv", "sensitivity.png"]


@pytest.fixture
def with_zeros(weights, tmp_path):
    """The trained network, in which 5 filters and their norms are zero."""
    content = torch.load(weights, weights_only=True)
    for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
        content["state_dict"][f"layer1.0.{name}"][3:8] = 0
    path = tmp_path / "zeros.pt"
    torch.save(content, path)
    return path


def test_thinnify_removes_zero_filters_and_changes_no_output(script, weights, with_zeros, tmp_path):
    done = script("train.py", *QUICK, "--weights", with_zeros, "--thinnify")
    assert done.code == 0, done.err
    # 5 filters of 16 inputs and 16 readers, 3x3, on 16x16 maps: 256 * 5 * (16 + 16) * 9 = 368,640
    before, after = (int(word.replace(",", "")) for word in done.out.split("multiply-adds ")[-1].split(", ")[0].split(" -> "))
    assert before - after == 368_640
    thinned = tmp_path / "runs/train/exp/weights/thinned.pt"
    assert state_of(thinned)["layer1.0.conv1.weight"].shape == (11, 16, 3, 3)
    lines = [script("train.py", *QUICK, "--weights", path, "--evaluate").out.splitlines()[-1] for path in (with_zeros, thinned)]
    assert lines[0] == lines[1]
    nothing = script("train.py", *QUICK, "--weights", weights, "--thinnify")
    assert "nothing to remove" in nothing.out
    assert [path.name for path in (tmp_path / "runs/train").iterdir()] == ["exp"]


def test_two_processes_thin_and_write_once(with_zeros, tmp_path):
    flags = (*QUICK, "--device", "cpu", "--weights", with_zeros, "--thinnify")
    with Launch(tmp_path, "two", as_script, "train.py", *flags, world=2) as processes:
        output = processes.finish()
    assert output.count("checkpoint runs/train/exp/weights/thinned.pt") == 1
    assert [path.name for path in (tmp_path / "runs/train").iterdir()] == ["exp"]


def test_evaluate_and_reset_optimizer_take_the_weights_of_a_run(script, trained, tmp_path):
    done = script("train.py", *QUICK, "--resume-from", trained, "--evaluate", "--confusion")
    assert done.code == 0, done.err
    rows = rows_of(trained / "results.csv")
    assert f"top-1 {float(rows[0]['top1']):.2%}" in done.out
    assert "on 143 validation images\nconfusion matrix" in done.out
    assert not (tmp_path / "runs").exists()
    anew = script("train.py", *QUICK, "--resume-from", trained, "--reset-optimizer", "--epochs", 1, "--lr0", 1e-12)
    assert anew.code == 0, anew.err
    before, after = state_of(trained / "weights/last.pt"), state_of(tmp_path / "runs/train/exp/weights/last.pt")
    assert torch.allclose(before["fc.weight"], after["fc.weight"], atol=1e-6)
    assert torch.load(tmp_path / "runs/train/exp/weights/last.pt")["training"]["epoch"] == 1


BAD = [
    (("--compress", "no.yaml"), "no.yaml"),
    (("--dry-run",), "give --compress FILE"),
    (("--masks-sparsity",), "give --compress FILE"),
    (("--sense", "filters", "--weights", "W"), "Did you mean 'filter'?"),
    (("--sense", "filter"), "--sense needs a trained network"),
    (("--evaluate",), "--evaluate needs a trained network"),
    (("--thinnify",), "--thinnify needs a trained network"),
    (("--sense", "filter", "--weights", "W", "--sense-range", "0", "1"), "takes three numbers"),
    (("--summary", "sparse"), "Did you mean 'sparsity'?"),
    (("--summary", "sparsity", "--evaluate", "--weights", "W"), "exclude each other"),
    (("--act-stats", "validation"), "act-stats is 'validation'"),
    (("--print-freq", "-1"), "print-freq is -1; it must be at least 0"),
    (("--effective-train-size", "0"), "effective-train-size is 0.0"),
    (("--effective-train-size", "0.0001"), "leaves 1 of 1299 images"),
    (("--reset-optimizer",), "--reset-optimizer goes with --resume-from"),
    (("--resume-from", "W", "--reset-optimizer", "--weights", "W"), "--resume-from and --weights exclude each other"),
    (("--kd-temp", "4"), "--kd-temperature needs a teacher"),
    (("--kd-start-epoch", "2"), "--kd-start-epoch needs a teacher"),
    (("--kd-pretrained",), "--kd-pretrained needs --kd-teacher"),
    (("--kd-teacher", "resnet32"), "--kd-teacher resnet32 has no weights"),
    (("--kd-resume", "no.pt"), "the teacher can't be loaded: no weights file no.pt"),
    (("--kd-resume", "W", "--kd-temp", "0"), "temperature of distillation is 0.0"),
    (("--kd-teacher", "W", "--kd-resume", "W"), "exclude each other"),
    (("--kd-resume", "W", "--kd-dw", "-1"), "the distill weight of distillation is -1.0"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_what_a_user_can_mend_is_one_line_exit_2_and_no_file(script, weights, tmp_path, flags, message):
    done = script("train.py", *QUICK, "--epochs", 1, *(weights if flag == "W" else flag for flag in flags))
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


WRONG = {
    "weight": ("conv1.weight", "conv9.weight", "matches no parameter"),
    "class": ("FilterRemover", "FilterRemoval", "Did you mean 'FilterRemover'?"),
    "window": ("ending_epoch: 2", "ending_epoch: 0", "ending_epoch 0 is exclusive"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_schedule_is_one_line_with_its_place(script, schedule, tmp_path, case):
    right, wrong, message = WRONG[case]
    schedule.write_text(FILTERS.replace(right, wrong))
    done = script("train.py", *QUICK, "--model", "resnet20-b", "--imgsz", 16, "--compress", schedule)
    assert done.code == 2
    assert f"{schedule}: " in done.err
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_schedule_that_distils_and_a_teacher_by_flags_exclude_each_other(script, weights, schedule):
    content = yaml.safe_load(FILTERS)
    content["distillers"] = {"dense": {"class": "KnowledgeDistillation", "resume": str(weights)}}
    content["policies"].append(policy("distiller", "dense", 0))
    schedule.write_text(yaml.safe_dump(content))
    flags = ("--weights", weights, "--compress", schedule, "--epochs", 1)
    done = script("train.py", *QUICK, *flags, "--kd-resume", weights)
    assert done.code == 2
    assert "has a distiller already" in done.err
    assert script("train.py", *QUICK, *flags, "--dry-run").code == 0
