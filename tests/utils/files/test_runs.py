import json
import os
from pathlib import Path

import pytest
import yaml

from utils import distributed
from utils.errors import UserError
from utils.files import runs
from utils.files.runs import RunDirectory, find_restarted, find_run, write_json
from utils.files.yaml_files import write_yaml


def checkpoint(run, name="last.pt", when=None):
    path = Path(run) / "weights" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    if when is not None:
        os.utime(path, (when, when))
    return path


def create(project, name="exp", exist_ok=False):
    return RunDirectory.create(str(project), name, exist_ok)


def test_runs_are_numbered_from_two_and_gaps_are_filled(tmp_path):
    project = tmp_path / "runs" / "train"
    assert [create(project).path.name for _ in range(3)] == ["exp", "exp2", "exp3"]
    (project / "exp2").rmdir()
    assert create(project).path == project / "exp2"
    assert create(project, "other").path == project / "other"
    assert sorted(path.name for path in project.iterdir()) == ["exp", "exp2", "exp3", "other"]


def test_exist_ok_takes_the_folder_as_it_is(tmp_path):
    first = create(tmp_path, exist_ok=True)
    (first.path / "kept.txt").write_text("x")
    second = create(tmp_path, exist_ok=True)
    assert (first.created, second.created) == (True, False)
    assert second.path == first.path
    second.discard()
    assert (first.path / "kept.txt").is_file()


def test_failed_run_removes_only_the_folder_that_it_made(tmp_path):
    directory = create(tmp_path)
    assert (directory.weights, directory.last) == (tmp_path / "exp" / "weights", tmp_path / "exp" / "weights" / "last.pt")
    assert directory.best == tmp_path / "exp" / "weights" / "best.pt"
    directory.discard()
    assert list(tmp_path.iterdir()) == []
    directory.discard()


def test_file_in_place_of_the_project_is_refused(tmp_path):
    (tmp_path / "runs").write_text("a file")
    for project in (tmp_path / "runs", tmp_path / "runs" / "train"):
        with pytest.raises(UserError, match=r"--project .*runs.* can't be a folder: a file is in the way"):
            create(project)


def test_file_of_the_run_s_name_makes_the_next_number(tmp_path):
    (tmp_path / "exp").write_text("a file")
    assert create(tmp_path).path.name == "exp2"


def test_file_of_the_run_s_name_is_refused_where_the_name_must_be_kept(tmp_path):
    (tmp_path / "exp").write_text("a file")
    with pytest.raises(UserError, match="exp"):
        create(tmp_path, exist_ok=True)


def test_only_rank_0_makes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast", lambda path: tmp_path / "exp7")
    assert create(tmp_path) == RunDirectory(tmp_path / "exp7", created=False)
    assert list(tmp_path.iterdir()) == []


def test_run_to_resume_is_found_by_folder_by_checkpoint_and_as_the_newest(tmp_path):
    checkpoint(tmp_path / "exp", when=2_000)
    checkpoint(tmp_path / "exp2", when=1_000)
    (tmp_path / "exp3").mkdir()
    for resume in (str(tmp_path / "exp2"), str(tmp_path / "exp2" / "weights" / "last.pt")):
        assert find_run(resume, "elsewhere") == RunDirectory(tmp_path / "exp2")
    assert find_run("newest", str(tmp_path)) == RunDirectory(tmp_path / "exp")  # by time, not by number


def test_nothing_to_resume_is_told_with_what_was_looked_for(tmp_path):
    best = checkpoint(tmp_path / "exp", "best.pt")
    stray = tmp_path / "last.pt"
    stray.write_bytes(b"")
    for resume, words in {
        "newest": f"nothing to resume: no run below {tmp_path} has a weights/last.pt",
        str(tmp_path / "exp"): r"nothing to resume: .*exp/weights/last.pt is not there",
        str(tmp_path / "absent"): r"nothing to resume: .*absent/weights/last.pt is not there",
        str(best): r"best.pt is not the weights/last.pt of a run; .*--weights .*best.pt",
        str(stray): r"last.pt is not the weights/last.pt of a run",
    }.items():
        with pytest.raises(UserError, match=words):
            find_run(resume, str(tmp_path))


def test_restarted_launch_finds_its_own_run(tmp_path, monkeypatch):
    for name, launch in (("exp", "job-1"), ("exp2", "job-2"), ("exp3", "job-3")):
        checkpoint(tmp_path / name)
        (tmp_path / name / runs.LAUNCH_FILE).write_text(launch)
    (tmp_path / "exp3" / "weights" / "last.pt").unlink()
    monkeypatch.setattr(distributed, "restarts", lambda: 1)
    for launch, found in (("job-2", RunDirectory(tmp_path / "exp2")), ("job-3", None), ("job-4", None)):
        monkeypatch.setattr(distributed, "launch_id", lambda launch=launch: launch)
        assert find_restarted(str(tmp_path), "exp") == found
    monkeypatch.setattr(distributed, "launch_id", lambda: "job-2")
    monkeypatch.setattr(distributed, "restarts", lambda: 0)
    assert find_restarted(str(tmp_path), "exp") is None


def test_launch_is_marked_so_that_a_restart_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "launch_id", lambda: "job-9")
    directory = create(tmp_path)
    assert (directory.path / runs.LAUNCH_FILE).read_text() == "job-9"


def test_json_and_yaml_come_back_in_order(tmp_path):
    content = {"zeta": 1, "alpha": [1.5, None], "name": "Käfer"}
    write_json(tmp_path / "a.json", content)
    write_yaml(tmp_path / "a.yaml", content)
    assert json.loads((tmp_path / "a.json").read_text()) == content
    text = (tmp_path / "a.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == content
    assert text.index("zeta") < text.index("alpha")
    assert "Käfer" in text
