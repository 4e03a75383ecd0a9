from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from compression.analysis.sensitivity import analyse, parse_range, write_results
from compression.analysis.sensitivity_schedule import tolerated, write_schedule
from compression.schedule.pruners import PRUNERS, Moment, PruningTask
from compression.tracing.channels import trace
from models.networks.resnet import CifarResNet
from tests import zoo
from utils.errors import UserError
from utils.files.yaml_files import read_yaml
from utils.options import Place, build
from utils.output.plots import plot_sensitivity


class Pair(nn.Module):
    """Four filters of L1 norms 1, 7, 2, 4, a norm, ReLU, and a linear layer that reads each channel's mean."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 0], [-3, 4], [1, 1], [0.5, -3.5]]).view(4, 2, 1, 1))
            self.head.weight.copy_(torch.tensor([[5.0, 1, -2, 0], [5, 0, -2, 3]]))  # columns: 10, 1, 4, 3

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def traced(model, size=4, channels=2):
    return trace(model, torch.zeros(1, channels, size, size))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(before, model):
    after = model.state_dict()
    return all(torch.equal(before[name].view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8)) for name in after)


def levels(*texts):
    return [Decimal(text) for text in texts]


class Watch:
    """An evaluation that keeps what it is shown; top-1 is the share of weights that are not zero."""

    def __init__(self, *watched):
        self.watched, self.seen = watched, []

    def __call__(self, model):
        shown = model.state_dict()
        self.seen.append({name: shown[name].clone() for name in self.watched})
        values = torch.cat([tensor.reshape(-1) for tensor in self.seen[-1].values()])
        return SimpleNamespace(top1=float((values != 0).double().mean()), top5=1.0, loss=0.5)


# ---- ranges
def test_ranges_are_exact_and_leave_stop_out():
    assert parse_range(("0", "0.4", "0.1")) == levels("0", "0.1", "0.2", "0.3")
    assert parse_range((0.0, 0.95, 0.05)) == [Decimal(i) / 20 for i in range(19)]  # 0.95 would come in by rounding in floats
    assert parse_range((0.1, 0.5, 0.25)) == levels("0.1", "0.35")
    assert parse_range((0, 1, 0.5)) == levels("0", "0.5")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 1.1, 0.5), r"'0 1.1 0.5' gives sparsities from 0 to 1.0; they must lie in \[0, 1\)"),
        ((-0.1, 0.5, 0.1), "from -0.1 to 0.4"),
        ((0, 0.5, 0), "three numbers"),
        ((0, 0.5, -0.1), "step must be above 0"),
        ((0.5, 0.5, 0.1), "stop above start"),
        (("0", "x", "0.1"), "'0 x 0.1'; it takes three numbers: start stop step"),
        ((0, 0.5), "three numbers"),
        ((0, float("nan"), 0.1), "must be above"),
        ((0, "1e999999", 1), "more than 1000"),
        ((0, 1, "1e-9"), "more than 1000 sparsities"),
        ((0, 1, "1e-9999999"), "three numbers|more than 1000"),
    ],
)
def test_ranges_that_can_not_be(bounds, message):
    with pytest.raises(UserError, match=message):
        parse_range(bounds)


# ---- what is pruned
def test_elements_go_by_magnitude_and_position_one_weight_alone():
    model, watch = Pair(), Watch("conv.weight", "head.weight")
    table = analyse(model, None, "element", levels("0.25", "0.5"), watch)
    assert list(table.columns) == ["name", "sparsity", "top1", "top5", "loss"]
    assert table["name"].tolist() == ["conv.weight"] * 3 + ["head.weight"] * 3
    assert table["sparsity"].tolist() == [0, 0.25, 0.5] * 2
    # conv has 8 weights, 1 0 -3 4 1 1 .5 -3.5: two go at 0.25 (0, .5), four at 0.5 (and the first two of the three ones).
    conv, head = model.conv.weight.detach(), model.head.weight.detach()
    expected_conv = [[1, 0, -3, 4, 1, 1, 0, -3.5], [0, 0, -3, 4, 0, 1, 0, -3.5]]
    # head has 5 1 -2 0 5 0 -2 3: at 0.25 both zeros "go", at 0.5 the 1 and the first -2 too.
    expected_head = [[5, 1, -2, 0, 5, 0, -2, 3], [5, 0, 0, 0, 5, 0, -2, 3]]
    conv_shown = [*expected_conv, conv.flatten().tolist(), conv.flatten().tolist()]
    head_shown = [head.flatten().tolist()] * 2 + expected_head
    assert [seen["conv.weight"].flatten().tolist() for seen in watch.seen[1:]] == conv_shown
    assert [seen["head.weight"].flatten().tolist() for seen in watch.seen[1:]] == head_shown
    # Of 16 weights 3 are zero already; then conv's .5, then two of its ones; then head's 1 and a -2.
    assert table["top1"].tolist() == [13 / 16, 12 / 16, 10 / 16, 13 / 16, 13 / 16, 11 / 16]


def test_the_number_that_goes_is_a_floor_in_exact_decimals():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    model, watch = nn.Linear(100, 1, bias=False), Watch("weight")
    nn.init.ones_(model.weight)
    table = analyse(model, None, "element", levels("0.29", "0.299"), watch)
    assert table["top1"].tolist() == pytest.approx([1, 0.71, 0.71])
    assert len(watch.seen) == 2  # what is the same is not measured twice
    assert watch.seen[1]["weight"].flatten().tolist() == [0.0] * 29 + [1.0] * 71


def test_filters_go_with_all_that_is_tied_by_the_norm_of_what_makes_them():
    model, watch = Pair(), Watch("conv.weight", "norm.weight", "norm.bias", "head.weight")
    table = analyse(model, traced(model), "filter", levels("0.2", "0.3", "0.5", "0.99"), watch)
    assert table["name"].tolist() == ["conv"] * 5
    # Of 4 units 0, 1, 2 and (3.96, but one stays) 3 go; L1 norms 1 7 2 4 put units 0, 2, 3 first.
    assert len(watch.seen) == 4
    for seen, gone in zip(watch.seen[1:], ([0], [0, 2], [0, 2, 3]), strict=True):
        assert [int(c) for c in (seen["conv.weight"].abs().sum((1, 2, 3)) == 0).nonzero()] == gone
        assert [int(c) for c in (seen["norm.weight"] == 0).nonzero()] == gone
        assert [int(c) for c in (seen["head.weight"].abs().sum(0) == 0).nonzero()] == gone


def test_channels_go_by_the_magnitude_of_what_reads_them():
    model, watch = Pair(), Watch("conv.weight", "head.weight")
    analyse(model, traced(model), "channel", levels("0.25", "0.5", "0.75"), watch)
    # Columns of the linear layer weigh 10 1 4 3: units 1, 3, 2 go first.
    for seen, gone in zip(watch.seen[1:], ([1], [1, 3], [1, 2, 3]), strict=True):
        assert [int(c) for c in (seen["head.weight"].abs().sum(0) == 0).nonzero()] == gone
        assert [int(c) for c in (seen["conv.weight"].abs().sum((1, 2, 3)) == 0).nonzero()] == gone


@pytest.mark.parametrize("option_a", [True, False])
def test_residual_layers_lose_the_same_channels_together(option_a):
    torch.manual_seed(0)
    model = CifarResNet(1, option_a, 10, 3).eval()
    graph = traced(model, 8, 3)
    group = next(group for group in graph.prunable if {"layer2.0.conv2.weight"} <= {member.tensor for member in group.producers})
    makers = [member.tensor for member in group.producers if member.tensor.endswith("weight")]
    readers = [member.tensor for member in group.readers]
    assert makers == ["layer2.0.conv2.weight"] + ([] if option_a else ["layer2.0.downsample.0.weight"])
    before, found = state(model), {}

    def evaluate(network):
        weights = dict(network.named_parameters())
        gone = [set((weights[name].flatten(1) == 0).all(1).nonzero().flatten().tolist()) for name in makers]
        gone += [set((weights[name].transpose(0, 1).flatten(1) == 0).all(1).nonzero().flatten().tolist()) for name in readers]
        found[len(found)] = gone
        return SimpleNamespace(top1=len(gone[0]) / 32, top5=1.0, loss=0.0)

    table = analyse(model, graph, "filter", levels("0.3"), evaluate)
    rows = table[table["name"] == group.name]
    assert rows["top1"].tolist() == [0, 9 / 32]  # floor(0.3 * 32)
    wide = [gone for gone in found.values() if gone[0]]
    assert len(wide) == 1
    assert all(gone == wide[0][0] for gone in wide[0])
    norms = sum(before[name].abs().sum((1, 2, 3)) / before[name].abs().sum((1, 2, 3)).mean() for name in makers)
    assert wide[0][0] == set(norms.argsort()[:9].tolist())
    assert same_bits(before, model)


def test_units_that_must_stay_stay():
    model = Pair()
    graph = traced(model)
    group = graph.prunable[0]
    fixed = type(group)(**{**vars(group), "fixed": frozenset({0, 2})})
    graph.groups = tuple(fixed if g.name == group.name else g for g in graph.groups)
    watch = Watch("conv.weight")
    analyse(model, graph, "filter", levels("0.25", "0.5", "0.75"), watch)
    gone = [[int(c) for c in (seen["conv.weight"].abs().sum((1, 2, 3)) == 0).nonzero()] for seen in watch.seen]
    assert gone == [[], [3], [1, 3]]  # norms 1 7 2 4, of units 1 and 3 only; at 0.75 no third may go


@pytest.mark.parametrize("kind", ["element", "filter", "channel"])
def test_the_network_is_left_as_it_was_after_an_error_too(kind):
    model = Pair()
    graph = traced(model)
    model.conv.weight.data[0, 0] = -0.0
    model.head.weight.data[0, 0] = float("nan")
    before, calls = state(model), []

    def evaluate(network, fails=False):
        calls.append(1)
        network.norm.running_mean.add_(1)  # as a forward pass in training mode would
        if fails and len(calls) == 3:
            raise RuntimeError("out of memory")
        return SimpleNamespace(top1=1.0, top5=1.0, loss=0.0)

    done = []
    analyse(model, graph, kind, levels("0.3", "0.6"), evaluate, lambda *step: done.append(step))
    assert same_bits(before, model)
    names = ["conv.weight", "head.weight"] if kind == "element" else ["conv"]
    assert done == [(name, i, len(names)) for i, name in enumerate(names, 1)]
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        analyse(model, graph, kind, levels("0.3", "0.6"), lambda network: evaluate(network, fails=True))
    assert len(calls) == 3
    assert same_bits(before, model)


def test_what_can_not_be_analysed():
    watch = Watch("conv.weight")
    with pytest.raises(UserError, match=r"unknown kind of sensitivity analysis 'filters'. Did you mean 'filter'\?"):
        analyse(Pair(), None, "filters", [], watch)
    with pytest.raises(UserError, match="'channel' needs the network's channel groups"):
        analyse(Pair(), None, "channel", [], watch)
    with pytest.raises(UserError, match=r"from 0 to 1; they must lie in \[0, 1\)"):
        analyse(Pair(), None, "element", levels("1"), watch)
    lone = nn.Sequential(nn.Conv2d(2, 3, 1))
    with pytest.raises(UserError, match="nothing to prune for a sensitivity analysis of kind 'filter'"):
        analyse(lone, traced(lone), "filter", levels("0.5"), watch)
    assert watch.seen == []


# ---- schedules
def table_of(**curves):
    """A table with sparsities 0, 0.1, 0.2, ... per name."""
    rows = [(name, i / 10, top1, 1.0, 0.5) for name, values in curves.items() for i, top1 in enumerate(values)]
    return pd.DataFrame(rows, columns=["name", "sparsity", "top1", "top5", "loss"])


def test_the_largest_sparsity_up_to_which_all_hold():
    table = table_of(
        at_once=[0.9, 0.5, 0.5, 0.5],
        edge=[0.9, 0.89, 0.88, 0.87],  # 0.9 - 0.88 is 0.02, though not in floating point
        returns=[0.9, 0.9, 0.8, 0.9],  # what comes back behind a fall does not count
        better=[0.9, 0.95, 0.9, 0.93],
    )
    assert tolerated(table, 0.02) == {"at_once": 0, "edge": 0.2, "returns": 0.1, "better": 0.3}
    assert tolerated(table.sample(frac=1, random_state=0), 0.02) == {"at_once": 0, "edge": 0.2, "returns": 0.1, "better": 0.3}
    assert tolerated(table, 0)["edge"] == 0
    with pytest.raises(UserError, match=r"tolerance is 2; .* \[0, 1\)"):
        tolerated(table, 2)


def test_a_schedule_of_elements(tmp_path):
    path = tmp_path / "schedule.yaml"
    table = table_of(**{"conv.weight": [0.9, 0.89, 0.88, 0.5], "head.weight": [0.9, 0.7, 0.7, 0.7], "b.weight": [0.9, 0.9, 0.9, 0.9]})
    write_schedule(table, "element", None, 0.02, path)
    assert read_yaml(path, "schedule") == {
        "version": 1,
        "pruners": {"sensitivity": {"class": "SparsityLevelParameterPruner", "levels": {"conv.weight": 0.2, "b.weight": 0.3}}},
        "policies": [{"pruner": {"instance_name": "sensitivity"}, "epochs": [0]}],
    }
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "--sense element" in head[0]
    assert "top-1 0.9000" in head[0]
    assert "within 0.02" in " ".join(head)
    assert head[-1] == f"#   python train.py --weights WEIGHTS --data DATA --epochs EPOCHS --compress {path}"


def test_a_schedule_of_filters_names_all_that_makes_a_group(tmp_path):
    model = CifarResNet(1, False, 10, 3).eval()
    graph = traced(model, 8, 3)
    assert [group.name for group in graph.prunable][:2] == ["conv1", "layer1.0.conv1"]
    # conv1 (with layer1.0.conv2 behind the addition) has 16 units: 0.2 takes 3. At 0.05 none goes, which is no pruning.
    table = table_of(**{"conv1": [0.9, 0.9, 0.9, 0.5], "layer1.0.conv1": [0.9, 0.9, 0.5, 0.5], "layer2.0.conv1": [0.9, 0.1, 0.1, 0.1]})
    small = pd.DataFrame([("layer3.0.conv1", s, t, 1.0, 0.5) for s, t in ((0.0, 0.9), (0.01, 0.9), (0.1, 0.5))], columns=table.columns)
    path = tmp_path / "a folder" / "schedule.yaml"
    write_schedule(pd.concat([table, small]), "filter", graph, 0.02, path)
    pruner = {"class": "L1RankedStructureParameterPruner_AGP", "initial_sparsity": 0.0, "group_type": "Filters"}
    window = {"starting_epoch": 0, "ending_epoch": 10, "frequency": 1}
    assert read_yaml(path, "schedule") == {
        "version": 1,
        "pruners": {
            "conv1": {
                **pruner,
                "final_sparsity": 0.2,
                "group_dependency": "Average",
                "weights": ["conv1.weight", "layer1.0.conv2.weight"],
            },
            "layer1.0.conv1": {**pruner, "final_sparsity": 0.1, "weights": ["layer1.0.conv1.weight"]},
        },
        "extensions": {"thinning": {"class": "FilterRemover"}},
        "policies": [
            {"pruner": {"instance_name": "conv1"}, **window},
            {"pruner": {"instance_name": "layer1.0.conv1"}, **window},
            {"extension": {"instance_name": "thinning"}, "epochs": [10]},
        ],
    }
    assert f"--compress '{path}'" in path.read_text()  # the blank is quoted for a shell
    assert "EPOCHS must be larger than that" in path.read_text()


def test_a_group_that_a_gather_feeds_too_is_no_schedules(tmp_path):
    """Option A's shortcut brings channels that are there still when the filters are zero."""
    graph = traced(CifarResNet(1, True, 10, 3).eval(), 8, 3)
    fed = [group.name for group in graph.prunable if any(member.tensor.endswith("source") for member in group.producers)]
    assert "layer2.0.conv2" in fed
    table = table_of(**{"layer2.0.conv1": [0.9, 0.9, 0.9], "layer2.0.conv2": [0.9, 0.9, 0.9]})
    write_schedule(table, "filter", graph, 0.02, tmp_path / "s.yaml")
    assert list(read_yaml(tmp_path / "s.yaml", "schedule")["pruners"]) == ["layer2.0.conv1"]
    assert "Left out, because no schedule can name their channels: layer2.0.conv2." in (tmp_path / "s.yaml").read_text()


