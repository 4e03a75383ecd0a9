"""The interface of a pruner: a rule that decides, whenever its policy asks, which weights are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """The time of a decision.

    Attributes:
        epoch: absolute, from 0.
        first, last: the first and the last epoch in which the policy asks for a decision.
        end: the epoch at which the policy's window ends, exclusive.
        frequency: epochs between two decisions.
    """

    epoch: int
    first: int
    last: int
    end: int
    frequency: int = 1


@dataclass(frozen=True)
class PruningTask:
    """What a pruner may look at; it must not change any of it.

    Attributes:
        moment: the time of the decision.
        weights: all parameters by name, detached; if the policy keeps a second copy, their unmasked values; with
            ``fold_batchnorm``, with batch norm folded in.
        masks: the present masks by parameter name: 1 is kept, 0 is pruned.
        generator: for random draws; has the same seed on all ranks.
        filter_scores: name of a criterion (see ``compression.scoring.criteria``) -> scores [O] of the filters by name of the
            weight, higher is more important; measured on calibration images.
        gradients: names of weights -> gradients of the mean cross-entropy over the calibration images, in eval mode.
        model: the network, masked, for pruners that look at feature maps.
        images: calibration images [N, C, H, W] on the network's device, normalised.
    """

    moment: Moment
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    generator: torch.Generator
    filter_scores: Callable[[str], Mapping[str, Tensor]]
    gradients: Callable[[tuple[str, ...]], Mapping[str, Tensor]]
    model: nn.Module
    images: Callable[[], Tensor]


@dataclass(frozen=True)
class Decision:
    """What a pruner decides.

    Attributes:
        masks: by parameter name, of the weight's shape and type: 1 is kept, 0 is pruned; parameters that are missing here
            keep their present mask. Other values (to compensate for dropped weights) need ``use_double_copies``.
        weights: new values of weights, by name, if the pruner refits them.
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Pruner(ABC):
    """Base of all pruners: a dataclass whose fields are its arguments in a schedule (see ``utils.options``)."""

    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters to prune."""

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise a UserError, before training starts, if the pruner can't prune one of these weights."""

    @abstractmethod
    def decide(self, task: PruningTask) -> Decision:
        """Return what is kept."""

    def target(self, moment: Moment) -> float | None:
        """Return the target sparsity of an epoch for the timeline, or None if it can't be known in advance."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: tensors and JSON-able values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
