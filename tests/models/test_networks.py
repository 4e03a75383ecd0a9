from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models.networks import ARCHITECTURES, build, cut_off, load_definition_of, resolve_model, set_dropout_
from models.networks.attention import HeadsAttention, with_heads
from models.networks.layers import C3, SPPF, Concat, Conv
from models.networks.resnet import PadShortcut
from models.networks.split_layers import Attention
from models.networks.yolo import NotBuiltNarrow, build_yolo
from tests.architectures import architectures
from utils.errors import UserError
from utils.files.yaml_files import read_yaml
from utils.measures.profile import count_macs
from utils.spec import ModelSpec

CIFAR, IMAGENET = (20, 32, 44, 56, 110), (18, 34, 50, 101, 152)
HEAD = [-1, 1, "Classify", ["nc"]]
STEM = [-1, 1, "Conv", [8, 3, 2]]


def on_meta(name, num_classes=10, channels=3):
    with torch.device("meta"):
        return build(ModelSpec(name, num_classes, channels=channels))


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters())


def perturb_(model):
    """Give biases, norms and running statistics values of their own, so that one that is lost or swapped shows."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator)).add_(0.05 * torch.rand(value.shape, generator=generator))
    return model.eval()


def test_the_table_holds_every_network_of_our_own():
    yolo = {f"{family}{size}-cls" for family in ("yolov5", "yolov8", "yolo11") for size in "nsmlx"}
    residual = {f"{kind}resnet{n}" for kind in ("", "preact-") for n in CIFAR + IMAGENET}
    residual |= {f"{kind}resnet{n}-b" for kind in ("", "preact-") for n in CIFAR}
    plain = {f"vgg{n}{norm}-distiller" for n in (11, 13, 16, 19) for norm in ("", "-bn")} | {"plain20", "plain20-nobn", "vgg16-cifar"}
    mobile = {"mobilenet-v1", "mobilenet-v1-distiller", "mobilenet-v2-hrank"}
    assert set(ARCHITECTURES) == yolo | residual | plain | mobile | {"googlenet-cifar", "densenet40"}


@pytest.mark.parametrize("name", architectures())
def test_every_network_takes_1_and_3_channels_and_gives_a_logit_per_class(name):
    for channels in (1, 3):
        model = on_meta(name, num_classes=7, channels=channels)
        assert model.training
        assert next(model.parameters()).shape[1] == channels
        assert model(torch.zeros(2, channels, 32, 32, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", architectures())
def test_a_state_dict_carries_all_that_the_logits_depend_on(name):
    torch.manual_seed(0)
    spec, image = ModelSpec(name, 5), torch.rand(2, 3, 32, 32)
    source, copy = perturb_(build(spec)), build(spec).eval()
    with torch.inference_mode():
        expected = source(image)
        assert not torch.equal(copy(image), expected)
        copy.load_state_dict(source.state_dict(), strict=True)
        assert torch.isfinite(expected).all()
        assert torch.equal(copy(image), expected)


# Parameters at 1000 and 10 classes, and 2 x GMACs of convolutions and linear layers at 224 px. By hand for x: stem 112^2*3*80*36; per
# stage with c in, 2c out, hidden c, d bottlenecks on p^2 pixels p^2*(9*c*2c + 2*2c*c + 2c*2c + d*10*c*c); head 49*1280*1280 + 1280*1000.
PUBLISHED_YOLO = [
    ("n", 2_493_000, 1_224_810, 0.357),
    ("s", 5_453_480, 4_185_290, 1.271),
    ("m", 12_957_640, 11_689_450, 3.755),
    ("l", 26_552_680, 25_284_490, 8.371),
    ("x", 48_097_160, 46_828_970, 15.794),
]


@pytest.mark.parametrize(("size", "params_1000", "params_10", "gflops"), PUBLISHED_YOLO)
def test_yolov5_has_the_published_size_and_cost(size, params_1000, params_10, gflops):
    model = on_meta(f"yolov5{size}-cls", 1000)
    assert trainable(model) == params_1000
    assert trainable(on_meta(f"yolov5{size}-cls", 10)) == params_10
    assert round(2 * count_macs(model, ModelSpec(f"yolov5{size}-cls", 1000)) / 1e9, 3) == gflops


YOLOV8_MILLIONS = {"n": 2.7, "s": 6.4, "m": 17.1, "l": 37.5, "x": 57.4}  # of 1,000 classes; n 2,719,288
YOLO11_80 = {"n": 1_633_584, "s": 5_545_488, "m": 10_455_696, "l": 12_937_104, "x": 28_458_544}


@pytest.mark.parametrize("size", "nsmlx")
def test_yolov8_and_yolo11_have_the_published_sizes(size):
    assert trainable(on_meta(f"yolo11{size}-cls", 80)) == YOLO11_80[size]
    assert round(trainable(on_meta(f"yolov8{size}-cls", 1000)) / 1e6, 1) == YOLOV8_MILLIONS[size]


def test_the_layers_of_yolov8n_have_the_published_sizes():
    model = on_meta("yolov8n-cls", 1000)
    assert [trainable(layer) for layer in model.model][:9] == [464, 4672, 7360, 18560, 49664, 73984, 197632, 295424, 460288]
    assert trainable(model) == 2_719_288


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("yolov8n-cls", ["model.2.cv1", "model.4.m.1.cv2", "model.8.cv2", "model.9.conv"]),
        ("yolo11n-cls", ["model.2.m.0.cv1", "model.6.m.0.cv3", "model.6.m.0.m.1.cv2", "model.9.cv2"]),
        ("yolo11n-cls", [f"model.9.m.0.{part}" for part in ("attn.qkv", "attn.proj", "attn.pe", "ffn.0", "ffn.1")]),
        ("yolo11m-cls", ["model.2.m.0.m.1.cv1", "model.10.conv"]),
    ],
)
def test_yolov8_and_yolo11_have_the_keys_of_their_files(name, keys):
    state = on_meta(name).state_dict()
    assert {f"{key}.{part}" for key in keys for part in ("conv.weight", "bn.running_var")} <= set(state)
    assert "model.0.conv.weight" in state


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_attention_is_torchs_and_leaves_the_rest_to_it(batch_first):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    network = with_heads(nn.Sequential(deepcopy(theirs)))
    ours = network[0]
    assert type(ours) is HeadsAttention
    x, other = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    for inputs, options in (((x, x, x), {"need_weights": False}), ((x, x, x), {}), ((x, other, other), {"need_weights": False})):
        for found, expected in zip(ours(*inputs, **options), theirs(*inputs, **options), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.allclose(found, expected, atol=1e-6)
    masked = {"attn_mask": torch.ones(*[x.shape[batch_first]] * 2, dtype=torch.bool).triu(1), "need_weights": False}
    assert torch.allclose(ours(x, x, x, **masked)[0], theirs(x, x, x, **masked)[0], atol=1e-6)


def test_attention_by_hand():
    """One head of two values and one key: softmax over four positions, and the values' own depthwise convolution."""
    torch.manual_seed(0)
    layer = Attention(2, 1).eval()
    x = torch.randn(1, 2, 2, 2)
    query, key, *values = layer.qkv(x)[0].flatten(1)
    weights = (query[:, None] * key[None]).softmax(-1)  # of one key channel, so the scale is 1
    seen = torch.stack([weights @ value for value in values]).view(1, 2, 2, 2)
    expected = layer.proj(seen + layer.pe(torch.stack(values).view(1, 2, 2, 2)))
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("layer", ["C2f", "C3k2", "C2PSA"])
def test_layers_that_split_are_built_narrow_by_surgery_alone(layer):
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, layer, [16]], [-1, 1, "Classify", ["num_classes"]]]
    assert build_yolo({"layers": rows}, 3)
    with pytest.raises(NotBuiltNarrow):
        build_yolo({"layers": rows}, 3, take=lambda width: width // 2)


def test_yolov5n_has_the_keys_that_its_users_know():
    convs = [f"model.{i}" for i in (0, 1, 3, 5, 7)] + ["model.9.conv"]
    convs += [f"model.{i}.{part}" for i in (2, 4, 6, 8) for part in ("cv1", "cv2", "cv3")]
    for i, repeats in ((2, 1), (4, 2), (6, 3), (8, 1)):
        convs += [f"model.{i}.m.{j}.{part}" for j in range(repeats) for part in ("cv1", "cv2")]
    assert len(convs) == 32
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{conv}.conv.weight" for conv in convs} | {f"{conv}.bn.{part}" for conv in convs for part in norm}
    assert set(on_meta("yolov5n-cls").state_dict()) == expected | {"model.9.linear.weight", "model.9.linear.bias"}


@pytest.mark.parametrize("size", "nsmlx")
def test_yolov5_norms_differ_between_backbone_and_head(size):
    norms = {name: m for name, m in on_meta(f"yolov5{size}-cls").named_modules() if isinstance(m, nn.BatchNorm2d)}
    head = norms.pop("model.9.conv.bn")
    assert (head.eps, head.momentum) == (1e-5, 0.1)
    assert {(norm.eps, norm.momentum) for norm in norms.values()} == {(1e-3, 0.03)}


# A CIFAR ResNet of 6n+2 layers: stem 432+32; n blocks of 16 channels 4,672; the first of 32 4,608+9,216+128 = 13,952, the others 18,560;
# the first of 64 18,432+36,864+256 = 55,552, the others 73,984; head 650. n = 3: 464 + 14,016 + 51,072 + 203,520 + 650 = 269,722.
# Option B adds 16*32+64 and 32*64+128, 2,752 in all.
RESNET_PARAMS = {
    **dict(zip((f"resnet{n}" for n in CIFAR), (269_722, 464_154, 658_586, 853_018, 1_727_962), strict=True)),
    **dict(zip((f"resnet{n}-b" for n in CIFAR), (272_474, 466_906, 661_338, 855_770, 1_730_714), strict=True)),
    # 13 convs with bias 14,714,688, their norms 2*4,224, hidden layer 262,656 and its norm 1,024, head 5,130
    "vgg16-cifar": 14_991_946,
}
PUBLISHED_PARAMS = {
    ("googlenet-cifar", 10): 6_166_250,
    ("densenet40", 10): 1_059_298,
    ("mobilenet-v1", 1000): 4_231_976,
    ("mobilenet-v1-distiller", 1000): 4_231_976,
    ("mobilenet-v2-hrank", 1000): 3_504_872,
    # as ResNet-20, whose last norms are where here the first ones are
    ("preact-resnet20", 10): 269_722,
    ("preact-resnet20-b", 10): 269_722 + 16 * 32 + 32 * 64,
    # as ResNet-20 and -18 less the norms of the shortcuts, 2 * (128 + 256 + 512), and the second ones of the blocks, 2 * 2 * 960,
    # with norms in front of seven blocks, 2 * (64 + 64 + 128 + 128 + 256 + 256 + 512), and the final one, 2 * 512
    ("preact-resnet18", 1000): 11_689_512 - 1792 - 3840 + 2816 + 1024,
    ("plain20", 10): 269_722,
    ("plain20-nobn", 10): 269_722 - 2 * (7 * 16 + 6 * 32 + 6 * 64),
    ("vgg16-distiller", 10): 14_714_688 + 5_130,
    ("vgg11-bn-distiller", 10): 9_231_114,
}
IMAGENET_PARAMS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def test_cifar_networks_have_the_parameters_worked_out_by_hand():
    assert {name: trainable(on_meta(name, 10)) for name in RESNET_PARAMS} == RESNET_PARAMS


@pytest.mark.parametrize(("network", "classes"), PUBLISHED_PARAMS)
def test_networks_of_hrank_and_distiller_have_the_published_parameters(network, classes):
    assert trainable(on_meta(network, classes)) == PUBLISHED_PARAMS[network, classes]


# Names that HRank's checkpoints and Distiller's schedules use.
NAMES = {
    "googlenet": (
        "googlenet-cifar",
        ["pre_layers.0", "inception_a3.branch1x1.0", "inception_b5.branch5x5.6", "inception_e4.branch_pool.1"],
    ),
    "densenet_40": ("densenet40", ["conv1", "dense1.0.bn1", "dense3.11.conv1", "trans2.conv1", "bn", "fc"]),
    "mobilenet_v1": ("mobilenet-v1", ["conv1.0", "features.12.3", "features.0.1", "classifier.0"]),
    "mobilenet_v2": ("mobilenet-v2-hrank", ["features.0.0", "features.1.conv.3", "features.17.conv.6", "features.18.0", "classifier.1"]),
    "preact_resnet20_cifar": ("preact-resnet20", ["layer1.0.pre_relu", "layer3.2.bn", "final_relu", "fc"]),
    "preact_resnet20_cifar_conv_ds": ("preact-resnet20-b", ["layer2.0.downsample", "layer1.0.pre_bn"]),
    "preact_resnet18": ("preact-resnet18", ["relu1", "layer1.1.pre_relu", "layer1.0.relu1_2", "layer4.0.downsample.0", "final_relu"]),
    "preact_resnet50": ("preact-resnet50", ["layer1.0.relu2_3", "layer1.0.bn2_3", "layer4.2.conv3"]),
    "mobilenet": ("mobilenet-v1-distiller", ["model.0.0", "model.4.3", "model.13.4", "fc"]),
    "plain20_cifar": ("plain20", ["bn1", "layer1.0.relu1", "layer3.2.conv2", "fc"]),
    "vgg16_cifar": ("vgg16-distiller", ["features.0", "features.28", "classifier"]),
    "vgg19_bn_cifar": ("vgg19-bn-distiller", ["features.1", "classifier"]),
}


@pytest.mark.parametrize("spelling", NAMES)
def test_networks_of_hrank_and_distiller_have_their_names(spelling):
    name, modules = NAMES[spelling]
    if spelling not in ("googlenet", "mobilenet_v2"):  # which are torchvision's
        assert resolve_model(spelling) == (name, None)
    assert set(modules) <= {module for module, _ in on_meta(name).named_modules()}


def test_mobilenet_v2_is_torchvisions():
    torch.manual_seed(0)
    theirs = perturb_(torchvision.models.mobilenet_v2(weights=None, num_classes=6))
    ours = build(ModelSpec("mobilenet-v2-hrank", 6)).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    image = torch.rand(2, 3, 64, 48)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


def test_both_forms_of_mobilenet_v1_compute_the_same():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 64, 48)
    first, second = perturb_(build(ModelSpec("mobilenet-v1", 6))), build(ModelSpec("mobilenet-v1-distiller", 6)).eval()
    second.load_state_dict(dict(zip(second.state_dict(), first.state_dict().values(), strict=True)))
    with torch.inference_mode():
        assert torch.equal(first(image), second(image))


