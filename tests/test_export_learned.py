"""From quantization-aware training to an int8 file: the ranges that were learned are those of the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from compression.calibration import sample
from compression.exporting.learned import is_linear, learned_ranges
from models.backends import open_backend
from models.quantized import prepare_
from models.quantized.layers import QuantizedLayer
from models.validation import load_for
from tests.conftest import ROOT
from utils.errors import UserError

CPU = torch.device("cpu")
DIGITS = ROOT / "weights" / "digits.pt"
SCHEDULE = {
    "pruners": {
        "fine": {"class": "AutomatedGradualPruner", "initial_sparsity": 0.2, "final_sparsity": 0.5, "weights": ["layer3.*.conv2.weight"]}
    },
    "quantizers": {"int8": {"class": "QuantAwareTrainRangeLinearQuantizer", "per_channel_wts": True, "ema_decay": 0.9}},
    "policies": [
        {"pruner": {"instance_name": "fine"}, "epochs": [0]},
        {"quantizer": {"instance_name": "int8"}, "starting_epoch": 0, "ending_epoch": 1, "frequency": 1},
    ],
}


@pytest.fixture
def trained(script, tmp_path):
    """A classifier that was pruned, trained for 8 bits and distilled for some steps."""
    path = tmp_path / "qat.yaml"
    path.write_text(yaml.safe_dump(SCHEDULE))
    flags = ("--epochs", 1, "--effective-train-size", 0.3, "--lr0", 1e-4, "--imgsz", 24, "--no-ema", "--workers", 0)
    done = script("train.py", "--weights", DIGITS, "--data", "digits", "--compress", path, "--kd-teacher", DIGITS, *flags)
    assert done.code == 0, done.err
    return tmp_path / "runs/train/exp/weights/last.pt"


def test_an_int8_file_has_the_learned_ranges_and_agrees_with_the_trained_network(script, trained, tmp_path):
    import onnx

    done = script("export.py", "--weights", trained, "--include", "onnx", "--int8", "--data", "digits", "--dynamic", "--images", 32)
    assert done.code == 0, done.err
    folder = tmp_path / "runs/export/exp"
    rows = {row["precision"]: row for row in json.loads((folder / "results.json").read_text())["formats"]}
    assert rows["fp32"]["max_difference"] < 1e-4  # the float weights, without the rounding
    eager, quantized = open_backend(str(trained), CPU), open_backend(rows["int8"]["path"], CPU)
    assert rows["int8"]["fp32_layers"] == []
    # scale and zero point of each layer's input are those of its grid
    graph = onnx.load(rows["int8"]["path"]).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    rounds = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = {name: module for name, module in eager.model.named_modules() if isinstance(module, QuantizedLayer)}
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and node.name in layers]
    assert len(convolutions) == len(layers) == 20
    for node in convolutions:
        _, scale, zero = (constants.get(name) for name in rounds[node.input[0]])
        grid = layers[node.name].input_grid()
        assert np.isclose(float(scale), float(grid.scale), rtol=1e-6)
        assert int(zero) == int(grid.zero_point)
    # and so the predictions agree, on at least 99 % of the validation images
    images = load_for(eager, "digits", "val", None, None, False).split("val")
    shown = sample(images, eager.spec, len(images), 64, 0).images
    agreement = (eager.logits(shown).argmax(1) == quantized.logits(shown).argmax(1)).float().mean()
    assert agreement >= 0.99
    assert abs(rows["int8"]["top1"] - rows["fp32"]["top1"]) <= 0.01


def test_what_no_integer_runtime_computes_is_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU())
    prepare_(model, {"0": {"kind": "layer", "method": "dorefa", "bits_weights": 3}})
    assert not is_linear(model)
    with pytest.raises(UserError, match="linear grids alone"):
        learned_ranges(model)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1))
    prepare_(model, {"0": {"kind": "layer", "bits_weights": 4, "bits_inputs": 8}})
    with pytest.raises(UserError, match="0 is quantized with 4 bits for weights"):
        learned_ranges(model)


def test_signed_inputs_become_unsigned_ones_by_hand():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1))
    prepare_(model, {"0": {"kind": "layer", "bits_weights": 8, "bits_inputs": 8, "input_mode": "asym_s"}})
    layer = model[0]
    layer.input_low.fill_(-1.0)
    layer.input_high.fill_(1.55)
    # scale (1.55 + 1) / 255 = 0.01; zero point round(-128 + 1 / 0.01) = -28, unsigned -28 + 128 = 100
    learned = learned_ranges(model)
    assert learned.inputs["0"] == (pytest.approx(0.01), 100)
    assert learned.per_channel is False
