"""A schedule in a loop of one's own: the one that compression/schedule/loop.py shows, run as it stands there."""

from __future__ import annotations

import copy
import textwrap

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

from compression.schedule import loop as module
from compression.schedule.loop import Examples, ScheduledLoop
from models.networks import build
from tests.schedules import THINNING, elements, filters, once, policy
from utils.errors import UserError
from utils.loop.ema import EMA
from utils.spec import ModelSpec

SCHEDULE = {
    "version": 1,
    "pruners": {
        "filters": filters(["conv1.weight"]),
        "elements": elements(["conv2.weight"], 0.1, 0.5),
        "surgery": {"class": "SplicingPruner", "sensitivities": {"head.weight": 0.1}, "low_thresh_mult": 0.6, "hi_thresh_mult": 0.8},
    },
    "regularizers": {"l1": {"class": "L1Regularizer", "reg_regims": {"conv2.weight": 1e-3}}},
    "extensions": THINNING,
    "lr_schedulers": {"lr": {"class": "ExponentialLR", "gamma": 0.8}},
    "policies": [
        once("pruner", "filters", 0),
        once("extension", "thinning", 1),
        policy("pruner", "elements", 0, 5, frequency=3),
        {
            "pruner": {"instance_name": "surgery", "args": {"use_double_copies": True, "mini_batch_pruning_frequency": 1}},
            "starting_epoch": 0,
            "ending_epoch": 6,
        },
        policy("regularizer", "l1", 0, 4),
        policy("lr_scheduler", "lr", 0),
    ],
}
HALF = filters("conv1.weight")
CUT = {  # filters go in epoch 0, before its first batch
    "pruners": {"filters": HALF},
    "extensions": THINNING,
    "policies": [once("pruner", "filters", 0), once("extension", "thinning", 0)],
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 1, 6, 6, generator=generator), torch.arange(size) % 3) for _ in range(count)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def shown():
    """The code of the module's docstring: the loop's construction, and the loop."""
    code = textwrap.dedent(module.__doc__.split("::\n", 1)[1])
    assert sum(f"# {number}" in code for number in range(1, 7)) == 6
    construction, loop = code.strip().split("\n", 1)
    return construction, loop


def run(model, optimizer, folder, epochs=6, loader=None):
    """Run the code that the docstring shows."""
    loader = loader or batches()
    names = {
        "ScheduledLoop": lambda path, *rest: ScheduledLoop(folder / path, *rest, report=lambda _: None),
        "model": model,
        "optimizer": optimizer,
        "epochs": epochs,
        "loader": loader,
        "examples": loader[0],
        "criterion": nn.functional.cross_entropy,
        "evaluation": None,
    }
    exec("\n".join(shown()), names)
    return names["loop"]


def train(loop, epochs, loader, network=None, start=0, stop=None):
    """The same loop, for some of the epochs; from a batch of the first one, or up to one of each."""
    model, optimizer = network or loop.state.model, loop.state.optimizer
    for epoch in epochs:
        loop.on_epoch_begin(epoch, start)
        for step, (inputs, targets) in list(enumerate(loader))[start:stop]:
            loop.on_minibatch_begin(step, inputs, targets)
            outputs = model(inputs)
            loss = loop.before_backward_pass(outputs, nn.functional.cross_entropy(outputs, targets))
            optimizer.zero_grad()
            loss.backward()
            loop.before_parameter_optimization()
            optimizer.step()
            if loop.state.ema:
                loop.state.ema.update_(loop.state.model)
            loop.on_minibatch_end()
        if stop is not None:
            return
        start = 0
        loop.on_epoch_end()


def loop_of(content, model, optimizer, epochs=6, loader=None, **more):
    loader = loader or batches()
    return ScheduledLoop(content, model, optimizer, epochs, len(loader), loader[0], report=lambda _: None, **more)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump(SCHEDULE))
    return tmp_path


def test_the_loop_that_is_shown_runs_as_it_stands(folder):
    model = net()
    optimizer = sgd(model)
    loop = run(model, optimizer, folder)
    assert model.conv1.weight.shape == (4, 1, 3, 3)  # half of 8 filters
    assert model.conv2.weight.shape == (4, 4, 3, 3)
    # from epoch 3, the last that acts, half of the 4 * 4 * 9 = 144 weights that are left
    assert int((model.conv2.weight == 0).sum()) == 72
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8**6)
    assert loop.state.plan["sizes"] == {"conv1": 8}
    assert loop.scheduler.target_reached(loop.state)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("stop", [1, 3])  # before the thinning and behind it; weights are hidden at both