def test_plain_vgg_has_torchvisions_convolutions():
    torch.manual_seed(0)
    theirs = perturb_(torchvision.models.vgg11_bn(weights=None, num_classes=6))
    ours = build(ModelSpec("vgg11-bn-distiller", 6)).eval()
    image = torch.rand(2, 3, 64, 48)
    with torch.inference_mode():
        ours.features.load_state_dict(theirs.features.state_dict())
        torch.testing.assert_close(ours.features(image), theirs.features(image))


def test_imagenet_networks_have_the_published_parameters():
    assert {layers: trainable(on_meta(f"resnet{layers}", 1000)) for layers in IMAGENET} == IMAGENET_PARAMS


@pytest.mark.parametrize("layers", [pytest.param(n, marks=() if n in (18, 50) else pytest.mark.exhaustive) for n in IMAGENET])
def test_imagenet_resnets_are_torchvisions_with_its_weights(layers):
    torch.manual_seed(0)
    theirs = perturb_(torchvision.models.get_model(f"resnet{layers}", weights=None, num_classes=6))
    ours = build(ModelSpec(f"resnet{layers}", 6)).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(2, 3, 64, 48)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


def test_option_a_places_the_channels_between_zeros_and_takes_every_second_pixel():
    x = torch.rand(2, 16, 6, 8)
    assert torch.equal(PadShortcut(16, 32, 2)(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))


