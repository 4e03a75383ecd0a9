"""Summaries of a network as text: the sparsity of its weights, its cost, its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from models.quantized.preparing import weights_by_name
from utils.errors import unknown
from utils.measures.profile import count_macs, example_input
from utils.modes import observed
from utils.spec import ModelSpec

if TYPE_CHECKING:
    import pandas as pd

SHARES = ("sparsity", "filters", "channels")  # fractions; text shows percent
MULTIPLIES = (nn.modules.conv._ConvNd, nn.Linear)
TOTAL, ELSEWHERE = "total", "(no module)"


def summary(kind: str, model: nn.Module, spec: ModelSpec) -> str:
    """Return a summary, see ``SUMMARIES``; the network is left as it was.

    Raises:
        UserError: there is no such summary, or the network does not take images of the specification's size.
    """
    if kind not in SUMMARIES:
        raise unknown("summary", kind, SUMMARIES)
    return SUMMARIES[kind](model, spec)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of two dimensions or more that are not empty, detached."""
    return {name: parameter.detach() for name, parameter in weights_by_name(model).items() if parameter.ndim > 1 and parameter.numel()}


def sparsity_of(model: nn.Module) -> tuple[dict[str, float], float]:
    """Return the share of zeros of each weight of two dimensions or more, and of all of them together."""
    weights = weights_of(model)
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return {name: zeros[name] / weight.numel() for name, weight in weights.items()}, sum(zeros.values()) / max(total, 1)


