from __future__ import annotations

import json
import math
import sys

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from models.backends import open_backend
from models.backends.metadata import KEY, TORCHSCRIPT_FILE, Metadata
from models.backends.torchscript_runtime import is_harmless, refuse_file_access
from tests.conftest import CLASSES
from utils.errors import UserError
from utils.spec import ModelSpec

CPU = torch.device("cpu")
SPEC = ModelSpec("hand", 3, 8, 1, ("a", "b", "c"), mean=(0.5,), std=(0.25,))
WEIGHT = np.array([[1.0], [-1.0], [2.0]], np.float32)  # logits of the mean m of an image: m, -m, 2 m


def write(path, metadata=None, shape=("n", 1, 8, 8), text=None, outputs=3, softmax=False, kind=TensorProto.FLOAT, twice=False):
    """Write an ONNX file by hand: the mean over space and channels, then logits."""
    weight = np.resize(WEIGHT, (outputs, 1))
    nodes = [
        *([helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT)] if kind != TensorProto.FLOAT else []),
        helper.make_node("ReduceMean", ["images" if kind == TensorProto.FLOAT else "x", "axes"], ["m"], keepdims=0),
        helper.make_node("Unsqueeze", ["m", "one"], ["mean"]),
        helper.make_node("Gemm", ["mean", "w"], ["z"], transB=1),
        helper.make_node("Softmax" if softmax else "Identity", ["z"], ["logits"]),
    ]
    constants = {"axes": np.array([1, 2, 3]), "one": np.array([1]), "w": weight}
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], outputs]) for name in ("logits", "z")[: 2 if twice else 1]]
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("images", kind, shape)],
        out,
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if metadata or text:
        entry = model.metadata_props.add()
        entry.key, entry.value = KEY, text or metadata.to_json()
    onnx.save(model, str(path))
    return str(path)


def images(*values, side=8, channels=1):
    return torch.stack([torch.full((side, side, channels), value, dtype=torch.uint8) for value in values])


def test_pixels_are_normalised_as_the_file_says(tmp_path):
    backend = open_backend(write(tmp_path / "a.onnx", Metadata(SPEC)), CPU)
    # 255 -> (1 - 0.5) / 0.25 = 2; 0 -> -2; 51 -> (0.2 - 0.5) / 0.25 = -1.2
    expected = torch.tensor([[2, -2, 4], [-2, 2, -4], [-1.2, 1.2, -2.4]])
    assert torch.allclose(backend.logits(images(255, 0, 51)), expected, atol=1e-5)
    assert (backend.spec, backend.named, backend.notes) == (SPEC, True, [])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_file_of_a_fixed_batch_takes_any_number(tmp_path, count):
    path = write(tmp_path / "a.onnx", Metadata(SPEC, batch_size=2), (2, 1, 8, 8))
    logits = open_backend(path, CPU).logits(images(*[255, 0, 51, 255, 0][:count]))
    assert logits[:, 0].tolist() == pytest.approx([2, -2, -1.2, 2, -2][:count], abs=1e-5)


def test_outputs_that_are_not_finite_are_refused(tmp_path):
    path = write(tmp_path / "a.onnx", metadata=Metadata(SPEC))
    model = onnx.load(path)
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.full((3, 1), np.nan, np.float32), "w"))
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"a\.onnx returns outputs that are not finite"):
        open_backend(path, CPU).logits(images(1))


def test_probabilities_become_logits_that_give_them_back(tmp_path):
    backend = open_backend(write(tmp_path / "a.onnx", Metadata(SPEC, softmax=True), softmax=True), CPU)
    terms = [math.exp(value) for value in (2, -2, 4)]
    assert backend.logits(images(255)).softmax(1)[0].tolist() == pytest.approx([term / sum(terms) for term in terms], abs=1e-5)


def test_a_probability_of_zero_stays_finite(tmp_path):
    path = write(tmp_path / "a.onnx", Metadata(SPEC.with_(mean=(0.0,), std=(0.001,)), softmax=True), softmax=True)
    logits = open_backend(path, CPU).logits(images(255))  # the mean is 1000: exp(-3000) is 0
    assert torch.isfinite(logits).all()
    assert logits.softmax(1)[0].tolist() == pytest.approx([0, 0, 1], abs=1e-5)


