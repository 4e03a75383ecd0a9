"""What it does to a network's outputs that one entry of a compress_rate loses channels, before or after its readers are refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.layers.calls import find_layer_calls
from compression.layers.pieces import in_pieces
from compression.layers.readers import InputMoments, Reader, readers_of
from compression.layers.replay import Replay
from compression.pruning.allocation import Damage
from compression.pruning.plan import Entry, make_plan
from compression.scoring.calibration import Calibration
from compression.tracing.cutting import mask_
from compression.tracing.graph import ChannelGraph, Keep
from utils.modes import eval_mode

PROBED = (0.8, 0.6, 0.4, 0.2)  # shares of an entry's channels at which its damage is measured
FURTHER = (0.1, 0.05)  # and at these too, as long as it is not SEVERE
SEVERE = 0.1  # nats
WORTHLESS = 10.0  # nats, at no channels: what lies below the least width that was measured is not taken for cheap
STEPS = 64  # widths, at most, at which the readers' errors are known
EVENLY = 1e-9  # added to the error at each of them: where no reader loses anything, or none is known, damage grows evenly


@torch.no_grad()
def measure_damage(
    model: nn.Module,
    graph: ChannelGraph,
    entries: Sequence[Entry],
    orders: Mapping[str, Sequence[int]],
    calibration: Calibration,
    moments: Mapping[str, InputMoments] | None = None,
) -> Damage:
    """Measure what it does to the network's outputs that one entry loses channels, with masks.

    Damage is the mean Kullback-Leibler divergence of the masked network's class probabilities from the dense network's
    own, on calibration images. It is measured at several widths, down to one that does severe damage; between them it
    grows as the readers' squared errors do. The curve is the lower convex hull.

    Cost: entries x widths passes over the calibration images, each from the first weight that changes.

    Args:
        model: the dense network; it is left as it was.
        orders: group name -> units from the least to the most important.
        moments: of the inputs of the weights that read the groups (``measure_readers``): the readers are refitted before
            the damage is measured. Without them they stay as they are.
    """
    bench = _Bench(model, graph, calibration)
    curves = []
    for entry in entries:
        points = _curve(entry, graph, orders, moments or {}, bench)
        curves.append(_convex([*points, (0.0, _at_nothing(points))]))
    return lambda i, share: float(np.interp(share, *curves[i]))


def _curve(
    entry: Entry, graph: ChannelGraph, orders: Mapping[str, Sequence[int]], moments: Mapping[str, InputMoments], bench: _Bench
) -> list[tuple[float, float]]:
    """Return (share kept, damage), measured at some widths; between them it grows with the readers' errors."""
    size, least = entry[0].size, max(1, *(len(group.fixed) for group in entry))
    probed = {max(round(share * size), least) for share in (*PROBED, *FURTHER)} - {size}
    readers = {group.name: readers_of(group, graph.shapes, moments) for group in entry}
    kept = {group.name: set(range(group.size)) for group in entry}
    widths, errors, measured = [size], [0.0], {0.0: 0.0}  # error -> damage
    for width in sorted({*range(size - 1, min(probed, default=size), -max(size // STEPS, 1)), *probed}, reverse=True):
        plan, error = make_plan(graph, entry.widths(width), orders), errors[-1]
        for name, units in plan.kept.items():
            going = sorted(kept[name] - set(units))
            error += sum(max(reader.remove_(going), 0.0) for reader in readers[name]) if going else 0.0
            kept[name] = set(units)
        widths.append(width)
        errors.append(error + EVENLY)
        if width in probed:
            damage = bench.damage([reader for found in readers.values() for reader in found], plan.kept)
            measured[errors[-1]] = max(damage, *measured.values())
            if damage >= SEVERE and width <= PROBED[-1] * size:
                break
    damages = np.interp(errors, list(measured), list(measured.values())).tolist()
    return [*zip((width / size for width in widths), damages, strict=True)]


class _Bench:
    """Compares a network that has lost channels with itself as it was."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, calibration: Calibration) -> None:
        self.model, self.graph = model, graph
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        batches = [piece for inputs, _ in calibration.batches() for piece in in_pieces(inputs, model)]
        with eval_mode(model):
            self.norms = {call.weight: call.norm for call in find_layer_calls(model, batches[0][:2]).values()}
            self.replay = Replay(model, batches)
        self.dense = _log_probabilities(self.replay.unchanged)

    def damage(self, readers: Sequence[Reader], kept: Keep) -> float:
        """Return the divergence of the network with refitted readers and other units masked; it stays as it is."""
        for reader in readers:
            self._refit_(reader)
        mask_(self.model, self.graph, kept)
        now = self.model.state_dict()
        changed = {name: tensor.clone() for name, tensor in now.items() if not torch.equal(tensor, self.state[name])}
        self.model.load_state_dict(self.state)
        with eval_mode(self.model):
            outputs = self.replay.outputs(changed)
        return F.kl_div(_log_probabilities(outputs), self.dense, reduction="batchmean", log_target=True).item()

    def _refit_(self, reader: Reader) -> None:
        """Write a reader's refitted weight; the norm behind it, or its bias, takes the shift of its outputs."""
        weight, lost = reader.refitted()
        self.model.get_parameter(reader.name).copy_(weight)
        owner = self.model.get_submodule(reader.name.rpartition(".")[0])
        if norm := self.norms.get(reader.name):
            mean = self.model.get_buffer(f"{norm}.running_mean")
            mean.sub_(lost)
        elif isinstance(bias := getattr(owner, "bias", None), Tensor):
            bias.add_(lost)


def _log_probabilities(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([F.log_softmax(output.double(), 1).cpu() for output in outputs])


def _at_nothing(points: Sequence[tuple[float, float]]) -> float:
    """Extrapolate the damage to no channels at all."""
    (last, damage), slope = points[-1], 0.0
    if len(points) > 1:
        slope = (points[-1][1] - points[-2][1]) / max(points[-2][0] - points[-1][0], 1e-9)
    return max(2 * damage + last * slope, WORTHLESS)


def _convex(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the lower convex hull of points, ascending in the first coordinate."""
    hull: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [x for x, _ in hull], [y for _, y in hull]


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])
