from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from compression.schedule.loop import ScheduledLoop
from compression.tracing.channels import trace
from compression.tracing.dead_units import dead_units
from models.loading import WeightsFile, build_as
from models.networks import build
from utils.errors import UserError
from utils.loop.ema import EMA
from utils.measures.profile import count_macs
from utils.spec import ModelSpec

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9),
}
HALF = {"class": "L1RankedStructureParameterPruner", "group_type": "Filters", "desired_sparsity": 0.5}


class Chain(nn.Module):
    """conv (4 filters) -> norm -> conv (3) -> head; what follows the first convolution has a bias and a shift."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.head = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.conv2(self.norm1(self.conv1(x)).relu()).relu().mean((2, 3)))


class Sum(nn.Module):
    """Two convolutions whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(1, 4, 1, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.head((self.one(x) + self.two(x)).relu().mean((2, 3)))


class Joined(nn.Module):
    """Two convolutions whose outputs stand side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(1, 4, 1, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), self.two(x)], 1).relu().mean((2, 3)))


def seeded(model, seed=0):
    """Give everything values that are far from the initial ones: shifts, biases and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5), (module.running_var, 0.5, 1.5)):
                    tensor.uniform_(low, high, generator=generator)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, 0.3, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-0.5, 0.5, generator=generator)
    return model


def images(channels=1, size=6, count=4):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, channels, size, size, generator=generator), torch.arange(count) % 2


def schedule(pruners, epochs=(0,), remover="FilterRemover", cut=(0,), **arguments):
    policies = [{"pruner": {"instance_name": name, "args": arguments}, "epochs": list(epochs)} for name in pruners]
    extensions = {"thin": {"class": remover}}
    return {
        "pruners": pruners,
        "extensions": extensions,
        "policies": [*policies, {"extension": {"instance_name": "thin"}, "epochs": list(cut)}],
    }


def loop_of(content, model, optimizer=None, epochs=8, steps=2, size=6, ema=None, spec=None, restructured=lambda: None):
    channels = next(p for p in model.parameters() if p.ndim == 4).shape[1]
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    lines = []
    examples = images(channels, size)
    loop = ScheduledLoop(content, model, optimizer, epochs, steps, examples, ema, spec, restructured=restructured, report=lines.append)
    loop.lines = lines
    return loop


def push(loop, step=0):
    """Train on one batch."""
    inputs, targets = loop.scheduler.measurements.examples.images, loop.scheduler.measurements.examples.labels
    loop.state.model.train()
    loop.on_minibatch_begin(step, inputs, targets)
    outputs = loop.state.model(inputs)
    loss = loop.before_backward_pass(outputs, nn.functional.cross_entropy(outputs, targets))
    loop.state.optimizer.zero_grad()
    loss.backward()
    loop.before_parameter_optimization()
    loop.state.optimizer.step()
    if loop.state.ema:
        loop.state.ema.update_(loop.state.model)
    loop.on_minibatch_end()


def cut(loop, epoch=0):
    """Begin an epoch up to its first batch; return the outputs of model and average right before the cut and after it."""
    inputs, targets = loop.scheduler.measurements.examples.images, loop.scheduler.measurements.examples.labels
    networks = [loop.state.model, *([loop.state.ema.model] if loop.state.ema else [])]
    loop.on_epoch_begin(epoch)
    before = [outputs(network, inputs) for network in networks]
    loop.on_minibatch_begin(0, inputs, targets)
    return before, [outputs(network, inputs) for network in networks]


