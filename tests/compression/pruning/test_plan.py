"""Entries, widths, plans, costs and budgets, on several architectures."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compression.layers.readers import measure_readers
from compression.pruning import damage as damage_module
from compression.pruning.allocation import Budget, allocate, allowed_widths
from compression.pruning.damage import measure_damage
from compression.pruning.hrank_entries import convolutions_of
from compression.pruning.plan import Entry, PruningPlan, entries_of, entry_table, make_plan, rates_of_widths, widths_of_rates
from compression.scoring.calibration import Calibration
from compression.tracing.channels import trace
from compression.tracing.costs import macs_cost, params_cost
from compression.tracing.cutting import apply_cut_, plan_cut
from compression.tracing.graph import ChannelGroup
from models.networks import build
from tests.zoo import ZOO, example, make
from utils.errors import UserError
from utils.measures.profile import count_macs, example_input, profile
from utils.spec import ModelSpec

# Concatenation, depthwise and grouped convolutions, shuffled channels, squeeze-and-excitation, linear layers that are cut.
SEVERAL = (
    "resnet20", "resnet20-b", "vgg16-cifar", "yolov5n-cls", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf",
    pytest.param("mobilenet_v2", marks=pytest.mark.exhaustive),
)  # fmt: skip


class Small(nn.Module):
    """A stem of 16 channels, a residual branch of 8, and a layer of 12 that reads the stem's first four channels twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.c = nn.Conv2d(20, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(self.c(torch.cat((x, x[:, :4]), 1)).relu().mean((2, 3)))


def traced(model, spec):
    model = model.eval()
    graph = trace(model, example_input(model, spec))
    return SimpleNamespace(model=model, spec=spec, graph=graph, entries=entries_of(graph, spec.name))


@cache
def network(name, imgsz=32):
    spec = ModelSpec(name, 10, imgsz)
    torch.manual_seed(0)
    return traced(build(spec), spec)


@cache
def small():
    torch.manual_seed(0)
    return traced(Small(), ModelSpec("small", 5, 8))


def names(s):
    return [[group.name for group in entry] for entry in s.entries]


# ---- entries


def test_a_vgg_has_hrank_plus_twelve_entries_without_the_last_convolution():
    assert names(network("vgg16-cifar")) == [[f"features.conv{i}"] for i in range(12)]


def test_resnet56_has_a_stem_two_stages_and_27_inner_layers():
    found = names(network("resnet56", 8))
    assert len(found) == 30
    assert found[:3] == [["conv1"], ["layer1.0.conv2"], ["layer2.0.conv2"]]
    assert found[3:] == [[f"layer{stage}.{block}.conv1"] for stage in (1, 2, 3) for block in range(9)]
    assert [entry[0].size for entry in network("resnet56", 8).entries] == [16, 16, 32] + [16] * 9 + [32] * 9 + [64] * 9


def test_resnet110_has_57_entries():
    found = names(network("resnet110", 8))
    assert len(found) == 57
    assert found[3] == ["layer1.0.conv1"]
    assert found[3 + 18] == ["layer2.0.conv1"]
    assert found[-1] == ["layer3.17.conv1"]


def test_hranks_grammar_of_a_rate_a_convolution_is_taken_where_it_means_the_same():
    entries, names = network("resnet56", 8).entries, convolutions_of("resnet56")
    # stem 0; stage 1: hidden 0.4, outputs 0.15; stage 2 alike; stage 3: hidden 0.4, outputs whole
    theirs = "[0.]+" + "+".join(["[0.4]+[0.15]"] * 18) + "+" + "+".join(["[0.4]+[0.]"] * 9)
    assert (len(names), len(entries)) == (55, 30)
    assert widths_of_rates(entries, theirs, "resnet56") == widths_of_rates(entries, "[0.]+[0.15]*2+[0.4]*27")
    with pytest.raises(UserError, match=r"those of tied channels differ \(layer1.0.conv2 0.6, layer1.1.conv2 0.1"):
        widths_of_rates(entries, "[0.]*2+[0.6]+[0.]+[0.1]+[0.]*50", "resnet56")
    with pytest.raises(UserError, match=r"layer3.8.conv2 has the rate 0.1, but here it stays whole: this network takes 30 entries"):
        widths_of_rates(entries, "[0.]*54+[0.1]", "resnet56")
    with pytest.raises(UserError, match=r"has 4 entries, this network takes 30:[^$]*HRank's 55, one a convolution, are taken too"):
        widths_of_rates(entries, "[0.]*4", "resnet56")