def sparsity_table(model: nn.Module) -> pd.DataFrame:
    """Return a row per weight of two dimensions or more, and a total.

    Columns: name; shape; nnz_dense, its elements; nnz, those that are not zero; the shares of zero elements (sparsity), of
    all-zero slices along dimension 0 (filters) and dimension 1 (channels); std (of the population), mean and abs_mean.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for name, weight in weights_of(model).items():
        nnz, values = int((weight != 0).sum()), weight.double()
        spread = {"std": float(values.std(correction=0)), "mean": float(values.mean()), "abs_mean": float(values.abs().mean())}
        shares = {"sparsity": 1 - nnz / weight.numel(), "filters": zero_share(weight, 0), "channels": zero_share(weight, 1)}
        rows.append({"name": name, "shape": shape_text(weight.shape), "nnz_dense": weight.numel(), "nnz": nnz, **shares, **spread})
    dense, nnz = sum(row["nnz_dense"] for row in rows), sum(row["nnz"] for row in rows)
    rows.append({"name": TOTAL, "nnz_dense": dense, "nnz": nnz, "sparsity": 1 - nnz / max(dense, 1)})
    return pd.DataFrame(rows)


def masks_table(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> pd.DataFrame:
    """Return a row per mask, in the order of the parameters.

    Args:
        masks: by parameter name; zero where the weight is pruned, of the parameter's shape or one that expands to it.
        parameters: all parameters.

    Returns:
        Columns: name; shape; pruned and of (elements); sparsity; the shares of filters (dimension 0) and channels
        (dimension 1; none for one-dimensional parameters) that are pruned as a whole.

    Raises:
        KeyError: a mask is of no parameter.
    """
    import pandas as pd

    if strangers := [name for name in masks if name not in parameters]:
        raise KeyError(f"masks of no parameter: {', '.join(strangers)}")
    columns = ["name", "shape", "pruned", "of", "sparsity", "filters", "channels"]
    rows: list[tuple[Any, ...]] = []
    for name, parameter in parameters.items():
        if name in masks:
            mask = masks[name].expand(parameter.shape)
            pruned, count = int((mask == 0).sum()), mask.numel()
            channels = zero_share(mask, 1) if mask.ndim > 1 else None
            rows.append((name, shape_text(mask.shape), pruned, count, pruned / count, zero_share(mask, 0), channels))
    return pd.DataFrame(rows, columns=columns)


def zero_share(values: Tensor, dim: int) -> float:
    """Return the share of the slices along a dimension that are zero throughout."""
    return float((values == 0).movedim(dim, 0).unsqueeze(-1).flatten(1).all(1).double().mean())


def compute_table(model: nn.Module, spec: ModelSpec) -> pd.DataFrame:
    """Return a row per convolution and linear layer for one image, and a total.

    Parameters are those of these layers alone (norms have some too); shapes are of a layer's first call, multiply-adds of
    all its calls. Multiply-adds outside of such layers (attention's, say) have a row of their own.

    Raises:
        UserError: the network does not take images of the specification's size.
    """
    import pandas as pd

    modules = {name: module for name, module in model.named_modules() if isinstance(module, MULTIPLIES)}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    total = count_macs(model, spec)  # before anything is hooked: it refuses images that the network can't take
    handles = [module.register_forward_hook(_recorder(calls[name])) for name, module in modules.items()]
    with observed(model, handles):
        model(example_input(model, spec))
    rows = [_compute_row(name, module, calls[name]) for name, module in modules.items()]
    elements = sum(module.weight.numel() for module in modules.values())
    zeros = sum(int((module.weight == 0).sum()) for module in modules.values())
    if other := total - sum(row["macs"] for row in rows):
        rows.append({"name": ELSEWHERE, "macs": other})
    params = sum(row.get("params", 0) for row in rows)
    rows.append({"name": TOTAL, "params": params, "macs": total, "sparsity": zeros / max(elements, 1)})
    columns = ["name", "type", "attributes", "input", "output", "params", "macs", "sparsity"]
    return pd.DataFrame(rows, columns=columns).astype({"params": "Int64", "macs": "Int64"})


def _recorder(calls: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0].to("meta"), output.to("meta")))  # only shapes count

    return record


def _compute_row(name: str, module: Any, calls: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)  # each input, not each output, meets the kernel once
    macs = 0
    for read, made in calls:
        maps, dim = (read, 1) if transposed else (made, 1 if isinstance(module, nn.modules.conv._ConvNd) else made.ndim - 1)
        macs += maps.numel() // maps.shape[dim] * module.weight.numel()
    attributes = ""
    if isinstance(module, nn.modules.conv._ConvNd):
        named = {"k": module.kernel_size, "s": module.stride, "p": module.padding, "g": module.groups}
        attributes = " ".join(f"{key}={_size_text(value)}" for key, value in named.items())
    shapes = {"input": shape_text(calls[0][0].shape), "output": shape_text(calls[0][1].shape)} if calls else {}
    return {
        "name": name,
        "type": type(module).__name__,
        "attributes": attributes,
        **shapes,
        "params": sum(parameter.numel() for parameter in module.parameters()),
        "macs": macs,
        "sparsity": float((module.weight == 0).double().mean()),
    }


def _size_text(value: Any) -> str:
    """Write a size along several dimensions: 3 where all are the same, else 1x7."""
    if not isinstance(value, tuple):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))


def modules_table(model: nn.Module) -> pd.DataFrame:
    """Return a row per module with the parameters in it, and a total, which counts each parameter once."""
    import pandas as pd

    rows = [(name, type(module).__name__, _params(module)) for name, module in model.named_modules() if name]
    return pd.DataFrame([*rows, (TOTAL, type(model).__name__, _params(model))], columns=["name", "type", "params"])


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shape_text(shape: Iterable[int]) -> str:
    """Write a shape: 64x3x7x7."""
    return "x".join(map(str, shape))


def render(table: pd.DataFrame) -> str:
    """Return a table as text with aligned columns: words to the left, numbers to the right, shares in percent."""
    import pandas as pd

    columns = []
    for title in table.columns:
        values = [None if pd.isna(value) else value for value in table[title]]
        words = all(isinstance(value, str | None) for value in values)
        share = title in SHARES and any(isinstance(value, float) for value in values)
        cells = [f"{title} %" if share else str(title), *(_cell(value, share) for value in values)]
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if words else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _cell(value: Any, share: bool) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if share:
        return f"{value * 100:.2f}"
    return f"{value:.5f}" if isinstance(value, float) else f"{value:,}"


SUMMARIES: dict[str, Callable[[nn.Module, ModelSpec], str]] = {
    "sparsity": lambda model, spec: render(sparsity_table(model)),
    "compute": lambda model, spec: render(compute_table(model, spec)),
    "model": lambda model, spec: repr(model),
    "modules": lambda model, spec: render(modules_table(model)),
}
