"""What a schedule may measure: a network's channel groups, its feature maps and its gradients on calibration images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
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
        calibration: gives the images; called when something needs them.
        seed: of what criteria draw.
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
        """Trace anew when the groups are needed next: the network was cut."""
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

        Equal scores are told apart by a billionth of the scale, in the criterion's own order.
        """
        model = plain_copy(self.model) if is_quantized(self.model) else self.model  # the graph is that of the plain layers
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
        """Return gradients of the mean cross-entropy over the first calibration images, in eval mode."""
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


def dead_units(graph: ChannelGraph, alive: Mapping[str, Tensor], role: str) -> dict[str, set[int]]:
    """Return, for each prunable group, the units that no weight carries any more; one at least is left out.

    Args:
        graph: the channel groups.
        alive: which elements of each tensor are not zero.
        role: "producer": all weights that make the unit are zero; "reader": all that read it are.
    """
    gathers = {route.buffer for route in graph.routes}  # what they hold are places, and no weights
    members = {group.name: [m for m in group.members if m.role == role and m.tensor not in gathers] for group in graph.prunable}
    lives = {name: torch.full((graph.group(name).size,), not found, dtype=torch.bool) for name, found in members.items()}
    for group in graph.prunable:
        for member in members[group.name]:
            tensor = alive[member.tensor].cpu()
            rows = tensor.movedim(member.dim, 0).flatten(1).any(1) if tensor.ndim > 1 else tensor
            lives[group.name][member.units[rows[member.positions]]] = True
    _through_routes(graph, lives, role)
    found = {}
    for group in graph.prunable:
        dead = {unit for unit, lively in enumerate(lives[group.name].tolist()) if not lively} - set(group.fixed)
        if len(dead) == group.size:
            dead.discard(0)
        if dead:
            found[group.name] = dead
    return found


def _through_routes(graph: ChannelGraph, lives: dict[str, Tensor], role: str) -> None:
    """Mark the units that a gather (an option-A shortcut) still feeds from a living one, or reads for one, in place."""
    for route in graph.routes if role == "producer" else reversed(graph.routes):
        made = graph.component[graph.record.bases[route.buffer, 0].numpy()]
        read = graph.component[route.read.numpy()]
        for place, source in zip(made.tolist(), np.asarray(route.index % len(read)).tolist(), strict=True):
            if source == route.zero:
                continue
            target, origin = graph.units.get(place), graph.units.get(int(read[source]))
            one, other = (target, origin) if role == "producer" else (origin, target)
            if one and one[0] in lives and (other is None or other[0] not in lives or bool(lives[other[0]][other[1]])):
                lives[one[0]][one[1]] = True


def followers_of(graph: ChannelGraph, dead: Mapping[str, set[int]], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks of the biases and norms that follow dead units, so that these really are zero behind their norm."""
    masks: dict[str, Tensor] = {}
    for name, units in dead.items():
        gone = torch.zeros(graph.group(name).size, dtype=torch.bool)
        gone[list(units)] = True
        for member in graph.group(name).members:
            if member.role == "follower" and member.tensor in parameters and parameters[member.tensor].ndim == 1:
                mask = masks.setdefault(member.tensor, torch.ones_like(parameters[member.tensor], requires_grad=False))
                mask[member.positions[gone[member.units]].to(mask.device)] = 0.0
    return masks