def test_the_rate_that_hrank_does_not_read_may_be_any():
    entries = network("vgg16-cifar", 32).entries
    published = widths_of_rates(entries, "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2", "vgg16-cifar")
    assert published == widths_of_rates(entries, "[0.95]+[0.5]*6+[0.9]*4+[0.8]")


def test_rates_of_tied_channels_that_differ_are_shown_once_each():
    entries = network("resnet56", 8).entries
    rates = ["0.", *(rate for i in range(27) for rate in ("0.", "0.2" if i == 8 else "0.6"))]
    with pytest.raises(UserError, match=r"differ \(layer1.0.conv2 0.6, layer1.8.conv2 0.2\), so they can't be cut"):
        widths_of_rates(entries, "+".join(f"[{rate}]" for rate in rates), "resnet56")


def test_hranks_rates_for_resnet50_are_one_a_convolution():
    entries, names = network("resnet50", 32).entries, convolutions_of("resnet50")
    assert (len(names), names[:6]) == (
        53,
        ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer1.0.downsample.0", "layer1.1.conv1"],
    )
    theirs = ["0."]
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            out = "0.1" if stage < 3 else "0."
            theirs += ["0.35", "0.35", out, *([out] if block == 0 else [])]
    found = widths_of_rates(entries, "+".join(f"[{rate}]" for rate in theirs), "resnet50")
    assert found == widths_of_rates(entries, "[0.]+[0.1]*3+[0.35]*16")
    with pytest.raises(UserError, match=r"one a convolution as HRank counts; layer4.0.conv3 has the rate 0.45, but here it stays whole"):
        widths_of_rates(entries, "[0.2]+[0.8]*10+[0.8]*13+[0.55]*19+[0.45]*10", "resnet50")


