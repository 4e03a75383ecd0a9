"""From quantization-aware training to an int8 file: the file has the learned ranges."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
import yaml

from compression.exporting.formats import FORMATS
from compression.exporting.graphs import ExportSource
from compression.exporting.learned import is_linear, learned_ranges
from compression.exporting.measuring import difference_of
from compression.exporting.quantizing import quantize_onnx, saturates
from compression.quantizers.dorefa import DorefaQuantizer
from compression.quantizers.modes import Modes
from compression.quantizers.range_linear import QuantAwareTrainRangeLinearQuantizer
from compression.scoring.calibration import sample
from models.backends import TorchBackend, open_backend
from models.backends.metadata import Metadata
from models.loading import LoadedClassifier
from models.quantized.layers import QuantizedLayer
from models.quantized.preparing import plain_copy, prepare_, rounded_copy
from models.validation import load_for
from tests.conftest import ROOT
from tests.zoo import randomised
from utils.data.datasets import load_data
from utils.errors import UserError
from utils.spec import ModelSpec

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_passes")
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
    flags = ("--epochs", 1, "--effective-train-size", 0.15, "--lr0", 1e-4, "--no-ema", "--workers", 0)
    done = script("train.py", "--weights", DIGITS, "--data", "digits", "--compress", path, "--kd-teacher", DIGITS, *flags)
    assert done.code == 0, done.err
    return tmp_path / "runs/train/exp/weights/last.pt"


def test_an_int8_file_has_the_learned_ranges_and_agrees_with_the_trained_network(script, trained, tmp_path):
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
    # and so the predictions agree, on at least 99 % of the images, and the accuracy within half a point
    data = load_for(eager, "digits", "val", None, None, False)
    parts = [sample(data.split(name), eager.spec, count, 64, 0) for name, count in (("train", 500), ("val", 143))]
    shown, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    expected, found = eager.logits(shown).argmax(1), quantized.logits(shown).argmax(1)
    assert len(shown) == 643
    assert (expected == found).float().mean() >= 0.99
    assert abs((expected == labels).float().mean() - (found == labels).float().mean()) <= 0.005


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(3, 6, 3, bias=False), torch.nn.BatchNorm2d(6)
        self.middle, self.head = torch.nn.Conv2d(6, 5, 3), torch.nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.middle(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))


def written(source, path):
    """Write an int8 file; return its weights as they are stored and their scales, by layer."""
    quantize_onnx(source, path)
    graph = onnx.load(str(path)).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    rounds = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in graph.node if node.name in ("stem", "middle", "head")]
    return {node.name: tuple(constants[name] for name in rounds[node.input[1]][:2]) for node in layers if node.input[1] in rounds}


@pytest.fixture
def small(photos):
    torch.manual_seed(0)
    spec = ModelSpec("small", 2, 16)
    model = randomised(Small()).eval()
    return model, spec, sample(load_data(str(photos)).split("train"), spec, 8, 8, 0)


def test_weights_of_an_int8_file_have_a_grid_for_each_channel_with_batch_norm_folded(small, tmp_path):
    model, spec, calibration = small
    path = tmp_path / "a.onnx"
    source = ExportSource(model, Metadata(spec, batch_size=None), 18, calibration)
    weights = written(source, path)
    folded = model.stem.weight * (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).view(-1, 1, 1, 1)
    for name, weight in (("stem", folded), ("middle", model.middle.weight), ("head", model.head.weight)):
        stored, scales = weights[name]
        most = weight.detach().abs().flatten(1).amax(1).numpy()
        assert scales == pytest.approx(most / (64 if saturates() else 127), rel=1e-5)
        assert stored.dtype == np.int8
        assert stored.shape == tuple(weight.shape)
    noise = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    FORMATS["onnx"].write(source, "int8", path)
    levels = len(open_backend(str(path), CPU).logits(noise).unique())
    assert levels > 120  # of 128 numbers; logits of 8 bits would tie


@pytest.mark.parametrize(("mode", "per_channel"), [("sym", False), ("sym_restr", True)])
def test_weights_of_the_file_are_those_that_were_trained(small, tmp_path, monkeypatch, mode, per_channel):
    monkeypatch.setattr("compression.exporting.quantizing.saturates", lambda: False)  # as on a processor with VNNI
    model, spec, calibration = small
    grids = Modes("asym_u", mode)
    quantizer = QuantAwareTrainRangeLinearQuantizer(mode=grids, per_channel_wts=per_channel, overrides={"head": {"bits_weights": None}})
    quantizer.prepare_model(model, next(calibration.batches())[0])
    learned = learned_ranges(model)
    assert learned.in_float == {"head"}
    source = ExportSource(plain_copy(model).eval(), Metadata(spec, batch_size=None), 18, calibration, learned)
    weights = written(source, tmp_path / "a.onnx")
    assert set(weights) == {"stem", "middle"}  # the head is left in float, as it was trained
    for name, (stored, scales) in weights.items():
        layer = getattr(model, name)
        trained = layer.image("weight").detach() * (1 if layer.multiplier() is None else layer.multiplier())
        shape = (-1, 1, 1, 1) if per_channel else ()
        assert stored * scales.reshape(shape) == pytest.approx(trained.numpy(), abs=1e-5)
    audit = FORMATS["onnx"].audit(source, tmp_path / "a.onnx")
    assert (audit.int8, audit.others) == (("stem", "middle"), ("head",))


def test_weights_of_few_bits_are_written_as_they_are_rounded(tmp_path, small):
    model, spec, _ = small
    DorefaQuantizer(bits_weights=3).prepare_model(model)
    reference = TorchBackend(LoadedClassifier(model, spec), CPU)
    source = ExportSource(rounded_copy(model), Metadata(spec, batch_size=None))
    kinds = {node.op_type for node in source.onnx().graph.node}
    assert not kinds & {"Tanh", "Round", "ReduceMax", "BatchNormalization"}
    FORMATS["onnx"].write(source, "fp32", tmp_path / "a.onnx")
    assert FORMATS["onnx"].audit(source, tmp_path / "a.onnx").others == ("stem", "middle", "head")
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    assert difference_of(reference.logits(images), open_backend(str(tmp_path / "a.onnx"), CPU).logits(images), False) < 1e-5


def test_openvino_takes_the_learned_ranges_too(small, tmp_path):
    pytest.importorskip("openvino")
    model, spec, calibration = small
    QuantAwareTrainRangeLinearQuantizer(per_channel_wts=True).prepare_model(model, next(calibration.batches())[0])
    source = ExportSource(plain_copy(model).eval(), Metadata(spec, batch_size=None), 18, calibration, learned_ranges(model))
    FORMATS["openvino"].write(source, "int8", tmp_path / "a_openvino")
    expected = TorchBackend(LoadedClassifier(model.eval(), spec), CPU).logits(calibration.images)
    assert difference_of(expected, open_backend(str(tmp_path / "a_openvino"), CPU).logits(calibration.images), False) < 0.05
    assert FORMATS["openvino"].audit(source, tmp_path / "a_openvino").others == ()


def test_what_no_integer_runtime_computes_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU())
    prepare_(model, {"0": {"kind": "layer", "method": "dorefa", "bits_weights": 3}})
    assert not is_linear(model)
    with pytest.raises(UserError, match="only linear grids"):
        learned_ranges(model)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1))
    prepare_(model, {"0": {"kind": "layer", "bits_weights": 8}})
    with pytest.raises(UserError, match="no layer has both its weights and its inputs quantized"):
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