def test_baked_in_pre_processing_takes_bytes(tmp_path):
    metadata = Metadata(SPEC, preprocessing=True)
    backend = open_backend(write(tmp_path / "a.onnx", metadata, ("n", 8, 8, 1), kind=TensorProto.UINT8), CPU)
    assert backend.logits(images(10))[0].tolist() == [10, -10, 20]


def test_the_runtime_gets_torchs_threads(tmp_path):
    backend = open_backend(write(tmp_path / "a.onnx", Metadata(SPEC)), CPU)
    assert backend.runtime.session.get_session_options().intra_op_num_threads == torch.get_num_threads()


def test_a_foreign_file_runs_on_assumptions_that_are_noted(tmp_path):
    backend = open_backend(write(tmp_path / "a.onnx", shape=("n", 3, 8, 8)), CPU)
    assert (backend.spec.imgsz, backend.spec.channels, backend.spec.num_classes, backend.named) == (8, 3, 3, False)
    assert backend.notes == [
        f"{tmp_path / 'a.onnx'} has no metadata of export.py; assumed: images of 8 px, 3 channel(s), "
        "ImageNet's mean (0.485, 0.456, 0.406) and std, outputs are logits"
    ]
    # ((1 - 0.485) / 0.229 + (1 - 0.456) / 0.224 + (1 - 0.406) / 0.225) / 3 = (2.2489083 + 2.4285714 + 2.64) / 3
    assert backend.logits(images(255, channels=3))[0, 0].item() == pytest.approx(2.4391599, abs=1e-5)


@pytest.mark.parametrize("classes", [3, -1])
def test_a_foreign_file_that_was_made_for_one_image_gets_them_one_by_one(tmp_path, classes):
    path = write(tmp_path / "a.onnx", shape=("n", 3, 8, 8))
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, classes]), "shape"))
    model.graph.node[-1].CopyFrom(helper.make_node("Reshape", ["z", "shape"], ["logits"]))
    onnx.save(model, path)
    backend = open_backend(path, CPU)
    assert any("it gets them one by one" in note for note in backend.notes)
    logits = backend.logits(images(255, 0, 255, channels=3))
    assert logits[:, 0].tolist() == pytest.approx(
        [2.4391599, -1.9860202, 2.4391599], abs=1e-5
    )  # -(0.485 / 0.229 + 0.456 / 0.224 + 0.406 / 0.225) / 3


def test_an_error_of_the_runtime_is_one_clear_line(tmp_path):
    backend = open_backend(write(tmp_path / "a.onnx", metadata=Metadata(SPEC)), CPU)
    with pytest.raises(UserError, match=r"a\.onnx does not run on 1 image\(s\) of 8 px"):
        backend._forward(np.zeros((1, 3, 9, 9), np.float32))


def test_invalid_entries_of_a_record_are_dropped(tmp_path):
    record = {"val_fraction": "x", "seed": -3, "other": 1}
    assert open_backend(write(tmp_path / "a.onnx", **changed(record=record)), CPU).record == {}
    record = {"val_fraction": 0.3, "seed": 5}
    assert open_backend(write(tmp_path / "b.onnx", **changed(record=record)), CPU).record == record


def test_probabilities_of_a_foreign_file_are_recognised(tmp_path):
    backend = open_backend(write(tmp_path / "a.onnx", softmax=True), CPU)
    assert "outputs are probabilities" in backend.notes[0]
    assert backend.logits(images(100)).softmax(1).sum().item() == pytest.approx(1, abs=1e-5)


def test_imgsz_gives_the_size_that_a_foreign_file_does_not_tell(tmp_path):
    path = write(tmp_path / "a.onnx", shape=("n", 3, "h", "w"))
    with pytest.raises(UserError, match="does not tell the size of its images; give --imgsz"):
        open_backend(path, CPU)
    assert open_backend(path, CPU, imgsz=12).logits(images(255, side=12, channels=3)).shape == (1, 3)