ENTRIES = {  # entries that HRank+ ignores are for nothing
    "googlenet-cifar": (10, {0: [], 1: [128, 32, 32], 9: [128]}),
    "densenet40": (39, {0: [], 1: [12], 13: [168], 26: [312], 38: [12]}),
    "mobilenet-v1": (13, {0: [], 1: [64], 12: [1024]}),
    "mobilenet-v2-hrank": (8, {0: [], 1: [16, 96], 2: [24, 144, 144], 7: [320]}),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_hrank(name):
    entries, (count, sizes) = network(name).entries, ENTRIES[name]
    assert len(entries) == count
    assert {i: [group.size for group in entries[i]] for i in sizes} == sizes
    for rate in ("0.", "0.25", "0.3", "0.55"):
        widths = widths_of_rates(entries, rate)
        assert widths_of_rates(entries, rates_of_widths(entries, widths)) == widths


def test_a_transition_of_densenet_keeps_a_share_of_what_arrives_and_hidden_layers_follow_mobilenets_stages():
    entries = network("densenet40").entries
    widths = widths_of_rates(entries, "[0.]+[0.5]*12+[0.25]+[0.5]*12+[0.]+[0.5]*12")
    assert widths["trans1.conv1"] == 72  # of 24 + 12 * 6 = 96
    assert widths["trans2.conv1"] == 144  # 72 + 12 * 6
    entries = network("mobilenet-v2-hrank").entries
    widths = widths_of_rates(entries, "[0.]+[0.3]*7")
    assert [widths[group.name] for group in entries[1]] == [11, 66]  # 16 * 0.7 = 11.2; six times as many
    assert [widths[group.name] for group in entries[2]] == [16, 96, 96]


def test_a_budget_leaves_no_transition_wider_than_what_arrives():
    s = network("densenet40")
    cost = macs_cost(s.graph, count_macs(s.model, s.spec))
    widths = allocate(s.graph, s.entries[1:], Budget(cost, 0.3, "macs"), 1, 1, lambda i, share: 0.0 if i < 12 else 1 - share)
    assert widths["trans1.conv1"] <= 24 + sum(widths[f"dense1.{i}.conv1"] for i in range(12)) < 168
    assert widths_of_rates(s.entries, rates_of_widths(s.entries, widths)) == widths


def test_resnet50_has_20_entries_of_which_the_inner_ones_are_for_two_layers_each():
    s = network("resnet50")
    blocks = [
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (2, 1),
        (2, 2),
        (2, 3),
        (3, 0),
        (3, 1),
        (3, 2),
        (3, 3),
        (3, 4),
        (3, 5),
        (4, 0),
        (4, 1),
        (4, 2),
    ]
    # A stage's output is named after the first layer that makes it: conv3 runs before the block's downsample.
    assert names(s)[:4] == [["conv1"], ["layer1.0.conv3"], ["layer2.0.conv3"], ["layer3.0.conv3"]]
    assert names(s)[4:] == [[f"layer{stage}.{block}.conv{i}" for i in (1, 2)] for stage, block in blocks]
    assert [entry[0].size for entry in s.entries[:4]] == [64, 256, 512, 1024]


YOLOV5N = (
    "model.0.conv model.1.conv"
    " model.2.cv1.conv model.2.m.0.cv1.conv model.2.cv2.conv model.2.cv3.conv model.3.conv"
    " model.4.cv1.conv model.4.m.0.cv1.conv model.4.m.1.cv1.conv model.4.cv2.conv model.4.cv3.conv model.5.conv"
    " model.6.cv1.conv model.6.m.0.cv1.conv model.6.m.1.cv1.conv model.6.m.2.cv1.conv model.6.cv2.conv model.6.cv3.conv model.7.conv"
    " model.8.cv1.conv model.8.m.0.cv1.conv model.8.cv2.conv model.8.cv3.conv"
    " model.9.conv.conv"
)


def test_yolov5n_has_25_entries_in_forward_order():
    s = network("yolov5n-cls")
    assert names(s) == [[name] for name in YOLOV5N.split()]
    # Widths of YOLOv5's YAML times 0.25; cv1 is tied with the outputs of the bottlenecks that add to it.
    sizes = [16, 32, 16, 16, 16, 32, 64, 32, 32, 32, 32, 64, 128, 64, 64, 64, 64, 64, 128, 256, 128, 128, 128, 256, 1280]
    assert [entry[0].size for entry in s.entries] == sizes
    tied = {m.tensor for m in s.graph.group("model.4.cv1.conv").producers}
    assert tied == {"model.4.cv1.conv.weight", "model.4.m.0.cv2.conv.weight", "model.4.m.1.cv2.conv.weight"}


def test_the_table_of_entries_is_numbered_and_names_groups_and_sizes():
    lines = entry_table(network("resnet50").entries).split("\n")
    assert len(lines) == 20
    assert lines[0].split() == ["0", "conv1", "(64)"]
    assert lines[4].split() == ["4", "layer1.0.conv1", "(64)", "+", "layer1.0.conv2", "(64)"]


# ---- widths of rates


def test_widths_of_rates_by_hand():
    s = network("resnet20")
    widths = widths_of_rates(s.entries, "[0.]+[0.15]*2+[0.4]*9")
    # floor(16 * .85) = 13, floor(32 * .85) = 27; floor(16 * .6) = 9, 19, 38
    assert list(widths.values()) == [16, 13, 27, 9, 9, 9, 19, 19, 19, 38, 38, 38]
    # 13 of 16 needs two decimals: 0.1 keeps 14.4 and 0.2 12.8, 0.18 keeps 13.12; so does 27 of 32: 28.8, 25.6, and 27.2 at 0.15.
    assert rates_of_widths(s.entries, widths) == "[0.]+[0.18]+[0.15]+[0.4]*9"
    assert widths_of_rates(s.entries, rates_of_widths(s.entries, widths)) == widths


def test_one_rate_for_all_and_both_layers_of_a_joint_entry():
    widths = widths_of_rates(network("resnet50").entries, "0.5")
    assert len(widths) == 4 + 32
    assert widths["conv1"] == 32
    assert widths["layer4.2.conv1"] == widths["layer4.2.conv2"] == 256


@pytest.mark.parametrize(("text", "count"), [("[0.1]*29", 29), ("[0.1]*31", 31), ("[0.1]", 1)])
def test_a_wrong_number_of_rates_lists_the_entries(text, count):
    with pytest.raises(UserError) as refused:
        widths_of_rates(network("resnet56", 8).entries, text)
    lines = str(refused.value).split("\n")
    assert lines[0] == f"compress_rate has {count} entries, this network takes 30:"
    assert [line.split()[0] for line in lines[1:31]] == [str(i) for i in range(30)]
    assert lines[1].split()[1:] == ["conv1", "(16)"]
    assert lines[30].split()[1:] == ["layer3.8.conv1", "(64)"]
    assert lines[31] == "one number stands for all; '*' repeats a rate"


@pytest.mark.parametrize(("name", "entries", "theirs"), [("googlenet", 10, "googlenet-cifar"), ("mobilenet_v2", 8, "mobilenet-v2-hrank")])
def test_rates_for_hranks_network_of_torchvisions_name_say_which_network_they_are_for(name, entries, theirs):
    with pytest.raises(UserError, match=f"rates of HRank's are for {theirs}, its network of that name"):
        widths_of_rates([Entry((group("a", 8),))] * (entries + 9), f"[0.1]*{entries}", name)


def group(name, size, fixed=(), reason=""):
    return ChannelGroup(name, size, size, (), frozenset(fixed), reason, 0)


def test_a_rate_that_would_cut_what_must_stay_is_refused():
    free, partly, stuck = group("a", 10), group("b", 10, range(6)), group("c", 10, reason="it is flipped")
    assert widths_of_rates([Entry((free,)), Entry((partly,)), Entry((stuck,))], "[0.5]+[0.4]+[0]") == {"a": 5, "b": 6, "c": 10}
    with pytest.raises(UserError, match=r"compress_rate 0.5 for 'b' is impossible: it stays \(6 of its 10 channels must\)"):
        widths_of_rates([Entry((partly,))], "0.5")
    with pytest.raises(UserError, match=r"for 'c' is impossible: it stays \(it is flipped\)"):
        widths_of_rates([Entry((stuck,))], "0.1")


# ---- plans


def graph_of(*groups):
    return SimpleNamespace(prunable=[g for g in groups if g.prunable], groups=groups)


def test_the_most_important_units_stay_sorted_and_the_fixed_ones_too():
    graph = graph_of(group("a", 6), group("b", 6, {4, 5}), group("c", 4), group("d", 4, reason="stays"))
    orders = {"a": [3, 1, 5, 0, 2, 4], "b": [5, 4, 3, 2, 1, 0], "c": [0, 1, 2, 3], "d": [0, 1, 2, 3]}
    kept_orders = deepcopy(orders)
    plan = make_plan(graph, {"a": 2, "b": 3, "d": 1}, orders)
    assert plan.kept == {"a": (2, 4), "b": (0, 4, 5)}  # of b the fixed two and the best of the rest
    assert plan.sizes == {"a": 6, "b": 6}
    assert orders == kept_orders
    assert plan == make_plan(graph, {"a": 2, "b": 3, "d": 1}, orders)
    # Never below what is fixed, never to nothing, never above the size.
    extreme = make_plan(graph, {"a": 0, "b": 1, "c": 99}, orders)
    assert extreme.kept == {"a": (4,), "b": (4, 5)}


def test_orders_may_be_tensors_and_arrays_and_the_plan_is_plain_data():
    graph = graph_of(group("a", 4))
    for order in (torch.tensor([2, 0, 1, 3]), np.array([2, 0, 1, 3]), [2, 0, 1, 3]):
        plan = make_plan(graph, {"a": 3}, {"a": order})
        assert plan.kept == {"a": (0, 1, 3)}
        assert json.dumps(plan.to_dict()) == '{"kept": {"a": [0, 1, 3]}, "sizes": {"a": 4}}'


def test_a_plan_survives_json_and_its_digest_tells_contents_apart():
    plan = PruningPlan({"a": (0, 2), "b": (1,)}, {"a": 3, "b": 2})
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest() == plan.digest()
    assert PruningPlan({"b": (1,), "a": (0, 2)}, {"b": 2, "a": 3}).digest() == plan.digest()
    others = [
        PruningPlan({"a": (0, 1), "b": (1,)}, plan.sizes),
        PruningPlan({"a": (0, 2)}, {"a": 3}),
        PruningPlan(plan.kept, {"a": 4, "b": 2}),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 4


@pytest.mark.parametrize(
    "values",
    [
        [],
        "plan",
        None,
        {},
        {"kept": {"a": [0]}},
        {"kept": [], "sizes": {}},
        {"kept": {"a": 3}, "sizes": {"a": 3}},
        {"kept": {"a": []}, "sizes": {"a": 3}},
        {"kept": {"a": [0]}, "sizes": {}},
        {"kept": {"a": [0, 3]}, "sizes": {"a": 3}},
        {"kept": {"a": [-1, 0]}, "sizes": {"a": 3}},
        {"kept": {"a": [1, 0]}, "sizes": {"a": 3}},
        {"kept": {"a": [1, 1]}, "sizes": {"a": 3}},
        {"kept": {"a": [0.5]}, "sizes": {"a": 3}},
        {"kept": {"a": "01"}, "sizes": {"a": 3}},
        {"kept": {"a": [True]}, "sizes": {"a": 3}},
        {"kept": {"a": [None]}, "sizes": {"a": 3}},
        {"kept": {"a": [0]}, "sizes": {"a": "3"}},
        {"kept": {"a": [0]}, "sizes": {"a": None}},
        {"kept": {"a": [[0]]}, "sizes": {"a": 3}},
    ],
)
def test_damaged_plans_are_refused(values):
    with pytest.raises(UserError, match="the pruning plan is damaged"):
        PruningPlan.from_dict(values)


# ---- costs


def random_keep(graph, seed):
    draw = np.random.default_rng(seed)
    widths = {g.name: int(draw.integers(1, g.size + 1)) for g in graph.prunable if draw.random() < 0.8}
    return make_plan(graph, widths, {g.name: draw.permutation(g.size) for g in graph.groups}).kept


@pytest.mark.parametrize("name", SEVERAL)
def test_costs_are_exactly_those_of_the_cut_network(name):
    s = network(name)
    total, parameters = count_macs(s.model, s.spec), list(dict(s.model.named_parameters()))
    macs, params = macs_cost(s.graph, total), params_cost(s.graph, parameters)
    assert macs(macs.full) == macs.of({}) == total
    assert params(params.full) == params.of({}) == sum(p.numel() for p in s.model.parameters())
    for seed in range(2):
        keep = random_keep(s.graph, seed)
        assert keep
        widths = {name: len(units) for name, units in keep.items()}
        narrow = deepcopy(s.model)
        apply_cut_(narrow, plan_cut(s.graph, keep))
        measured = profile(narrow, s.spec)
        assert measured.source == "thop"  # which agrees with torch's counter
        assert macs(macs.vector(widths)) == macs.of(keep) == measured.macs
        assert macs.of(keep) == s.graph.macs(keep) + total - s.graph.macs({})
        assert params(params.vector(widths)) == params.of(keep) == s.graph.params(keep, parameters) == measured.params


@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith("Heads")])
def test_heads_cost_their_products_too(name):
    model, spec = make(name), ModelSpec(name, 5, imgsz=8)
    graph, total = trace(model, example(name)), count_macs(model, spec)
    cost = macs_cost(graph, total)
    (group,) = [group for group in graph.prunable if group.size == 4 and group.channels > 4]
    assert cost.of({}) == pytest.approx(cost(cost.full)) == total
    for heads in ([0, 2, 3], [1]):
        narrow = deepcopy(model)
        apply_cut_(narrow, plan_cut(graph, {group.name: heads}))
        widths = cost.vector({group.name: len(heads)})
        assert cost.of({group.name: heads}) == pytest.approx(cost(widths)) == count_macs(narrow, spec)


