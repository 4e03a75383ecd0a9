"""A trained classifier with its channel groups, and the entries of a compress_rate that fits it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from compression.pruning.arguments import PruneArguments
from compression.pruning.plan import Entry, entries_of
from compression.tracing.channels import trace
from compression.tracing.graph import ChannelGraph
from models.loading import LoadedClassifier, default_size, load_classifier
from models.networks import build, resolve_model
from models.networks.plain_weights import fold_weights_
from utils.errors import UserError, nearest
from utils.measures.profile import Profile, example_input, profile
from utils.spec import ModelSpec, image_size


@dataclass(frozen=True)
class TracedClassifier:
    """The network that is cut, and its channel groups.

    Attributes:
        loaded: the dense network, on the CPU, with its specification.
        entries: the groups of each entry of a compress_rate.
        excluded: groups that stay whole at the user's wish -> the pattern that matched.
        path: the weights' file; "" without one.
    """

    loaded: LoadedClassifier
    graph: ChannelGraph
    entries: list[Entry]
    profile: Profile
    excluded: dict[str, str]
    path: str = ""

    @property
    def model(self) -> nn.Module:
        """The dense network, on the CPU."""
        return self.loaded.model

    @property
    def spec(self) -> ModelSpec:
        """The dense network's specification."""
        return self.loaded.spec

    @property
    def cuttable(self) -> list[Entry]:
        """The entries that are for some group, none of which is excluded."""
        return [entry for entry in self.entries if entry and not any(group.name in self.excluded for group in entry)]

    def group_rows(self, widths: Mapping[str, int] | None) -> list[dict[str, Any]]:
        """Return a row per channel group: its entry's number, name, channels before and after, and why it can't be cut."""
        numbers = {group.name: i for i, entry in enumerate(self.entries) for group in entry}
        return [
            {
                "index": numbers.get(group.name),
                "name": group.name,
                "channels": group.channels,
                "kept": (widths or {}).get(group.name, group.size) * group.channels // group.size,
                "prunable": group.prunable and group.name not in self.excluded,
                "reason": f"excluded by '{self.excluded[group.name]}'" if group.name in self.excluded else group.reason,
            }
            for group in self.graph.groups
        ]


def load_traced(arguments: PruneArguments) -> TracedClassifier:
    """Load (or build) the network and find its channel groups.

    Raises:
        UserError: the weights can't be loaded, the size does not fit, or a pattern of --exclude matches nothing.
    """
    if arguments.weights:
        loaded = load_classifier(arguments.weights, arguments.model or None, size_known=arguments.imgsz is not None)
        if loaded.spec.quantization:
            raise UserError(f"{arguments.weights} is quantized, so its channels can't be cut: prune first, then train quantized")
    else:
        name, definition = resolve_model(arguments.model)
        imgsz = image_size(arguments.imgsz) or default_size(name)
        spec = ModelSpec(name, arguments.num_classes, imgsz, definition=definition)
        loaded = LoadedClassifier(build(spec), spec, named=False)
    spec = loaded.spec if arguments.imgsz is None else loaded.spec.with_(imgsz=image_size(arguments.imgsz))
    if folded := fold_weights_(loaded.model):
        spec = spec.with_(plain_weights=True)
        loaded.notes.append(f"{len(folded)} layers compute their weights, as {folded[0]} does; those are plain weights from here on")
    loaded = replace(loaded, spec=spec, model=loaded.model.eval())
    measured = profile(loaded.model, spec)
    graph = trace(loaded.model, example_input(loaded.model, spec))
    return TracedClassifier(loaded, graph, entries_of(graph, spec.name), measured, _excluded(graph, arguments.exclude), arguments.weights)


def _excluded(graph: ChannelGraph, patterns: Sequence[str]) -> dict[str, str]:
    """Return the groups that patterns name (by any module that makes their channels), with the pattern."""
    names = {group.name: {group.name, *group.makers} for group in graph.prunable}
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name, modules in names.items() if any(fnmatch.fnmatch(module, pattern) for module in modules)]
        if not matched:
            raise UserError(f"exclude: '{pattern}' matches no channel group.{nearest(pattern, names)} Valid: {', '.join(names)}")
        found |= dict.fromkeys(matched, pattern)
    return found
