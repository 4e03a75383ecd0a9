"""Classify a stream of images: threads read ahead, the network runs in batches, results come in order."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from models.backends import Backend
from utils.data.images import READ_MARGIN, Image, UnreadableImage, preprocess
from utils.data.sources import Item, Source
from utils.spec import ModelSpec

READ_AHEAD = 2  # batches


Classes = tuple[tuple[str, float], ...]  # (class name, probability) pairs, the likeliest first


@dataclass(frozen=True)
class Prediction:
    """The classes of one image.

    Attributes:
        topk: its likeliest classes; empty if the image could not be read.
        error: why it could not be read.
        speed_ms: milliseconds of preprocess (which includes reading and decoding), inference and postprocess.
    """

    item: Item
    topk: Classes = ()
    error: str = ""
    speed_ms: dict[str, float] = field(default_factory=dict)


def predict(backend: Backend, source: Source, batch_size: int, topk: int) -> Iterator[Prediction]:
    """Classify every image of a source, in order, also yielding those that can't be read.

    Threads decode and pre-process up to two batches ahead of the network. Live sources are taken one image at a time.

    Args:
        backend, source: the classifier and the images.
        batch_size: images per forward pass.
        topk: classes per image, at most all.
    """
    batch_size = 1 if source.live else batch_size
    items = source.items()
    pending: deque[Future[tuple[Prediction, Image | None]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            while True:
                while len(pending) < (1 if source.live else READ_AHEAD * batch_size + batch_size):
                    item = next(items, None)
                    if item is None:
                        break
                    pending.append(pool.submit(_prepare, item, backend))
                if not pending:
                    return
                yield from _classify(backend, [pending.popleft().result() for _ in range(min(batch_size, len(pending)))], topk)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def share_cores_(device: torch.device, source: Source) -> None:
    """Give a network on the CPU half of torch's threads, in place; the other cores decode the next images.

    With all threads a forward pass would wait at every layer for the one whose core is busy decoding: on 2 cores the whole
    pipeline would take a quarter longer.
    """
    if device.type == "cpu" and source.files > 1:
        torch.set_num_threads(max(torch.get_num_threads() // 2, 1))


def _prepare(item: Item, backend: Backend) -> tuple[Prediction, Image | None]:
    """Read and pre-process an image; return its prediction, without classes yet, and its pixels, None if it can't be read."""
    start = time.perf_counter()
    try:
        pixels = preprocess(item.read(backend.spec.channels, backend.spec.longest * READ_MARGIN), backend.spec)
    except UnreadableImage as reason:
        return Prediction(item, error=str(reason)), None
    return Prediction(item, speed_ms={"preprocess": (time.perf_counter() - start) * 1e3}), pixels


def _classify(backend: Backend, prepared: list[tuple[Prediction, Image | None]], topk: int) -> list[Prediction]:
    batch = [pixels for _, pixels in prepared if pixels is not None]
    if not batch:
        return [prediction for prediction, _ in prepared]
    start = time.perf_counter()
    logits = backend.logits(torch.from_numpy(np.stack(batch)))
    done = time.perf_counter()
    found = iter(likeliest(logits, backend.spec, topk))
    ended = time.perf_counter()
    speed_ms = {"inference": (done - start) * 1e3 / len(batch), "postprocess": (ended - done) * 1e3 / len(batch)}
    predictions = []
    for prediction, pixels in prepared:
        if pixels is not None:
            prediction = replace(prediction, topk=next(found), speed_ms=prediction.speed_ms | speed_ms)
        predictions.append(prediction)
    return predictions


def likeliest(logits: Tensor, spec: ModelSpec, topk: int) -> list[Classes]:
    """Return the likeliest classes of each image, at most ``topk``."""
    values, indices = logits.softmax(1).topk(min(topk, logits.shape[1]), dim=1)
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [tuple(zip((spec.class_names[i] for i in row), chances, strict=True)) for row, chances in rows]