def changed(**values):
    """Metadata with other values, those of the spec by their own names."""
    content = json.loads(Metadata(SPEC).to_json())
    for name, value in values.items():
        (content if name in content else content["spec"])[name] = value
    return {"text": json.dumps(content)}


NEWER = json.dumps({"format": "rankcut-export", "version": 99})
HALF = json.dumps({"format": "rankcut-export", "version": 1, "spec": {}})
BAD = {
    "channels": (
        {"metadata": Metadata(SPEC), "shape": ("n", 3, 8, 8)},
        {},
        "claims an input of [any, 1, 8, 8], but it has [any, 3, 8, 8]",
    ),
    "size": ({"metadata": Metadata(SPEC), "shape": ("n", 1, 9, 9)}, {}, "claims an input of [any, 1, 8, 8], but it has [any, 1, 9, 9]"),
    "batch": ({"metadata": Metadata(SPEC), "shape": (2, 1, 8, 8)}, {}, "claims an input of [any, 1, 8, 8], but it has [2, 1, 8, 8]"),
    "classes": ({"metadata": Metadata(SPEC), "outputs": 4}, {}, "claims outputs of [2, 3], but it has [2, 4]"),
    "type": ({"metadata": Metadata(SPEC), "kind": TensorProto.UINT8}, {}, "claims float32 inputs, but it has uint8"),
    "no json": ({"text": "{"}, {}, "its metadata is not JSON"),
    "other format": ({"text": "[]"}, {}, "is not of the format 'rankcut-export'"),
    "newer": ({"text": NEWER}, {}, "has export version 99; this code reads up to 1"),
    "version of another type": (changed(version=1.0), {}, "has export version 1.0"),
    "negative version": (changed(version=-5), {}, "has export version -5"),
    "nested": ({"text": "[" * 100_000}, {}, "its metadata is not JSON"),
    "long number": ({"text": f'{{"format": {"1" * 5_000}}}'}, {}, "its metadata is not JSON"),
    "no batch": (changed(batch_size=0), {}, "batch_size is 0; it must lie in 1..65536"),
    "huge batch": (changed(batch_size=10**9), {}, "batch_size is 1000000000"),
    "mean of text": (changed(mean=["a"]), {}, "must be finite numbers"),
    "flat std": (changed(std=[0]), {}, "those of std above 0"),
    "std is no number": (changed(std=[float("nan")]), {}, "must be finite numbers"),
    "names of numbers": (changed(class_names=[1, 2, 3]), {}, "class_names must be a list of texts"),
    "names as a text": (changed(class_names="abc"), {}, "class_names must be a list of texts"),
    "names that move the cursor": (changed(class_names=["a", "b", "\x1b]0;x\x07"]), {}, "without control characters"),
    "half a class": (changed(num_classes=3.0), {}, "num_classes is 3.0; it must be a whole number"),
    "crop": (changed(crop_fraction="x"), {}, "crop_fraction is 'x'; it must lie in (0, 1]"),
    "no probabilities": (changed(softmax=True), {}, "claims probabilities, but it has outputs that do not sum to 1"),
    "half": ({"text": HALF}, {}, "its metadata's 'precision' is None"),
    "no spec": ({"text": Metadata(SPEC).to_json().replace('"num_classes": 3', '"num_classes": 4')}, {}, "3 class names for 4 classes"),
    "imgsz": ({"metadata": Metadata(SPEC)}, {"imgsz": 16}, "takes images of 8 px, not of 16"),
    "model": ({"metadata": Metadata(SPEC)}, {"model_name": "resnet20"}, "leave --model resnet20 out"),
    "two outputs": ({"twice": True}, {}, "has 1 inputs and 2 outputs"),
    "layout": ({"shape": ("n", 8, 8, 3)}, {}, "only floating-point [batch, 1 or 3, height, width] is understood"),
    "foreign imgsz": ({"shape": ("n", 3, "h", "w")}, {"imgsz": 4}, "image size is 4"),
}