def test_units_that_are_read_twice_cost_what_they_cost():
    s = small()
    cost = macs_cost(s.graph, count_macs(s.model, s.spec))
    # At 8 x 8: stem 27 * 16, a 144 * 8, b 72 * 16, c 180 * 12; head 60.
    assert cost.of({}) == 64 * (27 * 16 + 144 * 8 + 72 * 16 + 180 * 12) + 60
    # The first four, which c reads twice, stand at fixed places and stay; each of the others is read once.
    assert s.graph.group("stem").fixed == {0, 1, 2, 3}
    for width in (15, 10, 4):
        expected = 64 * (27 * width + 9 * width * 8 + 72 * width + 9 * (width + 4) * 12) + 60
        assert cost.of({"stem": range(width)}) == cost(cost.vector({"stem": width})) == expected


# ---- budgets


def budget_of(s, kind, share):
    if kind == "macs":
        return Budget(macs_cost(s.graph, count_macs(s.model, s.spec)), share, kind)
    return Budget(params_cost(s.graph, list(dict(s.model.named_parameters()))), share, kind)


def spent(budget, widths):
    return budget.cost(budget.cost.vector(widths)) / budget.cost(budget.cost.full)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_budget_is_met_within_one_percent_and_all_shrink_alike(name, kind):
    s = network(name)
    for share in (0.8, 0.5, 0.3):
        budget = budget_of(s, kind, share)
        widths = allocate(s.graph, s.entries, budget, 1, 1, None)
        assert share - 0.01 <= spent(budget, widths) <= share
        big = [entry[0] for entry in s.entries if entry[0].size >= 24]  # whose step is a 24th
        shares = [widths[g.name] / g.size for g in big]
        assert max(shares) - min(shares) <= 3 / 24  # what is left of the budget goes where it fits
        # At multiples of 8 (channels, not units), or whole.
        rounded = allocate(s.graph, s.entries, budget, 8, 1, None)
        assert spent(budget, rounded) <= share
        for entry in s.entries:
            for g in entry:
                per_unit = g.channels // g.size
                assert rounded[g.name] == g.size or rounded[g.name] * per_unit % 8 == 0
                assert rounded[g.name] == rounded[entry[0].name]


