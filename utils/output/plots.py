"""Figures of a run: curves, bars, confusion matrix, mosaics of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from utils.data.images import Image, UnreadableImage, as_bytes, as_channels
from utils.files.checkpoint import atomic_write
from utils.output import lettering

TILE, COLUMNS, MAX_TILES = 128, 8, 64
MAX_ANNOTATED_CLASSES = 20  # larger confusion matrices show no counts
MAX_TICKS = 60
MAX_CURVES = 10  # more colours can't be told apart


def plot_results(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw losses, accuracies and the learning rate over the epochs."""
    figure, axes = _subplots(1, 3, 12, 3.5)
    epochs = [row["epoch"] for row in rows]
    panels = (("loss", ("train_loss", "val_loss")), ("accuracy", ("top1", "top5")), ("learning rate", ("lr",)))
    for axis, (title, columns) in zip(axes.flat, panels, strict=True):
        for column in columns:
            axis.plot(epochs, [row[column] for row in rows], marker="o", markersize=3, label=column)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
        axis.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def plot_frontier(dense: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against multiply-adds, latency and bytes, the dense network among the others."""
    figure, axes = _subplots(1, 3, 12, 3.5)
    panels = (("macs", 1e6, "million multiply-adds"), ("latency_ms", 1, "milliseconds"), ("bytes", 1e6, "megabytes"))
    for axis, (column, unit, label) in zip(axes.flat, panels, strict=True):
        points = sorted((row[column] / unit, 100 * row["top1"]) for row in [dense, *rows] if row[column])
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4)
        axis.set_xlabel(label)
        axis.set_ylabel("top-1 (val), %")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix as shares of each true class, with counts if they fit."""
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    classes = len(class_names)
    side = min(max(4.0, 1.5 + classes * 0.45), 20.0)
    figure, axes = _subplots(1, 1, side + 1, side)
    axis = axes.flat[0]
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axis, fraction=0.046, label="share of the true class")
    step = -(-classes // MAX_TICKS)
    ticks = range(0, classes, step)
    labels, families = [lettering.drawable(class_names[i]).replace("$", r"\$") for i in ticks], list(lettering.fonts())
    axis.set_xticks(ticks, labels, rotation=90, family=families)
    axis.set_yticks(ticks, labels, family=families)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if classes <= MAX_ANNOTATED_CLASSES:
        for i, j in zip(*np.nonzero(counts), strict=True):
            axis.text(j, i, str(counts[i, j]), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black", fontsize=8)
    _save(figure, path)


def plot_scores(groups: Sequence[tuple[str, Sequence[float], Sequence[bool]]], label: str, path: Path) -> None:
    """Draw the scores of each group's channels in ascending order, a panel per group; channels that are cut are red."""
    columns = min(6, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = _subplots(rows, columns, 2.6 * columns, 1.9 * rows + 0.4)
    for axis, (name, values, kept) in zip(axes.flat, groups, strict=False):
        order = np.argsort(np.asarray(values), kind="stable")
        places, shown, stays = np.arange(len(order)), np.asarray(values)[order], np.asarray(kept)[order]
        axis.scatter(places[stays], shown[stays], s=5, color="tab:blue", label="kept")
        axis.scatter(places[~stays], shown[~stays], s=5, color="tab:red", label="cut")
        axis.set_title(f"{name}: {int(stays.sum())} of {len(order)}", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.margins(y=0.15)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_axis_off()
    handles, labels = next(iter(axes.flat)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8)
    figure.suptitle(label, fontsize=10)
    _save(figure, path)


def plot_widths(names: Sequence[str], before: Sequence[int], after: Sequence[int], path: Path) -> None:
    """Draw the number of channels per group before and after a cut, in forward order."""
    figure, axes = _subplots(1, 1, max(5.0, 1.5 + 0.28 * len(names)), 4.2)
    axis, places = axes.flat[0], np.arange(len(names))
    axis.bar(places, before, width=0.85, color="lightsteelblue", label="before")
    axis.bar(places, after, width=0.85, color="tab:blue", label="after")
    axis.set_xticks(places, names, rotation=90, fontsize=7)
    axis.set_ylabel("channels")
    axis.legend()
    _save(figure, path)


def plot_sensitivity(names: Sequence[str], sparsities: Sequence[float], top1: NDArray[Any], path: Path) -> None:
    """Draw top-1 over the sparsity of one layer at a time: a curve per layer, or a heat map of more than ``MAX_CURVES``.

    Args:
        names: the layers, in forward order.
        sparsities: ascending.
        top1: [layers, sparsities].
        path: file to write.
    """
    if len(names) <= MAX_CURVES:
        figure, axes = _subplots(1, 1, 9.0, 4.5)
        axis = axes.flat[0]
        for name, values in zip(names, top1, strict=True):
            axis.plot(sparsities, values, marker="o", markersize=3, label=name)
        axis.set_ylabel("top-1")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
    else:
        width, height = max(5.0, 3.5 + 0.42 * len(sparsities)), min(1.5 + 0.2 * len(names), 100.0)
        figure, axes = _subplots(1, 1, width, height)
        axis = axes.flat[0]
        picture = axis.imshow(top1, cmap="viridis", aspect="auto", vmin=float(np.nanmin(top1)), vmax=float(np.nanmax(top1)))
        figure.colorbar(picture, ax=axis, fraction=0.046, label="top-1", aspect=40)
        step = -(-len(sparsities) // MAX_TICKS)
        places = range(0, len(sparsities), step)
        axis.set_xticks(places, [f"{sparsities[i]:g}" for i in places], fontsize=7, rotation=90 if len(places) > 20 else 0)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("sparsity of one layer, the others as they are")
    _save(figure, path)


def mosaic(images: Sequence[Image], captions: Sequence[str], path: Path, colours: Sequence[tuple[int, int, int]] | None = None) -> None:
    """Write up to 64 images with captions as one JPEG, eight in a row; colours are RGB, one per caption."""
    images, captions = images[:MAX_TILES], captions[:MAX_TILES]
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    canvas = np.full((rows * (TILE + 18), columns * TILE, 3), 255, np.uint8)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        top, left = i // columns * (TILE + 18), i % columns * TILE
        tile = as_channels(np.ascontiguousarray(image), 3)
        scale = TILE / max(tile.shape[:2])
        height, width = (max(round(side * scale), 1) for side in tile.shape[:2])
        y, x = top + (TILE - height) // 2, left + (TILE - width) // 2
        canvas[y : y + height, x : x + width] = cv2.resize(
            tile, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
        )
        _write(canvas, _fitting(caption, TILE - 4), left + 2, top + TILE + 13, 0.4, colours[i] if colours else (0, 0, 0))
    write_image(path, canvas)


def annotate(image: Image, lines: Sequence[str]) -> Image:
    """Return a copy of an RGB image with lines of text in its upper left corner, on a dark background."""
    canvas = np.ascontiguousarray(as_channels(image, 3)).copy()
    if min(canvas.shape[:2]) < TILE:  # text needs room
        scale = TILE * 2 / min(canvas.shape[:2])
        canvas = as_bytes(cv2.resize(canvas, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST))
    size = max(min(canvas.shape[:2]) / 600, 0.4)
    height = round(26 * size) + 4
    width = max(_width(line, size) for line in lines) + 12
    box = canvas[: height * len(lines) + 6, :width]
    box[:] = box // 3
    for i, line in enumerate(lines):
        _write(canvas, line, 6, height * (i + 1) - 4, size, (255, 255, 255))
    return canvas


def _write(canvas: Image, text: str, left: int, baseline: int, size: float, colour: tuple[int, int, int]) -> None:
    """Write a line into an image, in place: OpenCV's letters, which are drawn fastest, have ASCII's characters only."""
    if text.isascii():
        cv2.putText(canvas, text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, size, colour, max(round(size), 1), cv2.LINE_AA)
    else:
        lettering.draw_text(canvas, text, left, baseline, _height(size), colour)


def _width(text: str, size: float) -> int:
    """Return the width of a line, pixels."""
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0] if text.isascii() else lettering.text_width(text, _height(size))


def _height(size: float) -> int:
    """Return the height of a font that is as large as OpenCV's letters."""
    return max(round(30 * size), 9)


def write_image(path: Path, image: Image) -> None:
    """Write an RGB image atomically, in the format of the path's suffix."""
    ok, data = cv2.imencode(path.suffix or ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not ok:
        raise UnreadableImage(f"can't encode {path}")
    with atomic_write(path) as temporary:
        temporary.write_bytes(data.tobytes())


def _fitting(text: str, width: int) -> str:
    while len(text) > 1 and _width(text, 0.4) > width:
        text = text[:-1]
    return text


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, NDArray[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which keeps global state and may need a screen
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.lstrip("."))
