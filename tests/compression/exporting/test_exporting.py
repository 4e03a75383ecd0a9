from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compression.exporting import run
from compression.exporting.arguments import ExportArguments
from compression.exporting.audit import Audit, audit_onnx
from compression.exporting.formats import FORMATS
from compression.exporting.graphs import ExportedModule, ExportSource, layers_of, name_layers_, to_onnx
from compression.exporting.measuring import FileResult, choose, difference_of, refuse_wrong_outputs, size_of
from compression.exporting.quantizing import import_nncf
from compression.pruning.narrowing import build_narrow
from compression.scoring.calibration import sample
from models.backends import TorchBackend, open_backend
from models.backends.metadata import KEY, Metadata
from models.loading import LoadedClassifier
from models.networks import build
from tests.conftest import ROOT
from tests.zoo import randomised
from utils.data.datasets import load_data
from utils.errors import UserError
from utils.files.checkpoint import save_checkpoint
from utils.spec import ModelSpec

CPU = torch.device("cpu")
WEIGHTS = str(ROOT / "weights/digits.pt")


@pytest.fixture(scope="module")
def digits(tmp_path_factory, few_passes):
    """The shipped classifier, 1 channel, as dynamic ONNX in fp32 and int8."""
    folder = tmp_path_factory.mktemp("digits")
    a = ExportArguments(WEIGHTS, dynamic=True, int8=True, data="digits", images=48, workers=0)
    classifier = run.prepare_export(a)
    return folder, classifier, run.run_export(a, classifier, folder)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, few_passes):
    """A pruned YOLOv5 with pre-processing inside and a fixed batch, from a checkpoint, as ONNX and TorchScript."""
    folder = tmp_path_factory.mktemp("pruned")
    torch.manual_seed(0)
    narrow = build_narrow(ModelSpec("yolov5n-cls", 3, 32, 3, ("blue", "green", "red")), "0.5")
    content = {"spec": narrow.spec.to_dict(), "plan": {"kept": {}, "widths": dict(narrow.widths)}}
    save_checkpoint(folder / "narrow.pt", {**content, "state_dict": randomised(narrow.model).state_dict()})
    a = ExportArguments(str(folder / "narrow.pt"), include=("onnx", "torchscript"), with_preprocess=True, batch_size=4, workers=0)
    classifier = run.prepare_export(a)
    return folder, classifier, run.run_export(a, classifier, folder)


def test_what_is_written_is_what_was_measured(digits):
    folder, _, exported = digits
    results = json.loads(json.dumps(exported.to_dict()))
    fp32, int8 = results["formats"]
    keys = ["format", "precision", "path", "bytes", "top1", "top1_error", "latency_ms", "max_difference", "int8_layers", "fp32_layers"]
    assert list(fp32) == list(int8) == keys
    assert [(row["format"], row["precision"]) for row in (fp32, int8)] == [("onnx", "fp32"), ("onnx", "int8")]
    assert fp32["path"] == str(folder / "digits.onnx")
    assert int8["bytes"] == (folder / "digits_int8.onnx").stat().st_size < 0.4 * fp32["bytes"]
    assert fp32["max_difference"] < 1e-4 < int8["max_difference"] < 0.1
    assert fp32["top1"] == results["eager"]["top1"] == pytest.approx(142 / 143)  # the validation images, one of them missed
    assert int8["top1"] >= 141 / 143
    assert min(fp32["latency_ms"], int8["latency_ms"], results["eager"]["latency_ms"]) > 0
    assert results["ship"]["onnx"] in (fp32["path"], int8["path"])


def test_every_layer_of_the_int8_file_is_found_under_its_modules_name(digits):
    _, classifier, exported = digits
    fp32, int8 = exported.files
    kinds = (nn.Conv2d, nn.Linear)
    modules = [name for name, module in classifier.reference.model.named_modules() if isinstance(module, kinds)]
    assert len(modules) == 20  # ResNet-20: 19 convolutions, one linear layer
    assert sorted(int8.int8_layers) == sorted(fp32.fp32_layers) == sorted(modules)
    assert int8.fp32_layers == fp32.int8_layers == ()


