from __future__ import annotations

import builtins
import contextlib
import math
import os
import pickle
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from models.loading import load_classifier, read_weights
from models.networks import ARCHITECTURES, build
from models.state_dicts import identify, load_state_
from utils.errors import UserError
from utils.files.checkpoint import save_checkpoint
from utils.spec import ModelSpec

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
NAMES = ["cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture(autouse=True, scope="module")
def _built_once():
    """To identify a state dict, networks are built without values, often the same ones."""
    made = {}

    def build_once(spec):
        if repr(spec) not in made:
            made[repr(spec)] = build(spec)
        return made[repr(spec)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.state_dicts.build", build_once)
        yield


def network(name="resnet20", num_classes=5, channels=3, seed=0):
    torch.manual_seed(seed)
    model = build(ModelSpec(name, num_classes, channels=channels)).eval()
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
    return model


def same_logits(a, b, image=IMAGE):
    with torch.inference_mode():
        return torch.equal(a.eval()(image), b.eval()(image))


def refused(path, *patterns):
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as refusal:
        load_classifier(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert path.name in message
    for pattern in patterns:
        assert pattern in message
    return message


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "inside"])
def test_wrappers_in_names_are_dropped_wherever_they_are(wrap, tmp_path):
    source, state = network(), {}
    for name, value in source.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"{first}.module.{rest}" if wrap == "inside" else wrap.format(name)] = value
    target = network(seed=1)
    assert not same_logits(source, target)
    assert load_state_(target, state) == []
    assert same_logits(source, target)
    torch.save(state, tmp_path / "plain.pth")
    assert same_logits(source, load_classifier(tmp_path / "plain.pth").model)


def test_a_public_resnet56_with_prefix_and_a_head_of_another_name_loads(tmp_path):
    """The layout of the public CIFAR-10 files: ``module.``, head ``linear``, option A without parameters or buffers, more beside."""
    source = network("resnet56", 10)
    state = {f"module.{n.replace('fc.', 'linear.')}": v for n, v in source.state_dict().items() if not n.endswith(("source", "tracked"))}
    assert {"module.conv1.weight", "module.layer3.8.bn2.running_var", "module.linear.bias"} <= set(state)
    assert len(state) == 55 + 55 * 4 + 2
    torch.save({"state_dict": state, "best_prec1": 94.37}, tmp_path / "resnet56.th")
    loaded = load_classifier(tmp_path / "resnet56.th")
    assert (loaded.spec.name, loaded.spec.num_classes, loaded.spec.imgsz, loaded.named) == ("resnet56", 10, 32, False)
    assert loaded.notes == ["the head 'linear' of the weights is this network's 'fc'"]
    assert same_logits(source, loaded.model)
    assert same_logits(source, load_classifier(tmp_path / "resnet56.th", "resnet_56").model)


def test_a_head_of_another_class_count_starts_fresh_and_the_rest_is_loaded():
    source, target = network(num_classes=5), network(num_classes=7, seed=1)
    head, bias = target.fc.weight.clone(), target.fc.bias.clone()
    state = {name.replace("fc.", "linear."): value for name, value in source.state_dict().items()}
    notes = load_state_(target, state)
    assert [note.split(" of ")[0] for note in notes] == [
        "the head 'linear'",
        "the head 'fc' has 5 classes in the weights and 7 here: it starts fresh",
    ]
    assert torch.equal(target.fc.weight, head)
    assert torch.equal(target.fc.bias, bias)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items() if "fc." not in name)


def test_a_fresh_head_can_be_asked_for():
    source, target = network(), network(seed=1)
    head = target.fc.weight.clone()
    assert load_state_(target, source.state_dict(), fresh_head=True) == ["the head 'fc' starts fresh"]
    assert torch.equal(target.fc.weight, head)
    assert torch.equal(target.conv1.weight, source.conv1.weight)


