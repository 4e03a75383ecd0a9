"""The README's picture, drawn from benchmarks/deploy.json. To renew it: python -m docs.figures.measured

It lies beside what it draws and not with the benchmarks, since it measures nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
JSON = HERE.parents[1] / "benchmarks" / "deploy.json"
RUNTIME = "onnxruntime"
STEPS = ("dense", "pruned", "pruned + int8")
NETWORKS = {
    "yolov5n-cls": ("YOLOv5n-cls", "CIFAR-10 at 64 px"),
    "resnet56": ("ResNet-56", "CIFAR-10 at 32 px"),
    "resnet50": ("ResNet-50", "224 px, random weights"),
}


@dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    ink: str
    faint: str
    track: str
    bars: tuple[str, str, str]


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#eaeef2", ("#8c959f", "#54a0e8", "#0a58b0")),
    "dark": Theme("#f0f6fc", "#9198a1", "#262c36", ("#6e7681", "#2f81d7", "#8cc8ff")),
}


@dataclass(frozen=True)
class Panel:
    """One measured quantity: its title, its key in the JSON, and how a value is written."""

    title: str
    key: str
    scale: float
    form: str

    def text(self, value: float) -> str:
        """Return a value as it is shown: three digits at least, and of large values no fraction."""
        value *= self.scale
        return self.form.format(f"{value:.2f}" if value < 10 or self.key == "top1" else f"{value:.1f}" if value < 100 else f"{value:,.0f}")


PANELS = (
    Panel("test top-1", "top1", 100, "{} %"),
    Panel("multiply-adds", "macs", 1e-6, "{} M"),
    Panel("latency, batch 1", "latency_ms_batch1", 1, "{} ms"),
    Panel("file", "bytes", 1e-6, "{} MB"),
)


def content() -> dict[str, Any]:
    """Return what the benchmark has written: its machine and its rows."""
    found: dict[str, Any] = json.loads(JSON.read_text(encoding="utf-8"))
    return found


def measured() -> dict[str, dict[str, dict[str, float | None]]]:
    """Return network -> step -> key -> value, all in one runtime."""
    rows = [row for row in content()["rows"] if row["runtime"].startswith(RUNTIME)]
    keys = [panel.key for panel in PANELS]
    return {
        network: {row["step"]: {key: row[key] for key in keys} for row in rows if row["network"] == network and _shown(row)}
        for network in NETWORKS
    }


def _shown(row: dict[str, str]) -> bool:
    return row["step"] in STEPS and (row["precision"] == "int8") == row["step"].endswith("int8")


def note() -> str:
    """Return where the figures come from."""
    machine = content()["machine"]
    versions = sorted({row["runtime"].split()[1] for row in content()["rows"] if row["runtime"].startswith(RUNTIME)})
    where = f"{machine['cores']} cores of an {machine['processor']}, {machine['threads']} threads"
    return f"Files in ONNX Runtime {' and '.join(versions)} on {where}; one checkpoint each. All figures: docs/results.md"


LEFT, TOP, WIDTH, GAP = 1.95, 3.55, 1.3, 2.28  # of the bars, inches: where they begin, how long they are, from one to the next
ROW, BAR = 1.2, 0.33  # from one network to the next, and from one bar to the next


def draw(theme: Theme, path: Path) -> None:
    """Draw the picture to a PNG file with a transparent background."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = measured()
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": theme.ink}):
        figure = plt.figure(figsize=(11, 4.7))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 11), ylim=(0, 4.7))
        axes.axis("off")
        for k, step in enumerate(STEPS):
            _bar(axes, LEFT + k * GAP, 4.5, 0.24, theme.bars[k])
            axes.text(LEFT + k * GAP + 0.33, 4.5, step, size=10.5, va="center")
        for i, panel in enumerate(PANELS):
            axes.text(LEFT + i * GAP, 4.0, panel.title, size=11.5, weight="bold", va="center")
        for j, (network, (name, about)) in enumerate(NETWORKS.items()):
            axes.text(0.12, TOP - ROW * j - 0.2, name, size=12.5, weight="bold", va="center")
            axes.text(0.12, TOP - ROW * j - 0.5, about, size=8.6, color=theme.faint, va="center")
            for i, panel in enumerate(PANELS):
                found = [values[network][step][panel.key] for step in STEPS]
                _bars(axes, (LEFT + i * GAP, TOP - ROW * j), panel, found, theme)
        axes.text(0.12, 0.15, note(), size=8.2, color=theme.faint, va="center")
        figure.savefig(path, dpi=160, transparent=True)
        plt.close(figure)


def _bars(axes: Any, place: tuple[float, float], panel: Panel, found: list[float | None], theme: Theme) -> None:
    """Draw one quantity of one network, a bar for each step; accuracies are shares of 1, all others of the largest."""
    x, top = place
    known = [value for value in found if value is not None]
    if not known:
        axes.text(x, top - BAR, "not trained", size=9, color=theme.faint, va="center")
    whole = 1.0 if panel.key == "top1" else max(known, default=1.0)
    for k, value in enumerate(known):
        y = top - BAR * k
        _bar(axes, x, y, WIDTH, theme.track)
        _bar(axes, x, y, WIDTH * value / whole, theme.bars[k])
        axes.text(x + WIDTH + 0.07, y, panel.text(value), size=9, va="center", weight="bold" if k == 2 else "normal")


def _bar(axes: Any, x: float, y: float, width: float, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(FancyBboxPatch((x, y - 0.1), width, 0.2, boxstyle="round,pad=0,rounding_size=0.05", lw=0, fc=colour))


if __name__ == "__main__":
    for name, theme in THEMES.items():
        draw(theme, HERE / f"measured_{name}.png")
