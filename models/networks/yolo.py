"""YOLOv5-style classifiers from a YAML definition with one row per layer, ``[from, repeats, layer, arguments]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.networks.layers import C3, SPPF, Bottleneck, Classify, Concat, Conv, round_up
from models.networks.split_layers import C2PSA, C2f, C3k, Pair
from utils.errors import UserError, unknown

BACKBONE_NORM_EPS, BACKBONE_NORM_MOMENTUM = 1e-3, 0.03  # YOLOv5's; its classification head keeps torch's defaults
MOST_LAYERS, LARGEST = 1_000, 1 << 16  # repeats of a line; any other number in it
NUM_CLASSES_WORDS = ("num_classes", "nc")


class NotBuiltNarrow(ValueError):
    """A layer whose channels depend on each other in a way that only surgery on the dense network resolves."""


@dataclass(frozen=True)
class Width:
    """Channels of the dense network, and of the one that is built."""

    dense: int
    built: int


@dataclass(frozen=True)
class Line:
    """One row of a definition, with its channels resolved.

    Attributes:
        c_in: of each source.
        scale: a width in the definition -> the dense width.
        take: a dense width -> both widths; called once per channel group, in forward order of the groups' first producers.
        narrow: whether other widths than the dense ones are asked for.
    """

    c_in: list[Width]
    repeats: int
    args: list[Any]
    scale: Callable[[int], int]
    take: Callable[[int], Width]
    narrow: bool

    @property
    def c_out(self) -> int:
        width = self.scale(self.args[0])
        if width < 1:
            raise ValueError(f"it has {width} channels")
        return width


Built = tuple[nn.Module, Width]


def _conv(line: Line) -> Built:
    if any(size < 1 for size in line.args[1:3]):
        raise ValueError("kernel and stride must be at least 1")
    c_out = line.take(line.c_out)
    if len(line.args) > 4 and line.args[4] != 1 and (line.c_in[0].built, c_out.built) != (line.c_in[0].dense, c_out.dense):
        raise NotBuiltNarrow("a grouped convolution")
    return Conv(line.c_in[0].built, c_out.built, *line.args[1:]), c_out


def _depthwise(line: Line) -> Built:
    (c_in,), (kernel, stride) = line.c_in, (*line.args[1:], 1, 1)[:2]
    if c_in.dense == line.c_out:
        return Conv(c_in.built, c_in.built, kernel, stride, g=c_in.built), c_in
    c_out = line.take(line.c_out)
    if (c_in.built, c_out.built) != (c_in.dense, c_out.dense):
        raise NotBuiltNarrow("a grouped convolution")
    return Conv(c_in.built, c_out.built, kernel, stride, g=math.gcd(c_in.built, c_out.built)), c_out


def _bottleneck(line: Line) -> Built:
    (c_in,), c_out, shortcut = line.c_in, line.c_out, (*line.args[1:], True)[0]
    add = shortcut and c_in.dense == c_out
    hidden = line.take(c_out // 2)
    out = c_in if add else line.take(c_out)
    return Bottleneck(c_in.built, hidden.built, out.built, add=add), out


def _c3(line: Line) -> Built:
    half, shortcut = line.c_out // 2, (*line.args[1:], True)[0]
    main, hidden = [line.take(half).built], []
    for _ in range(line.repeats):
        hidden.append(line.take(half).built)
        main.append(main[-1] if shortcut else line.take(half).built)
    skip, out = line.take(half), line.take(line.c_out)
    return C3(line.c_in[0].built, out.built, tuple(main), skip.built, tuple(hidden), shortcut), out


def _sppf(line: Line) -> Built:
    hidden, out = line.take(line.c_in[0].dense // 2), line.take(line.c_out)
    return SPPF(line.c_in[0].built, out.built, hidden.built, *line.args[1:]), out


def _c2f(line: Line) -> Built:
    c_out, shortcut = line.c_out, (*line.args[1:], False)[0]
    half = c_out // 2
    return _split(line, C2f(line.c_in[0].dense, c_out, half, [Pair(half, half, shortcut) for _ in range(line.repeats)]))


def _c3k2(line: Line) -> Built:
    c_out, nested, share = line.c_out, (*line.args, False)[1], (*line.args, False, 0.5)[2 if len(line.args) > 2 else -1]
    hidden = int(c_out * share)
    blocks = [C3k(hidden, True) if nested else Pair(hidden, hidden // 2, True) for _ in range(line.repeats)]
    return _split(line, C2f(line.c_in[0].dense, c_out, hidden, blocks))


def _c2psa(line: Line) -> Built:
    if line.c_in[0].dense != line.c_out:
        raise ValueError(f"it reads {line.c_in[0].dense} channels and puts out {line.c_out}; they must be as many")
    return _split(line, C2PSA(line.c_out, line.repeats))


def _split(line: Line, layer: nn.Module) -> Built:
    """Return a layer at its dense widths: how those of two halves depend on each other only surgery resolves."""
    if line.narrow:
        raise NotBuiltNarrow("a layer that splits its channels")
    return layer, Width(line.c_out, line.c_out)


def _concat(line: Line) -> Built:
    return Concat(), Width(sum(c.dense for c in line.c_in), sum(c.built for c in line.c_in))


def _classify(line: Line) -> Built:
    num_classes, c_hidden = line.args if len(line.args) > 1 else (*line.args, 1280)
    return Classify(line.c_in[0].built, num_classes, line.take(c_hidden).built), Width(num_classes, num_classes)


LAYERS: dict[str, Callable[[Line], Built]] = {
    "Conv": _conv,
    "DWConv": _depthwise,
    "Bottleneck": _bottleneck,
    "C3": _c3,
    "C2f": _c2f,
    "C3k2": _c3k2,
    "C2PSA": _c2psa,
    "SPPF": _sppf,
    "Concat": _concat,
    "Classify": _classify,
}
REPEATED_INSIDE = {"C3", "C2f", "C3k2", "C2PSA"}  # layers whose repeats are their own depth; others are chained


class YoloClassifier(nn.Module):
    """A classifier read from a YAML definition. ``state_dict`` keys are YOLOv5's: ``model.{i}. ...``."""

    def __init__(self, layers: list[nn.Module], sources: list[list[int]]) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)
        self.sources = sources
        self.kept = {j for i, source in enumerate(sources) for j in source if j != i - 1}

    def forward(self, x: Tensor) -> Tensor:
        outputs: dict[int, Tensor] = {-1: x}
        for i, (layer, source) in enumerate(zip(self.model, self.sources, strict=True)):
            inputs = [x if j == i - 1 else outputs[j] for j in source]
            x = layer(inputs if isinstance(layer, Concat) else inputs[0])
            if i in self.kept:
                outputs[i] = x
        return x