def masks_at_the_end(path, model):
    """What a schedule's pruners decide the last time that they are asked."""
    content, weights = read_yaml(path, "schedule"), dict(model.named_parameters())
    place = Place("", {name: weight.ndim for name, weight in weights.items()}, {})
    detached = {name: weight.detach() for name, weight in weights.items()}
    task = PruningTask(Moment(9, 0, 9, 10), detached, {}, torch.Generator(), None, None, model, None)
    masks = {}
    for described in content["pruners"].values():
        kind = PRUNERS[described.pop("class")]
        masks |= build(kind, described, place).decide(task).masks
    return masks


def zero_slices(values, dim):
    return set((values.movedim(dim, 0).flatten(1) == 0).all(1).nonzero().flatten().tolist())


@pytest.mark.parametrize("kind", ["element", "filter", "channel"])
def test_the_schedule_prunes_what_was_measured(kind, tmp_path):
    torch.manual_seed(1)
    model = CifarResNet(1, False, 10, 3).eval()
    graph, measured = traced(model, 8, 3), []

    def evaluate(network):
        measured.append({name: tensor.clone() for name, tensor in network.named_parameters()})
        return SimpleNamespace(top1=0.9, top5=1.0, loss=0.0)

    table = analyse(model, graph, kind, levels("0.37"), evaluate)
    write_schedule(table, kind, graph, 0.0, tmp_path / "s.yaml")
    masks = masks_at_the_end(tmp_path / "s.yaml", model)
    dim = 1 if kind == "channel" else 0
    for name, shown in zip(table["name"].unique(), measured[1:], strict=True):
        if kind == "element":
            assert torch.equal(masks[name] == 0, shown[name] == 0)
            continue
        group = graph.group(name)
        weights = [member.tensor for member in (group.producers if kind == "filter" else group.readers)]
        assert len(zero_slices(shown[weights[0]], dim)) == int(0.37 * group.size)
        assert all(zero_slices(masks[weight], dim) == zero_slices(shown[weight], dim) for weight in weights)


