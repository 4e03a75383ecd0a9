"""Every schedule of data/schedules reads, shows its timeline, runs, and ends where its head comment says."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from compression.schedule.loop import ScheduledLoop
from compression.schedule.reading import read_schedule
from compression.schedule.timeline import rates_by_epoch, timeline, warnings
from compression.training.arguments import TrainArguments
from models.networks import ARCHITECTURES, build
from tests.loops import one_batch_an_epoch
from utils.arguments import parse
from utils.measures.profile import count_macs
from utils.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "data" / "schedules"


@dataclass(frozen=True)
class Shipped:
    """The networks that a schedule is for; multiply-adds before and after, as its comment says them, at ``imgsz``."""

    network: str
    before: int
    after: int
    imgsz: int = 32


SHIPPED = {
    "resnet20_agp": [Shipped("resnet20-b", 40_813_184, 40_813_184)],
    "resnet20_filters_agp": [Shipped("resnet20-b", 40_813_184, 22_241_920)],
    "resnet20_network_slimming": [Shipped("resnet20-b", 40_813_184, 25_569_920)],
    "resnet20_network_surgery": [Shipped("resnet20-b", 40_813_184, 40_813_184)],
    "resnet20_drop_filter": [Shipped("resnet20-b", 40_813_184, 40_813_184)],
    # 6 channels of layer1.0 at 294,912, 10 of layer2.0 at 110,592, 4 of layer3.2 at 73,728: 3,170,304 less; see ``prepare_``
    "resnet20_ssl_group_lasso": [Shipped("resnet20-b", 40_813_184, 37_642_880)],
    "resnet56_filters_l1": [Shipped("resnet56", 125_485_696, 78_594_688), Shipped("resnet56-b", 125_747_840, 78_856_832)],
    "yolov5n_rank_distil": [Shipped("yolov5n-cls", 14_496_256, 10_818_048, 64)],
}
RUNS = [(name, net) for name, nets in SHIPPED.items() for net in nets]
COMMENTED = {  # what the comment says beside the filters that only training tells
    "resnet20_ssl_group_lasso": ["40,813,184", "294,912", "110,592", "147,456", "55,296", "73,728"],
    "alexnet_sensitivity": ["714,188,480"],
}


def path_of(name):
    return FOLDER / f"{name}.yaml"


def head_of(name):
    lines = path_of(name).read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return [line[1:].strip() for line in head]


def arguments_of(name):
    """Parse the command in a schedule's head."""
    command = next(line for line in head_of(name) if line.startswith("python train.py "))
    return parse(TrainArguments, "", shlex.split(command)[2:])[0]


def spec_of(net):
    return ModelSpec(net.network, 10, imgsz=net.imgsz)


def names_of(network):
    """Return the numbers of dimensions of a network's parameters, without making their values."""
    with torch.device("meta"):
        model = build(ModelSpec(network, 10, imgsz=32))
    return {name: parameter.ndim for name, parameter in model.named_parameters()}


def test_every_file_of_the_folder_is_tested_here():
    assert {path.stem for path in FOLDER.iterdir()} == {*SHIPPED, "alexnet_sensitivity"}


@pytest.mark.parametrize("name", [*SHIPPED, "alexnet_sensitivity"])
def test_the_head_gives_a_command_that_train_py_takes_with_the_file_itself_and_the_whole_schedule_in_its_epochs(name):
    arguments = arguments_of(name)
    assert arguments.compress == f"data/schedules/{name}.yaml"
    assert arguments.weights or arguments.model in ARCHITECTURES or arguments.model == "alexnet"
    networks = [net.network for net in SHIPPED.get(name, [Shipped("alexnet", 0, 0)])]
    for network in networks:
        schedule = read_schedule(path_of(name), names_of(network))
        assert warnings(schedule, arguments.epochs) == []
        assert schedule.unused == []


@pytest.mark.parametrize("name", [*SHIPPED, "alexnet_sensitivity"])
def test_the_head_states_the_multiply_adds(name):
    before_and_after = [f"{figure:,}" for net in SHIPPED.get(name, ()) for figure in (net.before, net.after)]
    head = " ".join(head_of(name))
    assert [figure for figure in COMMENTED.get(name, before_and_after) if figure not in head] == []


@pytest.mark.parametrize("name", ["resnet20_filters_agp", "resnet20_network_slimming", "yolov5n_rank_distil", "resnet56_filters_l1"])
def test_the_arithmetic_in_a_head_holds_line_by_line_and_adds_up(name):
    found = [re.fullmatch(r"[\w., ]+?\s{2,}(\d[\d*+() ]+?)\s+= +([\d,]+)", line) for line in head_of(name)]
    sums = {line[1]: int(line[2].replace(",", "")) for line in found if line}
    assert len(sums) == {"yolov5n_rank_distil": 6, "resnet56_filters_l1": 4}.get(name, 5)
    assert {terms: product_sum(terms) for terms in sums} == sums
    goes = name == "resnet56_filters_l1"  # what goes; elsewhere what stays
    assert {net.before - net.after if goes else net.after for net in SHIPPED[name]} == {sum(sums.values())}


def product_sum(terms):
    """Work out sums and products of whole numbers with brackets."""
    while inner := re.search(r"\(([^()]*)\)", terms):
        terms = terms.replace(inner[0], str(product_sum(inner[1])))
    total = 0
    for product in terms.split("+"):
        value = 1
        for factor in product.split("*"):
            value *= int(factor)
        total += value
    return total