@torch.no_grad()
def outputs(model, inputs):
    training = model.training
    found = model.eval()(inputs)
    model.train(training)
    return found


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_is_sliced_to_the_kept_channels_and_training_goes_on(name):
    model = seeded(Chain())
    optimizer = OPTIMIZERS[name](model.parameters())
    elements = {"class": "SparsityLevelParameterPruner", "levels": {"conv2.weight": 0.25}}
    content = schedule({"elements": elements, "filters": {**HALF, "weights": ["conv1.weight"]}}, epochs=(1,), cut=(2,))
    loop = loop_of(content, model, optimizer, ema=EMA(model, 0.9, 1e-9))
    for epoch in (0, 1):
        loop.on_epoch_begin(epoch)
        for step in range(2):
            push(loop, step)
        loop.on_epoch_end()
    kept = model.conv1.weight.detach().flatten(1).any(1).nonzero().flatten()
    assert len(kept) == 2
    # what each tensor must become: rows of what makes the channels and follows them, columns of what reads them
    dims = {"conv1.weight": 0, "conv1.bias": 0, "norm1.weight": 0, "norm1.bias": 0, "conv2.weight": 1}
    names = [key for key, _ in model.named_parameters()]
    old_state = {key: copy.deepcopy(dict(optimizer.state[p])) for key, p in model.named_parameters()}
    old_average = {key: t.clone() for key, t in loop.state.ema.model.state_dict().items()}
    old_masks = {key: t.clone() for key, t in loop.scheduler.masks.values.items()}

    def part(key, tensor):
        return tensor.index_select(dims[key], kept) if key in dims and tensor.ndim else tensor

    before, after = cut(loop, 2)
    same(after, before)
    assert shapes(model) == {
        "conv1.weight": (2, 1, 3, 3), "conv1.bias": (2,), "norm1.weight": (2,), "norm1.bias": (2,),
        "conv2.weight": (3, 2, 3, 3), "conv2.bias": (3,), "head.weight": (2, 3), "head.bias": (2,),
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(parameters[key]) for key in names]
    assert set(optimizer.state) == set(parameters.values())
    for key, parameter in parameters.items():
        for slot, value in optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(part(key, old_state[key][slot]))), (key, slot)
        assert torch.equal(loop.state.ema.model.get_parameter(key), part(key, old_average[key]))
    assert torch.equal(loop.state.ema.model.norm1.running_var, old_average["norm1.running_var"][kept])
    assert {key: mask.tolist() for key, mask in loop.scheduler.masks.values.items()} == {
        key: part(key, mask).tolist() for key, mask in old_masks.items() if not part(key, mask).all()
    }
    zeros = model.conv2.weight == 0
    assert zeros.any()
    losses = []
    for epoch in (2, 3):
        for step in range(2):
            push(loop, step)
            losses.append(loop.state.loss.item())
        loop.on_epoch_end()
        loop.on_epoch_begin(epoch + 1)
        for network in (model, loop.state.ema.model):
            assert (network.conv2.weight[zeros] == 0).all()
        assert (model.conv1.weight != 0).all()
    assert all(loss == loss for loss in losses)


def test_the_norm_behind_a_masked_filter_is_masked_with_it_so_that_the_cut_changes_nothing():
    content = schedule({"filters": {**HALF, "weights": ["conv1.weight"]}})
    model = seeded(Chain())
    loop = loop_of(content, model)
    inputs = loop.scheduler.measurements.examples.images
    dense = outputs(model, inputs)
    loop.on_epoch_begin(0)
    dead = ~model.conv1.weight.detach().flatten(1).any(1)
    assert dead.sum() == 2
    for tensor in (model.conv1.bias, model.norm1.weight, model.norm1.bias):
        assert (tensor[dead] == 0).all()
        assert (tensor[~dead] != 0).all()
    before = outputs(model, inputs)
    assert (before - dense).abs().max() > 1e-3
    loop.on_minibatch_begin(0, inputs, torch.zeros(4, dtype=torch.int64))
    same([outputs(model, inputs)], [before])
    assert any(line.startswith("thin: removed channels, left are conv1 2 of 4; outputs changed by ") for line in loop.lines)

    # without a remover nothing is to be removed, so that the norm stays
    alone = seeded(Chain())
    del content["extensions"], content["policies"][-1]
    loop_of(content, alone).on_epoch_begin(0)
    assert (alone.norm1.bias != 0).all()


def test_nothing_to_remove_changes_nothing():
    model = seeded(Chain())
    few = {"class": "SparsityLevelParameterPruner", "levels": {"conv1.weight": 0.1}}
    calls = []
    loop = loop_of(schedule({"few": few}), model, restructured=lambda: calls.append(1))
    before, after = cut(loop)
    assert torch.equal(after[0], before[0])
    begin = "thin: nothing to remove: no channel is zero throughout; the weakest, in conv1, has 0."
    assert loop.lines[-1].startswith(begin)
    assert loop.lines[-1].endswith(" of its group's mean norm")
    assert loop.state.plan is None
    assert calls == []


