"""Measure the ranks of all feature maps in one pass over the images, and stop once the choice has settled.

When to stop. After 32, 48, 64, 80, 96, 112, 128, 160, ... images, the images seen so far are dealt into eight blocks like
cards. For each of the 35 ways to split them into two halves of four blocks (in wide groups for some of them, which tell
as much), each half chooses its own units to keep. Let d be the mean share of the kept units on which two halves differ. A
mean over n/2 images has twice the variance of one over n, and the two halves err independently, so scores of halves
differ by twice the standard deviation by which the mean over the n images seen differs from the mean over infinitely
many, and by ``2 / sqrt(1 - n/N)`` times that by which it differs from the mean over all N images. Near the threshold the
number of exchanged units grows in proportion with the deviation. So the kept set is expected to differ from that of all
N images in a share ``d / 2 * sqrt(1 - n/N)`` of its units. A group has settled when that is at most ``TOLERATED``. It is
then scored no more, a pass ends at the last map that is still scored, and scoring ends once all groups have settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from compression.scoring.feature_maps import PASS, Measured, Tap, find_taps, measure_images
from compression.scoring.ranks import KEYS, KINDS, scores_from_ranks
from compression.scoring.scores import MapScores, NetworkScores, ScoringTask, TapScore, from_taps, taps_of
from compression.scoring.singular_values import spectrum_scores
from compression.tracing.graph import ChannelGroup
from utils.errors import UserError

BLOCKS = 8
TOLERATED = 0.05
FIRST = 32  # a multiple of PASS: images before the first look
_HALVES = [half for half in combinations(range(BLOCKS), BLOCKS // 2) if 0 in half]


@dataclass
class _Sums:
    """One tap's sums over the images of each block, float64 [blocks, kinds, C]."""

    blocks: Tensor
    images: int = 0
    size: tuple[int, int] = (0, 0)

    def add(self, measured: Measured, begin: int, end: int) -> None:
        """Add images ``begin`` to ``end``; image i belongs to block i % BLOCKS."""
        for block in range(BLOCKS):
            self.blocks[block] += measured.values[:, (block - begin) % BLOCKS :: BLOCKS].double().sum(1)
        self.images, self.size = end, measured.size


@dataclass
class _Progress:
    """Where a measurement stands."""

    sums: dict[str, _Sums]
    images: dict[str, int] = field(default_factory=dict)  # of the groups that have settled


def measure_ranks(task: ScoringTask, criterion: str = "rank") -> MapScores:
    """Measure matrix rank, effective rank and nuclear norm of every tap's maps, in one pass.

    Args:
        task: with ``keep_counts``, scoring stops early.
        criterion: the one by which the units will be chosen, of ``KEYS``.

    Raises:
        UserError: there are no images.
    """
    total = len(task.images)
    if not total:
        raise UserError("no images to measure ranks on")
    taps = find_taps(task.graph)
    progress = _Progress({tap.name: _Sums(torch.zeros(BLOCKS, len(KINDS), tap.channels, dtype=torch.float64)) for tap in taps})
    threads, begin = torch.get_num_threads(), 0
    with ThreadPoolExecutor(threads) as pool:
        statistic = partial(spectrum_scores, pool=pool, threads=threads)
        for end in looks(total):
            active = _active(task, taps, progress)
            if not active:
                break
            for name, measured in measure_images(task.model, active, task.images, statistic, range(begin, end)).items():
                progress.sums[name].add(measured, begin, end)
            if task.keep_counts is not None and end < total:
                _settle(task, task.keep_counts, taps, progress, KEYS[criterion], end / total)
            begin = end
    images = {group.name: progress.images.get(group.name, begin) for group in task.graph.prunable if taps_of(group, taps)}
    scores = {}
    for tap in taps:
        sums = progress.sums[tap.name]
        means = (sums.blocks.sum(0) / sums.images).float()
        scores[tap.name] = TapScore(tap.name, tap.weights, sums.size, sums.images, dict(zip(KINDS, means, strict=True)))
    return MapScores(scores, images)


def score_by_ranks(task: ScoringTask, criterion: str) -> NetworkScores:
    """Measure ranks and score the groups by the one of ``KEYS`` that is asked for."""
    maps = measure_ranks(task, criterion)
    return NetworkScores(scores_from_ranks(maps, task.graph, criterion), maps)


def looks(total: int) -> list[int]:
    """Return the numbers of images after which scoring may stop, and the total: 32, 48, 64, 80, 96, 112, 128, 160, ..."""
    counts = [FIRST]
    while counts[-1] < total:  # four looks each time that the number doubles, in whole passes
        power = FIRST << (counts[-1] // FIRST).bit_length() - 1
        counts.append(counts[-1] + max(power // 4, PASS))
    return [*(count for count in counts if count < total), total]


def _active(task: ScoringTask, taps: list[Tap], progress: _Progress) -> list[Tap]:
    """Return the taps of groups that have not settled; with an early stop, the other taps are scored up to the first look."""
    if task.keep_counts is None or not any(sums.images for sums in progress.sums.values()):
        return taps
    unsettled = {group.name for group in task.graph.prunable} - set(progress.images)
    return [tap for tap in taps if unsettled & set(tap.units)]


def _settle(
    task: ScoringTask, keep_counts: Mapping[str, int], taps: list[Tap], progress: _Progress, keys: tuple[str, ...], seen: float
) -> None:
    """Record the groups that have settled."""
    for group in task.graph.prunable:
        mine = taps_of(group, taps)
        if group.name in progress.images or not mine:
            continue
        if disagreement(group, mine, progress.sums, keys, keep_counts.get(group.name, group.size)) / 2 * (1 - seen) ** 0.5 <= TOLERATED:
            progress.images[group.name] = min(progress.sums[tap.name].images for tap in mine)


def disagreement(group: ChannelGroup, taps: list[Tap], sums: Mapping[str, _Sums], keys: tuple[str, ...], count: int) -> float:
    """Return the mean share of the kept units on which two halves of the images differ."""
    if not 0 < count < group.size:
        return 0.0
    rows = [KINDS.index(key) for key in keys]
    blocks = from_taps(group, taps, {tap.name: sums[tap.name].blocks[:, rows] / sums[tap.name].images for tap in taps})
    halves = _HALVES[:: max(1, min(len(_HALVES) // 5, group.size // 64))]
    member = torch.zeros(len(halves), BLOCKS, dtype=torch.float64)
    for row, half in enumerate(halves):
        member[row, list(half)] = 1
    kept = [_kept(torch.einsum("sb,bku->ksu", side, blocks), count) for side in (member, 1 - member)]
    return 1 - float((kept[0] & kept[1]).sum()) / (count * len(halves))


def _kept(keys: Tensor, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return which units are among the ``count`` best, bool [splits, units], from keys [K, splits, units]."""
    order = np.lexsort(keys.numpy()[::-1], axis=-1)
    kept = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(kept, order[:, -count:], True, axis=-1)
    return kept