def test_a_schedule_of_channels_names_the_readers(tmp_path):
    model = Pair()
    write_schedule(table_of(conv=[0.9, 0.9, 0.9, 0.9]), "channel", traced(model), 0.02, tmp_path / "s.yaml")
    content = read_yaml(tmp_path / "s.yaml", "schedule")
    assert content["pruners"]["conv"]["weights"] == ["head.weight"]
    assert content["pruners"]["conv"]["group_type"] == "Channels"
    assert content["extensions"] == {"thinning": {"class": "ChannelRemover"}}


def test_groups_that_no_schedule_can_name_are_left_out_and_named(tmp_path):
    """Channels of a concatenation are a part of what reads them: 8 and 4 of c's 12."""
    graph = trace(zoo.make("concat").eval(), zoo.example("concat"))
    assert [group.name for group in graph.prunable] == ["stem.0", "a.0", "b.0", "c.0"]
    table = table_of(**{"a.0": [0.9, 0.9, 0.9, 0.9], "c.0": [0.9, 0.9, 0.9, 0.9]})
    write_schedule(table, "channel", graph, 0.02, tmp_path / "s.yaml")
    assert list(read_yaml(tmp_path / "s.yaml", "schedule")["pruners"]) == ["c.0"]
    assert "# Left out, because no schedule can name their channels: a.0." in (tmp_path / "s.yaml").read_text()
    with pytest.raises(UserError, match=r"the channels of a.0 are no whole channels"):
        write_schedule(table[table["name"] == "a.0"], "channel", graph, 0.02, tmp_path / "t.yaml")
    assert not (tmp_path / "t.yaml").exists()
    write_schedule(table, "filter", graph, 0.02, tmp_path / "f.yaml")  # a's filters are a's alone
    assert list(read_yaml(tmp_path / "f.yaml", "schedule")["pruners"]) == ["a.0", "c.0"]