def test_as_close_as_rounding_allows():
    # Any one step up would exceed the budget.
    s = network("resnet20")
    budget = budget_of(s, "macs", 0.5)
    widths = allocate(s.graph, s.entries, budget, 8, 1, None)
    for entry in s.entries:
        size, name = entry[0].size, entry[0].name
        if widths[name] < size:
            assert spent(budget, {**widths, name: min(widths[name] + 8, size)}) > 0.5


def test_the_fewest_channels_are_kept():
    s = network("resnet20")
    widths = allocate(s.graph, s.entries, budget_of(s, "macs", 0.4), 1, 10, None)
    assert min(widths.values()) == 10
    assert all(width >= 10 for width in widths.values())


@pytest.mark.parametrize(
    ("size", "channels", "round_to", "least", "expected"),
    [
        (16, 16, 8, 1, [8, 16]),
        (16, 16, 1, 14, [14, 15, 16]),
        (12, 12, 8, 1, [8, 12]),
        (6, 6, 8, 1, [6]),
        (16, 16, 8, 9, [16]),
        (4, 16, 8, 1, [2, 4]),  # four channels a unit: two units make eight
        (4, 16, 8, 9, [4]),
        (5, 15, 8, 1, [5]),  # three channels a unit: eight units would make 24
        (16, 16, 4, 99, [16]),
    ],
)
def test_allowed_widths_by_hand(size, channels, round_to, least, expected):
    assert allowed_widths((ChannelGroup("g", size, channels, (), frozenset(), "", 0),), round_to, least) == expected


