"""Measurements of a network for a schedule: channel groups, scores of filters, gradients, on calibration images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.scoring.calibration import Calibration
from compression.scoring.criteria import score
from compression.tracing.channels import trace
from compression.tracing.graph import ChannelGraph
from models.quantized.preparing import is_quantized, plain_copy, weights_by_name
from utils.errors import UserError
from utils.modes import eval_mode

GRADIENT_IMAGES = 256


@dataclass
class Measurements:
    """Measures a network on demand; the channel groups are traced once, and again after a cut.

    Args:
        model: the network.
        calibration: returns the images; called when they are first needed.
        seed: of criteria that draw at random.
    """

    model: nn.Module
    calibration: Callable[[], Calibration]
    seed: int = 0
    _graph: ChannelGraph | None = None
    _images: Calibration | None = None

    @property
    def graph(self) -> ChannelGraph:
        """The channel groups."""
        if self._graph is None:
            self._graph = trace(plain_copy(self.model).cpu().eval(), self.inputs()[:1].cpu())
        return self._graph

    def forget_graph(self) -> None:
        """Trace again when the groups are next needed: the network was cut."""
        self._graph = None

    @property
    def examples(self) -> Calibration:
        """The calibration images.

        Raises:
            UserError: there are none.
        """
        if self._images is None:
            self._images = self.calibration()
        if not len(self._images):
            raise UserError("the schedule measures the network, so it needs images")
        return self._images

    def inputs(self) -> Tensor:
        """Return the first batch of calibration images, normalised, on the network's device."""
        inputs, _ = next(self.examples.batches())
        return inputs.to(next(self.model.parameters()).device)

    def images(self) -> Tensor:
        """Return all calibration images, normalised, on the network's device."""
        return torch.cat([inputs for inputs, _ in self.examples.batches()]).to(next(self.model.parameters()).device)

    def filter_scores(self, criterion: str) -> dict[str, Tensor]:
        """Return scores [O] of the filters by name of the weight, for the weights whose channels can be cut.

        Ties are broken by a billionth of the scale, in the criterion's own order.
        """
        model = plain_copy(self.model) if is_quantized(self.model) else self.model  # the graph has the plain layers
        with eval_mode(model):
            scored = score(criterion, model, self.graph, self.examples, self.seed).groups
        found: dict[str, Tensor] = {}
        for group in self.graph.prunable:
            if group.name in scored:
                values, order = scored[group.name].values, scored[group.name].order
                places = torch.empty_like(values)
                places[order] = torch.arange(len(order), dtype=values.dtype)
                ranked = values + places * (1e-9 * float(values.abs().max()))
                for member in group.producers:
                    size = self.graph.shapes[member.tensor][member.dim]
                    scores = found.setdefault(member.tensor, torch.full((size,), float("nan"), dtype=torch.float64))
                    scores[member.positions] = ranked[member.units]
        return {name: values for name, values in found.items() if not values.isnan().any()}

    def gradients(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return gradients of the mean cross-entropy over the first ``GRADIENT_IMAGES`` calibration images, in eval mode."""
        parameters = weights_by_name(self.model)
        wanted = [parameters[name] for name in names]
        flags = [parameter.requires_grad for parameter in wanted]
        examples = self.examples.head(GRADIENT_IMAGES)
        sums = [torch.zeros_like(parameter) for parameter in wanted]
        try:
            for parameter in wanted:
                parameter.requires_grad_(True)
            with eval_mode(self.model), torch.enable_grad():
                for inputs, labels in examples.batches():
                    logits = self.model(inputs.to(wanted[0].device)).float()
                    loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                    for total, gradient in zip(sums, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                        if gradient is not None:
                            total += gradient
        finally:
            for parameter, flag in zip(wanted, flags, strict=True):
                parameter.requires_grad_(flag)
        return {name: total / len(examples) for name, total in zip(names, sums, strict=True)}