def narrow_conv_(conv, outputs, inputs):
    """Keep some channels of a Conv, by its tensors alone: what remains in its attributes must not matter."""
    conv.conv.weight = nn.Parameter(conv.conv.weight[outputs][:, inputs].clone())
    for name in ("weight", "bias"):
        setattr(conv.bn, name, nn.Parameter(getattr(conv.bn, name)[outputs].clone()))
    for name in ("running_mean", "running_var"):
        setattr(conv.bn, name, getattr(conv.bn, name)[outputs].clone())


def test_no_layer_of_yolov5_holds_a_channel_number():
    torch.manual_seed(0)
    block = perturb_(C3(8, 8, (4, 4, 4), 4, (4, 4), shortcut=True))
    x, main, skip, out = list(range(8)), [0, 2, 3], [1, 3], [0, 1, 4, 6, 7]
    narrow_conv_(block.cv1, main, x)
    narrow_conv_(block.cv2, skip, x)
    narrow_conv_(block.cv3, out, main + [4 + i for i in skip])
    for bottleneck, hidden in zip(block.m, ([1], [0, 3]), strict=True):
        narrow_conv_(bottleneck.cv1, hidden, main)
        narrow_conv_(bottleneck.cv2, main, hidden)
    fresh = C3(8, 5, (3, 3, 3), 2, (1, 2), shortcut=True).eval()
    fresh.load_state_dict(block.state_dict())
    image = torch.rand(2, 8, 6, 6)
    assert block(image).shape == (2, 5, 6, 6)
    assert torch.equal(block(image), fresh(image))


