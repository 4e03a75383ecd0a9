"""Networks at the widths of a compress_rate: published counts, load_model without the reference's bugs, YOLO built directly.

In ``load_model``'s tests the narrow network is filled with NaN first, so what was not loaded shows.
"""

from __future__ import annotations

import math
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2

from compression.pruning import narrowing
from compression.pruning.narrowing import build_narrow, load_model
from compression.pruning.plan import entries_of, make_plan, widths_of_rates
from compression.scoring.criteria import score_by_files
from compression.tracing.channels import trace
from compression.tracing.cutting import NotProved, apply_cut_, mask_, plan_cut
from models.loading import build_as, read_weights
from models.networks import build, load_definition_of
from models.networks.resnet import Bottleneck, ResNet
from models.networks.vgg import CifarVGG
from models.networks.widths import group_counts
from models.networks.yolo import build_yolo
from models.state_dicts import load_state_
from utils.errors import UserError
from utils.files.checkpoint import save_checkpoint
from utils.measures.profile import count_macs, example_input
from utils.spec import ModelSpec

# ---- published counts

VGG, R56, R50 = ("vgg16-cifar", 10, 32), ("resnet56", 10, 32), ("resnet50", 1000, 224)
GOOGLENET, DENSENET = ("googlenet-cifar", 10, 32), ("densenet40", 10, 32)
PUBLISHED = {  # parameters in millions, multiply-adds in millions, as the tables print them
    (VGG, "[0.21]*7+[0.75]*5"): ("2.76", "131.17"),
    (VGG, "[0.3]*7+[0.75]*5"): ("2.50", "104.78"),
    (VGG, "[0.45]*7+[0.78]*5"): ("1.90", "66.95"),
    (R56, "[0.]+[0.18]*29"): ("0.66", "90.35"),
    (R56, "[0.]+[0.15]*2+[0.4]*27"): ("0.48", "65.94"),
    (R56, "[0.]+[0.4]*2+[0.5]*9+[0.6]*9+[0.7]*9"): ("0.24", "34.78"),
    (R50, "[0.]+[0.1]*3+[0.35]*16"): ("15.09", "2260"),
    (R50, "[0.]+[0.25]*3+[0.5]*16"): ("11.05", "1520"),
    (GOOGLENET, "[0.3]+[0.6]*2+[0.7]*5+[0.8]*2"): ("2.85", "649.19"),
    (DENSENET, "[0.]+[0.2]*12+[0.]+[0.2]*12+[0.]+[0.2]*12"): ("0.62", "173.39"),
}