def test_no_schedule_where_nothing_holds(tmp_path):
    table = table_of(**{"conv.weight": [0.9, 0.5, 0.9]})
    with pytest.raises(UserError, match=r"no layer tolerates any .* within 0.02 of top-1"):
        write_schedule(table, "element", None, 0.02, tmp_path / "s.yaml")
    with pytest.raises(UserError, match="unknown kind"):
        write_schedule(table, "elements", None, 0.5, tmp_path / "s.yaml")
    with pytest.raises(UserError, match="no layer tolerates"):  # a tenth of four units is none
        write_schedule(table_of(conv=[0.9, 0.9, 0.1]), "filter", traced(Pair()), 0.02, tmp_path / "s.yaml")
    assert list(tmp_path.iterdir()) == []


# ---- files
@pytest.mark.usefixtures("plots")
def test_results_are_a_table_and_a_picture(tmp_path):
    table = table_of(b=[0.9, 0.8, 0.7], a=[0.9, 0.9, 0.85])
    write_results(table, tmp_path)
    assert (tmp_path / "sensitivity.csv").read_text().splitlines()[:3] == [
        "name,sparsity,top1,top5,loss",
        "b,0.0,0.9,1.0,0.5",
        "b,0.1,0.8,1.0,0.5",
    ]
    picture = cv2.imread(str(tmp_path / "sensitivity.png"))
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 5


@pytest.mark.usefixtures("plots")
def test_many_layers_become_a_heat_map_that_grows_with_them(tmp_path):
    sparsities = [0, 0.25, 0.5, 0.75]
    for count in (11, 60):
        top1 = np.linspace(1, 0, 4)[None] * np.linspace(0.5, 1, count)[:, None]
        plot_sensitivity([f"layer{i}.weight" for i in range(count)], sparsities, top1, tmp_path / f"{count}.png")
    few, many = (cv2.imread(str(tmp_path / f"{count}.png")) for count in (11, 60))
    assert many.shape[0] > 3 * few.shape[0]
    colours = many.astype(int)
    assert ((colours[..., 2] > 200) & (colours[..., 0] < 80)).mean() > 0.005  # the best cells are yellow (BGR)
    assert ((colours.sum(2) < 200) & (colours[..., 0] > 60)).mean() > 0.1  # the worst ones dark purple