def test_option_a_runs_with_channels_cut_on_either_side():
    shortcut, x = PadShortcut(4, 8, 2), torch.rand(1, 4, 4, 4)  # outputs 2..5 are inputs 0..3
    shortcut.source = torch.tensor([-1, 0, 1, -1])  # without input 1 and 3; outputs 1, 2, 4, 5 are kept, 5 lost its input
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, [0, 2], ::2, ::2]
    assert torch.equal(shortcut(x[:, [0, 2]]), expected)


def test_a_shortcut_whose_width_does_not_fit_fails_instead_of_vanishing():
    block = C3(8, 8, (4, 4), 4, (4,), shortcut=True).eval()
    narrow_conv_(block.m[0].cv2, [0, 1], [0, 1, 2, 3])
    with pytest.raises(RuntimeError, match="size of tensor"):
        block(torch.rand(1, 8, 4, 4))


def test_own_definitions_take_several_sources_and_every_layer():
    layers = [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "DWConv", [16, 3, 1]],
        [[-1, 0], 1, "Concat", []],  # 32 channels
        [-1, 2, "Bottleneck", [32]],
        [-1, 2, "C3", [32, False]],
        [-1, 1, "SPPF", [64, 5]],
        [[-1, 2, 0], 1, "Concat", [1]],  # 64 + 32 + 16
        [-1, 1, "Classify", ["num_classes"]],
    ]
    model = build_yolo({"layers": layers}, 3, channels=1).eval()
    assert [type(layer) for layer in model.model[:3]] == [Conv, Conv, Concat]
    assert (model.model[1].conv.groups, tuple(model.model[1].conv.weight.shape)) == (16, (16, 1, 3, 3))
    assert len(model.model[3]) == 2  # chained; a C3 takes the repeats as its own depth
    assert (len(model.model[4].m), model.model[4].m[0].add) == (2, False)
    assert isinstance(model.model[5], SPPF)
    assert model.model[7].conv.conv.in_channels == 112
    first, image = model.model[0], torch.rand(2, 1, 16, 16)
    stem = first(image)
    both = torch.cat((model.model[1](stem), stem), 1)
    x = model.model[5](model.model[4](model.model[3](both)))
    assert torch.equal(model(image), model.model[7](torch.cat((x, both, stem), 1)))