def test_a_foreign_file_for_oblong_images_is_understood(tmp_path):
    backend = open_backend(write(tmp_path / "a.onnx", shape=("n", 3, 8, 9)), CPU)
    assert backend.spec.size == (8, 9)
    assert "images of 8 x 9 px" in backend.notes[-1]
    assert backend.logits(torch.zeros(2, 8, 9, 3, dtype=torch.uint8)).shape[0] == 2


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_clear_line(tmp_path, case):
    written, opened, message = BAD[case]
    path = write(tmp_path / "a.onnx", **written)
    with pytest.raises(UserError) as caught:
        open_backend(path, CPU, **opened)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["onnx", "torchscript"])
def test_damaged_and_absent_files_are_one_clear_line(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(UserError, match="no weights file"):
        open_backend(str(path), CPU)
    for content in (b"", b"not a network", bytes(range(256)) * 9):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged") as caught:
            open_backend(str(path), CPU)
        assert "\n" not in str(caught.value)


def test_half_of_a_file_is_damaged(tmp_path):
    whole = tmp_path / "a.onnx"
    write(whole, Metadata(SPEC))
    whole.write_bytes(whole.read_bytes()[:150])
    with pytest.raises(UserError, match="is damaged"):
        open_backend(str(whole), CPU)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder with 0 \.xml files"):
        open_backend(str(tmp_path), CPU)


@pytest.mark.parametrize(("library", "name"), [("onnxruntime", "a.onnx"), ("openvino", "a.xml")])
def test_a_missing_runtime_is_one_line_with_the_command(tmp_path, monkeypatch, library, name):
    path = tmp_path / name
    write(path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}, which can't be imported .*; pip install -r requirements-export.txt"):
        open_backend(str(path), CPU)


def test_requests_that_a_file_ignores_are_noted(tmp_path):
    path = write(tmp_path / "a.onnx", Metadata(SPEC))
    assert open_backend(path, torch.device("cuda"), half=True).notes == [
        f"{path} runs on the CPU, not on cuda",
        f"{path} computes in the precision that it was exported in; --half changes nothing",
    ]


class Means(nn.Module):
    def forward(self, x):
        mean = x.mean((1, 2, 3))[:, None]
        return torch.cat((mean, -mean, 2 * mean), 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_files_with_and_without_metadata(tmp_path):
    module = torch.jit.trace(Means(), torch.zeros(2, 1, 8, 8))
    own, foreign = tmp_path / "own.torchscript", tmp_path / "foreign.torchscript"
    torch.jit.save(module, str(own), _extra_files={TORCHSCRIPT_FILE: Metadata(SPEC).to_json()})
    torch.jit.save(module, str(foreign))
    assert open_backend(str(own), CPU).logits(images(255))[0].tolist() == pytest.approx([2, -2, 4], abs=1e-5)
    with pytest.raises(UserError, match="give --imgsz"):
        open_backend(str(foreign), CPU)
    backend = open_backend(str(foreign), CPU, imgsz=8)
    assert backend.logits(images(255, channels=3))[0, 0].item() == pytest.approx(2.4391599, abs=1e-5)
    torch.jit.save(module, str(own), _extra_files={TORCHSCRIPT_FILE: Metadata(SPEC.with_(num_classes=2, class_names=("a", "b"))).to_json()})
    with pytest.raises(UserError, match=r"claims outputs of \[2, 2\], but it has \[2, 3\]"):
        open_backend(str(own), CPU)


class Hostile(nn.Module):
    def __init__(self, victim: str):
        super().__init__()
        self.victim = victim

    def forward(self, x):
        return torch.from_file(self.victim, shared=True, size=3)[None] + x.mean()


class Saving(nn.Module):
    def __init__(self, victim: str):
        super().__init__()
        self.victim = victim

    def forward(self, x):
        torch.save(x, self.victim)
        return x.mean((2, 3))


class Reading(nn.Module):
    """Uses what torchvision registers."""

    def __init__(self, victim: str):
        super().__init__()
        self.victim = victim

    def forward(self, x):
        return torch.ops.image.read_file(self.victim).float()[None] + x.mean()


class Loading(nn.Module):
    """Runs while it is loaded."""

    def __init__(self, victim: str):
        super().__init__()
        self.victim = victim

    @torch.jit.export
    def __getstate__(self):
        return self.victim, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.victim = state[0]
        self.training = state[1]

    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "used"), [(Hostile, "torch.from_file"), (Saving, "torch.save"), (Reading, "ops.image.read_file"), (Loading, "__setstate__")]
)
def test_a_torchscript_file_that_could_do_more_than_compute_is_refused(tmp_path, kind, used):
    import torchvision  # noqa: F401 - registers image.read_file

    victim = tmp_path / "victim"
    torch.jit.script(kind(str(victim))).save(str(tmp_path / "a.torchscript"))
    with pytest.raises(UserError, match=rf"is refused: its code uses {used}"):
        open_backend(str(tmp_path / "a.torchscript"), CPU, imgsz=8)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("namespace", "name", "harmless"),
    [
        ("aten", "conv2d", True),
        ("aten", "gelu", True),
        ("prim", "NumToTensor", True),
        ("aten", "from_file", False),
        ("aten", "save", False),
        ("aten", "classes", False),
        ("image", "decode_image", False),
        ("profiler", "_record_function_enter", False),
    ],
)
def test_what_a_torchscript_file_may_call(namespace, name, harmless):
    assert is_harmless(namespace, name) == harmless


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_the_code_is_read_as_torch_reads_it(tmp_path):
    """Python's zipfile takes the directory that lies right before the end record, torch the one that the record names."""
    good, evil = tmp_path / "good.torchscript", tmp_path / "evil.torchscript"
    torch.jit.script(nn.AdaptiveAvgPool2d(1)).save(str(good))
    torch.jit.script(Hostile("x")).save(str(evil))
    data = evil.read_bytes()
    begin, end = data.index(b"PK\1\2"), data.index(b"PK\6\6")
    (tmp_path / "both.torchscript").write_bytes(data[:end] + data[begin:end] + data[end:])
    for path in (evil, tmp_path / "both.torchscript"):
        with pytest.raises(UserError):
            refuse_file_access(path)
    refuse_file_access(good)


