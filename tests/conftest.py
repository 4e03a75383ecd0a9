"""Small data sets, and a way to run the scripts as a user does."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"blue": (40, 60, 200), "green": (50, 190, 70), "red": (210, 50, 40)}  # RGB
# The images are small, so a second thread would mostly wait for the first. make test-processors asks for more of them.
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
DRAW = Figure.savefig


def spare_time_() -> None:
    """Use THREADS threads, and leave plots empty: drawing one takes longer than training a small network on it."""
    torch.set_num_threads(THREADS)
    Figure.savefig = lambda figure, path, **_: Path(path).touch()


@pytest.fixture(autouse=True, scope="session")
def _spare_time() -> None:
    spare_time_()


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are drawn after all."""
    monkeypatch.setattr(Figure, "savefig", DRAW)


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, as some tests wait for processes that they have started; with more threads, cores for each of them."""
    cores = os.cpu_count() or 1
    return cores + 1 if THREADS == 1 else max(cores // THREADS, 1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out, and which commands run it."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple)]
    exported = sum("openvino" in reason or "nncf" in reason for reason in reasons)
    if exported:
        terminalreporter.write_line(f"left out: {exported} tests that need OpenVINO or NNCF; make test-export installs both and runs them")
    if others := len(reasons) - exported:
        terminalreporter.write_line(f"left out: {others} other tests; python -m pytest -rs tells why")
    if config.option.markexpr == "not exhaustive":
        terminalreporter.write_line("left out: tests that take too long for every run; make test-exhaustive runs them")


@pytest.fixture(scope="module")
def few_passes() -> Iterator[None]:
    """Exported files are timed, but not for long."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ROUNDS", "PASSES"):
            patch.setattr(f"compression.exporting.measuring.{name}", 1)
        yield


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Run a script in this process, in a temporary folder, as ``python SCRIPT ARGUMENTS`` would."""

    def run(name: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code: int | str | None = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            torch.set_num_threads(THREADS)  # predict.py has taken fewer
        captured = capsys.readouterr()
        return Result(int(code or 0), captured.out, captured.err)

    return run


def write_images(folder: Path, per_class: int, seed: int, size: int = 24, classes: tuple[str, ...] = tuple(CLASSES)) -> None:
    """Write noisy squares of a colour per class, JPEG and PNG by turns."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            image = np.clip(generator.normal(CLASSES[name], 40, (size, size, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"{i:03}.{'jpg' if i % 2 else 'png'}"), image[:, :, ::-1])


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (3 x 12 images), val/ (3 x 5) and test/ (3 x 4)."""
    root = tmp_path_factory.mktemp("photos")
    for split, count, seed in (("train", 12, 0), ("val", 5, 1), ("test", 4, 2)):
        write_images(root / split, count, seed)
    return root


@pytest.fixture
def few_digits(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set "digits" has every third image only."""
    folder = tmp_path_factory.mktemp("few")
    with np.load(ROOT / "data" / "digits.npz") as file:
        np.savez(folder / "digits.npz", **{name: values[::3] for name, values in file.items()})
    monkeypatch.setattr("utils.data.datasets.DATA_DIR", folder)
