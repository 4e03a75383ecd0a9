"""Convolutions and matrix products: they read channels and make new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression.labels import Coordinates, Label, strip
from compression.ledger import Contraction
from compression.rules import Call, Outcome, Rule, aten, barrier


def convolution(call: Call) -> Outcome:
    """Read the channels of axis 1, make new ones; grouped convolutions tie by their structure."""
    ledger, weight, bias = call.ledger, call.owned("weight"), call.owned("bias") if call["bias"] is not None else None
    label = call.label("input")
    if label is None or weight is None or (call["bias"] is not None and bias is None):
        return barrier(call)
    groups, transposed = call["groups"], call["transposed"]
    shape, read = call["weight"].shape, label.vector(1, ledger)
    c_in, c_out = len(read), call.result.shape[1]
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    ledger.producers.add((weight, out_dim))
    if groups == 1:
        ledger.readers.add((weight, in_dim))
        ledger.tie(ledger.nodes(weight, in_dim), read)
        out = ledger.nodes(weight, out_dim)
    else:
        by_group = read.view(groups, c_in // groups)
        if ledger.takes_whole_groups(weight, groups, c_in // groups):
            rows = ledger.nodes(weight, 0).view(groups, -1)
            ledger.tie(rows[:, :1], rows)
            ledger.tie(rows[:, :1], by_group)
            out = rows[:, :1].expand(groups, c_out // groups).reshape(-1)
            ledger.producers.add((weight, 0))
        else:
            ledger.tie(by_group[:1], by_group)
            rows = ledger.nodes(weight, 0).view(groups, -1)
            ledger.tie(rows[:1], rows)
            inside = ledger.nodes(weight, 1)
            ledger.readers.add((weight, in_dim))
            ledger.tie(rows[0] if transposed else inside, by_group[0])
            out = (inside if transposed else rows[0]).repeat(groups)
    if bias is not None:
        ledger.tie(ledger.nodes(bias, 0), out)
    spatial = call["input"] if transposed else call.result
    repeats = spatial.shape[0] * int(torch.tensor(spatial.shape[2:]).prod())
    ledger.contractions.append(Contraction(weight, call.module, out, read, groups, repeats, call.computed, call.result.ndim == 4))
    assert len(shape) == call.result.ndim
    return Label(out.view(1, -1, *[1] * (call.result.ndim - 2)), call.result.shape)


def matrix_product(call: Call) -> Outcome:
    """Read the last axis of an activation with a (moved) weight matrix: mm, addmm."""
    activation, matrix = ("mat1", "mat2") if "mat1" in call.arguments else ("self", "mat2")
    bias = call["self"] if activation == "mat1" else None
    label, weight, ledger = call.label(activation), call.mark(matrix), call.ledger
    scaled = call.arguments.get("alpha", 1) != 1 or call.arguments.get("beta", 1) != 1
    owned_bias = call.owned("self") if bias is not None else None
    if label is None or not isinstance(weight, Coordinates) or (bias is not None and owned_bias is None) or scaled:
        return barrier(call)
    rows, columns = weight.along(0), weight.along(1)
    if call[matrix].shape[0] == 1 or call[matrix].shape[1] == 1:
        rows, columns = _of_flat_matrix(weight, call[matrix])
    if rows is None or columns is None or rows[0] == columns[0]:
        return barrier(call)
    read = label.vector(1, ledger)
    ledger.tie(ledger.nodes(weight.name, rows[0])[rows[1]], read)
    out = ledger.nodes(weight.name, columns[0])[columns[1]]
    ledger.producers.add((weight.name, columns[0]))
    ledger.readers.add((weight.name, rows[0]))
    if owned_bias is not None:
        ledger.tie(ledger.nodes(owned_bias, 0), out)
    ledger.contractions.append(Contraction(weight.name, call.module, out, read, 1, call.result.shape[0], call.computed, False))
    return Label(out.view(1, -1), call.result.shape)


def _of_flat_matrix(weight: Coordinates, matrix: Tensor) -> tuple[Any, Any]:
    """Coordinates of a matrix with one row or column, whose dimension of size 1 does not vary: a transposed weight."""
    if len(weight.places) != 2:
        return None, None
    return (1, strip(weight.places[1]).reshape(-1).expand(matrix.shape[0])), (
        0,
        strip(weight.places[0]).reshape(-1).expand(matrix.shape[1]),
    )


CONTRACTIONS: dict[Any, Rule] = {aten.convolution: convolution, aten.mm: matrix_product, aten.addmm: matrix_product}
