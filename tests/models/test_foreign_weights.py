"""Weights files as others write them: wrappers' prefixes, other numbers, narrow networks, classes beside the tensors, other formats."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compression.pruning.narrowing import build_narrow
from models.backends import open_backend
from models.loading import load_classifier
from models.networks import build
from utils.errors import UserError
from utils.spec import ModelSpec


def trained(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    model = build(ModelSpec(name, classes, 32))
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.05 * torch.rand_like(value))
    return model.eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    image = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        return torch.equal(one.eval()(image), other.eval()(image))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_classifier(path)
    assert "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("prefix", ["model.", "net.", "_orig_mod.model.", "encoder.0.net."])
@pytest.mark.parametrize("name", ["resnet20", "yolov5n-cls"])
def test_a_prefix_before_all_names_is_dropped(prefix, name, tmp_path):
    model = trained(name)
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(10)}, "epoch": 3}, tmp_path / "x.ckpt")
    loaded = load_classifier(tmp_path / "x.ckpt")
    assert (loaded.spec.name, same(loaded.model, model)) == (name, True)
    assert "which is dropped; left out: criterion.weight" in loaded.notes[0]


def test_names_without_a_prefix_stay(tmp_path):
    model = trained("yolov5n-cls")  # all of whose names begin with "model."
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert load_classifier(tmp_path / "x.pt").notes == []


def hrank_vgg(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number the layers as HRank does: pools count."""
    numbers = [0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16]
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "features":
            kind = parts[1][:4]
            parts[1] = f"{kind}{numbers[int(parts[1][4:])]}"
        renamed[".".join(parts)] = value
    return renamed


def test_the_numbers_of_hranks_vgg_count_its_pools(tmp_path):
    model = trained("vgg16-cifar")
    state = hrank_vgg(model.state_dict())
    assert "features.conv16.weight" in state
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "x.pt")
    loaded = load_classifier(tmp_path / "x.pt")
    assert (loaded.spec.name, same(loaded.model, model)) == ("vgg16-cifar", True)
    assert loaded.notes == ["the layers of the weights are numbered otherwise; they are taken in their order"]