def test_openvino_folders_with_and_without_metadata(tmp_path):
    openvino = pytest.importorskip("openvino")
    for name, metadata in (("own", Metadata(SPEC)), ("foreign", None)):
        model = openvino.Core().read_model(write(tmp_path / "a.onnx"))
        if metadata:
            model.set_rt_info(metadata.to_json(), [KEY])
        (tmp_path / name).mkdir()
        openvino.save_model(model, str(tmp_path / name / "model.xml"), compress_to_fp16=False)
    for path in (tmp_path / "own", tmp_path / "own" / "model.xml"):
        backend = open_backend(str(path), CPU)
        assert backend.logits(images(255, 0))[:, 2].tolist() == pytest.approx([4, -4], abs=1e-5)
        assert backend.spec == SPEC
    assert "assumed: images of 8 px, 1 channel(s)" in open_backend(str(tmp_path / "foreign"), CPU).notes[0]
    (tmp_path / "own" / "model.xml").write_text("<net")
    with pytest.raises(UserError, match="is damaged"):
        open_backend(str(tmp_path / "own"), CPU)


def test_predict_and_val_take_a_foreign_file_with_the_names_of_data(script, tmp_path, photos):
    path = write(tmp_path / "a.onnx", shape=("n", 3, "h", "w"))
    source = tmp_path / "white.png"
    cv2.imwrite(str(source), np.full((16, 16, 3), 255, np.uint8))
    done = script("predict.py", "--weights", path, "--source", source, "--imgsz", 16, "--data", photos, "--nosave")
    assert done.code == 0, done.err
    assert "assumed: images of 16 px" in done.out
    # The mean is 2.439 (see above), the logits 2.439, -2.439, 4.878: red has 1 / (1 + exp(-2.439) + exp(-7.317)) = 0.92
    assert f"{sorted(CLASSES)[2]} 0.92, {sorted(CLASSES)[0]} 0.08" in done.out
    assert "in the order of the data's classes" in done.out
    done = script("val.py", "--weights", path, "--data", photos, "--imgsz", 16, "--workers", 0)
    assert done.code == 0, done.err
    assert "assumed: images of 16 px" in done.out
    refused = script("predict.py", "--weights", path, "--source", source, "--imgsz", 16, "--data", "digits", "--nosave")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "has 10 classes, the weights have 3 outputs and no names" in refused.err
