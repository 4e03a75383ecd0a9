"""What a pruner is: a rule that says, when it is asked, which weights stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """When a pruner is asked.

    Attributes:
        epoch: absolute, from 0.
        first, last: the first and the last epoch at which its policy asks.
        end: the epoch at which the policy's window ends, exclusive.
        frequency: epochs between two askings.
    """

    epoch: int
    first: int
    last: int
    end: int
    frequency: int = 1


@dataclass(frozen=True)
class PruningTask:
    """What a pruner may look at; it changes nothing.

    Attributes:
        moment: when it is asked.
        weights: all parameters by name, detached; where a policy keeps a second copy, the values that are not masked,
            and with ``fold_batchnorm`` those that batch norm has been folded into.
        masks: by parameter name, those that hold now: 1 stays, 0 is pruned.
        generator: of what is drawn; seeded alike on all ranks.
        filter_scores: name of a criterion (see ``compression.scoring.criteria``) -> scores [O] of the filters by name of the
            weight, higher is more important; measured on calibration images.
        gradients: names of weights -> gradients of the mean cross-entropy over the calibration images, in eval mode.
        model: the network, masked, for what looks at feature maps.
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
        masks: by parameter name, of the weight's shape and type: 1 stays, 0 goes; parameters that are not named keep the
            mask that they have. Other values (a mask that makes up for what it drops) need ``use_double_copies``.
        weights: new values of weights, by name, where a pruner refits them.
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Pruner(ABC):
    """Base of all pruners: a dataclass whose fields are its arguments in a schedule (see ``utils.options``)."""

    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters that it prunes."""

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Check that it can prune these weights, before anything is trained.

        Raises:
            UserError: one does not fit.
        """

    @abstractmethod
    def decide(self, task: PruningTask) -> Decision:
        """Say what stays."""

    def target(self, moment: Moment) -> float | None:
        """Return the sparsity that it aims at in an epoch, where that is known before; for the timeline."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs: tensors and JSON-able values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