@pytest.mark.parametrize("batch", [1, 32])
def test_a_dynamic_file_takes_any_batch(digits, batch):
    folder, classifier, _ = digits
    images = torch.randint(0, 256, (batch, 32, 32, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = classifier.reference.logits(images)
    assert torch.allclose(open_backend(str(folder / "digits.onnx"), CPU).logits(images), reference, atol=1e-4)
    assert open_backend(str(folder / "digits_int8.onnx"), CPU).logits(images).shape == reference.shape


def test_a_file_runs_with_onnxruntime_and_numpy_alone(digits):
    folder, classifier, _ = digits
    session = onnxruntime.InferenceSession(str(folder / "digits.onnx"), providers=["CPUExecutionProvider"])
    spec = json.loads(session.get_modelmeta().custom_metadata_map[KEY])["spec"]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    inputs = ((images / 255 - spec["mean"]) / spec["std"]).transpose(0, 3, 1, 2).astype(np.float32)
    (logits,) = session.run(None, {"images": inputs})
    assert logits == pytest.approx(classifier.reference.logits(torch.from_numpy(images)).numpy(), abs=1e-3)
    assert spec["class_names"] == list("0123456789")


def test_the_snippet_of_the_docs_runs_with_onnxruntime_and_numpy_alone(tmp_path, monkeypatch, capsys):
    blocks = (ROOT / "docs" / "quantization.md").read_text().split("```python\n")[1:]
    snippet = next(block.partition("```")[0] for block in blocks if "onnxruntime.InferenceSession" in block)
    assert {line.split()[1] for line in snippet.splitlines() if line.startswith("import ")} == {"json", "numpy", "onnxruntime"}
    spec = ModelSpec("tiny", 2, 16, class_names=("cat", "dog"))
    model = randomised(Tiny()).eval()
    FORMATS["onnx"].write(ExportSource(model, Metadata(spec, preprocessing=True, softmax=True)), "fp32", tmp_path / "best.onnx")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "photo.npy", image)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    expected = TorchBackend(LoadedClassifier(model, spec), CPU).logits(torch.from_numpy(image)[None]).softmax(1)[0]
    name, probability = capsys.readouterr().out.split()
    assert name == spec.class_names[int(expected.argmax())]
    assert float(probability) == pytest.approx(float(expected.max()), abs=1e-5)


def test_nothing_of_this_machine_is_in_the_file(digits):
    content = (digits[0] / "digits.onnx").read_bytes()
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content
    assert b"forward" not in content


def test_the_same_digits_are_predicted_and_measured_from_the_file(digits, script, tmp_path):
    for name, weights in (("pt", WEIGHTS), ("onnx", digits[0] / "digits.onnx")):
        flags = ("--weights", weights, "--source", ROOT / "data/images", "--nosave", "--save-json", "--name", name, "--batch", 3)
        done = script("predict.py", *flags)
        assert done.code == 0, done.err
        assert "note" not in done.out
        assert script("val.py", "--weights", weights, "--workers", 0, "--name", name).code == 0
    a, b = (json.loads((tmp_path / f"runs/predict/{name}/predictions.json").read_text()) for name in ("pt", "onnx"))
    for left, right in zip(a, b, strict=True):
        assert [name for name, _ in left["topk"]] == [name for name, _ in right["topk"]]
        assert [p for _, p in left["topk"]] == pytest.approx([p for _, p in right["topk"]], abs=1e-4)
    a, b = (json.loads((tmp_path / f"runs/val/{name}/results.json").read_text()) for name in ("pt", "onnx"))
    assert (a["images"], a["top1"]) == (b["images"], b["top1"]) == (143, pytest.approx(142 / 143))  # the same part is held out


def test_a_pruned_network_with_pre_processing_inside(pruned):
    folder, classifier, exported = pruned
    assert [row.top1 for row in exported.files] == [None, None]
    assert all(row.max_difference < 1e-4 for row in exported.files)
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = classifier.reference.logits(images).softmax(1)
    for name in ("narrow.onnx", "narrow.torchscript"):
        backend = open_backend(str(folder / name), CPU)
        assert torch.allclose(backend.logits(images).softmax(1), expected, atol=1e-5)
        assert backend.spec.class_names == ("blue", "green", "red")
    session = onnxruntime.InferenceSession(str(folder / "narrow.onnx"), providers=["CPUExecutionProvider"])
    assert (session.get_inputs()[0].type, session.get_inputs()[0].shape) == ("tensor(uint8)", [4, 32, 32, 3])
    (probabilities,) = session.run(None, {"images": images[:4].numpy()})
    assert probabilities == pytest.approx(expected[:4].numpy(), abs=1e-5)


def test_int8_with_pre_processing_inside_leaves_it_and_the_softmax_in_float(pruned, photos, tmp_path):
    _, classifier, _ = pruned
    spec = classifier.reference.spec
    classifier.source.calibration = sample(load_data(str(photos)).split("train"), spec, 6, 6, 0)
    assert [len(part) for part in classifier.source.calibration_inputs()] == [4, 4]  # 6 images, the first two once more
    path = tmp_path / "a.onnx"
    FORMATS["onnx"].write(classifier.source, "int8", path)
    audit = FORMATS["onnx"].audit(classifier.source, path)
    assert len(audit.int8) == 33  # YOLOv5n-cls: 32 convolutions, one linear layer
    assert audit.others == ()
    nodes = onnx.load(str(path)).graph.node
    first = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    assert {"Cast", "Sub", "Mul", "Transpose"} <= {node.op_type for node in nodes[:first]}
    softmax = next(node for node in nodes if node.op_type == "Softmax")
    assert softmax.output[0] == "probabilities"
    images = classifier.source.calibration.images
    close = open_backend(str(path), CPU).logits(images).softmax(1) - classifier.reference.logits(images).softmax(1)
    assert close.abs().max() < 0.1


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))