def test_fixed_channels_bound_the_widths():
    assert allowed_widths((group("a", 8, range(5)), group("b", 8)), 1, 1) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("kind", "share", "round_to", "least", "words"),
    [
        (
            "macs",
            0.001,
            1,
            1,
            "the budget macs 0.001 can't be reached: .* is the least that can stay with --min-channels 1 and --round-to 1",
        ),
        ("params", 0.2, 8, 16, "the budget params 0.2 can't be reached: .* --min-channels 16 and --round-to 8"),
        ("macs", 0.0, 1, 1, r"macs is 0.0; it is the share that stays, in \(0, 1\]"),
        ("macs", 1.5, 1, 1, "macs is 1.5"),
        ("params", float("nan"), 1, 1, "params is nan"),
    ],
)
def test_impossible_budgets_are_named(kind, share, round_to, least, words):
    s = network("resnet20")
    with pytest.raises(UserError, match=words):
        allocate(s.graph, s.entries, budget_of(s, kind, share), round_to, least, None)


def test_the_least_that_is_named_can_be_reached():
    s = network("resnet20")
    with pytest.raises(UserError) as refused:
        allocate(s.graph, s.entries, budget_of(s, "macs", 0.01), 8, 1, None)
    least = float(str(refused.value).split("reached: ")[1].split()[0])
    budget = budget_of(s, "macs", least + 1e-4)
    assert spent(budget, allocate(s.graph, s.entries, budget, 8, 1, None)) <= least + 1e-4