@pytest.mark.parametrize("remover", ["FilterRemover", "ChannelRemover"])
def test_where_everything_is_dead_one_channel_stays(remover):
    model = seeded(Chain())
    with torch.no_grad():
        (model.conv1 if remover == "FilterRemover" else model.conv2).weight.zero_()
    never = {"class": "MagnitudeParameterPruner", "thresholds": {"head.weight": 0.0}}
    loop = loop_of(schedule({"never": never}, remover=remover), model)
    cut(loop)
    assert loop.state.plan["kept"] == {"conv1": [0]}
    assert shapes(model)["conv2.weight"] == (3, 1, 3, 3)
    push(loop, 1)


def test_a_sum_loses_a_channel_when_all_its_filters_are_zero():
    model = seeded(Sum())
    with torch.no_grad():
        model.one.weight[[0, 1, 2]] = 0
        model.two.weight[[1, 2, 3]] = 0  # 0 is made by two, 3 by one; 1 and 2 by none
    never = {"class": "MagnitudeParameterPruner", "thresholds": {"head.weight": 0.0}}
    loop = loop_of(schedule({"never": never}), model)
    before, after = cut(loop)
    same(after, before)
    assert loop.state.plan["kept"] == {"one": [0, 3]}
    assert shapes(model) == {"one.weight": (2, 1, 1, 1), "two.weight": (2, 1, 1, 1), "head.weight": (2, 2), "head.bias": (2,)}


def test_what_stands_side_by_side_is_cut_apart():
    model = seeded(Joined())
    head = model.head.weight.detach().clone()
    with torch.no_grad():
        model.one.weight[[1]] = 0
        model.two.weight[[0, 2]] = 0
    never = {"class": "MagnitudeParameterPruner", "thresholds": {"head.weight": 0.0}}
    loop = loop_of(schedule({"never": never}), model)
    before, after = cut(loop)
    same(after, before)
    assert loop.state.plan["kept"] == {"one": [0, 2, 3], "two": [1, 3]}
    assert torch.equal(model.head.weight, head[:, [0, 2, 3, 5, 7]])  # the second four columns read "two"


def test_channels_that_nothing_reads_go_with_the_filters_that_make_them():
    model = seeded(Chain())
    with torch.no_grad():
        model.conv2.weight[:, [0, 3]] = 0
    never = {"class": "MagnitudeParameterPruner", "thresholds": {"head.weight": 0.0}}
    untouched = loop_of(schedule({"never": never}), copy.deepcopy(model))
    cut(untouched)
    assert untouched.state.plan is None  # their filters are not zero
    first = model.conv1.weight.detach()[[1, 2]].clone()
    loop = loop_of(schedule({"never": never}, remover="ChannelRemover"), model)
    before, after = cut(loop)
    same(after, before)
    assert loop.state.plan["kept"] == {"conv1": [1, 2]}
    assert torch.equal(model.conv1.weight, first)


def test_plans_are_chained():
    model = seeded(Chain())
    content = schedule({"filters": {**HALF, "weights": ["conv1.weight"]}}, epochs=(0, 1), cut=(0, 1))
    calls = []
    loop = loop_of(content, model, restructured=lambda: calls.append(1))
    sizes = []
    for epoch in (0, 1):
        before, after = cut(loop, epoch)
        same(after, before)
        push(loop, 1)
        sizes.append(model.conv1.out_channels)
    assert sizes == [2, 1]  # half of 4, then half of what is left
    assert len(calls) == 2
    plan = loop.state.plan
    assert plan["sizes"] == {"conv1": 2}
    assert plan["before"]["sizes"] == {"conv1": 4}
    assert len(plan["kept"]["conv1"]) == 1
    assert "before" not in plan["before"]


