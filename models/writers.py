"""Save predictions: annotated images and videos, text files, CSV, JSON. Images are encoded in threads."""

from __future__ import annotations

import csv
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import cv2

from models.prediction import Prediction
from utils.data.images import UnreadableImage
from utils.data.sources import Item
from utils.errors import UserError
from utils.files.checkpoint import write_text
from utils.files.runs import write_json
from utils.output.plots import annotate, write_image

WRITABLE = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class PredictionWriter:
    """Saves predictions in a folder with the structure of the source's; a context manager that completes all files on exit.

    Args:
        folder: the run's folder.
        images, txt, csv, json: what to save.
    """

    def __init__(self, folder: Path, images: bool, txt: bool, csv: bool, json: bool) -> None:
        self.folder, self.images, self.txt, self.json = folder, images, txt, json
        self.records: list[tuple[str, int, tuple[tuple[str, float], ...]]] = []
        self.taken: set[Path] = set()
        self.video: tuple[Path, Any] | None = None
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.jobs: list[Future[None]] = []
        self.table = self._open_table() if csv else None

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_video()
        self.pool.shutdown()
        for job in self.jobs:
            job.result()
        if self.json:
            write_json(self.folder / "predictions.json", [_record(*record) for record in self.records])
        if self.table:
            self.table.close()

    def save(self, prediction: Prediction) -> None:
        """Save one prediction; images and text files are written in the background.

        Raises:
            OSError: an earlier image could not be written.
        """
        item = prediction.item
        self.records.append((item.path, item.frame, prediction.topk))
        if self.table:
            self._add_rows(self.table, item, prediction.topk)
        lines = [f"{probability:.2f} {name}" for name, probability in prediction.topk]
        if self.txt:
            suffix = f"_{item.frame}.txt" if item.frame else ".txt"
            path = self._free(self.folder / "labels" / item.output.with_suffix(""), suffix, item.output.name)
            self.jobs.append(self.pool.submit(write_text, path, "\n".join(lines) + "\n"))
        if self.images and item.frame:
            self._add_frame(item, lines)
        elif self.images:
            suffix = item.output.suffix if item.output.suffix.lower() in WRITABLE else ".jpg"
            path = self._free(self.folder / item.output.with_suffix(""), suffix, item.output.name)
            self.jobs.append(self.pool.submit(_save_image, item, lines, path))
        while self.jobs and self.jobs[0].done():
            self.jobs.pop(0).result()

    def _open_table(self) -> TextIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        table = (self.folder / "predictions.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="")
        csv.writer(table).writerow(["path", "frame", "rank", "class", "probability"])
        return table

    def _add_rows(self, table: TextIO, item: Item, topk: tuple[tuple[str, float], ...]) -> None:
        """Write to predictions.csv as predictions come: what was predicted is there, whatever happens afterwards."""
        rows = csv.writer(table)
        for rank, (name, probability) in enumerate(topk, 1):
            rows.writerow([_cell(item.path), item.frame or "", rank, _cell(name), f"{probability:.6f}"])
        table.flush()

    def _free(self, stem: Path, suffix: str, name: str) -> Path:
        """Return a path that no other image uses: photo.txt, or photo.png.txt if that is photo.jpg's."""
        path = stem.with_name(stem.name + suffix)
        if path in self.taken:
            path = stem.with_name(name + suffix)
        self.taken.add(path)
        return path

    def _add_frame(self, item: Item, lines: list[str]) -> None:
        image = annotate(item.read(3, 0), lines)
        path = self.folder / item.output
        if self.video is None or self.video[0] != path:
            self._close_video()
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = image.shape[:2]
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), item.fps, (width, height))
            if not writer.isOpened():
                raise UserError(f"can't write the video {path}; use --nosave")
            self.video = path, writer
        self.video[1].write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def _close_video(self) -> None:
        if self.video:
            self.video[1].release()
            self.video = None


def _save_image(item: Item, lines: list[str], path: Path) -> None:
    try:
        image = item.read(3, 0)  # at full size; the network saw a smaller one
    except UnreadableImage:  # it was deleted in the meantime
        return
    write_image(path, annotate(image, lines))


def _record(path: str, frame: int, topk: tuple[tuple[str, float], ...]) -> dict[str, Any]:
    pairs = [[name, round(probability, 6)] for name, probability in topk]
    return {"path": path, **({"frame": frame} if frame else {}), "topk": pairs}


def _cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