def test_openvino_files_in_every_precision(tmp_path, photos):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    spec = ModelSpec("tiny", 2, 16)
    model = randomised(Tiny()).eval()
    calibration = sample(load_data(str(photos)).split("train"), spec, 8, 8, 0)
    source = ExportSource(model, Metadata(spec, preprocessing=True, softmax=True, batch_size=None), 18, calibration)
    expected = TorchBackend(LoadedClassifier(model, spec), CPU).logits(calibration.images)
    tolerances = {"fp32": 1e-5, "fp16": 2e-2}
    try:
        import_nncf()
        tolerances["int8"] = 0.1
    except UserError:
        pass
    for precision, tolerance in tolerances.items():
        path = tmp_path / precision
        FORMATS["openvino"].write(source, precision, path)
        backend = open_backend(str(path), CPU)
        assert backend.metadata.precision == precision
        assert difference_of(expected, backend.logits(calibration.images), True) < tolerance
        audit = FORMATS["openvino"].audit(source, path)
        assert sorted((*audit.int8, *audit.others)) == ["head", "stem"]
        assert bool(audit.int8) == (precision == "int8")


@pytest.mark.parametrize(("half", "named"), [(False, True), (True, True), (False, False)])
def test_safetensors_hold_a_narrow_network_with_its_specification(half, named, tmp_path):
    pytest.importorskip("safetensors")
    narrow = build_narrow(ModelSpec("resnet20", 3, 32, 1, ("blue", "green", "red") if named else ()), "0.5")
    model = randomised(narrow.model).eval()
    source = ExportSource(model, Metadata(narrow.spec, named=named, record={"val_fraction": 0.2}))
    FORMATS["safetensors"].write(source, "fp16" if half else "fp32", tmp_path / "x.safetensors")
    backend = open_backend(str(tmp_path / "x.safetensors"), CPU)
    assert (backend.named, backend.record) == (named, {"val_fraction": 0.2} if named else {})
    if named:
        assert backend.spec == narrow.spec
    images = torch.randint(0, 256, (2, 32, 32, 1), dtype=torch.uint8)
    expected = TorchBackend(LoadedClassifier(model, narrow.spec), CPU).logits(images)
    assert torch.allclose(backend.logits(images), expected, rtol=2e-2 if half else 1e-6, atol=2e-2 if half else 1e-6)


