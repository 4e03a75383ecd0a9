"""Where a run's files may lie, checked before any work."""

from __future__ import annotations

import os

import pytest

from tests.conftest import ROOT
from utils.errors import UserError
from utils.files.runs import RunDirectory, check_place

DIGITS = ROOT / "weights" / "digits.pt"


@pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/tmp/x", "..", "."])
def test_a_name_stays_below_its_project(tmp_path, name):
    with pytest.raises(UserError, match="is no name of a folder below --project"):
        RunDirectory.create(str(tmp_path / "p"), name, False)
    assert not list(tmp_path.iterdir())


def test_folders_within_a_project_are_names(tmp_path):
    assert RunDirectory.create(str(tmp_path), "a/b", False).path == tmp_path / "a/b"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_project_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "p").mkdir(mode=0o500)
    with pytest.raises(UserError, match="can't be written"):
        check_place(str(tmp_path / "p"), "exp")


@pytest.mark.parametrize(
    "line",
    [
        ("train.py", "--data", "digits", "--epochs", 1),
        ("val.py", "--weights", DIGITS),
        ("prune.py", "--weights", DIGITS, "--macs", 0.5),
        ("export.py", "--weights", DIGITS),
        ("predict.py", "--weights", DIGITS),
    ],
)
def test_every_script_refuses_before_it_works(script, tmp_path, monkeypatch, line):
    monkeypatch.setattr("utils.files.runs.os.access", lambda *_: False)
    for flags, message in ((("--name", "../x"), "is no name of a folder below"), (("--project", tmp_path), "can't be written: ")):
        done = script(*line, *flags)
        assert done.code == 2
        assert message in done.err
        assert done.err.count("\n") == 1
        assert "epoch" not in done.out


def test_a_run_s_folder_stands_for_its_best_weights(script, tmp_path):
    (tmp_path / "run/weights").mkdir(parents=True)
    (tmp_path / "run/weights/best.pt").write_bytes(DIGITS.read_bytes())
    done = script("predict.py", "--weights", tmp_path / "run", "--source", ROOT / "data/images/digit_3.png", "--nosave")
    assert done.code == 0, done.err
    (tmp_path / "run/weights/best.pt").rename(tmp_path / "run/weights/pruned.pt")
    done = script("prune.py", "--weights", tmp_path / "run", "--dry-run", "--macs", 0.5)
    assert done.code == 0, done.err
