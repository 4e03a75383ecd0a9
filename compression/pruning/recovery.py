"""What brings a cut network back without training: its weights are refitted, and its batch norms measured again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from compression.layers.pieces import in_pieces
from compression.pruning.recalibration import recalibrate_
from compression.pruning.refit import HELD_OUT, refit_
from compression.scoring.calibration import Calibration
from compression.tracing.graph import ChannelGraph, Keep
from compression.tracing.tracer import tensors_in
from utils import distributed
from utils.modes import eval_mode


@dataclass(frozen=True)
class Recovery:
    """What is done to a cut network before any training.

    Attributes:
        refit: whether its weights are refitted, if there are ``HELD_OUT`` images at least; batch norm is then measured
            again if that brings the outputs closer to the dense network's.
        recalibrate: whether batch norm is measured again in any case.
        seed: of the positions that a refit samples.
    """

    refit: bool = True
    recalibrate: bool = False
    seed: int = 0


def recover_(
    narrow: nn.Module, dense: nn.Module, graph: ChannelGraph, keep: Keep, calibration: Calibration, recovery: Recovery
) -> Iterator[tuple[str, float]]:
    """Refit a cut network and measure its batch norms again, in place.

    Labels are not used; the images that the refit holds out decide on batch norm. On several processes all get rank 0's weights.

    Args:
        narrow, dense, graph, keep: see ``refit_``.
        calibration: the images.
        recovery: what to do.

    Yields:
        After each step that changed the network, its name and the seconds it took: "refitted", "recalibrated".
    """
    refits = recovery.refit and len(calibration) >= HELD_OUT
    begin, device = time.perf_counter(), next(narrow.parameters()).device
    dense = deepcopy(dense).to(device)
    if refits:
        refit_(narrow, dense, graph, keep, (inputs.to(device) for inputs, _ in calibration.batches()), recovery.seed)
        _share_(narrow)
        yield "refitted", time.perf_counter() - begin
        begin = time.perf_counter()
    if recovery.recalibrate:
        recalibrate_(narrow, calibration)
    elif not (refits and _recalibrate_if_closer_(narrow, dense, calibration)):
        return
    _share_(narrow)
    yield "recalibrated", time.perf_counter() - begin


def _recalibrate_if_closer_(narrow: nn.Module, dense: nn.Module, calibration: Calibration) -> bool:
    """Measure batch norm's statistics again, in place; undo it unless the divergence on the held-out images falls."""
    fitted = len(calibration) - len(calibration) // HELD_OUT
    recalibrated, held_out = deepcopy(narrow), calibration.tail(fitted)
    recalibrate_(recalibrated, calibration.head(fitted))
    closer = distributed.broadcast(divergence(recalibrated, dense, held_out) < divergence(narrow, dense, held_out))
    if closer:
        narrow.load_state_dict(recalibrated.state_dict())
    return bool(closer)


@torch.no_grad()
def divergence(narrow: nn.Module, dense: nn.Module, images: Calibration) -> float:
    """Return the mean Kullback-Leibler divergence of the narrow network's class probabilities from the dense network's, in nats."""
    total = 0.0
    with eval_mode(narrow), eval_mode(dense):
        for piece in (piece for inputs, _ in images.batches() for piece in in_pieces(inputs, narrow)):
            ours, theirs = (F.log_softmax(tensors_in(model(piece))[0].double(), -1) for model in (narrow, dense))
            total += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
    return total / max(len(images), 1)


def _share_(model: nn.Module) -> None:
    distributed.broadcast_([tensor.detach() for tensor in model.state_dict().values()])
