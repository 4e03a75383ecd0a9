"""Prediction over a stream of images: reading ahead in threads, inference in batches, results in order."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from models.backends import Backend
from utils.data.images import READ_MARGIN, Image, UnreadableImage, preprocess
from utils.data.sources import Item, Source

READ_AHEAD = 2  # batches


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, likeliest first.

    Attributes:
        topk: (class name, probability) pairs; empty where the image could not be read.
        error: why it could not be read.
        speed_ms: milliseconds of preprocess (reading and decoding included), inference and postprocess.
    """

    item: Item
    topk: tuple[tuple[str, float], ...] = ()
    error: str = ""
    speed_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Prepared:
    item: Item
    pixels: Image | None
    error: str
    milliseconds: float


def predict(backend: Backend, source: Source, batch_size: int, topk: int) -> Iterator[Prediction]:
    """Classify every item of a source, in order.

    Decoding and pre-processing run in threads, up to two batches ahead of the network. Live sources are taken one
    image at a time.

    Args:
        backend: the classifier.
        source: the images.
        batch_size: images per forward pass.
        topk: classes per image; at most all.

    Yields:
        A prediction per image, also for those that could not be read.
    """
    batch_size = 1 if source.live else batch_size
    items = source.items()
    pending: deque[Future[_Prepared]] = deque()
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
    """Give the network half of torch's threads, in place, where it shares the processor with the threads that decode.

    With all of them a forward pass waits at every layer for the thread whose core is busy decoding: on 2 cores the
    whole pipeline takes a quarter longer. A single image, and a network on a GPU, have nothing to share.
    """
    if device.type == "cpu" and source.files > 1:
        torch.set_num_threads(max(torch.get_num_threads() // 2, 1))


def _prepare(item: Item, backend: Backend) -> _Prepared:
    start = time.perf_counter()
    pixels, error = None, ""
    try:
        pixels = preprocess(item.read(backend.spec.channels, backend.spec.imgsz * READ_MARGIN), backend.spec)
    except UnreadableImage as reason:
        error = str(reason)
    return _Prepared(item, pixels, error, (time.perf_counter() - start) * 1e3)


def _classify(backend: Backend, prepared: list[_Prepared], topk: int) -> list[Prediction]:
    pixels = [p.pixels for p in prepared if p.pixels is not None]
    probabilities: list[list[float]] = []
    classes: list[list[int]] = []
    inference = postprocess = 0.0
    if pixels:
        start = time.perf_counter()
        logits = backend.logits(torch.from_numpy(np.stack(pixels)))
        done = time.perf_counter()
        values, indices = logits.softmax(1).topk(min(topk, logits.shape[1]), dim=1)
        probabilities, classes = values.tolist(), indices.tolist()
        inference = (done - start) * 1e3 / len(pixels)
        postprocess = (time.perf_counter() - done) * 1e3 / len(pixels)
    predictions, names, row = [], backend.spec.class_names, 0
    for p in prepared:
        if p.pixels is None:
            predictions.append(Prediction(p.item, error=p.error))
            continue
        pairs = tuple((names[i], v) for i, v in zip(classes[row], probabilities[row], strict=True))
        speed_ms = {"preprocess": p.milliseconds, "inference": inference, "postprocess": postprocess}
        predictions.append(Prediction(p.item, pairs, speed_ms=speed_ms))
        row += 1
    return predictions
