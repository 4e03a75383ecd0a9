"""The network of docs/how-a-cut-works.md: four layers, a residual connection and a concatenation; traced, cut, proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from compression.tracing.channel_labels import ChannelLabel
from compression.tracing.channels import trace
from compression.tracing.cutting import apply_cut_, plan_cut, prove_channels
from compression.tracing.graph import ChannelGraph, read_graph
from compression.tracing.rules import Call, Outcome, aten, elementwise
from compression.tracing.tracer import RULES

KEEP = {"stem": (0, 1, 3), "side": (0, 2, 3, 5)}  # unit 2 of the first group goes, and units 1 and 4 of the second
INPUT = torch.zeros(1, 3, 8, 8)


class FourLayers(nn.Module):
    """A stem, a layer whose output is added to its input, a side branch that is concatenated, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(10, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 2] for images [B, 3, H, W]."""
        stem = self.stem(images).relu()
        stream = (stem + self.body(stem)).relu()
        side = self.side(stream).relu()
        return self.head(torch.cat([stream, side], 1).mean((2, 3)))


class Swapped(FourLayers):
    """The same layers, concatenated the other way round: what the structural proof must refuse."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 2] for images [B, 3, H, W]."""
        stem = self.stem(images).relu()
        stream = (stem + self.body(stem)).relu()
        return self.head(torch.cat([self.side(stream).relu(), stream], 1).mean((2, 3)))


@dataclass(frozen=True)
class Step:
    """One operation of a trace.

    Attributes:
        name: of the module that is called, or of the operation.
        shape: of what it returns.
        numbers: the channel numbers that its result carries, in order.
    """

    name: str
    shape: tuple[int, ...]
    numbers: tuple[int, ...]


def four_layers() -> FourLayers:
    """Return the network, with seeded weights, in eval mode."""
    torch.manual_seed(0)
    return FourLayers().eval()


def graph_of(model: nn.Module) -> ChannelGraph:
    """Return the network's channel groups."""
    return trace(model, INPUT)


def dense_steps() -> list[Step]:
    """Return every operation of the whole network with the channel numbers of its result."""
    model = four_layers()
    with _recorded() as steps:
        read_graph(model, INPUT, {}, {})
    return steps


def shrunk_network() -> tuple[FourLayers, FourLayers, ChannelGraph]:
    """Return the network cut to ``KEEP`` (not yet proved), the whole one, and its channel groups."""
    dense = four_layers()
    graph = graph_of(dense)
    shrunk = deepcopy(dense)
    apply_cut_(shrunk, plan_cut(graph, KEEP))
    return shrunk, dense, graph


def shrunk_steps() -> list[Step]:
    """Return every operation of the structural proof with the channel numbers of its result.

    Raises:
        NotProved: the shrunk network does not receive its channels.
    """
    shrunk, _, graph = shrunk_network()
    with _recorded() as steps:
        prove_channels(shrunk, graph, KEEP, INPUT)
    return steps


NAMES = {
    aten.convolution: "convolution",
    aten.addmm: "linear",
    aten.relu: "relu",
    aten.add: "addition",
    aten.cat: "concatenation",
    aten.mean: "mean over the pixels",
}


@contextmanager
def _recorded() -> Iterator[list[Step]]:
    """Note what each rule answers while a trace runs."""
    steps: list[Step] = []

    def noting(operation: Any, rule: Callable[[Call], Outcome]) -> Callable[[Call], Outcome]:
        def apply(call: Call) -> Outcome:
            outcome = rule(call)
            if isinstance(outcome, ChannelLabel):
                numbers = tuple(outcome.ids.reshape(-1).tolist())
                name = f"`{call.module}`: {NAMES[operation]}" if call.module else NAMES[operation]
                steps.append(Step(name, tuple(call.result.shape), numbers))
            return outcome

        return apply

    watched = {operation: noting(operation, RULES.get(operation, elementwise)) for operation in NAMES}
    with mock.patch.dict(RULES, watched):
        yield steps