class TwoBranches(nn.Module):
    """Two convolutions that are added."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 6, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.first(x) + self.second(x))).mean((2, 3))


def emptied():
    """The first convolution has lost channels 1, 2, 4, the second 2 and 3."""
    model = seeded(TwoBranches())
    with torch.no_grad():
        for layer, gone in ((model.first, [1, 2, 4]), (model.second, [2, 3])):
            layer.weight[gone] = 0
            layer.bias[gone] = 0
    return model


@pytest.mark.parametrize(
    ("arguments", "left"),
    [({}, [0, 1, 3, 4, 5]), ({"decides": "leader"}, [0, 3, 5]), ({"decides": "leader", "min_channels": 5}, [0, 1, 3, 4, 5])],
)
def test_all_weights_of_a_group_decide_or_the_leader_and_so_many_stay(arguments, left):
    model = emptied()
    content = {
        "extensions": {"thin": {"class": "FilterRemover", **arguments}},
        "policies": [{"extension": {"instance_name": "thin"}, "epochs": [0]}],
    }
    loop = loop_of(content, model)
    first, second = model.first.weight.detach().clone(), model.second.weight.detach().clone()
    cut(loop, 0)
    assert torch.equal(model.first.weight, first[left])
    assert torch.equal(model.second.weight, second[left])
    assert model.head.in_channels == len(left)
    assert "shrunk == masked" in loop.lines[-1]


@pytest.mark.parametrize(("decides", "stream", "macs"), [("leader", 16, 24_723_776), ("all", None, None)])
def test_a_leader_gives_the_published_resnet20(decides, stream, macs):
    """Distiller's resnet20_filters.schedule_agp_4: half of the filters of stage 2, each layer's own, and of stage 3's stream."""
    spec = ModelSpec("resnet20-b", 10, imgsz=32)
    model, generator = build(spec), torch.Generator().manual_seed(0)
    own = [f"layer2.{place}" for place in ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2", "2.conv1", "2.conv2")]
    same, tied = (
        torch.randperm(64, generator=generator)[:32],
        [f"layer3.{place}" for place in ("0.conv2", "0.downsample.0", "1.conv2", "2.conv2")],
    )
    with torch.no_grad():
        for layer in own:
            model.get_parameter(f"{layer}.weight")[torch.randperm(32, generator=generator)[:16]] = 0
        for layer in tied:
            model.get_parameter(f"{layer}.weight")[same] = 0
    content = {
        "extensions": {"thin": {"class": "FilterRemover", "decides": decides}},
        "policies": [{"extension": {"instance_name": "thin"}, "epochs": [0]}],
    }
    cut(loop_of(content, model, size=32, spec=spec))
    if stream is None:
        assert len(model.layer2[0].conv2.weight) > 16
        return
    assert len(model.layer2[0].conv2.weight) == stream
    assert count_macs(model, spec) == macs
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) == 130_544


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (torch.zeros(2, 1, 6, 6), "examples is a Tensor; expected a pair of tensors"),
        ((torch.zeros(2, 1, 6, 6),), "examples is a tuple of 1; expected a pair"),
        ((torch.zeros(2, 1, 6, 6), [0, 1]), "examples is a tuple of 2; expected a pair of tensors, inputs"),
        (
            (torch.zeros(2, 1, 6, 6), torch.zeros(3)),
            r"have the shapes \[2, 1, 6, 6\] and \[3\]; expected inputs \[N, C, H, W\] and as many",
        ),
    ],
)
def test_examples_that_are_no_pair_say_what_was_expected(examples, message):
    model = emptied()
    with pytest.raises(UserError, match=message):
        ScheduledLoop(schedule({}, cut=(1,)), model, torch.optim.SGD(model.parameters(), 0.1), 2, 1, examples)


def test_option_a_a_unit_that_a_shortcut_feeds_lives_as_long_as_what_feeds_it():
    # resnet20: layer1's 16 channels enter layer2's 32 in the middle, as channels 8 to 23; 0 to 7 and 24 to 31 are padded
    model = seeded(build(ModelSpec("resnet20", 3, imgsz=16, channels=1)))
    graph = trace(copy.deepcopy(model).eval(), images(1, 16)[0][:1])
    last = [f"layer2.{i}.conv2.weight" for i in range(3)]
    dead = [2, 10, 11]  # one is padded, two are fed by layer1's channels 2 and 3
    with torch.no_grad():
        for name in last:
            model.get_parameter(name)[dead] = 0

    def alive():
        return {name: tensor != 0 for name, tensor in model.state_dict().items()}

    assert dead_units(graph, alive(), "producer") == {"layer2.0.conv2": {2}}
    with torch.no_grad():  # layer1's third channel too, which the first convolution feeds through layer1's own shortcut
        for name in [f"layer1.{i}.conv2.weight" for i in range(3)]:
            model.get_parameter(name)[3] = 0
    assert dead_units(graph, alive(), "producer") == {"layer2.0.conv2": {2}}
    with torch.no_grad():
        model.conv1.weight[3] = 0
    assert dead_units(graph, alive(), "producer") == {"conv1": {3}, "layer1.0.conv2": {3}, "layer2.0.conv2": {2, 11}}