def build_yolo(definition: dict[str, Any], num_classes: int, channels: int = 3, take: Callable[[int], int] | None = None) -> YoloClassifier:
    """Build a classifier from a parsed YAML definition, dense or at other widths.

    Args:
        definition: ``layers`` (or YOLOv5's ``backbone`` and ``head``), and where they are not 1 ``depth_multiple`` and
            ``width_multiple``; ``max_channels`` before the multiple; ``norm_eps`` and ``norm_momentum`` of the backbone.
        num_classes: outputs; ``num_classes`` (or ``nc``) in an argument list stands for it.
        channels: input channels.
        take: a channel group's dense width -> the width to build; called in forward order of the groups' first
            producers, which is the order of the entries of a compress_rate. By default all are dense.

    Raises:
        NotBuiltNarrow: another width is asked for, but how a layer's channels depend on each other is not known here.
        UserError: a layer is unknown, a row malformed, a source missing, or the last layer no classifier.
    """
    layers: list[nn.Module] = []
    sources: list[list[int]] = []
    widths = {-1: Width(channels, channels)}
    rows = rows_of(definition)
    depth, width, most = (_multiple(definition, name) for name in ("depth_multiple", "width_multiple", "max_channels"))
    most = most if "max_channels" in definition else math.inf

    def scale(channels: int) -> int:
        return round_up(min(channels, most) * width)

    def widths_of(channels: int) -> Width:
        return Width(channels, take(channels) if take else channels)

    for i, row in enumerate(rows):
        source, repeats, kind, args = _checked_row(i, row, widths)
        args = [num_classes if argument in NUM_CLASSES_WORDS else argument for argument in args]
        repeats = max(round(min(repeats * depth, 2 * MOST_LAYERS)), 1) if repeats > 1 else repeats
        if repeats > MOST_LAYERS or any(isinstance(value, int | float) and not abs(value) <= LARGEST for value in args):
            limits = f"at most {MOST_LAYERS:,} repeats, numbers up to {LARGEST:,}"
            raise UserError(f"layer {i} ({kind}) of the model definition is too large: {limits}")
        c_in, chain = [widths[j] for j in source], []
        try:
            for _ in range(1 if kind in REPEATED_INSIDE else repeats):
                layer, c_out = LAYERS[kind](Line(c_in, repeats, args, scale, widths_of, take is not None))
                chain.append(layer)
                c_in = [c_out]
        except NotBuiltNarrow:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"layer {i} ({kind}) of the model definition does not take the arguments {row[3]}: {error}") from None
        layers.append(chain[0] if len(chain) == 1 else nn.Sequential(*chain))
        sources.append(source)
        widths[i] = c_out
    if not isinstance(layers[-1], Classify):
        raise UserError(f"the last layer of the model definition is {rows[-1][2]}; a classifier ends in Classify")
    eps = _multiple({"norm_eps": BACKBONE_NORM_EPS, **definition}, "norm_eps")
    momentum = _multiple({"norm_momentum": BACKBONE_NORM_MOMENTUM, **definition}, "norm_momentum")
    for module in nn.Sequential(*layers[:-1]).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = eps, momentum
    return YoloClassifier(layers, sources)


