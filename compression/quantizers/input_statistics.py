"""Statistics of the inputs of a network's layers, measured on images or read from a file.

The file is Distiller's: ``layer: {inputs: {0: {min, max, avg_min, avg_max, mean, std, b}}}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compression.quantizers.clipping import InputStatistics
from compression.quantizers.layout import LAYERS
from compression.statistics.activations import ChannelSums
from utils.errors import UserError
from utils.files.yaml_files import read_yaml, write_yaml
from utils.modes import observed
from utils.options import Place, mapping, number


def measure_input_statistics(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, InputStatistics]:
    """Measure the inputs of a network's convolutions and linear layers in eval mode.

    ``b`` is averaged over batches, each with its own mean.

    Args:
        model: on any device.
        batches: inputs [B, C, H, W], normalised, of training or validation images, never of test images.

    Raises:
        UserError: there are no batches.
    """
    sums: dict[str, ChannelSums] = {}
    distances: dict[str, list[float]] = {}
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules() if isinstance(module, LAYERS)}

    def collect(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach().float()
        sums.setdefault(names[module], ChannelSums()).add(x, 1 if isinstance(module, nn.Conv2d) else x.ndim - 1)
        distances.setdefault(names[module], []).append(float((x - x.mean()).abs().mean()))

    device = next(model.parameters()).device
    handles = [module.register_forward_pre_hook(collect) for module in names]
    with observed(model, handles):
        for inputs in batches:
            model(inputs.to(device))
    if not sums:
        raise UserError("calibration needs images, and there are none")
    found = {}
    for name, measured in sums.items():
        whole = measured.whole()
        known = {field.name: whole[field.name] for field in fields(InputStatistics) if field.name != "b"}
        found[name] = InputStatistics(**known, b=sum(distances[name]) / len(distances[name]))
    return found


def write_input_statistics(path: Path, statistics: Mapping[str, InputStatistics]) -> None:
    """Write statistics to a YAML file."""
    write_yaml(path, {name: {"inputs": {0: asdict(measured)}} for name, measured in statistics.items()})


def read_input_statistics(path: Path) -> dict[str, InputStatistics]:
    """Read statistics from a YAML file; layers without inputs are skipped.

    Raises:
        UserError: a value is missing or not a number.
    """
    found = {}
    for name, values in read_yaml(path, "activation statistics").items():
        place = Place(f"{path}: {name}", {}, {})
        given = mapping(values, place).get("inputs")
        if not given:
            continue
        first = mapping(given, place / "inputs").get(0, given.get("0"))
        numbers = mapping(first, place / "inputs" / "0")
        if missing := [field.name for field in fields(InputStatistics) if field.name not in numbers]:
            raise (place / "inputs").error(f"'{missing[0]}' is missing")
        found[str(name)] = InputStatistics(
            **{field.name: number()(numbers[field.name], place / field.name) for field in fields(InputStatistics)}
        )
    if not found:
        raise UserError(f"{path} has no statistics of the inputs of layers; an entry is 'layer: {{inputs: {{0: {{min: ..., max: ...}}}}}}'")
    return found