@pytest.mark.parametrize(("name", "net"), RUNS, ids=[f"{name}-{net.network}" for name, net in RUNS])
def test_the_schedule_prints_its_timeline_and_what_its_patterns_match(name, net):
    arguments = arguments_of(name)
    schedule = read_schedule(path_of(name), names_of(net.network))
    table = timeline(schedule, arguments.epochs, arguments.lr0).splitlines()
    assert table[0].split() == ["epochs", "learning", "rate", "active", "(target", "sparsity)"]
    assert re.match(rf" +(\d+ to )?{arguments.epochs - 1}  ", table[-1])
    assert all(names for names in schedule.matches.values())
    said = "\n".join(schedule.describe())
    assert [place for place in schedule.matches if f"{place} -> " not in said] == []


def test_the_timeline_of_the_gradual_schedules_ends_at_the_final_sparsity():
    schedule = read_schedule(path_of("resnet20_filters_agp"), names_of("resnet20-b"))
    table = timeline(schedule, 30, 0.02)
    assert "coarse (50.0%), fine (25.0%), between_blocks (25.0%), classifier (50.0%)" in table  # epoch 18
    assert re.search(r"^ +18 ", table, re.MULTILINE)
    # 27 epochs of MultiStepLR(22, 27): 0.02, then 0.002, then 0.0002
    assert [rates_by_epoch(schedule, 30, 0.02)[e] for e in (0, 21, 22, 26, 27, 29)] == pytest.approx([0.02, 0.02, 2e-3, 2e-3, 2e-4, 2e-4])


def prepare_(name, model):
    """Make some input channels small, where the schedule leaves it to training how many get there."""
    if name == "resnet20_ssl_group_lasso":
        with torch.no_grad():
            for key, count in (("layer1.0", 6), ("layer2.0", 10), ("layer3.2", 4)):
                model.get_submodule(key).conv2.weight[:, :count] *= 1e-5


def run(name, net, report=lambda line: None):
    """Carry a schedule out, a batch of two images an epoch; return the network and the loop."""
    torch.manual_seed(0)
    spec, epochs = spec_of(net), arguments_of(name).epochs
    model = build(spec).train()
    assert count_macs(model, spec) == net.before
    prepare_(name, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    inputs, labels = torch.randn(2, 3, net.imgsz // 2, net.imgsz // 2), torch.tensor([1, 3])
    loop = ScheduledLoop(path_of(name), model, optimizer, epochs, 1, (inputs, labels), report=report)
    one_batch_an_epoch(loop, epochs, inputs, labels)
    return model, loop


@pytest.mark.parametrize(("name", "net"), RUNS, ids=[f"{name}-{net.network}" for name, net in RUNS])
def test_the_schedule_runs_and_ends_where_its_head_says(name, net):
    model, loop = run(name, net)
    assert count_macs(model, spec_of(net)) == net.after
    assert loop.scheduler.target_reached(loop.state)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    CHECKS.get(name, lambda *_: None)(model, loop)


def zeros(model, *names):
    parameters = dict(model.named_parameters())
    return {name: int((parameters[name] == 0).sum()) for name in names}


def check_agp(model, loop):
    # floor(0.5 * 2304) = 1152, floor(0.8 * n): 4608 -> 3686, 9216 -> 7372, 512 -> 409, 36864 -> 29491, 640 -> 512; 432 stay
    names = ("conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.2.conv2", "layer2.0.downsample.0", "layer3.1.conv1", "fc")
    found = zeros(model, *(f"{name}.weight" for name in names))
    assert list(found.values()) == [0, 1152, 3686, 7372, 409, 29491, 512]
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert sum(int((weight == 0).sum()) for weight in weights) == 212_217
    assert sum(weight.numel() for weight in weights) == 270_896


def check_filters_agp(model, loop):
    shapes = {name: tuple(parameter.shape[:2]) for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert shapes["layer1.2.conv1.weight"] == (8, 16)
    assert shapes["layer2.0.downsample.0.weight"] == (24, 16)
    assert shapes["layer2.1.conv2.weight"] == (24, 16)
    assert shapes["layer3.0.conv1.weight"] == (48, 24)
    assert shapes["fc.weight"] == (10, 64)
    assert int((model.fc.weight != 0).any(0).sum()) == 32  # half of the inputs


def check_surgery(model, loop):
    masks = loop.scheduler.masks
    convolutions = [name for name in dict(model.named_parameters()) if re.fullmatch(r"layer\d\.\d\.conv\d\.weight", name)]
    assert sorted(masks.values) == sorted(convolutions)
    assert (masks.hidden, masks.double) == ({}, set())  # kept for good
    pruned = sum(zeros(model, *convolutions).values())
    # freshly drawn weights are normal: 0.678 below the border, give or take 0.01 for 18 layers' own figures
    assert pruned / sum(model.get_parameter(name).numel() for name in convolutions) == pytest.approx(0.678, abs=0.01)
    averages = [int((masks.values[name] == 0).sum()) for name in convolutions]
    assert sum(averages) == pruned


def check_drop_filter(model, loop):
    assert (loop.scheduler.masks.values, loop.scheduler.masks.hidden) == ({}, {})
    assert all(bool((parameter != 0).all()) for parameter in model.parameters() if parameter.ndim > 1)


CHECKS = {
    "resnet20_agp": check_agp,
    "resnet20_filters_agp": check_filters_agp,
    "resnet20_network_surgery": check_surgery,
    "resnet20_drop_filter": check_drop_filter,
}