def test_sppf_pools_three_times_in_a_row():
    layer, x = SPPF(8, 6, 4).eval(), torch.rand(1, 8, 7, 7)
    y = layer.cv1(x)
    windows = [y] + [F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]  # 5x5 pools in a row see 9 and 13 pixels
    assert torch.equal(layer(x), layer.cv2(torch.cat(windows, 1)))


def test_yolov5s_own_sections_and_multiples_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    rows = "[[-1, 1, Conv, [64, 6, 2, 2]], [-1, 9, C3, [100]]]"
    path.write_text(f"nc: 1000\ndepth_multiple: 0.33\nwidth_multiple: 0.25\nbackbone: {rows}\nhead: [[-1, 1, Classify, [nc]]]\n")
    name, definition = resolve_model(str(path))
    model = build(ModelSpec(name, 4, definition=definition))
    assert name == "mine"
    assert model.model[0].conv.weight.shape == (16, 3, 6, 6)
    assert len(model.model[1].m) == 3  # 9 * 0.33 = 2.97
    assert model.model[1].cv3.conv.out_channels == 32  # 25 rounded up to a multiple of 8
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 4)


BAD_DEFINITIONS = {
    "no layers": ({}, "no layers"),
    "layers are null": ({"backbone": None, "head": None}, "layers"),
    "layers are a number": ({"layers": 5}, "layers"),
    "layers are a text": ({"layers": "Conv"}, "layer"),
    "a short row": ({"layers": [[-1, 1, "Conv"], HEAD]}, r"layer 0 .*\[from, repeats, layer, arguments\]"),
    "arguments are no list": ({"layers": [STEM, [-1, 1, "Conv", 8], HEAD]}, r"layer 1 .*\[from, repeats, layer, arguments\]"),
    "a fraction of repeats": ({"layers": [[-1, 1.5, "Conv", [8]], HEAD]}, r"layer 0 .*\[from, repeats, layer, arguments\]"),
    "no repeats": ({"layers": [[-1, 0, "Conv", [8]], HEAD]}, "layer 0"),
    "an unknown layer": ({"layers": [STEM, [-1, 1, "Konv", [8]], HEAD]}, "line 1 .*'Konv'. Did you mean 'Conv'.*SPPF"),
    "a layer that is a list": ({"layers": [[-1, 1, ["Conv"], [8]], HEAD]}, "0 "),
    "a later source": ({"layers": [STEM, [5, 1, "Conv", [8]], HEAD]}, r"layer 1 \(Conv\) .*reads layer 5"),
    "itself as source": ({"layers": [[0, 1, "Conv", [8]], HEAD]}, r"layer 0 \(Conv\) .*reads layer 0"),
    "a source before the input": ({"layers": [STEM, [-3, 1, "Conv", [8]], HEAD]}, r"layer 1 \(Conv\) .*reads layer -2"),
    "a source that is a text": ({"layers": [["input", 1, "Conv", [8]], HEAD]}, "layer 0"),
    "no source": ({"layers": [[[], 1, "Conv", [8]], HEAD]}, "layer 0"),
    "two sources for one input": ({"layers": [STEM, STEM, [[0, 1], 1, "Conv", [8]], HEAD]}, "layer 2"),
    "no arguments": ({"layers": [[-1, 1, "Conv", []], HEAD]}, r"layer 0 \(Conv\) .*arguments \[\]"),
    "a width that is a text": ({"layers": [[-1, 1, "Conv", ["x"]], HEAD]}, r"layer 0 \(Conv\) .*arguments \['x'\]"),
    "a negative width": ({"layers": [[-1, 1, "Conv", [-8]], HEAD]}, r"layer 0 \(Conv\) .*arguments \[-8\]"),
    "a width of 0": ({"layers": [[-1, 1, "Conv", [0]], HEAD]}, r"layer 0 \(Conv\) .*arguments \[0\]"),
    "a stride of 0": ({"layers": [[-1, 1, "Conv", [8, 3, 0]], HEAD]}, r"layer 0 \(Conv\)"),
    "too many arguments": ({"layers": [STEM, [-1, 1, "Classify", ["nc", 1280, 1]]]}, r"layer 1 \(Classify\)"),
    "no classifier at the end": ({"layers": [STEM]}, "last layer .*Conv; a classifier ends in Classify"),
    "depth is a text": ({"depth_multiple": "deep", "layers": [STEM, HEAD]}, "depth_multiple"),
    "width is null": ({"width_multiple": None, "layers": [STEM, HEAD]}, "width_multiple"),
}