@pytest.mark.parametrize("baked", [False, True])
def test_half_computes_in_fp16_between_float_ends(baked):
    spec = ModelSpec("tiny", 2, 8)
    network = Tiny().eval()
    exported = ExportedModule(network, spec, baked, half=True)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    inputs = images if baked else torch.randn(2, 3, 8, 8)
    assert exported(inputs).dtype == torch.float32
    assert exported.network.stem.weight.dtype == torch.float16
    assert network.stem.weight.dtype == torch.float32  # its own copy


def test_layers_and_weights_are_named_after_modules():
    nodes = [
        helper.make_node("Conv", ["images", "network.a.weight"], ["x"], name="node_1"),
        helper.make_node("Conv", ["x", "shared"], ["y"], name="node_2"),
        helper.make_node("Conv", ["y", "shared"], ["z"], name="node_3"),
        helper.make_node("MatMul", ["z", "y"], ["logits"], name="node_4"),
    ]
    weights = [numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), name) for name in ("network.a.weight", "shared")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 2, 2]) for name in ("images", "logits")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights))
    name_layers_(model)
    assert layers_of(model) == ["a", "2", "3"]  # a product of two activations has no weights
    assert [tensor.name for tensor in model.graph.initializer] == ["a.weight", "shared"]
    assert list(model.graph.node[0].input) == ["images", "a.weight"]
    onnx.checker.check_model(model)


def test_the_audit_finds_what_was_left_in_float(digits, tmp_path):
    folder, classifier, _ = digits
    layers = layers_of(classifier.source.onnx(half=False))
    model = onnx.load(str(folder / "digits_int8.onnx"))
    # Between layer and quantizer goes what onnxruntime can't fuse, so that this layer must run in float32.
    conv = next(node for node in model.graph.node if node.name == "layer2.0.conv2")
    output, conv.output[0] = conv.output[0], "loose"
    at = list(model.graph.node).index(conv)
    model.graph.node.insert(at + 1, helper.make_node("Erf", ["loose"], [output]))
    onnx.save(model, str(tmp_path / "a.onnx"))
    audit = audit_onnx(tmp_path / "a.onnx", [*layers, "absent"])
    assert audit.others == ("layer2.0.conv2", "absent")  # what is not found counts as float
    assert len(audit.int8) == 19


def test_a_file_that_computes_something_else_is_refused():
    refuse_wrong_outputs(Path("a.onnx"), 1e-4)
    with pytest.raises(UserError, match=r"a.onnx does not compute what the network computes: outputs differ by 2\.0e-04"):
        refuse_wrong_outputs(Path("a.onnx"), 2e-4)


@pytest.mark.parametrize("wrong", [lambda reference: True, lambda reference: len(reference) == 1])
def test_a_run_refuses_a_file_whose_outputs_differ_for_any_number_of_images(digits, tmp_path, monkeypatch, wrong):
    _, classifier, _ = digits
    monkeypatch.setattr("compression.exporting.graphs.to_onnx", lambda *_: classifier.source.graphs[False])
    monkeypatch.setattr(run, "difference_of", lambda reference, *_: 0.01 if wrong(reference) else 0.0)
    monkeypatch.setattr(run, "measure_latencies", lambda backends, _: [1.0] * len(backends))
    with pytest.raises(UserError, match="does not compute what the network computes"):
        run.run_export(ExportArguments(WEIGHTS, dynamic=True), classifier, tmp_path)


def test_the_file_records_how_validation_images_were_held_out_and_whether_names_are_known(tmp_path):
    spec = ModelSpec("resnet20", 2, 16)
    model = build(spec)
    arguments = {"val_fraction": 0.3, "seed": 5, "lr0": 0.1}
    content = {"spec": spec.to_dict(), "plan": None, "arguments": arguments, "state_dict": model.state_dict()}
    save_checkpoint(tmp_path / "ours.pt", content)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    ours, plain = (run.prepare_export(ExportArguments(str(tmp_path / f"{name}.pt"))).source.metadata for name in ("ours", "plain"))
    assert (ours.record, ours.named) == ({"val_fraction": 0.3, "seed": 5}, True)
    assert (plain.record, plain.named) == ({}, False)


