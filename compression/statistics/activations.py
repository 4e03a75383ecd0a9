"""Activation statistics: the outputs of every layer of a network, per channel and as a whole.

APoZ is the share of outputs that are not above zero (arXiv:1607.03250, equation 1, which is for outputs of ReLU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files.checkpoint import write_text
from utils.files.yaml_files import write_yaml
from utils.modes import observed

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 1 << 22  # values that are turned into float64 at a time
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
ADDED = ("zeros", "not_positive", "sums", "magnitudes")


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.float64)


@dataclass
class ChannelSums:
    """Running sums over one module's outputs; tensors are float64 [channels].

    Attributes:
        counts: values of each channel; a module that is used in several places may not have the same channels in all.
        deviations: sums of squared differences from ``means`` (merged batch by batch, Chan et al. 1979: a sum of squares
            would lose the digits of a small deviation from a large mean).
        samples: how many images' outputs were added; lows and highs are the sums of their smallest and largest values.
    """

    counts: Tensor = field(default_factory=_empty)
    zeros: Tensor = field(default_factory=_empty)
    not_positive: Tensor = field(default_factory=_empty)
    sums: Tensor = field(default_factory=_empty)
    magnitudes: Tensor = field(default_factory=_empty)
    means: Tensor = field(default_factory=_empty)
    deviations: Tensor = field(default_factory=_empty)
    least: Tensor = field(default_factory=_empty)
    most: Tensor = field(default_factory=_empty)
    samples: int = 0
    lows: float = 0.0
    highs: float = 0.0

    def add(self, output: Tensor, dim: int) -> None:
        """Add an output whose dimension 0 is the batch and whose channels are along ``dim``."""
        if not output.numel():
            return
        flat = output.detach().flatten(1)
        self.samples += len(flat)
        self.lows += float(flat.amin(1).double().sum())
        self.highs += float(flat.amax(1).double().sum())
        for part in output.detach().split(max(CHUNK // flat.shape[1], 1)):
            self._add_rows(part.movedim(dim, 0).flatten(1).double())

    def _add_rows(self, rows: Tensor) -> None:
        """Add values [channels, n]."""
        self._widen(len(rows))
        here, count = slice(len(rows)), float(rows.shape[1])
        added = ((rows == 0).sum(1), (rows <= 0).sum(1), rows.sum(1), rows.abs().sum(1))
        for name, values in zip(ADDED, added, strict=True):
            getattr(self, name)[here] += values.double().cpu()
        deviations, means = (values.cpu() for values in torch.var_mean(rows, 1, correction=0))
        before, gap = self.counts[here].clone(), means - self.means[here]
        self.deviations[here] += deviations * count + gap.square() * before * count / (before + count)
        self.means[here] += gap * count / (before + count)
        self.counts[here] += count
        self.least[here] = torch.minimum(self.least[here], rows.amin(1).cpu())
        self.most[here] = torch.maximum(self.most[here], rows.amax(1).cpu())

    def _widen(self, channels: int) -> None:
        more = channels - len(self.counts)
        if more > 0:
            for name in ("counts", "means", "deviations", *ADDED):
                setattr(self, name, torch.cat((getattr(self, name), torch.zeros(more, dtype=torch.float64))))
            endless = torch.full((more,), torch.inf, dtype=torch.float64)
            self.least, self.most = torch.cat((self.least, endless)), torch.cat((self.most, -endless))

    def per_channel(self) -> dict[str, list[float]]:
        """Return the statistics of each channel."""
        columns = {
            "sparsity": self.zeros / self.counts,
            "apoz": self.not_positive / self.counts,
            "min": self.least,
            "max": self.most,
            "mean": self.sums / self.counts,
            "std": (self.deviations / self.counts).sqrt(),
            "l1": self.magnitudes / self.counts,
        }
        return {name: values.tolist() for name, values in columns.items()}

    def whole(self) -> dict[str, float]:
        """Return the statistics of all values together."""
        count, mean = self.counts.sum(), self.sums.sum() / self.counts.sum()
        spread = (self.deviations + self.counts * (self.means - mean).square()).sum() / count
        values: dict[str, Tensor | float] = {
            "min": self.least.min(),
            "max": self.most.max(),
            "avg_min": self.lows / self.samples,
            "avg_max": self.highs / self.samples,
            "mean": mean,
            "std": spread.sqrt(),
            "sparsity": self.zeros.sum() / count,
            "apoz": self.not_positive.sum() / count,
            "l1": self.magnitudes.sum() / count,
        }
        return {name: float(value) for name, value in values.items()}


@dataclass(frozen=True)
class ActivationTable:
    """Statistics of activations by module, in the order in which the modules first ran.

    Shares and moments are of all values of all images: ``sparsity`` of exact zeros, ``apoz`` of values <= 0, ``std`` of the
    population, ``l1`` the mean magnitude; ``avg_min`` and ``avg_max`` are means over images of an image's extremes.
    """

    modules: dict[str, ChannelSums]

    def to_frame(self) -> pd.DataFrame:
        """Return a row per module and channel."""
        import pandas as pd

        frames = []
        for name, sums in self.modules.items():
            leading = {"module": name, "channel": range(len(sums.counts)), "count": sums.counts.long().tolist()}
            frames.append(pd.DataFrame({**leading, **sums.per_channel()}))
        return pd.concat(frames, ignore_index=True)

    def by_module(self) -> pd.DataFrame:
        """Return a row per module."""
        import pandas as pd

        rows = [{"module": name, "channels": len(sums.counts), **sums.whole()} for name, sums in self.modules.items()]
        return pd.DataFrame(rows)

    def write(self, folder: Path) -> None:
        """Write activations.csv (per channel) and activations.yaml (per module)."""
        write_text(folder / "activations.csv", self.to_frame().to_csv(index=False))
        write_yaml(folder / "activations.yaml", {name: sums.whole() for name, sums in self.modules.items()})

    def log(self, writer: Any, step: int) -> None:
        """Write the modules' statistics to TensorBoard."""
        for name, sums in self.modules.items():
            for statistic, value in sums.whole().items():
                writer.add_scalar(f"activations/{statistic}/{name}", value, step)


def measure_activations(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> ActivationTable:
    """Measure the outputs of every module without children that returns one floating-point tensor, in eval mode.

    A module that is called several times is measured over all calls, each right after it (an in-place ReLU's input is
    measured before it changes). Channels are dimension 1; of linear layers and layer norms, and of other modules' outputs
    of three dimensions unless they are convolutions or batch norms, the last.

    Args:
        model: on any device; it is left as it was.
        batches: (inputs [B, ...], labels [B]).

    Raises:
        UserError: there are no batches.
    """
    found: dict[str, ChannelSums] = {}
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    handles = [module.register_forward_hook(_collector(name, found)) for name, module in leaves(model)]
    with observed(model, handles):
        for inputs, _ in batches:
            model(inputs.to(device))
    if not found:
        raise UserError("no activations to measure: there are no images")
    return ActivationTable(found)


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules without children, by name; a parametrisation counts as a part of its module."""
    named = [(name, module) for name, module in model.named_modules() if "parametrizations" not in name.split(".")]
    return [(name, module) for name, module in named if not {child for child, _ in module.named_children()} - {"parametrizations"}]


def _collector(name: str, found: dict[str, ChannelSums]) -> Callable[[nn.Module, Any, Any], None]:
    def collect(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1 and output.numel():
            last = isinstance(module, CHANNELS_LAST) or (output.ndim == 3 and not isinstance(module, CHANNELS_FIRST))
            found.setdefault(name, ChannelSums()).add(output, output.ndim - 1 if last else 1)

    return collect
