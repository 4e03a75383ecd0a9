"""Channel groups: what is found, by hand; what can't be cut, by name; and that tracing leaves no mark."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from compression.tracing import channels
from compression.tracing.channels import trace
from models.networks import ARCHITECTURES
from tests.zoo import ZOO, Net, conv, example, layers, make, net, randomised
from utils.errors import UserError

# What each small network's groups are: "name size" where it can be cut, "name size/channels" where a unit is several
# channels, "name size!word" where it can't, with a word of the reason. The head, whose output is the network's, is
# left out, and so is the stem where it is "stem.0 16".
GROUPS = {
    "residual": "stem.0 16, a.0 8",
    "concat": "a.0 8, b.0 4, c.0 16",
    "concat_and_add": "a.0 8",
    "branches": "a.0 16, b.0.0 8",
    "shared": "b.0 16",
    "depthwise": "b.0 16",
    "depthwise_wider": "b.0 16",
    "many_groups": "stem.0 8/16, b.0 16",
    "many_groups_gated": "stem.0 8/16, b.0 16",
    "two_groups": "stem.0 8/16, a.0 12/24, b.0 16",
    "transposed": "a 12, b.0 16",
    "transposed_two": "stem.0 8/16, a 6/12, b.0 16",
    "transposed_many": "stem.0 8/16, b.0 16",
    "squeeze_excite": "d 4, b.0 16",
    "spatial_attention": "stem.0 1/16!'mean', b.0.0 8, b.1.0 16, a 1!'mul'",
    "interpolate": "a.0 16",
    "reflected": "a.0 16, b.0 16",
    "dense_block": "a.0.conv 4, a.1.conv 4, a.2.conv 4",
    "pad_fixed": "stem.0 8, a.0 16, b.0 8!'constant_pad_nd'",
    "pad_shortcut": "stem.0 8, a.0 16, b.0 16, c.0 16",
    "pad_gather_dirty": "stem.0 7, stem.0#2 1!live or die, a.0 1!'constant_pad_nd', b.0 16",
    "shuffle": "a.0 4/16, b.0 16",
    "shuffle_module": "a.0 8/16, b.0 16",
    "shuffle_grouped": "stem.0 8/16, a.0 4/16, b.0 8/16",
    "shuffle_by_size": "a.0 4/16, b.0 16",
    "shuffle_fixed": "a.0 16!'view', b.0 16",
    "glu": "a.0 16/32, c.0 16",
    "chunk_gate": "a.0 16/32, c.0 16",
    "flip": "a.0 16, b.0 16",
    "flip_and_add": "a.0 16",
    "roll_one": "a.0 16, b.0 16",
    "roll_back": "a.0 16, b.0 16",
    "roll_half": "a.0 8/16, b.0 16",
    "roll_all": "a.0 1/16!'roll', b.0 16",
    "strided": "stem.0 8/16, a.0 16",
    "halves": "stem.0 8/16, a.0 16",
    "quarters": "stem.0 4/16, a.0 16",
    "first_four": "stem.0 4!'slice', stem.0#2 12, a.0 16",
    "last_four": "stem.0 12, stem.0#2 4!'slice', a.0 16",
    "one_channel": "stem.0 15!'select', stem.0#2 1!'select', a.0 16",
    "split_fixed": "stem.0 5!'split_with_sizes', stem.0#2 11!'split_with_sizes', a.0 16",
    "unbind": "stem.0 16!'unbind', b.0 16",
    "stack": "a.0 16",
    "lined_up": "a.0 16",
    "pixel_shuffle": "a.0 4/16, b.0 16",
    "pixel_unshuffle": "a.0 4, b.0 16",
    "repeat": "a.0 8, b.0 16",
    "repeat_interleave": "a.0 8, b.0 16",
    "expand": "a.0 1!live or die, b.0 16",
    "expand_same": "a.0 16!expanded size, b.0 16",
    "index_buffer": "a.0 16, b.0 16",
    "index_select": "a.0 16, b.0 16",
    "index_list": "a.0 16!'index', b.0 16",
    "mask_list": "a.0 8!'index', a.0#2 8!'index', b.0 16",
    "prelu": "a.0 16, b.0 16",
    "prelu_each": "a.0 16, b.0 16",
    "group_norm": "a 4/16, b.0 16",
    "group_norm_one": "a 16!group norm n, b.0 16",
    "group_norm_bare": "a 4/16, b.0 16",
    "instance_norm": "a 16, b.0 16",
    "instance_norm_affine": "a 16, b.0 16",
    "batch_norm_bare": "a 16, b.0 16",
    "batch_norm_untracked": "a 16, b.0 16",
    "local_response_norm": "a 1/16!'avg_pool3d' in n, b.0 16",
    "layer_scale": "a.0 16",
    "softplus_scale": "a.0 16, b.0 16",
    "bare_weight": "a.0 16, w 16, b.0 16",
    "matmul_parameter": "a.0 16, w 16, b.0 16",
    "matmul_before": "stem.0 16!shape, a.0 16, w 16!shape, b.0 16",
    "matmul_to_one": "a.0 12, w 1!live or die, b.0 16",
    "linear_to_one": "a.0 12, l 1!live or die, b.0 16",
    "einsum": "a.0 16, w 16, b.0 16",
    "weight_norm": "stem.0 16!'convolution' in a, b.0.0 8, b.1.0 16",
    "standardised_weight": "stem.0 16!computed, b.0.0 8, b.1.0 16",
    "spectral_norm": "stem.0 16!computed, b.0.0 8, b.1.0 16",
    "efficient_attention": "a.0 1/16!not told apart, g 1!'mul' in the network spreads, b.0.0 8, b.1.0 16",
    "channel_statistics": "a.0 1/16!'mean' in the network runs over channels, g 1!spreads, b.0.0 8, b.1.0 16",
    "global_response_norm": "a.0 1/16!'mean' in the network runs over channels, b.0.0 8, b.1.0 16",
    "lstm": "a.0 16!in r is not understood, b.0.0 8, b.1.0 16",
    "unfold": "a.0 16, w.0 16, b.0.0 8, b.1.0 16",
    "maxout": "a.0 1/32!'amax' in the network runs over channels, b.0.0 8, b.1.0 16",
    "bilinear": "a.0 16!'trilinear' in m is not understood, b.0.0 8, b.1.0 16",
    "blur": "a.0 16, b.0 16",
    "in_place": "a.0 16",
    "add_in_place": "a.0 16",
    "written_slice": "stem.0 8!'slice', stem.0#2 8",
    "written_zeros": "stem.0 16!shrunk copy, a.0 8!'copy'",
    "written_like": "stem.0 8!'slice', stem.0#2 8",
    "out_argument": "stem.0 16!'add', b.0 16",
    "masked_fill": "b.0 16",
    "log_sigmoid": "a.0 16, b.0 16",
    "softmax": "a.0 16!'softmax', b.0.0 8, b.1.0 16",
    "sum": "a.0 1/16!'sum', b.0 16",
    "mean_last": "a.0 1/16!'mean', b.0 16",
    "max_pool_channels": "a.0 1/16!'max_pool3d, b.0 16",
    "cumsum": "a.0 16!'cumsum', b.0.0 8, b.1.0 16",
    "sort": "a.0 16!'sort', b.0.0 8, b.1.0 16",
    "fourier": "a.0 16!'fft_r2c', b.0.0 8, b.1.0 16",
    "branch": "stem.0 1/16!'mean', a.0 16, b.0 16",
    "branch_on_width": "a.0 16!output differs, b.0 16",
    "leak": "b.0 16, a.0 16!'tolist' takes",
    "leak_numpy": "b.0 16, a.0 16!'numpy' takes",
    "leak_data": "b.0 16, a.0 1/16!'amax'",
    "equal": "stem.0 16!'equal', a.0 16!'equal', b.0 16",
    "restrided": "a.0 8!'as_strided', b.0 16",
    "constant_added": "a.0 16!'add', b.0 16",
    "coordinates": "a.0 8, b.0 16",
    "unused": "a.0 16, b.0 16",
    "outer": "stem.0 16!'mul', a.0 16, b.0 16",
    "TwoOutputs": "stem.0 1/16!'sum'",
    "FeaturesOut": "stem.0 16!output, a.0 16",
    "Flattened": "a.0 8, l 12",
    "Tied": "",
    "TiedTransposed": "a 12",
    "TiedDepthwise": "",
    "convnext": "stem.0 16!layer norm a.norm, a.up 32",
    "Tokens": "patch 16!layer norm n1, attention 8/48!attention, mlp.0 32",
    "PlainTokens": "patch 16, mlp.0 32",
    "HandAttention": "stem.0 16!shape, qkv 8/48!'bmm', mlp.0 24",
    "FusedHeads": "patch 16!layer norm n, a.qkv 4/96",
    "BiasedHeads": "patch 16!layer norm n, a.qkv 4/96",
    "TalkingHeads": "patch 16!layer norm n, a.qkv 4/96, a.before 4",
    "CrossCovarianceHeads": "patch 16!layer norm n, a.qkv 4/96",
    "SeparateHeads": "patch 16!layer norm n, a.q 4/32",
    "TorchHeads": "patch 16!layer norm n, a.attention 4/48",
    "Mixer": "patch 1/16!'add', tokens.0 8, tokens.2 16!'add', mlp.0 32, mlp.2 16!'add'",
    "OneDimension": "a.0 16, b 12",
    "ThreeDimensions": "a.0 16, b 12",
}


def shown(group):
    return f"{group.name} {group.size}" + (f"/{group.channels}" if group.channels != group.size else "")


def test_every_small_network_has_its_groups_written_down():
    assert set(GROUPS) == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_the_groups_of_small_networks(name):
    model = make(name)
    found = trace(model, example(name)).groups
    expected = [entry.partition("!") for entry in GROUPS[name].split(", ") if entry]
    if not any(entry[0].startswith("stem.0") for entry in expected) and hasattr(model, "stem"):
        expected = [("stem.0 16", "", ""), *expected]
    found = [group for group in found if group.name != "head"]
    assert [shown(group) for group in found] == [entry for entry, _, _ in expected]
    for group, (_, barred, word) in zip(found, expected, strict=True):
        assert group.prunable == (not barred)
        assert word in group.reason


@pytest.mark.parametrize(("name", "group", "fixed"), [("roll_one", "a.0", {15}), ("roll_back", "a.0", {0, 1})])
def test_what_wraps_around_stays(name, group, fixed):
    assert trace(make(name), example(name)).group(group).fixed == fixed


def members(group):
    return {(member.tensor, member.dim, member.role) for member in group.members}


def test_the_members_of_a_residual_group_are_all_that_carry_it():
    graph = trace(make("residual"), example("residual"))
    norms = {(f"{norm}.1.{key}", 0, "follower") for norm in ("stem", "b") for key in ("weight", "bias", "running_mean", "running_var")}
    convs = {("stem.0.weight", 0, "producer"), ("stem.0.bias", 0, "follower"), ("b.0.weight", 0, "producer"), ("b.0.bias", 0, "follower")}
    assert members(graph.group("stem.0")) == {*norms, *convs, ("a.0.weight", 1, "reader"), ("head.weight", 1, "reader")}


def test_members_say_which_unit_stands_at_which_place():
    (reader,) = trace(make("glu"), example("glu")).group("a.0").producers
    assert (reader.tensor, reader.dim) == ("a.0.weight", 0)
    assert reader.positions.tolist() == list(range(32))
    assert reader.units.tolist() == [*range(16), *range(16)]
    concat = trace(make("concat"), example("concat"))
    (reader,) = concat.group("b.0").readers
    assert (reader.tensor, reader.positions.tolist(), reader.units.tolist()) == ("c.0.weight", [8, 9, 10, 11], [0, 1, 2, 3])
    flat = trace(make("Flattened"), example("Flattened")).group("a.0").readers[0]
    assert flat.units.tolist() == [i // 16 for i in range(128)]  # each channel has 4 x 4 pixels


def producers(graph):
    return {group.name: sorted(m.tensor.removesuffix(".weight") for m in group.producers if m.dim == 0) for group in graph.prunable}


def test_yolov5n_has_the_ties_of_its_c3_blocks():
    """reference: in a C3 the outputs of cv1 and of every m.i.cv2 are one; each m.i.cv1, cv2 and cv3 is free."""
    expected = {}
    for layer, repeats in ((0, 0), (1, 0), (2, 1), (3, 0), (4, 2), (5, 0), (6, 3), (7, 0), (8, 1)):
        if not repeats:
            expected[f"model.{layer}.conv"] = [f"model.{layer}.conv"]
            continue
        at = f"model.{layer}"
        expected[f"{at}.cv1.conv"] = [f"{at}.cv1.conv", *(f"{at}.m.{i}.cv2.conv" for i in range(repeats))]
        expected |= {f"{at}.{name}.conv": [f"{at}.{name}.conv"] for name in ("cv2", "cv3", *(f"m.{i}.cv1" for i in range(repeats)))}
    expected["model.9.conv.conv"] = ["model.9.conv.conv"]
    graph = trace(ARCHITECTURES["yolov5n-cls"](10, 3), torch.zeros(1, 3, 32, 32))
    assert len(expected) == 25
    assert producers(graph) == expected
    sizes = {group.name: group.size for group in graph.prunable}
    assert (sizes["model.0.conv"], sizes["model.2.cv1.conv"], sizes["model.8.cv3.conv"], sizes["model.9.conv.conv"]) == (16, 16, 256, 1280)


def test_resnet20_has_a_group_a_stage_and_one_a_block():
    expected = {"conv1": ["conv1"]}
    for stage in (1, 2, 3):
        expected |= {f"layer{stage}.{i}.conv1": [f"layer{stage}.{i}.conv1"] for i in range(3)}
        shortcut = f"layer{stage}.0.downsample.source"  # makes the stage's channels too: of the earlier ones or of zeros
        expected[f"layer{stage}.0.conv2"] = [shortcut, *(f"layer{stage}.{i}.conv2" for i in range(3))]
    graph = trace(ARCHITECTURES["resnet20"](10, 3), torch.zeros(1, 3, 32, 32))
    assert {name: set(found) for name, found in producers(graph).items()} == {name: set(found) for name, found in expected.items()}
    assert [group.size for group in graph.prunable] == [16, *[16] * 4, *[32] * 4, *[64] * 4]
    assert [group.name for group in graph.groups][:4] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]


def test_multiply_adds_by_hand():
    graph = trace(make("residual"), example("residual"))
    whole = 64 * 9 * (3 * 16 + 16 * 8 + 8 * 16) + 16 * 5
    assert graph.macs({}) == whole
    assert graph.macs({"a.0": [0, 3]}) == 64 * 9 * (3 * 16 + 16 * 2 + 2 * 16) + 16 * 5
    assert graph.group("a.0").macs == 64 * 9 * (16 * 8 + 8 * 16)
    keep = {"stem.0": range(4)}
    assert graph.params(keep, ["stem.0.weight", "b.0.bias", "a.0.weight", "head.weight"]) == 4 * 27 + 4 + 8 * 4 * 9 + 5 * 4
    assert {name: cut for name, cut in graph.indices({"a.0": [2, 5]}).items() if name == "b.0.weight"}["b.0.weight"][1].tolist() == [2, 5]


@pytest.mark.parametrize("name", ["residual", "Tokens", "pad_shortcut", "instance_norm_affine"])
def test_tracing_leaves_the_network_as_it_was(name):
    model = make(name).train()
    model.head.eval()  # a module that its owner froze stays so
    model.get_submodule("head").register_forward_hook(lambda *_: None)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tensors = {key: id(tensor) for key, tensor in (*model.named_parameters(), *model.named_buffers())}
    trace(model, example(name))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert tensors == {key: id(tensor) for key, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert [m.training for m in model.modules()] == [m is not model.head for m in model.modules()]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1
    assert torch.equal(random, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_a_forward_pass_that_counts_is_not_counted():
    class Counting(Net):
        def build(self):
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def body(self, x):
            self.calls += 1
            return x

    model = Counting()
    assert trace(model, example("residual")).group("stem.0").prunable
    assert model.calls == 0


def test_a_failing_forward_pass_leaves_no_hook():
    model = net(layers(a=lambda: conv(16, 16)), lambda s, x: s.a(x)[:, 99])().train()
    with pytest.raises(IndexError):
        trace(model, example("residual"))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_groups_do_not_depend_on_the_weights_or_the_example():
    for name in ("residual", "roll_half", "shuffle_by_size"):
        one = trace(make(name, 0), example(name, seed=5))
        other = trace(randomised(ZOO[name](), 3), torch.zeros(1, 3, 8, 8))
        assert [(g.name, g.size, g.fixed, members(g)) for g in one.groups] == [(g.name, g.size, g.fixed, members(g)) for g in other.groups]


def test_a_name_that_stands_twice_is_numbered():
    graph = trace(make("first_four"), example("first_four"))
    assert [graph.group(name).size for name in ("stem.0", "stem.0#2")] == [4, 12]


def test_a_grouped_head_is_output_and_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))
    graph = trace(model, example("residual"))
    assert [(g.name, g.prunable) for g in graph.groups] == [("0", False)]
    assert graph.groups[0].reason == "the network's output"


def test_what_is_no_module_or_does_not_show_what_it_computes_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"takes a module and a tensor \[1, C, H, W\], not Linear and list"):
        trace(nn.Linear(2, 2), [1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = nn.Sequential(nn.Conv2d(1, 2, 1), torch.jit.script(nn.Conv2d(2, 2, 1)))
    with pytest.raises(UserError, match="a scripted module does not show what it computes"):
        trace(scripted, torch.zeros(1, 1, 4, 4))


def test_what_fails_is_found_where_it_fails(monkeypatch):
    """Half of the layers can't be cut, since their maps are reshaped to fixed sizes: a proof for each finds them."""

    class Fixed(nn.Module):
        def forward(self, maps):
            return maps.flatten(2).reshape(len(maps), 8, maps.shape[2] * maps.shape[3]).unflatten(2, maps.shape[2:])

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Fixed(), nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(6)]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    proofs, failure = [], channels._failure
    monkeypatch.setattr(channels, "_failure", lambda *arguments: proofs.append(1) or failure(*arguments))
    graph = trace(network, torch.randn(1, 3, 16, 16))
    assert [group.name for group in graph.prunable] == ["0", *(f"{i}.2" for i in range(1, 7))]
    assert len(proofs) <= 6 + 2
