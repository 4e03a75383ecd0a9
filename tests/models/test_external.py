from __future__ import annotations

import importlib.util

import pytest
import torch
import torchvision
from torch import nn

from models.networks import build, external, resolve_model
from utils.errors import UserError
from utils.spec import ModelSpec

RESOLVED = {
    "yolov5n-cls": "yolov5n-cls",
    "yolov5n": "yolov5n-cls",
    "yolov5x": "yolov5x-cls",
    "yolov5s-cls.yaml": "yolov5s-cls",
    "resnet18": "resnet18",
    "resnet_50": "resnet50",  # HRank's names, then Distiller's
    "resnet_56": "resnet56",
    "vgg_16_bn": "vgg16-cifar",
    "resnet56_cifar": "resnet56-b",
    "alexnet": "alexnet",  # torchvision's
    "mobilenet_v3_small": "mobilenet_v3_small",
}
# name, side of the image, convolution that sees the image, its shape with one channel
FAMILIES = [
    ("alexnet", 64, "features.0", (64, 1, 11, 11)),
    ("mobilenet_v3_small", 32, "features.0.0", (16, 1, 3, 3)),
    ("googlenet", 64, "conv1.conv", (64, 1, 7, 7)),
    ("squeezenet1_1", 64, "features.0", (64, 1, 3, 3)),
    ("densenet121", 32, "features.conv0", (64, 1, 7, 7)),
    ("shufflenet_v2_x0_5", 32, "conv1.0", (24, 1, 3, 3)),
    ("efficientnet_b0", 32, "features.0.0", (32, 1, 3, 3)),
    ("inception_v3", 75, "Conv2d_1a_3x3.conv", (32, 1, 3, 3)),
    ("vit_b_32", 224, "conv_proj", (768, 1, 32, 32)),
]


def test_the_names_that_users_type_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {name: resolve_model(name) for name in RESOLVED} == {name: (full, None) for name, full in RESOLVED.items()}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet65", "resnet56"),
        ("yolov5n-clss", "yolov5n-cls"),
        ("YOLOv5s-cls", "yolov5s-cls"),
        ("mobilenet_v3_smal", "mobilenet_v3_small"),
        ("alexnett", "alexnet"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one(typed, meant):
    with pytest.raises(UserError, match=rf"^unknown model '{typed}'\. Did you mean '{meant}'\?.*Valid: yolov5n-cls"):
        resolve_model(typed)


def test_a_name_unlike_all_others_gets_the_choices_alone():
    with pytest.raises(UserError) as refusal:
        resolve_model("qqqq")
    assert str(refusal.value).startswith("unknown model 'qqqq'. Valid: yolov5n-cls, ")


def test_an_unknown_architecture_in_a_spec_is_refused():
    with pytest.raises(UserError, match=r"unknown model 'alexnett'\. Did you mean 'alexnet'"):
        build(ModelSpec("alexnett", 2))


def test_the_list_holds_classifiers_only():
    names = external.torchvision_names()
    assert {"alexnet", "googlenet", "vit_b_16", "resnet18"} <= set(names)
    assert not [name for name in names if any(word in name for word in ("rcnn", "deeplab", "r3d", "raft", "quantized"))]


@pytest.mark.parametrize(("name", "side", "stem", "shape"), FAMILIES)
def test_a_torchvision_network_takes_1_and_3_channels_and_gives_a_logit_per_class_in_training_too(name, side, stem, shape):
    for channels in (1, 3):
        with torch.device("meta"):
            model = build(ModelSpec(name, 7, imgsz=side, channels=channels))
            logits = model(torch.zeros(2, channels, side, side))
        assert model.training
        assert logits.shape == (2, 7)
        assert model.get_submodule(stem).weight.shape == (shape[0], channels, *shape[2:])
    assert [key for key in model.state_dict() if key.startswith(("aux", "AuxLogits"))] == []


def test_only_the_first_convolution_of_a_grey_network_differs():
    with torch.device("meta"):
        grey, rgb = external.build("alexnet", 5, 1), torchvision.models.alexnet(weights=None, num_classes=5)
    ours = {key: value.shape for key, value in grey.state_dict().items()}
    theirs = {key: value.shape for key, value in rgb.state_dict().items()}
    assert ours.pop("features.0.weight") == (64, 1, 11, 11)
    assert theirs.pop("features.0.weight") == (64, 3, 11, 11)
    assert ours == theirs
    kept = grey.features[0]
    assert (kept.stride, kept.padding, kept.bias is not None) == ((4, 4), (2, 2), True)


def test_a_real_network_of_torchvision_learns_on_grey_images():
    torch.manual_seed(0)
    model = build(ModelSpec("mobilenet_v3_small", 3, imgsz=32, channels=1))
    logits = model(torch.rand(4, 1, 32, 32))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert torch.isfinite(logits).all()
    assert model.features[0][0].weight.grad.abs().sum() > 0


def test_dropout_of_a_spec_reaches_a_torchvision_network():
    with torch.device("meta"):
        model = build(ModelSpec("alexnet", 2, dropout=0.125))
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.125, 0.125]


def test_a_network_without_a_convolution_on_the_image_is_refused(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"no convolution with 3 input channels .* 1"):
        external.build("alexnet", 2, 1)


def test_timm_names_need_timm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for call in (lambda: resolve_model("timm/resnet10t"), lambda: build(ModelSpec("timm/resnet10t", 2))):
        with pytest.raises(UserError, match=r"'timm/resnet10t' needs timm: pip install timm"):
            call()
    with pytest.raises(UserError, match="unknown model 'resnet10t'"):
        resolve_model("resnet10t")


def test_timm_networks_are_built_by_either_name():
    pytest.importorskip("timm")
    assert resolve_model("timm/resnet10t") == resolve_model("resnet10t") == ("timm/resnet10t", None)
    with torch.device("meta"):
        model = build(ModelSpec("timm/resnet10t", 7, channels=1))
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(UserError, match="unknown model 'timm/resnet10x'"):
        resolve_model("timm/resnet10x")


def test_weights_that_can_not_be_fetched_are_one_clear_line(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("<urlopen error\n[Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"could not fetch the pretrained weights of 'alexnet': <urlopen error .Errno -2") as refusal:
        external.pretrained_state("alexnet")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "mean", "std", "imgsz", "crop"),
    [
        ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 224 / 256),
        # Trained with transform_input=True: torchvision feeds them (x - 0.5) / 0.5
        ("googlenet", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224, 224 / 256),
        ("inception_v3", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 299, 299 / 342),
    ],
)
def test_pretrained_networks_are_fed_as_they_were_trained(name, mean, std, imgsz, crop):
    assert external.pretrained_preprocessing(name) == {"mean": mean, "std": std, "imgsz": imgsz, "crop_fraction": crop}
