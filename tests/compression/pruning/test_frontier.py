"""Several budgets of one network, and the cheapest one that loses no more than is tolerated."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

import rankcut
from compression.pruning import frontier
from rankcut import UserError
from tests.scripts.test_prune import YOLO, write_dense
from utils.files.checkpoint import read_tensor_file
from utils.measures.significance import PairedDifference

FLAGS = ("--workers", 0, "--images", 24, "--round-to", 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "tiny.pt", "tiny", definition=YOLO)


@pytest.fixture
def prune(script, photos, tiny):
    """Run prune.py on a small network and a few photos."""
    return lambda *flags: script("prune.py", "--weights", tiny, "--data", photos, *FLAGS, *flags)


@pytest.fixture(autouse=True)
def _quick_damage(monkeypatch):
    monkeypatch.setattr("compression.pruning.widths.DAMAGE_IMAGES", (8, 8))
    monkeypatch.setattr("compression.pruning.damage.PROBED", (0.6, 0.3))
    monkeypatch.setattr(frontier, "STEPS", 4)


def test_a_paired_difference_by_hand():
    first = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    second = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    found = PairedDifference.of(first, second)
    assert (found.lost, found.won, found.drop, found.flips) == (3, 1, pytest.approx(0.2), pytest.approx(0.4))
    assert found.standard_error == pytest.approx(math.sqrt((0.4 - 0.04) / 10))
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)  # at most one of four tosses
    same = PairedDifference.of(first, first)
    assert (same.drop, same.standard_error, same.flips, same.p_value) == (0, 0, 0, 1)
    assert PairedDifference.of(torch.ones(2000, dtype=torch.bool), torch.zeros(2000, dtype=torch.bool)).p_value == pytest.approx(0)


def test_a_sweep_makes_what_single_runs_make(prune, tmp_path):
    done = prune("--sweep", 0.7, 0.4, "--project", tmp_path, "--name", "s")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "s/results.json").read_text())
    assert list(found) == ["by", "dense", "frontier", "runs"]
    assert [row["share"] for row in found["frontier"]] == [0.7, 0.4]
    assert list(found["frontier"][0]) == ["share", "macs", "params", "top1", "latency_ms", "bytes", "weights"]
    with (tmp_path / "s/frontier.csv").open() as file:
        assert [float(row["share"]) for row in csv.DictReader(file)] == [0.7, 0.4]
    assert (tmp_path / "s/frontier.png").exists()
    assert f"{found['frontier'][1]['macs']:,}" in done.out
    done = prune("--macs", 0.4, "--project", tmp_path, "--name", "one")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "one/results.json").read_text())
    for name in ("macs", "params", "top1", "bytes"):
        assert (found["dense"][name], found["frontier"][1][name]) == tuple(results[name])
    several, single = (read_tensor_file(path) for path in (tmp_path / "s/weights/pruned-0.4.pt", tmp_path / "one/weights/pruned.pt"))
    assert several["plan"] == single["plan"]
    assert all(torch.equal(tensor, single["state_dict"][name]) for name, tensor in several["state_dict"].items())


def test_as_much_goes_as_the_tolerance_allows(prune, tmp_path):
    done = prune("--max-drop", 0.2, "--project", tmp_path, "--name", "t")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "t/results.json").read_text())
    tolerance, (before, after) = results["tolerance"], results["top1"]
    assert before - after <= 0.2 + 1e-9
    tried = {row["share"]: row for row in tolerance["tried"]}
    kept = min(share for share, row in tried.items() if row["drop"] <= 0.2 + 1e-9)
    assert results["macs"][1] <= kept * results["macs"][0]
    assert tried[kept]["top1"] == after
    for row in tried.values():
        assert row["drop"] == pytest.approx(before - row["top1"])
    assert "the cheapest that loses at most 20.00% on 15 validation images is kept" in done.out


def test_where_every_cut_loses_more_nothing_is_written(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "drop_of", lambda run, outcome: PairedDifference(0.5, 0.1, 5, 0, 0.5, 0.01))
    done = prune("--max-drop", 0.1, "--project", tmp_path / "runs")
    assert done.code == 2
    assert "max-drop 0.1 can't be kept: " in done.err
    assert "of the macs lose 50.00% of top-1 on 15 validation images" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_tolerance_from_python_and_a_sweep_in_a_loop(tiny, photos):
    dense = rankcut.load(tiny)
    small = dense.prune(photos, max_drop=0.9, workers=0, images=24, round_to=1)
    assert small.results["tolerance"]["max_drop"] == 0.9
    with pytest.raises(UserError, match="sweep makes several networks"):
        dense.prune(photos, sweep=(0.5, 0.4), workers=0, images=24)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sweep", 0.5, 1.5), "sweep is 1.5; it is the share that stays, in (0, 1]"),
        (("--max-drop", 1.5), "max-drop is 1.5; it is a share of the images, in [0, 1)"),
        (("--max-drop", 0.1, "--macs", 0.5), "--macs and --max-drop exclude each other"),
        (("--sweep", 0.5, "--max-drop", 0.1), "--sweep and --max-drop exclude each other"),
        (("--sweep", 0.5, "--dry-run"), "--sweep does not go with --dry-run"),
        (("--max-drop", 0.1, "--controls"), "--max-drop does not go with --controls"),
        (("--macs", 0.5, "--by", "params"), "--by is for --sweep and --max-drop"),
        (("--sweep", 0.5, 0.0001), "the budget macs 0.0001 can't be reached"),
    ],
)
def test_what_can_be_mended_is_one_line(prune, tmp_path, flags, message):
    done = prune(*flags, "--project", tmp_path / "runs")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))