def test_differences_are_relative_to_the_scale():
    reference, outputs = torch.tensor([[4.0, -8.0]]), torch.tensor([[4.0, -7.0]])
    assert difference_of(reference, outputs, False) == 1 / 8
    # softmax of (0, 0) is (0.5, 0.5), of (0, ln 3) it is (0.25, 0.75): 0.25 of 0.5
    assert difference_of(torch.zeros(1, 2), torch.tensor([[0.0, np.log(3.0)]]), True) == pytest.approx(0.5, abs=1e-6)


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "in/b").write_bytes(b"123")
    assert size_of(tmp_path) == 8


def row(precision, latency=1.0, top1=0.9, int8=("a",), error=0.001):
    return FileResult("onnx", precision, precision, 1, top1, error, latency, 0.0, int8 if precision == "int8" else (), ())


@pytest.mark.parametrize(
    ("int8", "chosen", "reasons"),
    [
        (None, "fp32", []),
        (row("int8", 0.5), "int8", []),
        (row("int8", 1.0, 0.89), "int8", []),  # a drop of just --max-drop
        (row("int8", 2.0), "fp32", ["it is slower than fp32 here (2.000 against 1.000 ms)"]),
        (row("int8", 1.04), "int8", []),  # within the noise
        (row("int8", 0.5, 0.88), "fp32", ["it loses 2.00% ± 0.10% of top-1, more than --max-drop 0.01"]),
        (row("int8", 0.5, 0.88, error=0.007), "int8", []),  # 1 point more than allowed is 1.4 standard errors
        (row("int8", 0.5, 0.88, error=0.006), "fp32", ["it loses 2.00% ± 0.60% of top-1, more than --max-drop 0.01"]),
        (row("int8", 0.5, 0.88, error=None), "fp32", ["it loses 2.00% ± 0.00% of top-1, more than --max-drop 0.01"]),
        (row("int8", 0.5, None), "int8", []),
        (row("int8", 0.5, int8=()), "fp32", ["no layer runs in int8 here"]),
    ],
)
def test_int8_is_chosen_only_where_it_is_better(int8, chosen, reasons):
    found, why = choose(row("fp32"), int8, 0.01)
    assert (found.precision, why) == (chosen, reasons)


def test_the_script_reports_and_says_why_int8_is_not_the_one_to_use(script, tmp_path, monkeypatch, digits):
    graph = digits[1].source.onnx(half=False)
    monkeypatch.setattr("compression.exporting.graphs.to_onnx", lambda *_: graph)  # the export itself takes seconds
    monkeypatch.setattr(run, "measure_latencies", lambda backends, _: [3.0, 1.0, 2.0])
    done = script("export.py", "--int8", "--data", "digits", "--images", 8, "--workers", 0, "--dynamic")
    assert done.code == 0, done.err
    assert "onnx: int8 is not the one to use: it is slower than fp32 here (2.000 against 1.000 ms)" in done.out
    assert "onnx: 20 of 20 convolutions and linear layers run in int8" in done.out
    assert "onnx: use runs/export/exp/digits.onnx" in done.out
    results = json.loads((tmp_path / "runs/export/exp/results.json").read_text())
    assert set(results) == {"formats", "eager", "ship"}
    assert (results["eager"]["precision"], results["eager"]["latency_ms"]) == ("fp32", 3.0)
    assert results["ship"] == {"onnx": "runs/export/exp/digits.onnx"}
    assert (tmp_path / "runs/export/exp/opt.yaml").is_file()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.q, self.k = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(((self.q(x) @ self.k(x).transpose(1, 2)).softmax(2) @ x).mean(1))