def test_a_stopped_loop_goes_on_to_the_bits_of_one_that_was_not_stopped(folder, stop, make):
    path, loader = folder / "schedule.yaml", batches()
    whole = net()
    whole_loop = loop_of(path, whole, make(whole), ema=EMA(whole, 0.5, 1e-9))
    train(whole_loop, range(6), loader)

    first = net()
    first_loop = loop_of(path, first, make(first), ema=EMA(first, 0.5, 1e-9))
    train(first_loop, range(stop), loader)
    assert first_loop.scheduler.masks.hidden
    average = first_loop.state.ema
    state = {"loop": first_loop.state_dict(), "model": first.state_dict(), "optimizer": first_loop.state.optimizer.state_dict()}
    torch.save({**state, "average": average.model.state_dict(), "ema": average.state_dict()}, folder / "checkpoint.pt")

    second = net(seed=7)
    calls = []
    second_loop = loop_of(path, second, make(second), ema=EMA(second, 0.5, 1e-9), restructured=lambda: calls.append(1))
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    second_loop.load_state_dict(saved["loop"])
    assert calls == ([1] if stop > 1 else [])
    second.load_state_dict(saved["model"])
    second_loop.state.optimizer.load_state_dict(saved["optimizer"])
    second_loop.state.ema.model.load_state_dict(saved["average"])
    second_loop.state.ema.load_state_dict(saved["ema"])
    train(second_loop, range(stop, 6), loader)

    for ours, theirs in ((second, whole), (second_loop.state.ema.model, whole_loop.state.ema.model)):
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert second_loop.state.plan == whole_loop.state.plan
    masks, expected = second_loop.scheduler.masks.state_dict(), whole_loop.scheduler.masks.state_dict()
    for kind in ("values", "hidden"):
        assert masks[kind].keys() == expected[kind].keys()
        assert all(torch.equal(masks[kind][name], tensor) for name, tensor in expected[kind].items())
    slots = zip(second_loop.state.optimizer.state.values(), whole_loop.state.optimizer.state.values(), strict=True)
    assert all(torch.equal(ours[key], theirs[key]) for ours, theirs in slots for key in theirs)


def test_a_loop_that_was_stopped_within_an_epoch_goes_on_there(folder):
    # epoch 1 cuts before its first batch, epoch 0 asks the pruners there: neither happens again
    path, loader = folder / "schedule.yaml", batches()
    whole = net()
    train(loop_of(path, whole, sgd(whole)), range(3), loader)
    for epoch in (0, 1):
        first, second = net(), net()
        first_loop, second_loop = (loop_of(path, model, sgd(model)) for model in (first, second))
        train(first_loop, range(epoch), loader)
        train(first_loop, [epoch], loader, stop=2)
        second_loop.load_state_dict(first_loop.state_dict())
        second.load_state_dict(first.state_dict())
        second_loop.state.optimizer.load_state_dict(first_loop.state.optimizer.state_dict())
        train(second_loop, range(epoch, 3), loader, start=2)
        assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_a_mapping_stands_for_a_file(folder):
    model = net()
    loop = loop_of(copy.deepcopy(CUT), model, sgd(model))
    train(loop, range(2), batches())
    assert model.conv1.out_channels == 4
    with pytest.raises(UserError, match=r"^pruners.filters.desired_sparsity: is 1.5; it must be at least 0 and below 1"):
        loop_of({**CUT, "pruners": {"filters": {**HALF, "desired_sparsity": 1.5}}}, net(), sgd(model))
    with pytest.raises(UserError, match=r"no schedule file .*absent\.yaml"):
        loop_of(folder / "absent.yaml", model, sgd(model))