def test_option_a_a_channel_that_only_a_shortcut_passes_on_is_read():
    model = seeded(build(ModelSpec("resnet20", 3, imgsz=16, channels=1)))
    graph = trace(copy.deepcopy(model).eval(), images(1, 16)[0][:1])
    readers = ["layer1.1.conv1.weight", "layer1.2.conv1.weight", "layer2.0.conv1.weight"]
    with torch.no_grad():
        for name in readers:
            model.get_parameter(name)[:, 3] = 0

    def alive():
        return {name: tensor != 0 for name, tensor in model.state_dict().items()}

    assert dead_units(graph, alive(), "reader") == {}  # layer2's shortcut passes it on as channel 11
    with torch.no_grad():
        for name in ["layer2.1.conv1.weight", "layer2.2.conv1.weight", "layer3.0.conv1.weight"]:
            model.get_parameter(name)[:, 11] = 0
    assert dead_units(graph, alive(), "reader") == {}  # and layer3's as channel 16 + 11
    with torch.no_grad():
        for name in ["layer3.1.conv1.weight", "layer3.2.conv1.weight", "fc.weight"]:
            model.get_parameter(name)[:, 27] = 0
    found = dead_units(graph, alive(), "reader")
    assert found == {"layer1.0.conv2": {3}, "layer2.0.conv2": {11}, "layer3.0.conv2": {27}}


RESNETS = {
    # filters inside the blocks, and channels between them: what is added goes together
    "resnet20": ["conv1.weight", "layer1.?.conv2.weight"],
    "resnet20-b": ["conv1.weight", "layer1.?.conv2.weight"],
    "yolov5n-cls": ["model.4.cv1.conv.weight", "model.4.m.?.cv2.conv.weight"],
}


@pytest.mark.parametrize("net", RESNETS)
def test_networks_with_sums_gathers_and_joins(net):
    size = 32 if net == "yolov5n-cls" else 16
    spec = ModelSpec(net, 3, imgsz=size, channels=1)
    model = seeded(build(spec))
    inside = ["model.*.m.*.cv1.conv.weight", "model.4.cv3.conv.weight"] if net == "yolov5n-cls" else ["layer?.?.conv1.weight"]
    pruners = {"together": {**HALF, "group_dependency": "Leader", "weights": RESNETS[net]}, "inside": {**HALF, "weights": inside}}
    loop = loop_of(schedule(pruners), model, size=size, ema=EMA(model), spec=spec)
    dense = shapes(model)
    before, after = cut(loop)
    same(after, before)
    now = shapes(model)
    for name in [key for key in dense if any(Path(key).match(pattern) for pattern in [*RESNETS[net], *inside])]:
        assert now[name][0] * 2 == dense[name][0], name
    same([outputs(model, images(1, size)[0])], [after[0]])
    push(loop, 1)

    # the checkpoint's shapes carry the widths: nothing is traced to load it
    checkpoint = {"plan": loop.state.plan, "state_dict": model.state_dict()}
    file = WeightsFile(Path("last.pt"), checkpoint["state_dict"], loop.state.spec, checkpoint)
    again = build_as(loop.state.spec, file)
    again.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(outputs(again, images(1, size)[0]), outputs(model, images(1, size)[0]))