def extra_elements(model, size):
    """Elements that batch norms and biases of convolutions write for one image: (of norms, of biases)."""
    model, counts = deepcopy(model).to("meta"), [0, 0]

    def count(module, _, output):
        counts[isinstance(module, nn.Conv2d)] += output.numel()

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    biased = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.bias is not None]
    handles = [module.register_forward_hook(count) for module in (*norms, *biased)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return counts


def as_printed(value, printed, unit):
    """Whether a number is printed so, truncated or rounded (the tables have both: 2.7665 is 2.76 and 11.0473 is 11.05)."""
    digits = len(printed.partition(".")[2])
    shown = value / unit
    return printed in (f"{shown:.{digits}f}", f"{math.floor(shown * 10**digits) / 10**digits:.{digits}f}")


@pytest.fixture(scope="module")
def traced_once():
    """The groups of a network do not depend on its weights."""
    graphs = {}

    def cached(model, inputs):
        key = tuple((name, tuple(t.shape)) for name, t in model.state_dict().items())
        if key not in graphs:
            graphs[key] = trace(model, inputs)
        return graphs[key]

    return cached


@pytest.mark.parametrize(("network", "rates"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else value[0])
def test_published_counts(network, rates, traced_once, monkeypatch):
    """Pruned rows count convolutions and linear layers, 2 per element of a batch norm's output and, for VGG, 1 per element of a
    convolution's output, for its bias. ResNet-50's multiply-adds are printed in billions with two digits. In floating point 63 of the
    320 channels of GoogLeNet's inception_a5.branch3x3.3 stay at 0.8, exactly 64: on 8 x 8 pixels one more that makes (160 * 9), is
    normalised and biased (3) and is read by four 1x1 convolutions (384 + 192 + 48 + 128).
    """
    (name, classes, size), (params, macs) = network, PUBLISHED[network, rates]
    monkeypatch.setattr(narrowing, "trace", traced_once)
    model = build_narrow(ModelSpec(name, classes, 32), rates).model
    norms, biases = extra_elements(model, size)
    counted = count_macs(model, ModelSpec(name, classes, size)) + 2 * norms + biases
    if name == "googlenet-cifar":
        counted -= 64 * (160 * 9 + 3 + 384 + 192 + 48 + 128)
    assert as_printed(sum(p.numel() for p in model.parameters()), params, 1e6)
    assert round(counted, -7) == float(macs) * 1e6 if name == "resnet50" else as_printed(counted, macs, 1e6)
    assert (biases > 0) == (name in ("vgg16-cifar", "googlenet-cifar"))


def test_published_counts_of_the_dense_networks():
    """Base rows: CIFAR-ResNet without batch norm, ResNet-50 with it. VGG's come from HRank's own counting of convolutions, linear
    layers and biases: it prints 313.73 M and 14.98 M where the sum is 313.740 M and 14.992 M, so within a thousandth.
    """
    resnet, vgg = build(ModelSpec("resnet56", 10, 32)), build(ModelSpec("vgg16-cifar", 10, 32))
    assert as_printed(count_macs(resnet, ModelSpec("resnet56", 10, 32)), "125.49", 1e6)
    assert as_printed(sum(p.numel() for p in resnet.parameters()), "0.85", 1e6)
    norms, biases = extra_elements(vgg, 32)
    assert count_macs(vgg, ModelSpec("vgg16-cifar", 10, 32)) + biases == pytest.approx(313.73e6, rel=1e-4)
    assert sum(p.numel() for p in vgg.parameters()) == pytest.approx(14.98e6, rel=1e-3)
    # 13 convolutions: 2 of 64 x 32 x 32, 2 of 128 x 16 x 16, 3 of 256 x 8 x 8, 3 of 512 x 4 x 4, 3 of 512 x 2 x 2; 512 of linear1's norm
    assert biases == 131072 + 65536 + 49152 + 24576 + 6144
    assert norms == biases + 512
    for name, printed in (("googlenet-cifar", "6.15"), ("densenet40", "1.04")):  # of convolutions and linear layers
        parts = [m for m in build(ModelSpec(name, 10, 32)).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert as_printed(sum(p.numel() for part in parts for p in part.parameters()), printed, 1e6)
    assert as_printed(sum(p.numel() for p in build(ModelSpec("mobilenet-v2-hrank", 1000)).parameters()), "3.50", 1e6)
    imagenet = build(ModelSpec("resnet50", 1000, 224))
    assert as_printed(sum(p.numel() for p in imagenet.parameters()), "25.55", 1e6)
    assert as_printed(count_macs(imagenet, ModelSpec("resnet50", 1000, 224)) + 2 * extra_elements(imagenet, 224)[0], "4.11", 1e9)


# ---- load_model


def randomised(model, seed=0):
    """Give every tensor values of its own, batch norm's statistics too."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "weight")) and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (2 / max(tensor[0].numel(), 1)) ** 0.5)
        elif tensor.ndim == 0:
            tensor.fill_(int(torch.randint(1, 1000, (), generator=draw)))
    return model.eval()


class Case:
    """A dense network, a narrow one of another seed that is all NaN, and random orders."""

    def __init__(self, model, size=32, share=0.5, widths=None, seed=0):
        self.dense = randomised(model)
        self.inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
        self.graph = trace(self.dense, self.inputs[:1])
        draw = random.Random(seed)
        self.orders = {g.name: draw.sample(range(g.size), g.size) for g in self.graph.groups}
        self.widths = widths or {g.name: max(int(share * g.size), 1) for g in self.graph.prunable}
        identity = {g.name: range(g.size) for g in self.graph.groups}
        self.narrow = deepcopy(self.dense)
        apply_cut_(self.narrow, plan_cut(self.graph, make_plan(self.graph, self.widths, identity).kept))
        for tensor in self.narrow.state_dict().values():
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)

    def load(self, state=None, **more):
        self.plan = load_model(self.narrow, self.dense.state_dict() if state is None else state, self.orders, self.inputs, **more)
        self.before, self.after = self.dense.state_dict(), self.narrow.state_dict()
        return self

    def kept(self, name):
        """The kept units of a group by one of its weights' modules: the best by the order, ascending."""
        group = next(g for g in self.graph.groups if f"{name}.weight" in {m.tensor for m in g.producers})
        expected = sorted(self.orders[group.name][-self.widths.get(group.name, group.size) :])
        if len(expected) < group.size:
            assert list(self.plan.kept[group.name]) == expected
        return expected

    def is_slice(self, name, rows=None, columns=None):
        """Whether a weight is the dense one's, exactly, at rows and columns."""
        expected = self.before[f"{name}.weight"]
        expected = expected if rows is None else expected[rows]
        expected = expected if columns is None else expected[:, columns]
        return torch.equal(self.after[f"{name}.weight"], expected)

    def norm_is_slice(self, name, rows):
        sliced = all(
            torch.equal(self.after[f"{name}.{key}"], self.before[f"{name}.{key}"][rows])
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        return sliced and torch.equal(self.after[f"{name}.num_batches_tracked"], self.before[f"{name}.num_batches_tracked"])

    def everything_came_from_the_dense_network(self):
        """No NaN is left, every value is one of the dense tensor's, and the outputs are those of the masked dense network."""
        for name, tensor in self.after.items():
            if tensor.is_floating_point():
                assert torch.isin(tensor, self.before[name]).all(), name
        masked = deepcopy(self.dense)
        mask_(masked, self.graph, self.plan.kept)
        with torch.no_grad():
            expected = masked(self.inputs)
            return (self.narrow(self.inputs) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_by_hand_select_index_and_last_select_index():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    for i, layer in enumerate((model[0], model[2], model[6])):
        layer.weight.data = (torch.arange(layer.weight.numel()) + 1.0 + 100 * i).reshape(layer.weight.shape)
        layer.bias.data = torch.arange(len(layer.bias)) * 1.0
    narrow = nn.Sequential(
        nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)
    )
    plan = load_model(narrow, model.state_dict(), {"0": [1, 2, 3, 0], "2": [0, 2, 1]}, torch.rand(1, 2, 4, 4))
    assert plan.kept == {"0": (0, 3), "2": (1,)}  # the best two, ascending; the best one
    assert narrow[0].weight.flatten().tolist() == [1, 2, 7, 8]  # rows 0 and 3 of [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert narrow[0].bias.tolist() == [0, 3]
    assert narrow[2].weight.flatten().tolist() == [105, 108]  # row 1, columns 0 and 3 of [[101..104], [105..108], [109..112]]
    assert narrow[2].bias.tolist() == [1]
    assert narrow[6].weight.flatten().tolist() == [202, 205]  # column 1 of [[201, 202, 203], [204, 205, 206]]
    assert narrow[6].bias.tolist() == [0, 1]


def tiny_vgg():
    """HRank's VGG-16 with a sixteenth of the channels."""
    model = CifarVGG(10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                sizes = [max(size // 16, 4) if size >= 64 else size for size in tensor.shape]
                (module._parameters if name in module._parameters else module._buffers)[name] = (
                    nn.Parameter(torch.zeros(sizes)) if name in module._parameters else torch.zeros(sizes, dtype=tensor.dtype)
                )
            for attribute in ("in_channels", "out_channels", "in_features", "out_features", "num_features"):
                if getattr(module, attribute, 0) >= 64:
                    setattr(module, attribute, max(getattr(module, attribute) // 16, 4))
    return model


def test_vgg_copies_norms_biases_and_classifier_and_forgets_the_last_index_after_a_whole_layer():
    sizes = [4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32]
    widths = {f"features.conv{i}": size // 2 for i, size in enumerate(sizes[:12]) if i not in (3, 7)}  # 3, 7, 12: whole
    c = Case(tiny_vgg(), widths=widths).load()
    last = None
    for i in range(13):
        rows = c.kept(f"features.conv{i}")
        assert len(rows) == (sizes[i] if i in (3, 7, 12) else sizes[i] // 2)
        assert c.is_slice(f"features.conv{i}", rows, last)
        assert torch.equal(c.after[f"features.conv{i}.bias"], c.before[f"features.conv{i}.bias"][rows])
        assert c.norm_is_slice(f"features.norm{i}", rows)
        last = rows
    for name in ("classifier.linear1.weight", "classifier.linear1.bias", "classifier.linear2.weight", "classifier.linear2.bias"):
        assert torch.equal(c.after[name], c.before[name])
    assert c.norm_is_slice("classifier.norm1", list(range(32)))
    assert c.everything_came_from_the_dense_network()


def test_vgg_linear_layers_are_cut_where_they_read_and_make_cut_channels():
    c = Case(tiny_vgg(), widths={"features.conv12": 20, "classifier.linear1": 9}).load()
    assert c.is_slice("classifier.linear1", c.kept("classifier.linear1"), c.kept("features.conv12"))
    assert c.is_slice("classifier.linear2", None, c.kept("classifier.linear1"))
    assert c.norm_is_slice("classifier.norm1", c.kept("classifier.linear1"))
    assert c.everything_came_from_the_dense_network()


def test_a_cifar_resnet_copies_norms_and_has_one_index_for_each_residual_stream():
    c = Case(build(ModelSpec("resnet20", 10, 32))).load()
    stem = c.kept("conv1")
    assert c.is_slice("conv1", stem)
    assert c.norm_is_slice("bn1", stem)
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        stream, before = c.kept(f"layer{stage}.0.conv2"), stem if stage == 1 else c.kept(f"layer{stage - 1}.0.conv2")
        assert len(stream) == channels // 2
        for block in range(3):
            path = f"layer{stage}.{block}"
            inner = c.kept(f"{path}.conv1")
            assert c.is_slice(f"{path}.conv1", inner, stream if block else before)
            assert c.is_slice(f"{path}.conv2", stream, inner)
            assert c.norm_is_slice(f"{path}.bn1", inner)
            assert c.norm_is_slice(f"{path}.bn2", stream)
        # The zero-padding shortcut leads each kept channel to where it stands now; the constant zero stands behind the last.
        source, zero = c.before[f"layer{stage}.0.downsample.source"].tolist(), len(before)
        expected = [before.index(source[j]) if source[j] in before else zero for j in stream]
        assert [j % (zero + 1) for j in c.after[f"layer{stage}.0.downsample.source"].tolist()] == expected
    assert c.is_slice("fc", None, c.kept("layer3.0.conv2"))
    assert c.everything_came_from_the_dense_network()


def test_a_downsample_reads_what_its_block_reads():
    c = Case(ResNet(Bottleneck, (2, 1, 1, 1), 10, 3)).load()
    stem = c.kept("conv1")
    for stage in (1, 2, 3, 4):
        path, stream = f"layer{stage}.0", c.kept(f"layer{stage}.0.conv3")
        before = stem if stage == 1 else c.kept(f"layer{stage - 1}.0.conv3")
        assert c.is_slice(f"{path}.downsample.0", stream, before)  # HRank took conv2's selection for the columns
        assert c.norm_is_slice(f"{path}.downsample.1", stream)
        assert c.is_slice(f"{path}.conv1", c.kept(f"{path}.conv1"), before)
        assert c.is_slice(f"{path}.conv2", c.kept(f"{path}.conv2"), c.kept(f"{path}.conv1"))
        assert c.is_slice(f"{path}.conv3", stream, c.kept(f"{path}.conv2"))
    assert c.kept("layer1.1.conv3") == c.kept("layer1.0.conv3")
    assert c.everything_came_from_the_dense_network()


def test_concatenated_branches_are_read_at_their_offsets_and_the_stem_is_copied():
    c = Case(build(ModelSpec("googlenet", 10, 32)), size=32).load()
    assert c.is_slice("conv1.conv", c.kept("conv1.conv"))
    assert c.norm_is_slice("conv1.bn", c.kept("conv1.conv"))
    # inception3a gives 64 | 128 | 32 | 32 channels, which inception3b's four branches read.
    branches, columns, offset = ("branch1", "branch2.1", "branch3.1", "branch4.1"), [], 0
    for branch, width in zip(branches, (64, 128, 32, 32), strict=True):
        kept = c.kept(f"inception3a.{branch}.conv")
        assert len(kept) == width // 2
        columns += [offset + unit for unit in kept]
        offset += width
    for branch in ("branch1", "branch2.0", "branch3.0", "branch4.1"):
        assert c.is_slice(f"inception3b.{branch}.conv", c.kept(f"inception3b.{branch}.conv"), columns)
    assert c.everything_came_from_the_dense_network()


def test_a_dense_block_reads_all_layers_before_and_its_first_convolution_is_copied():
    c = Case(DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, bn_size=2, num_classes=5)).load()
    stem = c.kept("features.conv0")
    assert len(stem) == 8
    assert c.is_slice("features.conv0", stem)
    assert c.norm_is_slice("features.norm0", stem)
    first = [16 + unit for unit in c.kept("features.denseblock1.denselayer1.conv2")]
    second = [24 + unit for unit in c.kept("features.denseblock1.denselayer2.conv2")]
    assert c.norm_is_slice("features.denseblock1.denselayer2.norm1", stem + first)
    assert c.is_slice("features.denseblock1.denselayer2.conv1", c.kept("features.denseblock1.denselayer2.conv1"), stem + first)
    assert c.norm_is_slice("features.transition1.norm", stem + first + second)
    assert c.is_slice("features.transition1.conv", c.kept("features.transition1.conv"), stem + first + second)
    assert c.everything_came_from_the_dense_network()


def test_depthwise_convolutions_follow_the_layer_before():
    settings = [[1, 16, 1, 1], [2, 24, 2, 2]]
    c = Case(MobileNetV2(num_classes=5, inverted_residual_setting=settings)).load()
    expand = c.kept("features.2.conv.0.0")
    assert c.is_slice("features.2.conv.1.0", expand)  # [C, 1, 3, 3]
    assert c.norm_is_slice("features.2.conv.1.1", expand)
    assert c.is_slice("features.2.conv.2", c.kept("features.2.conv.2"), expand)
    assert c.narrow.features[2].conv[1][0].groups == len(expand)
    assert c.everything_came_from_the_dense_network()


def test_prefixes_are_dropped():
    c = Case(build(ModelSpec("resnet20", 10, 32)), size=16).load()
    plain = {name: tensor.clone() for name, tensor in c.after.items()}
    for wrap in ("module.{}", "_orig_mod.module.{}"):
        for tensor in c.narrow.state_dict().values():
            tensor.fill_(3)
        c.load({wrap.format(name): tensor for name, tensor in c.dense.state_dict().items()})
        assert all(torch.equal(tensor, c.after[name]) for name, tensor in plain.items())


def fails(c, error, words, state=None):
    """Loading fails with these words, and not one bit of the narrow network changes."""
    before = {name: tensor.clone() for name, tensor in c.narrow.state_dict().items()}
    attributes = {name: repr(module) for name, module in c.narrow.named_modules()}
    with pytest.raises(error, match=words):
        c.load(state)
    after = c.narrow.state_dict()
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)
    assert attributes == {name: repr(module) for name, module in c.narrow.named_modules()}


def test_a_failure_leaves_the_narrow_network_as_it_was(monkeypatch):
    c = Case(build(ModelSpec("resnet20", 10, 32)), size=16)
    state = c.dense.state_dict()
    fails(c, UserError, "1 missing .layer3.2.bn2.running_var.", {k: v for k, v in state.items() if k != "layer3.2.bn2.running_var"})
    fails(c, UserError, "1 not of this network .layer4.", {**state, "layer4.weight": torch.ones(1)})
    fails(c, UserError, "do not fit", {**state, "layer2.1.conv1.weight": torch.ones(3)})
    monkeypatch.setattr(narrowing, "prove_outputs", lambda *_: (_ for _ in ()).throw(NotProved("differs")))
    fails(c, NotProved, "differs")


def test_widths_that_are_no_cut_of_the_weights_are_refused():
    c = Case(build(ModelSpec("resnet20", 10, 32)), size=16)
    fitting = c.narrow
    c.narrow = deepcopy(fitting)
    c.narrow.layer1[1].bn2 = nn.BatchNorm2d(5)  # the stream has 8 channels
    fails(c, UserError, r"can't be cut to the narrow network's widths: layer1.1.bn2.weight has \(5,\), the weights give \(8,\)")
    c.narrow = deepcopy(fitting)
    c.narrow.conv1 = nn.Conv2d(3, 24, 3, padding=1, bias=False)  # wider than the dense network's 16
    fails(c, UserError, "can't be cut to the narrow network's widths: conv1.weight")
    c.narrow = deepcopy(fitting)
    c.narrow.fc = nn.Linear(32, 7)  # other classes
    fails(c, UserError, "can't be cut to the narrow network's widths: fc.weight")


def test_rank_files_of_others_leave_linear_layers_to_the_norm_of_their_weights(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)
    ).eval()
    model[4].weight.data = torch.tensor([[3.0] * 4, [1.0] * 4, [2.0] * 4])
    np.save(tmp_path / "rank_conv1.npy", np.array([2, 5, 1, 4], np.float32))
    scores = score_by_files(str(tmp_path), model, trace(model, torch.zeros(1, 3, 8, 8)))
    assert scores.orders == {"0": [2, 0, 3, 1], "4": [1, 2, 0]}


# ---- widths from rates


def test_build_narrow_gives_the_rates_widths_and_a_network_that_trains_and_loads(tmp_path):
    spec = ModelSpec("resnet20", 7, 32)
    narrow = build_narrow(spec, "[0.25]+[0.5]*2+[0.75]*9")
    model = narrow.model
    assert (model.conv1.out_channels, model.layer1[0].conv2.out_channels, model.layer2[2].bn2.num_features) == (12, 8, 16)
    assert (model.layer3[1].conv1.out_channels, model.layer3[1].conv2.out_channels) == (16, 64)
    assert model.fc.out_features == 7
    model.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    content = {"spec": narrow.spec.to_dict(), "plan": {"kept": {}, "widths": narrow.widths}, "state_dict": model.state_dict()}
    save_checkpoint(tmp_path / "narrow.pt", content)
    file = read_weights(tmp_path / "narrow.pt")
    again = build_as(file.spec, file)
    assert load_state_(again, file.state) == []
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(image), model.eval()(image))


@pytest.mark.parametrize("rates", ["[0.1", "[0.1]*11", "1.5"])
def test_rates_that_do_not_fit_are_refused(rates):
    with pytest.raises(UserError, match="compress_rate"):
        build_narrow(ModelSpec("resnet20", 7, 32), rates)


# ---- YOLO, built directly


def directly(spec, rates, monkeypatch):
    """Build narrow; return the network, that of surgery, and whether it was built directly."""
    built = []
    original = narrowing._build_directly
    monkeypatch.setattr(narrowing, "_build_directly", lambda *a: built.append(original(*a)) or built[-1])
    narrow = build_narrow(spec, rates)
    monkeypatch.setattr(narrowing, "_build_directly", original)
    widths = widths_of_rates(entries_of(narrow.graph, spec.name), rates)
    cut = build(spec)
    plan = make_plan(narrow.graph, widths, {g.name: range(g.size) for g in narrow.graph.groups})
    apply_cut_(cut, plan_cut(narrow.graph, plan.kept))
    return narrow, cut, built[0] is not None and narrow.model is built[0]


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def agree(narrow, cut, spec):
    """Both have the same shapes and, with the same values, the same outputs."""
    assert shapes(narrow.model) == shapes(cut)
    assert {n: repr(m) for n, m in narrow.model.named_modules()} == {n: repr(m) for n, m in cut.named_modules()}
    narrow.model.load_state_dict(cut.state_dict())
    image = torch.rand(2, 3, spec.imgsz, spec.imgsz)
    assert torch.equal(narrow.model.eval()(image), cut.eval()(image))


@pytest.mark.parametrize("size", ["n", "m", *(pytest.param(size, marks=pytest.mark.exhaustive) for size in "slx")])
def test_yolo_built_directly_has_the_widths_of_surgery(size, traced_once, monkeypatch):
    """Each size's depth, at a quarter of its width, which changes no tie."""
    monkeypatch.setattr(narrowing, "trace", traced_once)
    definition = load_definition_of(f"yolov5{size}-cls")
    definition["width_multiple"] /= 4
    spec = ModelSpec("small", 5, 32, definition=definition)
    # 5 Convs, 4 C3s of 3 groups and one per bottleneck, the head: 18, and 7, 7, 14, 21, 28 bottlenecks.
    count = 18 + {"n": 7, "s": 7, "m": 14, "l": 21, "x": 28}[size]
    draw = random.Random(size)
    mixed = "+".join(f"[{draw.choice(['0.', '0.1', '0.35', '0.5', '0.8'])}]" for _ in range(count))
    for rates in ("0", "0.5", mixed):
        narrow, cut, direct = directly(spec, rates, monkeypatch)
        assert direct
        agree(narrow, cut, spec)


def test_yolov5n_at_a_known_rate(monkeypatch):
    spec = ModelSpec("yolov5n-cls", 5, 32)
    narrow, cut, direct = directly(spec, "[0.1]+[0.4]*24", monkeypatch)
    assert direct
    agree(narrow, cut, spec)
    layers = narrow.model.model
    assert layers[0].conv.weight.shape == (14, 3, 6, 6)  # floor(16 * .9)
    assert layers[1].conv.weight.shape == (19, 14, 3, 3)  # floor(32 * .6)
    # the second C3: A 19, two hidden layers of 19, B 19, out 38
    assert layers[4].cv3.conv.weight.shape == (38, 19 + 19, 1, 1)
    assert layers[4].m[1].cv2.conv.weight.shape == (19, 19, 3, 3)
    assert layers[9].conv.conv.weight.shape == (768, 153, 1, 1)  # floor(1280 * .6), floor(256 * .6)
    assert layers[9].linear.weight.shape == (5, 768)


CUSTOM = {  # layers, number of entries, whether they are built directly
    # without a shortcut each bottleneck's output is a group of its own: conv; cv1, 2 x (hidden, out), cv2, cv3; classify
    "C3 without shortcut": ([[-1, 1, "Conv", [32, 3, 2]], [-1, 2, "C3", [32, False]]], 1 + 7 + 1, True),
    "SPPF": ([[-1, 1, "Conv", [32, 3, 2]], [-1, 1, "SPPF", [32, 3]]], 1 + 2 + 1, True),
    # the first widens and adds nothing, so it makes a group of its own, to which the next two add: hidden, out, hidden, hidden
    "Bottleneck chain": ([[-1, 1, "Conv", [16, 3, 2]], [-1, 3, "Bottleneck", [32]]], 1 + 4 + 1, True),
    "Bottleneck chain without shortcut": ([[-1, 1, "Conv", [16, 3, 2]], [-1, 2, "Bottleneck", [16, False]]], 1 + 4 + 1, True),
    "Concat": ([[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [24, 3]], [[-1, 0], 1, "Concat", []], [-1, 1, "Conv", [16, 1]]], 3 + 1, True),
    "Concat of one layer twice": ([[-1, 1, "Conv", [16, 3, 2]], [[0, 0], 1, "Concat", []], [-1, 1, "C3", [16]]], 1 + 4 + 1, True),
    "Concat into a C3": (
        [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "SPPF", [24]], [[0, -1], 1, "Concat", []], [-1, 2, "C3", [32]]],
        1 + 2 + 5 + 1,
        True,
    ),
    "depthwise DWConv": ([[-1, 1, "Conv", [32, 3, 2]], [-1, 1, "DWConv", [32, 3]], [-1, 1, "Conv", [16, 1]]], 2 + 1, True),
    "chain of Convs": ([[-1, 1, "Conv", [16, 3, 2]], [-1, 3, "Conv", [24, 3]]], 1 + 3 + 1, True),
    "a branch beside": (
        [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3]], [0, 1, "Conv", [16, 3]], [[1, 2], 1, "Concat", []]],
        3 + 1,
        True,
    ),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_definitions_have_the_widths_of_surgery(name, monkeypatch):
    layers, entries, built_directly = CUSTOM[name]
    spec = ModelSpec("custom", 5, 32, definition={"layers": [*layers, [-1, 1, "Classify", ["nc", 40]]]})
    draw = random.Random(name)
    mixed = "+".join(f"[{draw.choice(['0.', '0.1', '0.35', '0.5', '0.8'])}]" for _ in range(entries))
    for rates in ("0.5", mixed):
        narrow, cut, direct = directly(spec, rates, monkeypatch)
        assert direct == built_directly
        agree(narrow, cut, spec)


@pytest.mark.parametrize(
    "layer",
    [
        [-1, 1, "DWConv", [64, 3]],  # 32 groups of one channel that make two each
        [-1, 1, "Conv", [48, 3, 1, 1, 4]],  # four groups
        [-1, 1, "Conv", [32, 3, 1, 1, 32]],  # depthwise, but not by name
    ],
)
@pytest.mark.parametrize("rate", ["0.5", "0", "first"])
def test_grouped_convolutions_are_left_to_surgery(layer, rate, monkeypatch, tmp_path):
    rows = [[-1, 1, "Conv", [32, 3, 2]], layer, [-1, 1, "Conv", [16, 1]], [-1, 1, "Classify", ["nc", 40]]]
    spec = ModelSpec("custom", 5, 32, definition={"layers": rows})
    if rate == "first":
        count = len(entries_of(trace(build(spec).eval(), torch.zeros(1, 3, 32, 32)), "custom"))
        rate = "[0.5]" + f"+[0.]*{count - 1}"
    narrow, cut, _ = directly(spec, rate, monkeypatch)
    agree(narrow, cut, spec)
    # The narrow network comes back from a checkpoint, and takes a dense one's weights.
    save_checkpoint(tmp_path / "n.pt", {"spec": narrow.spec.to_dict(), "plan": {"kept": {}}, "state_dict": narrow.model.state_dict()})
    file = read_weights(tmp_path / "n.pt")
    again = build_as(file.spec, file)
    load_state_(again, file.state)
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(image), narrow.model.eval()(image))
    dense = randomised(build(spec))
    plan = load_model(
        narrow.model, dense.state_dict(), {g.name: range(g.size) for g in narrow.graph.groups}, image, groups=group_counts(dense)
    )
    assert {name: len(units) for name, units in plan.kept.items()} == {
        name: width for name, width in narrow.widths.items() if width < narrow.graph.group(name).size
    }


def test_no_entry_of_a_yaml_network_is_asked_for_twice_or_never():
    spec = ModelSpec("yolov5n-cls", 5, 32)
    asked = []
    build_yolo(load_definition_of("yolov5n-cls"), 5, 3, lambda width: asked.append(width) or width)
    dense = build(spec)
    entries = entries_of(trace(dense.eval(), example_input(dense, spec)), spec.name)
    assert asked == [entry[0].size for entry in entries]