def test_a_network_of_which_nothing_can_go_is_named():
    s = network("resnet20")
    with pytest.raises(UserError, match="nothing in this network can be cut: its only channels are its outputs"):
        allocate(s.graph, [], budget_of(s, "macs", 0.5), 1, 1, None)
    model = make("standardised_weight")
    graph = trace(model, example("standardised_weight"))
    assert list(graph.record.unfollowed) == [""]
    with pytest.raises(UserError, match="can be cut: 'convolution' in the network has a weight or bias that is computed"):
        allocate(graph, [], budget_of(s, "macs", 0.5), 1, 1, None)


# ---- sensitivity


def images(count=24, size=8):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=draw)
    return Calibration(pixels, torch.zeros(count, dtype=torch.int64), ModelSpec("small", 5, size), 8)


def test_sensitivity_takes_the_channels_of_a_layer_that_does_nothing():
    torch.manual_seed(0)
    model = Small()
    nn.init.zeros_(model.b.weight)  # what a makes reaches nothing
    s = traced(model, ModelSpec("small", 5, 8))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    orders = {g.name: list(range(g.size)) for g in s.graph.groups}
    damage = measure_damage(model, s.graph, s.entries, orders, images())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    places = {entry[0].name: i for i, entry in enumerate(s.entries)}
    assert damage(places["a"], 0.2) < 1e-6
    for other in ("stem", "c"):
        shares = [damage(places[other], share) for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)]
        assert shares[0] == 0
        assert shares[4] > 1e-4
        assert shares == sorted(shares)
    # a and b are 2304 of 4896 multiply-adds at a pixel; with a at one of eight channels 288 of these are left, 0.59 in all.
    widths = allocate(s.graph, s.entries, budget_of(s, "macs", 0.6), 1, 1, damage)
    assert (widths["stem"], widths["c"]) == (16, 12)
    assert widths["a"] == 1
    uniform = allocate(s.graph, s.entries, budget_of(s, "macs", 0.6), 1, 1, None)
    assert uniform["stem"] < 16
    assert uniform["c"] < 12


