"""The notebook runs from top to bottom, cell by cell in one namespace, without Jupyter."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "digits.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_of_format_4_without_outputs_and_magics():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        assert set(cell) == {"id", "cell_type", "metadata", "source"} | ({"outputs", "execution_count"} & set(cell))
        assert cell["cell_type"] in ("markdown", "code")
        assert not cell.get("outputs")
    assert [line for cell in CELLS for line in cell.splitlines() if line.startswith(("%", "!"))] == []


@pytest.mark.usefixtures("few_digits")
def test_it_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "compression").mkdir()  # what the first cell looks for
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "nowhere"))  # undoes what the first cell does to the path
    monkeypatch.setattr("compression.exporting.measuring.ROUNDS", 1)
    monkeypatch.setattr("compression.pruning.widths.DAMAGE_IMAGES", (8, 8))
    monkeypatch.setattr("compression.pruning.arguments.MANY", 96)
    namespace: dict[str, object] = {"__name__": "notebook"}
    first, *others = CELLS
    exec(first.replace("EPOCHS = 10", "EPOCHS = 3"), namespace)
    for cell in others:
        exec(cell, namespace)
    assert namespace["EPOCHS"] == 3
    cut, small = namespace["cut"], namespace["small"]
    assert cut.results["macs"][1] <= 0.5 * cut.results["macs"][0]
    assert small.results["top1"] > 0.5
    assert capsys.readouterr().out.count("digit_") == 10
