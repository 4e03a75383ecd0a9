"""Cuts by Torch-Pruning 1.6 (pip install torch-pruning), at a share of the multiply-adds by our counter."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.scoring.calibration import Calibration
from utils.measures.profile import count_macs
from utils.spec import ModelSpec

# Its strongest data-free importance, and the two that take gradients of the labels' loss.
IMPORTANCES = ("magnitude", "taylor", "hessian")
BISECTIONS = 8
HESSIAN_IMAGES = 256  # each costs a backward pass of its own
NORM_EPS = 1e-5


def cut_by_torch_pruning(model: nn.Module, spec: ModelSpec, images: Calibration, importance: str, scope: str, share: float) -> nn.Module:
    """Return the widest network that Torch-Pruning makes within a budget.

    Args:
        model: the dense network.
        spec: its specification.
        images: for importances that take gradients; with labels.
        importance: of ``IMPORTANCES``.
        scope: "global" ranks the channels of all layers together, "local" cuts each layer alike.
        share: of the dense network's multiply-adds.
    """
    limit, low, high, best = share * count_macs(model, spec), 0.0, 1.0, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        narrow = _cut(model, spec, images, importance, scope, ratio)
        if count_macs(narrow, spec) <= limit:
            best, high = narrow, ratio
        else:
            low = ratio
    assert best is not None
    return best


def with_convolution_shortcuts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a CIFAR ResNet with shortcuts of option A for one with option B that computes the same.

    Torch-Pruning can't cut option A, which pads with zero channels. A 1x1 convolution that copies channels does the same.
    """
    found = {}
    for name, tensor in state.items():
        if not name.endswith("downsample.source"):
            found[name] = tensor
            continue
        if torch.equal(tensor, torch.arange(len(tensor))):  # the plain shortcut
            continue
        stem = name.removesuffix("source")
        weight = torch.zeros(len(tensor), int(tensor.max()) + 1, 1, 1)
        weight[tensor >= 0, tensor[tensor >= 0]] = 1
        zeros, ones = torch.zeros(len(tensor)), torch.ones(len(tensor))
        found[f"{stem}0.weight"] = weight
        found |= {f"{stem}1.weight": ones * (1 + NORM_EPS) ** 0.5, f"{stem}1.bias": zeros, f"{stem}1.running_mean": zeros.clone()}
        found |= {f"{stem}1.running_var": ones.clone(), f"{stem}1.num_batches_tracked": torch.tensor(0)}
    return found


def _cut(model: nn.Module, spec: ModelSpec, images: Calibration, importance: str, scope: str, ratio: float) -> nn.Module:
    import torch_pruning

    narrow = deepcopy(model).eval().requires_grad_(True)
    named: dict[str, Callable[[], Any]] = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "hessian": torch_pruning.importance.GroupHessianImportance,
    }
    scorer = named[importance]()
    heads: list[nn.Module] = [m for m in narrow.modules() if isinstance(m, nn.Linear) and m.out_features == spec.num_classes]
    pruner = torch_pruning.pruner.BasePruner(
        narrow,
        torch.zeros(1, spec.channels, *spec.size),
        importance=scorer,
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        ignored_layers=heads,
    )
    if importance != "magnitude":
        _accumulate(narrow, images, scorer if importance == "hessian" else None)
    pruner.step()
    return narrow.requires_grad_(False).eval()


def _accumulate(model: nn.Module, images: Calibration, scorer: Any) -> None:
    """Leave the gradients of the loss; the Hessian's diagonal is estimated from those of single images, as its documentation does."""
    model.zero_grad()
    for inputs, labels in (images if scorer is None else images.head(HESSIAN_IMAGES)).batches():
        losses: Tensor = F.cross_entropy(model(inputs), labels, reduction="none")
        if scorer is None:
            losses.sum().backward()
            continue
        for loss in losses:
            model.zero_grad()
            loss.backward(retain_graph=True)
            scorer.accumulate_grad(model)
