from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from tests.launch import Launch, as_paused_script, as_script

# Everything that a resumed run could get wrong: random draws in the loader, the mixing and the network, moments,
# averages, accumulated gradients, the best score.
FLAGS = (
    "--data", "digits", "--effective-train-size", 0.3, "--model", "resnet20", "--imgsz", 16, "--batch-size", 100, "--workers", 0,
    "--optimizer", "AdamW",
    "--augment", "strong", "--mixup", 0.3, "--cutmix", 0.3, "--dropout", 0.1, "--accumulate", 2, "--epochs", 3,
)  # fmt: skip


def final(run):
    content = torch.load(run / "weights/last.pt", weights_only=True)
    return content["state_dict"], content["training"]


def columns_without_time(run):
    rows = (run / "results.csv").read_text().splitlines()
    return [row.split(",")[:6] for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run that is left alone, and one that is killed in its second epoch; test_resume_schedule interrupts others."""
    folder = tmp_path_factory.mktemp("resume")
    with Launch(folder, "whole", as_script, "train.py", *FLAGS, "--name", "whole") as launch:
        launch.finish()
    with Launch(folder, "killed", as_paused_script, (2, 3), "train.py", *FLAGS, "--name", "killed") as launch:
        launch.stop_where_it_waits(signal.SIGKILL)
    return folder / "runs/train"


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_left_alone(runs):
    run = runs / "killed"
    assert len(columns_without_time(run)) == 2  # the header and one epoch
    with Launch(runs, "resumed", as_script, "train.py", "--resume", run, "--workers", 1) as launch:
        launch.finish()
    (expected, expected_training), (state, training) = final(runs / "whole"), final(run)
    assert all(torch.equal(expected[key], state[key]) for key in expected)
    assert all(torch.equal(expected_training["model"][key], training["model"][key]) for key in expected)
    for slot, moments in expected_training["optimizer"]["state"].items():
        assert all(torch.equal(moment, training["optimizer"]["state"][slot][key]) for key, moment in moments.items())
    assert columns_without_time(run) == columns_without_time(runs / "whole")
    best, expected_best = (torch.load(path / "weights/best.pt")["state_dict"] for path in (run, runs / "whole"))
    assert all(torch.equal(expected_best[key], best[key]) for key in best)


def test_a_finished_run_a_foreign_file_and_changed_arguments_are_refused(script, runs, tmp_path):
    assert "has finished; start a new run from it with --weights" in script("train.py", "--resume", runs / "whole").err
    best = runs / "whole/weights/best.pt"
    assert "is not the weights/last.pt of a run" in script("train.py", "--resume", best).err
    changed = script("train.py", "--resume", runs / "whole", "--lr0", 1)
    assert changed.code == 2
    assert "--lr0 can't be changed by --resume" in changed.err


def test_a_run_whose_images_have_changed_is_not_resumed(script, photos, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    flags = ("--data", data, "--model", "resnet20", "--imgsz", 16, "--batch-size", 12, "--workers", 0, "--epochs", 2)

    def stop_after_first(run):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("utils.output.logs.EarlyStopping.on_epoch_end", lambda self, run: stop_after_first(run))
    stopped = script("train.py", *flags)
    assert stopped.code == 130
    assert "python train.py --resume runs/train/exp" in stopped.err
    monkeypatch.undo()
    (data / "train/red/000.png").unlink()
    refused = script("train.py", "--resume", tmp_path / "runs/train/exp")
    assert refused.code == 2
    assert "the train images" in refused.err
    assert "have changed" in refused.err


def test_a_half_written_last_pt_is_refused_in_one_line(script, runs, tmp_path):
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    (run / "weights/last.pt").write_bytes((runs / "whole/weights/last.pt").read_bytes()[:5000])
    refused = script("train.py", "--resume", run)
    assert refused.code == 2
    assert "not a weights file, or is damaged" in refused.err
    assert refused.err.count("\n") == 1