NARROW = {
    "vgg16-cifar": "[0.3]*7+[0.75]*5",
    "resnet56": "[0.]+[0.15]*2+[0.4]*27",
    "resnet110": "[0.]+[0.2]*2+[0.3]*54",
    "googlenet-cifar": "[0.]+[0.6]*2+[0.7]*5+[0.8]*2",
    "densenet40": "[0.]+[0.4]*12+[0.2]+[0.5]*12+[0.3]+[0.6]*12",
    "mobilenet-v1": "[0.]+[0.3]*12",
    "mobilenet-v2-hrank": "[0.]+[0.3]*7",
}


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_network_from_elsewhere_has_the_widths_of_its_tensors(name, tmp_path):
    torch.manual_seed(0)
    model = build_narrow(ModelSpec(name, 10, 32), NARROW[name]).model.eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items() if value.is_floating_point()}
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    loaded = load_classifier(tmp_path / "x.pt")
    assert loaded.spec.name == name
    assert {key: value.shape for key, value in loaded.model.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert loaded.checkpoint["plan"] == {"kept": {}, "sizes": {}}
    if name not in ("resnet56", "resnet110"):  # whose shortcuts are cut otherwise here
        assert same(loaded.model, model)


def test_the_head_of_a_narrow_network_may_have_another_name(tmp_path):
    model = build_narrow(ModelSpec("resnet20", 10, 32), "[0.]+[0.15]*2+[0.4]*9").model
    state = {key.replace("fc.", "linear."): value for key, value in model.state_dict().items() if value.is_floating_point()}
    assert "linear.weight" in state
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    loaded = load_classifier(tmp_path / "x.pt")
    assert loaded.spec.name == "resnet20"
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
    assert loaded.notes == ["the head 'linear' of the weights is this network's 'fc'"]


def test_the_shortcuts_of_a_narrow_resnet_pad_and_crop_as_those_of_hrank(tmp_path):
    """Stem of 16, stage 1 of 13: two channels less in front, one behind. From 13 to 27: seven zeros in front and seven behind."""
    model = build_narrow(ModelSpec("resnet56", 10, 32), NARROW["resnet56"]).model
    torch.save({name: value for name, value in model.state_dict().items() if value.is_floating_point()}, tmp_path / "x.pt")
    state = load_classifier(tmp_path / "x.pt").model.state_dict()
    assert state["layer1.0.downsample.source"].tolist() == list(range(2, 15))
    assert state["layer2.0.downsample.source"].tolist() == [-1] * 7 + list(range(13)) + [-1] * 7


def test_a_narrow_network_that_could_be_several_is_refused_by_their_names(tmp_path):
    state = build_narrow(ModelSpec("yolov5n-cls", 10, 32), "0.3").model.state_dict()
    torch.save(state, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "yolov5n-cls, yolov5s-cls", "--model")
    assert load_classifier(tmp_path / "x.pt", "yolov5n-cls").spec.name == "yolov5n-cls"


@pytest.mark.parametrize("zipped", [True, False])
def test_classes_beside_the_tensors_are_left_out_and_named(zipped, tmp_path):
    model = trained("resnet20")
    content = {"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1), "optimizer_type": torch.optim.SGD, "best": np.float64(3)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_classifier(tmp_path / "x.pt")
    assert same(loaded.model, model)
    assert "argparse.Namespace" in loaded.notes[0]
    assert "left out" in loaded.notes[0]


@pytest.mark.parametrize(
    ("more", "named"),
    [({"optimizer_type": torch.optim.SGD}, "torch.optim.sgd.SGD"), ({"args": argparse.Namespace(lr=1)}, "argparse.Namespace")],
    ids=["class", "object"],
)
def test_what_is_left_out_is_named(more, named, tmp_path):
    torch.save({"state_dict": trained("resnet20").state_dict(), **more}, tmp_path / "x.pt")
    assert load_classifier(tmp_path / "x.pt").notes[0].endswith(f"since reading it could run code: {named}")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["", "net", "model"])
def test_a_whole_pickled_network_is_read_and_may_need_its_name(key, zipped, tmp_path):
    import torchvision

    torch.manual_seed(0)
    whole = torchvision.models.mobilenet_v2(num_classes=5).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the old format, that it keeps the source
        torch.save({key: whole} if key else whole, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "x.pt", "needs code to load", "or name its architecture with --model")
    assert same(load_classifier(tmp_path / "x.pt", "mobilenet_v2").model, whole)


def test_a_prefix_before_names_that_are_numbered_otherwise(tmp_path):
    model = trained("vgg16-cifar")
    torch.save({f"net.{name}": value for name, value in hrank_vgg(model.state_dict()).items()}, tmp_path / "x.pt")
    loaded = load_classifier(tmp_path / "x.pt")
    assert (loaded.spec.name, same(loaded.model, model)) == ("vgg16-cifar", True)


def test_the_size_of_the_images_is_not_asked_for_where_it_is_given(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(trained("resnet20"), tmp_path / "x.pt")
    assert "give --imgsz" in load_classifier(tmp_path / "x.pt").notes[-1]
    assert load_classifier(tmp_path / "x.pt", size_known=True).notes == []


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".weights", ""])
def test_every_script_reads_weights_by_what_they_hold_and_not_by_their_suffix(suffix, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, images = trained("resnet20"), torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    expected = open_backend(str(tmp_path / "x.pt"), torch.device("cpu")).logits(images)
    path = tmp_path / f"y{suffix}"
    safetensors.save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    assert torch.equal(open_backend(str(path), torch.device("cpu")).logits(images), expected)


def test_safetensors_are_read_whatever_the_suffix(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = trained("resnet20")
    for name in ("x.safetensors", "x.pt"):
        safetensors.save_file(model.state_dict(), tmp_path / name)
        assert same(load_classifier(tmp_path / name).model, model)
    damaged = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(damaged[: len(damaged) // 2])
    refused(tmp_path / "x.pt", "damaged safetensors file")


def test_a_torchscript_file_with_another_suffix_is_called_by_its_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "x.pt"))
    refused(tmp_path / "x.pt", "is a TorchScript file", "*.torchscript")