def scaled(definition: dict[str, Any], size: str) -> dict[str, Any]:
    """Return the definition of one of a family's ``scales``: the multiples, and a layer whose kind all blocks shall have."""
    depth, width, most, *everywhere = definition["scales"][size]
    rows = [
        [source, repeats, kind, [args[0], True, *args[2:]] if everywhere and kind == "C3k2" else args]
        for source, repeats, kind, args in definition["layers"]
    ]
    rest = {key: value for key, value in definition.items() if key != "scales"}
    return {**rest, "layers": rows, "depth_multiple": depth, "width_multiple": width, "max_channels": most}


def rows_of(definition: dict[str, Any]) -> list[Any]:
    """Return the rows of a definition, one per layer: ``layers``, or YOLOv5's ``backbone`` and ``head``."""
    rows = definition.get("layers") or [*(definition.get("backbone") or []), *(definition.get("head") or [])]
    if not isinstance(rows, list) or not rows:
        raise UserError("the model definition has no layers; it needs a list 'layers' of [from, repeats, layer, arguments]")
    return rows


def _checked_row(i: int, row: Any, known: Container[int]) -> tuple[list[int], int, str, list[Any]]:
    """Return a row with its sources as absolute indices."""
    if not (isinstance(row, list) and len(row) == 4 and isinstance(row[3], list) and isinstance(row[1], int) and row[1] > 0):
        raise UserError(f"layer {i} of the model definition is {row!r}; it must be [from, repeats, layer, arguments]")
    origin, repeats, kind, args = row
    if not isinstance(kind, str) or kind not in LAYERS:
        raise unknown(f"layer in line {i} of the model definition:", str(kind), LAYERS)
    where = f"layer {i} ({kind}) of the model definition reads"
    origins = origin if isinstance(origin, list) else [origin]
    if not all(isinstance(j, int) for j in origins):
        raise UserError(f"{where} {origin!r}; it must be a layer's index or a list of them")
    source = [i + j if j < 0 else j for j in origins]
    if absent := [j for j in source if j not in known]:
        raise UserError(f"{where} layer {absent[0]}, which does not come before it")
    if not source or (len(source) > 1 and kind != "Concat"):
        raise UserError(f"{where} {len(source)} layers; only Concat reads more than one")
    return source, repeats, kind, args


def _multiple(definition: dict[str, Any], name: str) -> float:
    value = definition.get(name, 1)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} of the model definition is {value!r}; it must be a number above 0")
    return float(value)