def test_thinning_without_examples_says_what_is_missing():
    model = net()
    loop = ScheduledLoop(CUT, model, sgd(model), 1, 1, report=lambda _: None)
    with pytest.raises(UserError, match="the schedule measures the network, so it needs images"):
        loop.on_epoch_begin(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": [1, 2]}, "schedule is a list; expected the path of a YAML file, or its content"),
        ({"model": None}, "expected a module and its optimizer, not NoneType and SGD"),
        ({"optimizer": "SGD"}, "expected a module and its optimizer, not Linear and str"),
    ],
)
def test_arguments_of_another_type_say_what_was_expected(change, message):
    model = torch.nn.Linear(2, 2)
    arguments = {"schedule": {}, "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "epochs": 1, "steps_per_epoch": 1}
    with pytest.raises(UserError, match=message):
        ScheduledLoop(**{**arguments, **change})


def test_examples_are_taken_as_they_are():
    inputs, labels = batches(1)[0]
    examples = Examples(inputs, labels, ModelSpec("", 1), 3)
    found = list(examples.batches())
    assert [len(part) for part, _ in found] == [3, 3, 2]
    assert torch.equal(torch.cat([part for part, _ in found]), inputs)
    assert len(examples.head(2)) == 2


def test_the_report_says_what_was_cut():
    model, lines, loader = net(), [], batches()
    loop = ScheduledLoop(CUT, model, sgd(model), 1, 3, loader[0], report=lines.append)
    train(loop, [0], loader)
    assert lines[0].startswith("schedule pruner filters: L1RankedStructureParameterPruner")
    assert lines[-1].startswith("thinning: removed channels, left are conv1 4 of 8; outputs changed by ")


def test_an_optimizer_may_hold_more_than_the_network(folder):
    whole, centre = net(), nn.Parameter(torch.zeros(2))
    loop = loop_of(CUT, whole, torch.optim.SGD([*whole.parameters(), centre], lr=0.1))
    train(loop, [0], batches())
    again = net()
    optimizer = torch.optim.SGD([*again.parameters(), centre], lr=0.1)
    fresh = loop_of(CUT, again, optimizer)
    fresh.load_state_dict(loop.state_dict())
    assert optimizer.param_groups[0]["params"][-1] is centre
    assert again.conv1.weight.shape == (4, 1, 3, 3)


def test_the_specification_follows_a_restart_with_other_groups():
    spec = ModelSpec("shufflenet_v2_x0_5", 3)

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
            self.depthwise, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.depthwise(self.conv1(x)).relu().mean((2, 3)))

    model = Grouped()
    with torch.no_grad():
        model.conv1.weight[4:] = 0
        model.depthwise.weight[4:] = 0
    content = {**CUT, "pruners": {"filters": {"class": "MagnitudeParameterPruner", "thresholds": {"head.weight": 0}}}}
    loop = loop_of(content, model, sgd(model), spec=spec)
    train(loop, [0], batches())
    assert loop.state.spec.groups == {"depthwise": 4}
    again = Grouped()
    fresh = loop_of(content, again, sgd(again), spec=spec)
    fresh.load_state_dict(loop.state_dict())
    assert fresh.state.spec.groups == {"depthwise": 4}
    assert again.depthwise.groups == 4


def test_a_network_wrapped_in_ddp_is_wrapped_again_when_it_was_cut():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, wrapped, loader = net(), [], batches()
        loop = loop_of(CUT, model, sgd(model), restructured=lambda: wrapped.append(nn.parallel.DistributedDataParallel(model)))
        wrapped.append(nn.parallel.DistributedDataParallel(model))
        train(loop, [0], loader, network=lambda inputs: wrapped[-1](inputs))
        assert len(wrapped) == 2
        parameters = {id(p) for p in model.parameters()}
        assert {id(p) for p in wrapped[-1].parameters()} == parameters
        assert model.conv1.weight.grad.shape == (4, 1, 3, 3)

        alone = net()
        train(loop_of(CUT, alone, sgd(alone)), [0], loader)
        assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in model.state_dict().items())
    finally:
        dist.destroy_process_group()


def test_a_network_of_ours_in_channels_last_and_bf16():
    spec = ModelSpec("resnet20", 3, imgsz=16, channels=1)
    torch.manual_seed(0)
    model = build(spec).to(memory_format=torch.channels_last)
    inputs = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=torch.channels_last)
    loader = [(inputs, torch.arange(8) % 3)] * 2
    filters = {**HALF, "weights": "layer?.?.conv1.weight"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    loop = loop_of({**CUT, "pruners": {"filters": filters}}, model, optimizer, loader=loader, spec=spec)

    def forward(images):
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    train(loop, range(2), loader, network=lambda images: forward(images).float())
    assert model.layer3[2].conv1.out_channels == 32
    weight = model.layer3[2].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