@pytest.mark.parametrize("case", BAD_DEFINITIONS)
def test_a_definition_that_is_wrong_is_refused_with_the_place(case):
    definition, message = BAD_DEFINITIONS[case]
    with pytest.raises(UserError, match=message) as refusal:
        build_yolo(definition, 4)
    assert "\n" not in str(refusal.value)


def test_files_that_hold_no_definition_are_refused(tmp_path):
    path = tmp_path / "net.yaml"
    for content, message in (
        (b"layers: [", "not valid YAML"),
        (b"\xff\xfe\xff", "not valid YAML"),
        (b"- 1", "must hold a mapping, not list"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_yaml(path, "model")
    with pytest.raises(UserError, match=r"no model file .*absent.yaml"):
        resolve_model(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match=r"'resnet18' is not described .*yolov5n-cls"):
        load_definition_of("resnet18")


def test_cut_off_keeps_the_first_layers_and_puts_a_head_behind_them():
    definition = load_definition_of("yolov5n-cls")
    cut = cut_off(definition, 3)
    model = build(ModelSpec("yolov5n-cls", 6, definition=cut))
    assert [type(layer).__name__ for layer in model.model] == ["Conv", "Conv", "C3", "Classify"]
    assert model.model[3].conv.conv.in_channels == 32
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 6)
    assert cut_off(definition, 10)["layers"] == definition["layers"] == load_definition_of("yolov5n-cls")["layers"]
    sections = {"width_multiple": 0.25, "backbone": [STEM, STEM], "head": [HEAD]}
    assert cut_off(sections, 1) == {"width_multiple": 0.25, "layers": [STEM, [-1, 1, "Classify", ["num_classes"]]]}
    for layers in (0, 11):
        with pytest.raises(UserError, match=f"cutoff is {layers}.*10 layers.*1..10"):
            cut_off(definition, layers)


@pytest.mark.parametrize("name", ["yolov5n-cls", "resnet18", "resnet20", "vgg16-cifar"])
def test_dropout_reaches_the_layer_before_the_head(name):
    model = build(ModelSpec(name, 2, dropout=0.25))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25]
    set_dropout_(model, 0)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0]


@pytest.mark.parametrize("probability", [-0.1, 1, float("nan")])
def test_dropout_out_of_range_is_refused(probability):
    with pytest.raises(UserError, match=r"dropout is .*\[0, 1\)"):
        set_dropout_(nn.Sequential(nn.Dropout()), probability)


def test_norm_eps_of_a_spec_is_applied_by_name():
    model = build(ModelSpec("resnet20", 2, norm_eps={"bn1": 0.125}))
    assert (model.bn1.eps, model.layer1[0].bn1.eps) == (0.125, 1e-5)
    with pytest.raises(UserError, match=r"unknown normalisation layer 'bn9'. Did you mean 'bn1'"):
        build(ModelSpec("resnet20", 2, norm_eps={"bn9": 1e-3}))


def test_depthwise_convolutions_begin_with_the_spread_of_their_own_fan():
    torch.manual_seed(0)
    weight = build(ModelSpec("mobilenet-v1", 6)).features[12][0].weight  # 1,024 channels, 9 outputs each
    assert weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