def test_a_stem_for_colour_is_summed_for_grey_images_which_then_look_the_same():
    source, target = network(channels=3), network(channels=1, seed=1)
    source.conv1.weight.data[0, :, 0, 0] = torch.tensor([1.0, 2.0, 4.0])
    before = source.conv1.weight.clone()
    assert load_state_(target, source.state_dict()) == ["the stem 'conv1.weight' was converted from 3 to 1 input channels"]
    assert target.conv1.weight.shape == (16, 1, 3, 3)
    assert target.conv1.weight[0, 0, 0, 0] == 7
    assert torch.equal(source.conv1.weight, before)
    grey = IMAGE[:, :1]
    torch.testing.assert_close(target(grey), source(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_a_stem_for_grey_is_shared_among_the_colours():
    source, target = network(channels=1), network(channels=3, seed=1)
    source.conv1.weight.data[2, 0, 1, 1] = 6.0
    assert load_state_(target, source.state_dict()) == ["the stem 'conv1.weight' was converted from 1 to 3 input channels"]
    assert target.conv1.weight[2, :, 1, 1].tolist() == [2.0, 2.0, 2.0]
    grey = IMAGE[:, :1]
    torch.testing.assert_close(target(grey.expand(-1, 3, -1, -1)), source(grey), rtol=1e-4, atol=1e-5)


DAMAGE = {
    "missing": (lambda s: s.pop("layer1.0.conv1.weight"), "1 missing (layer1.0.conv1.weight)"),
    "statistics missing": (lambda s: s.pop("bn1.running_var"), "1 missing (bn1.running_var)"),
    "extra": (lambda s: s.update({"layer9.weight": torch.zeros(3)}), "1 not of this network (layer9.weight)"),
    "wrong": (lambda s: s.update({"bn1.bias": torch.zeros(3)}), "1 of another shape (bn1.bias)"),
    "stem of 2 channels": (lambda s: s.update({"conv1.weight": torch.zeros(16, 2, 3, 3)}), "1 of another shape (conv1.weight)"),
    "integers": (lambda s: s.update({"bn1.bias": torch.ones(16, dtype=torch.int32)}), "1 of another type (bn1.bias)"),
    "complex": (lambda s: s.update({"bn1.bias": torch.ones(16, dtype=torch.complex64)}), "1 of another type (bn1.bias)"),
    "sparse": (lambda s: s.update({"layer1.0.conv1.weight": s["layer1.0.conv1.weight"].to_sparse()}), "1 of another type (layer1.0."),
    "many": (lambda s: [s.pop(f"layer1.{i}.conv{j}.weight") for i in range(3) for j in (1, 2)], "6 missing (layer1.0.conv1.weight, "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_do_not_fit_are_refused_and_leave_the_model_unchanged(damage):
    change, message = DAMAGE[damage]
    state, target = dict(network().state_dict()), network(seed=1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    change(state)
    with pytest.raises(UserError, match="do not fit the network: of 119 tensors") as refusal:  # 19 convs, 19 x 5 norms, 3 sources, 2 fc
        load_state_(target, state)
    assert message in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


SAME_TENSORS = {"plain20": "resnet20"}  # shortcuts of option A have none


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_is_known_by_its_tensors(name):
    with torch.device("meta"):
        state = build(ModelSpec(name, 3, channels=1)).state_dict()
    assert identify(state, Path("x.pt")) == SAME_TENSORS.get(name, name)


def test_tensors_of_an_unknown_network_are_refused():
    with torch.device("meta"):
        state = build(ModelSpec("resnet20", 3)).state_dict()
    changed = {**state, "conv1.weight": torch.zeros(17, 3, 3, 3)}
    with pytest.raises(UserError, match=r"x\.pt is a plain state dict whose shapes match none of our architectures; .* --model"):
        identify(changed, Path("x.pt"))


def test_a_checkpoint_of_ours_is_rebuilt_from_its_spec(tmp_path):
    spec = ModelSpec("resnet20", 5, imgsz=32, class_names=tuple(NAMES), norm_eps={"bn1": 0.25})
    source = network()
    source.bn1.eps = 0.25
    save_checkpoint(tmp_path / "best.pt", {"spec": spec.to_dict(), "state_dict": source.state_dict(), "epoch": 3})
    loaded = load_classifier(tmp_path / "best.pt")
    assert (loaded.spec, loaded.named, loaded.notes, loaded.checkpoint["epoch"]) == (spec, True, [], 3)
    assert same_logits(source, loaded.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this code reads up to 1: update RankCut"),
        ({"version": "1"}, "version 1"),
        ({"state_dict": None}, "not a complete checkpoint: 'state_dict' is missing"),
        ({"spec": []}, "not a complete checkpoint: 'spec' is missing"),
    ],
)
def test_a_newer_or_incomplete_checkpoint_is_refused(change, message, tmp_path):
    content = {"spec": ModelSpec("resnet20", 5).to_dict(), "state_dict": network().state_dict(), **change}
    save_checkpoint(tmp_path / "best.pt", content)
    refused(tmp_path / "best.pt", message)


class Foreign:
    """Makes classes of a package that is gone once the file is written: loading them for real would fail, and leave a trace."""

    def __init__(self, touched):
        self.module, self.touched = types.ModuleType("foreign_package"), touched

    def kind(self, name, *bases):
        def spring(instance, state):
            self.touched.touch()

        if not hasattr(self.module, name):
            setattr(self.module, name, type(name, bases, {"__module__": self.module.__name__, "__setstate__": spring}))
        return getattr(self.module, name)

    def save(self, content, path):
        sys.modules[self.module.__name__] = self.module
        try:
            torch.save(content, path)
        finally:
            del sys.modules[self.module.__name__]


def write_official(path, key="model", name="yolov5n-cls", **attributes):
    """Write what YOLOv5's train.py writes, a pickled module in half precision; return the network and the trace of run code."""
    foreign = Foreign(path.with_suffix(".ran"))
    source, pickled = network(name, 5), network(name, 5).half()
    for module in pickled.modules():
        if type(module).__module__.startswith("models"):
            module.__class__ = foreign.kind(type(module).__name__, nn.Module)
    for name, value in {"names": NAMES, "stride": torch.tensor([1]), "yaml": {"nc": 5}, **attributes}.items():
        setattr(pickled, name, value)
    content = {"epoch": -1, "model": None, "ema": None, "opt": {"save_dir": Path("runs")}, "date": "2022-08-17", key: pickled}
    foreign.save(content, path)
    source.load_state_dict({name: value.half() for name, value in source.state_dict().items()})
    return source, foreign.touched


@pytest.mark.parametrize("names", [NAMES, dict(enumerate(NAMES))])
@pytest.mark.parametrize(
    ("key", "name"), [("model", "yolov5n-cls"), ("ema", "yolov5n-cls"), ("model", "yolov8n-cls"), ("ema", "yolo11n-cls")]
)
def test_an_official_yolo_file_is_imported_without_running_its_code(names, key, name, tmp_path):
    source, touched = write_official(tmp_path / "official.pt", key, name, names=names)
    loaded = load_classifier(tmp_path / "official.pt")
    assert not touched.exists()
    assert (loaded.spec.name, loaded.spec.class_names, loaded.spec.norm_eps) == (name, tuple(NAMES), {})
    (note,) = loaded.notes
    assert loaded.named
    assert "224 px is assumed" in note
    assert "--imgsz" in note
    assert {value.dtype for value in loaded.model.state_dict().values()} == {torch.float32, torch.int64}
    assert same_logits(source, loaded.model)


def test_the_eps_of_an_official_file_is_kept_where_it_differs(tmp_path):
    eps = 0.0625
    foreign, pickled = Foreign(tmp_path / "ran"), network()
    pickled.layer1[0].bn1.eps = eps
    pickled.__class__ = foreign.kind("ResNet", nn.Module)
    foreign.save({"model": pickled}, tmp_path / "official.pt")
    assert read_weights(tmp_path / "official.pt").spec.norm_eps == {"layer1.0.bn1": eps}
    assert load_classifier(tmp_path / "official.pt").model.layer1[0].bn1.eps == eps


class Payload:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


KINDS = ["os.system", "eval", "exec", "method"]


def payload(kind, trace):
    code = f"open({str(trace)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"touch '{trace}'"),
        "eval": Payload(builtins.eval, code),
        "exec": Payload(builtins.exec, code),
        "method": Payload(Path.touch, trace),
    }[kind]


def contents(evil):
    module = nn.Sequential(nn.Linear(2, 2))
    module.trap = evil
    yield from (evil, [evil], {"model": evil}, {"state_dict": {"fc.weight": evil}}, {"ema": module}, {"format": "rankcut", "spec": evil})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_never_runs_and_is_refused_in_one_line(kind, zipped, tmp_path):
    trace, path = tmp_path / "pwned", tmp_path / "bad.pt"
    evil = payload(kind, trace)
    pickle.loads(pickle.dumps(evil))
    assert trace.exists()  # it works where a pickle is trusted
    trace.unlink()
    for content in contents(evil):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with contextlib.suppress(UserError):
            load_classifier(path)
        assert not trace.exists()
        refused(path, "needs code to load", "refused; save a plain state dict")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_malicious_pickle_never_runs_and_is_refused_in_one_line(protocol, tmp_path):
    trace, path = tmp_path / "pwned", tmp_path / "bad.pkl"
    for kind in KINDS:
        path.write_bytes(pickle.dumps(payload(kind, trace), protocol=protocol))
        refused(path)
    assert not trace.exists()


def test_calls_hidden_in_an_official_file_never_run(tmp_path):
    trace, path = tmp_path / "pwned", tmp_path / "official.pt"
    evil = {kind: payload(kind, trace) for kind in KINDS}
    source, _ = write_official(path, date=evil["eval"], hooks=evil, eps=evil["exec"], names=[evil["method"], *NAMES[1:]])
    loaded = load_classifier(path)
    assert not trace.exists()
    assert loaded.spec.class_names == ("class0", "class1", "class2", "class3", "class4")
    assert same_logits(source, loaded.model)


class Slotted:
    __slots__ = ("a",)


class Options(dict):
    pass


def test_objects_of_any_shape_beside_the_tensors_do_no_harm(tmp_path):
    slotted = Slotted()
    slotted.a = 1
    source, _ = write_official(tmp_path / "x.pt", o=Options(a=1), p=Options(), q=slotted, r=object(), s={1}, t=torch.Size([1]), u=print)
    assert same_logits(source, load_classifier(tmp_path / "x.pt").model)
    for stranger in (slotted, object(), Options(a=1)):
        torch.save({"model": stranger}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", "needs code to load")


def cyclic_(model):
    model.add_module("again", model)


def listed_(model):
    model.layer1._modules = [1]


def eps_that_is_a_text_(model):
    model.bn1.eps = "small"


@pytest.mark.parametrize("damage_", [cyclic_, listed_, eps_that_is_a_text_])
def test_a_pickled_module_of_impossible_structure_is_refused_in_one_line(damage_, tmp_path):
    model = network()
    damage_(model)
    torch.save({"model": model}, tmp_path / "odd.pt")
    refused(tmp_path / "odd.pt", "needs code to load")


@pytest.mark.parametrize("names", [{0: "a", "1": "b"}, ["a"], [1, 2, 3, 4, 5], "abcde"])
def test_class_names_that_are_no_list_of_texts_are_left_out_and_not_taken_for_real(names, tmp_path):
    source, _ = write_official(tmp_path / "official.pt", names=names)
    loaded = load_classifier(tmp_path / "official.pt")
    assert (loaded.spec.class_names[0], loaded.named) == ("class0", False)
    assert same_logits(source, loaded.model)


def test_a_half_written_file_is_refused_wherever_it_ends(tmp_path):
    path, state = tmp_path / "half.pt", {"conv.weight": torch.zeros(2, 3, 1, 1), "fc.weight": torch.zeros(3, 2)}
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for end in range(0, len(whole), 7):
            path.write_bytes(whole[:end])
            refused(path, "is not a weights file, or is damaged" if zipped else "")


FOREIGN_BYTES = {
    "empty": b"",
    "text": b"hello world, this is no network\n",
    "html": b"<!DOCTYPE html><html><body>Not Found</body></html>",
    "json": b'{"model": "resnet18"}',
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "zeros": bytes(200),
    "one byte": b"G",
    "broken zip": b"PK\x03\x04" + b"x" * 50,
}


@pytest.mark.parametrize("kind", FOREIGN_BYTES)
def test_a_file_of_another_kind_is_refused_as_no_weights_file(kind, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(FOREIGN_BYTES[kind])
    refused(path, "is not a weights file, or is damaged")


def test_folders_absent_files_and_files_without_a_network_are_refused(tmp_path):
    refused(tmp_path, "is a folder, not a weights file")
    refused(tmp_path / "absent.pt", "no weights file")
    cases = [
        (torch.zeros(3), "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"conv.weight": torch.zeros(2, 3, 1, 1)}, "no linear layer at its end"),
        ({"fc.weight": torch.zeros(3, 2)}, "shapes match none of our architectures; name its architecture with --model"),
    ]
    for content, message in cases:
        torch.save(content, tmp_path / "some.pt")
        refused(tmp_path / "some.pt", message)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="lists open files by Linux's /proc")
def test_a_refused_file_is_closed(tmp_path):
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": b"\x80\x02cposix\nsystem\n.", "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", data)
    path.write_bytes(path.read_bytes().replace(b"system", b"sistem"))  # no longer of the checksum that stands in the directory
    with pytest.raises(UserError, match="needs code to load") as refusal:
        load_classifier(path)
    still_open = [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path)]
    assert (still_open, refusal.value is None) == ([], False)  # closed while the error is still held


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([-1, 10**9, "Conv", [8, 3, 2]], "layer 0 (Conv) of the model definition is too large: at most 1,000 repeats"),
        ([-1, 1, "Conv", [10**9, 3, 2]], "numbers up to 65,536"),
        ([-1, 1, "Conv", [8, 10**9, 2]], "numbers up to 65,536"),
        ([-1, 1, "Conv", [math.inf, 3, 2]], "numbers up to 65,536"),
        ([-1, 1000, "Conv", [2000, 1, 1]], "it describes a network of 4,0"),
    ],
)
def test_a_small_file_can_not_ask_for_a_large_network(row, words, tmp_path):
    definition = {"layers": [row, [-1, 1, "Classify", ["num_classes"]]]}
    spec = ModelSpec("mine", 2, 32).to_dict() | {"definition": definition}
    save_checkpoint(tmp_path / "x.pt", {"spec": spec, "state_dict": {"model.0.conv.weight": torch.zeros(8, 3, 3, 3)}})
    begin = time.perf_counter()
    with pytest.raises(UserError) as refusal:
        load_classifier(tmp_path / "x.pt")
    assert words in str(refusal.value)
    assert time.perf_counter() - begin < 20