def test_after_a_refit_copies_cost_nothing():
    torch.manual_seed(0)
    model = Small()
    half = model.a.out_channels // 2
    model.b.weight.data *= 5
    model.a.weight.data[half:] = model.a.weight.data[:half]
    model.a.bias.data[half:] = model.a.bias.data[:half]
    s = traced(model, ModelSpec("small", 5, 8))
    calibration = images(64)
    orders = {g.name: list(reversed(range(g.size))) for g in s.graph.groups}
    moments = measure_readers(model, s.graph, (inputs for inputs, _ in calibration.batches()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    as_cut, refitted = (measure_damage(model, s.graph, s.entries, orders, calibration, found) for found in (None, moments))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    place = [entry[0].name for entry in s.entries].index("a")
    assert as_cut(place, 0.6) > 1e-4
    assert refitted(place, 0.6) < 1e-2 * as_cut(place, 0.6)
    for i in range(len(s.entries)):
        assert refitted(i, 0.4) <= as_cut(i, 0.4) + 1e-9
        assert [refitted(i, 1.0), as_cut(i, 1.0)] == [0, 0]


def test_what_does_no_damage_at_a_fifth_is_measured_further_down():
    """A wide layer before a narrow head: of 160 channels that the head reads, few are enough, but not one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(nn.Conv2d(3, 160, 3, padding=1), nn.ReLU(), nn.Conv2d(160, 4, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )
    model[-1].weight.data *= 20
    s = traced(model, ModelSpec("wide", 5, 8))
    calibration = images(64)
    moments = measure_readers(model, s.graph, (inputs for inputs, _ in calibration.batches()))
    damage = measure_damage(model, s.graph, s.entries, {g.name: range(g.size) for g in s.graph.groups}, calibration, moments)
    place = [entry[0].name for entry in s.entries].index("0")
    assert damage(place, 0.2) < damage_module.SEVERE
    one = mask_all_but_one(s, calibration, moments)
    assert damage(place, 1 / 160) >= min(one, damage_module.SEVERE) * 0.99
    assert damage(place, 1 / 160) > damage(place, 8 / 160) + 1  # the least width that is measured: below it nothing is cheap


def test_damage_grows_from_nothing_where_no_reader_tells():
    """Without moments the curve is even between the measured widths, and nothing is lost by what is whole."""
    s = small()
    damage = measure_damage(s.model, s.graph, s.entries, {g.name: range(g.size) for g in s.graph.groups}, images(), {})
    for i in range(len(s.entries)):
        assert damage(i, 1.0) == 0
        assert damage(i, 0.9) <= damage(i, 0.8) <= damage(i, 0.2)
        assert damage(i, 0.9) == pytest.approx(damage(i, 0.8) / 2, rel=0.35)


@torch.no_grad()
def mask_all_but_one(s, calibration, moments):
    """Measure the damage with a single channel of the first layer left, the others' readers refitted."""
    group = s.graph.group("0")
    bench = damage_module._Bench(s.model, s.graph, calibration)
    (reader,) = damage_module.readers_of(group, s.graph.shapes, moments)
    reader.remove_(list(range(159)))
    return bench.damage([reader], {"0": {159}})


def test_sensitivity_keeps_the_budget_too():
    s = small()
    damage = measure_damage(s.model, s.graph, s.entries, {g.name: range(g.size) for g in s.graph.groups}, images())
    for share in (0.7, 0.4, 0.2):
        budget = budget_of(s, "macs", share)
        widths = allocate(s.graph, s.entries, budget, 1, 1, damage)
        assert share - 0.1 < spent(budget, widths) <= share
