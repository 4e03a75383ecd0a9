"""The figure of docs/how-a-cut-works.md, drawn from the trace of its network. To renew it: python -m docs.figures.channels"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docs.figures.measured import HERE, THEMES, Theme
from docs.four_layers import dense_steps, shrunk_steps

STREAM, SIDE = range(6, 10), range(30, 36)  # the numbers of the two groups; body's own, 18 to 21, are tied to the first
COLOURS = {"light": ("#0a58b0", "#bc4c00", "#8c959f"), "dark": ("#2f81d7", "#db6d28", "#6e7681")}
COLUMNS = {  # place of the operation in the trace -> the column's title
    0: "stem",
    2: "body",
    3: "addition",
    5: "side",
    7: "concatenation",
    9: "head",
}
SIZE, PITCH, STEP = 0.36, 0.42, 1.75
MIDDLE = 3.0


def draw(name: str, theme: Theme, path: Path) -> None:
    """Draw the figure to a PNG file with a transparent background."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    dense, kept = dense_steps(), [set(step.numbers) for step in shrunk_steps()]
    columns = [("images", (0, 1, 2), {0, 1, 2}), *((title, dense[place].numbers, kept[place]) for place, title in COLUMNS.items())]
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": theme.ink}):
        figure = plt.figure(figsize=(11, 5.6))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.55, 11.35), ylim=(-0.1, 5.95))
        axes.axis("off")
        for i, (title, numbers, left) in enumerate(columns):
            _column(axes, i * STEP, title, numbers, left, theme, COLOURS[name])
        for i in range(len(columns) - 1):
            _arrow(axes, i * STEP + 0.3, (i + 1) * STEP - 0.3, theme)
        for first, last, height in ((1, 3, 1.15), (3, 5, 1.15)):  # round body, and round side
            style = f"arc3,rad={0.42 if first == 1 else 0.52}"
            axes.annotate(
                "",
                (last * STEP - 0.28, MIDDLE - height + 0.32),
                (first * STEP, MIDDLE - height + 0.1),
                arrowprops={"arrowstyle": "-|>", "color": theme.faint, "lw": 1.4, "connectionstyle": style},
            )
        texts = (
            "group stem: one keep-set for stem and body, which meet in the addition",
            "group side",
            "not cut: the input and the output",
        )
        for k, (colour, text) in enumerate(zip(COLOURS[name], texts, strict=True)):
            x = (-0.3, 6.15, 7.75)[k]
            axes.add_patch(Rectangle((x, 0.12), 0.22, 0.22, fc=colour, lw=0))
            axes.text(x + 0.3, 0.23, text, size=8.8, va="center")
        figure.savefig(path, dpi=160, transparent=True)
        plt.close(figure)


def _column(axes: Any, x: float, title: str, numbers: tuple[int, ...], left: set[int], theme: Theme, colours: tuple[str, ...]) -> None:
    """Draw a tensor's channels as numbered squares; those that go are hollow."""
    from matplotlib.patches import FancyBboxPatch

    axes.text(x, 5.6, title, size=10.5, weight="bold", ha="center", va="center")
    axes.text(
        x, 5.28, f"{len(numbers)} → {len(left)}" if len(left) < len(numbers) else f"{len(numbers)}", size=9, color=theme.faint, ha="center"
    )
    for k, number in enumerate(numbers):
        stream = number in STREAM or title == "body"
        colour = colours[0] if stream else colours[1] if number in SIDE else colours[2]
        y = MIDDLE + ((len(numbers) - 1) / 2 - k) * PITCH
        stays = number in left
        look: dict[str, Any] = {"fc": colour, "lw": 0} if stays else {"fc": "none", "ec": colour, "lw": 1.3, "ls": (0, (2, 1.5))}
        axes.add_patch(FancyBboxPatch((x - SIZE / 2, y - SIZE / 2), SIZE, SIZE, boxstyle="round,pad=0,rounding_size=0.06", **look))
        axes.text(x, y - 0.01, str(number), size=8.5, ha="center", va="center", color="white" if stays else theme.faint)


def _arrow(axes: Any, begin: float, end: float, theme: Theme) -> None:
    axes.annotate("", (end, MIDDLE), (begin, MIDDLE), arrowprops={"arrowstyle": "-|>", "color": theme.faint, "lw": 1.4})


if __name__ == "__main__":
    for name, theme in THEMES.items():
        draw(name, theme, HERE / f"channels_{name}.png")