def test_int8_of_a_transformer_quantizes_its_layers_and_not_its_attention(tmp_path, photos):
    torch.manual_seed(0)
    spec = ModelSpec("attending", 2, 16)
    model = randomised(Attending()).eval()
    calibration = sample(load_data(str(photos)).split("train"), spec, 8, 8, 0)
    source = ExportSource(model, Metadata(spec, batch_size=None), 18, calibration)
    path = tmp_path / "a.onnx"
    FORMATS["onnx"].write(source, "int8", path)
    assert FORMATS["onnx"].audit(source, path) == Audit(("patch", "q", "k", "head"), ())
    nodes = {node.output[0]: node for node in onnx.load(str(path)).graph.node}
    products = [n for n in nodes.values() if n.op_type == "MatMul" and not all(nodes[i].op_type == "DequantizeLinear" for i in n.input)]
    assert len(products) == 2
    reference = TorchBackend(LoadedClassifier(model, spec), CPU).logits(calibration.images)
    assert difference_of(reference, open_backend(str(path), CPU).logits(calibration.images), False) < 0.1


class Counting(nn.Module):
    """Looks at the number of images, so that it can't be left open."""

    def forward(self, x):
        return x.mean((2, 3)) * (2 if x.shape[0] > 3 else 1)


def test_a_network_that_needs_its_batch_size_is_refused_with_dynamic():
    with pytest.raises(UserError, match="can't be exported with --dynamic") as caught:
        to_onnx(Counting(), torch.zeros(2, 3, 8, 8), True, 18)
    assert "\n" not in str(caught.value)


BAD = [
    (("--include", "onx"), "--include is 'onx'. Did you mean 'onnx'?"),
    (("--int8",), "--int8 needs images to calibrate on: give --data"),
    (("--int8", "--data", "digits", "--include", "onnx", "torchscript"), "--int8 can't be written as torchscript; valid: onnx, openvino"),
    (("--dynamic", "--batch-size", "2"), "so it excludes --batch-size 2"),
    (("--batch-size", "0"), "batch-size is 0"),
    (("--images", "0"), "images is 0"),
    (("--opset", "11"), "opset is 11; it must lie in 18..21"),
    (("--max-drop", "1.5"), "max-drop is 1.5"),
    (("--seed", "-1"), "seed is -1"),
    (("--imgsz", "2"), "image size is 2"),
    (("--weights", "no.pt"), "no weights file no.pt"),
    (("--weights", "a.onnx"), "a.onnx has been exported already; give the checkpoint"),
    (("--data", "nowhere/else"), "no folder nowhere/else"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_user_error_is_one_line_exit_2_and_no_run_directory(script, tmp_path, flags, message):
    done = script("export.py", *flags)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("library", "flags"),
    [
        ("onnxscript", ()),
        ("onnxruntime", ()),
        ("openvino", ("--include", "openvino")),
        ("nncf", ("--include", "openvino", "--int8", "--data", "digits")),
    ],
)
def test_a_missing_library_is_one_line_with_the_command(script, tmp_path, monkeypatch, library, flags):
    for name in ("openvino", "nncf"):
        if name != library:
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name, sys))  # may not be installed here
    monkeypatch.setitem(sys.modules, library, None)
    done = script("export.py", *flags)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"needs {library}, which can't be imported" in done.err
    assert "pip install -r requirements-export.txt" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_failed_export_leaves_no_run_directory(script, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("can't be exported")

    monkeypatch.setattr("compression.exporting.graphs.to_onnx", fail)
    done = script("export.py")
    assert (done.code, done.err) == (2, "export.py: error: can't be exported\n")
    assert list((tmp_path / "runs/export").iterdir()) == []


def test_calibration_takes_training_images_and_never_those_of_the_test(photos):
    save = run.sample
    seen = []
    run.sample = lambda split, *rest: seen.append(split.name(0)) or save(split, *rest)
    try:
        folder = photos.parent / "calibrated"
        folder.mkdir(exist_ok=True)
        spec = ModelSpec("resnet20", 3, 16, 3, ("blue", "green", "red"))
        save_checkpoint(folder / "a.pt", {"spec": spec.to_dict(), "state_dict": build(spec).state_dict()})
        classifier = run.prepare_export(ExportArguments(str(folder / "a.pt"), int8=True, data=str(photos), images=5, workers=0))
    finally:
        run.sample = save
    assert len(classifier.source.calibration) == 5
    assert [Path(name).parts[-3] for name in seen] == ["train", "val"]  # to calibrate on, and to compare outputs on