def test_resnet20_option_b_multiply_adds_by_hand():
    spec = ModelSpec("resnet20-b", 10, imgsz=32)
    model = build(spec)
    # stem 32*32*3*16*9 = 442,368; layer1 6 convolutions of 32*32*16*16*9 = 14,155,776; layer2 16*16*(16*32*9 + 5*32*32*9
    # + 16*32) = 13,107,200; layer3 8*8*(32*64*9 + 5*64*64*9 + 32*64) = 13,107,200; fc 640
    assert 442_368 + 14_155_776 + 13_107_200 + 13_107_200 + 640 == 40_813_184
    assert count_macs(model, spec) == 40_813_184
    agp = {"class": "L1RankedStructureParameterPruner_AGP", "group_type": "Filters", "initial_sparsity": 0.0, "final_sparsity": 0.5}
    window = {"starting_epoch": 0, "ending_epoch": 6, "frequency": 4}  # acts in 0 and 4: 4 does not divide 6
    content = {
        "pruners": {"inside": {**agp, "weights": ["layer[12].?.conv1.weight"]}},
        "extensions": {"thin": {"class": "FilterRemover", "thinning_func_str": "remove_filters", "arch": "resnet20"}},
        "policies": [{"pruner": {"instance_name": "inside"}, **window}, {"extension": {"instance_name": "thin"}, "epochs": [5]}],
    }  # fmt: skip
    loop = loop_of(content, model, size=32, spec=spec)
    for epoch in range(6):
        loop.on_epoch_begin(epoch)
        zero = [int((~model.get_parameter(f"layer{i}.{j}.conv1.weight").flatten(1).any(1)).sum()) for i in (1, 2) for j in range(3)]
        assert zero == ([8, 8, 8, 16, 16, 16] if epoch >= 4 else [0] * 6)
        loop.on_minibatch_begin(0, *images(3, 32))
        loop.on_minibatch_end()
        loop.on_epoch_end()
        assert loop.scheduler.target_reached(loop.state) == (epoch == 5)
    # layer1: 3 blocks of 32*32*(16*8 + 8*16)*9 = 7,077,888; layer2: 16*16*((16*16 + 16*32)*9 + 16*32 + 2*(32*16 + 16*32)*9)
    # = 256*(6,912 + 512 + 18,432) = 6,619,136; stem, layer3 and fc stay
    assert count_macs(model, spec) == 442_368 + 7_077_888 + 6_619_136 + 13_107_200 + 640


@pytest.mark.parametrize(("end", "frequency", "last"), [(10, 3, 9), (11, 4, 8), (5, 7, 0), (8, 1, 7)])
def test_gradual_sparsity_is_exact_at_the_last_epoch_that_acts(end, frequency, last):
    model = nn.Linear(10, 10, bias=False)
    agp = {"class": "AutomatedGradualPruner", "initial_sparsity": 0.1, "final_sparsity": 0.57, "weights": ["weight"]}
    window = {"starting_epoch": 0, "ending_epoch": end, "frequency": frequency}
    content = {"pruners": {"agp": agp}, "policies": [{"pruner": {"instance_name": "agp"}, **window}]}
    loop = ScheduledLoop(content, model, torch.optim.SGD(model.parameters(), 0.1), 12, 1, report=lambda _: None)
    for epoch in range(12):
        loop.on_epoch_begin(epoch)
        zeros = int((model.weight == 0).sum())
        if epoch >= last:
            assert zeros == 57
        elif epoch == 0:
            assert zeros == 10
        else:
            assert 10 <= zeros < 57
        loop.on_epoch_end()


def test_a_regularizers_kept_threshold_is_thinned():
    # the threshold zeroes the filters of a mean magnitude of at most 0.02 (the rate keeps them so small);
    # what it keeps at the window's end is removed after it
    model = seeded(Chain())
    with torch.no_grad():
        model.conv1.weight[[1, 2]] *= 0.01
    lasso = {"class": "GroupLassoRegularizer", "reg_regims": {"conv1.weight": [0.02, "3D"]}, "threshold_criteria": "Mean_Abs"}
    policies = [
        {"regularizer": {"instance_name": "lasso", "args": {"keep_mask": True}}, "starting_epoch": 0, "ending_epoch": 1},
        {"extension": {"instance_name": "thin"}, "epochs": [1]},
    ]
    content = {"regularizers": {"lasso": lasso}, "extensions": {"thin": {"class": "FilterRemover"}}, "policies": policies}
    loop = loop_of(content, model, torch.optim.SGD(model.parameters(), lr=1e-4))
    loop.on_epoch_begin(0)
    for step in range(2):
        push(loop, step)
    loop.on_epoch_end()
    before, after = cut(loop, 1)
    same(after, before)
    assert loop.state.plan["kept"] == {"conv1": [0, 3]}
