"""Cutting: the shrunk network is the masked one, for every small network and every architecture; optimizers and averages follow."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compression.pruning.surgery import shrink_
from compression.tracing.channels import trace
from compression.tracing.cutting import NotProved, mask_
from models.networks import ARCHITECTURES
from models.networks.resnet import PadShortcut
from models.networks.widths import group_counts, resize_
from tests.architectures import architectures
from tests.zoo import ZOO, example, make, random_keep, randomised
from utils.errors import UserError
from utils.loop.ema import EMA

RATES = (0.1, 0.5, 0.9)
THREE_TIMES = ("yolov5n-cls", "resnet20", "resnet20-b")  # the others are larger


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors_of(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for item in (output.values() if isinstance(output, dict) else output) for t in tensors_of(item)]


@torch.no_grad()
def outputs(model, inputs):
    modes = [(m, m.training) for m in model.modules()]
    found = tensors_of(model.eval()(inputs))
    for module, mode in modes:
        module.training = mode
    return found


def close(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def multiply(factor):
    return lambda _, args: (args[0] * factor,)


def silence_readers_(model, graph, keep):
    """Zero the removed channels where convolutions and linear layers read them, and nothing else. Not for mask_'s eyes."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    cut = {id(parameters[name]): dims for name, dims in graph.indices(keep).items() if name in parameters}
    for module in modules.values():
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        dims, dim = cut.get(id(module.weight), {}), 0 if transposed else 1
        if dim not in dims:
            continue
        living = torch.zeros(module.weight.shape[dim])
        living[dims[dim]] = 1
        living = living if transposed else living.repeat(getattr(module, "groups", 1))
        shape = (1, -1, *[1] * (module.weight.ndim - 2)) if module.weight.ndim > 2 else (-1,)
        module.register_forward_pre_hook(multiply(living.view(shape)))
    for name, block in modules.items():  # option A reads what the block's first convolution reads
        short = getattr(block, "downsample", None) or getattr(block, "short", None)
        short = short[-1] if isinstance(short, nn.Sequential) else short  # behind an average pool
        if isinstance(short, PadShortcut):
            reader = f"{name}.conv1.weight" if name else "a.0.weight"
            living = torch.zeros(graph.shapes[reader][1])
            living[graph.indices(keep).get(reader, {}).get(1, torch.arange(len(living)))] = 1
            short.register_forward_pre_hook(multiply(living.view(1, -1, 1, 1)))


# Some readers are no layers.
NO_ORACLE = {"bare_weight", "matmul_parameter", "matmul_before", "matmul_to_one", "einsum", "blur", "TiedTransposed"}
NOT_TRAINABLE = {"out_argument"}
NOT_TO_ONE = {"einsum"}  # torch takes another way through it where one channel is left


def check_cut(model, graph, keep, inputs, oracle=True):
    dense, masked, silenced = (copy.deepcopy(model) for _ in range(3))
    mask_(masked, graph, keep)
    difference = shrink_(model, graph, keep, inputs)
    assert difference <= 1e-4
    ours = outputs(model, inputs)
    close(ours, outputs(masked, inputs))
    if oracle:
        silence_readers_(silenced, graph, keep)
        close(ours, outputs(silenced, inputs))
    indices, before = graph.indices(keep), {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        old = before[name]
        for dim, index in indices.get(name, {}).items():
            old = old.index_select(dim, index)
        assert tensor.shape == old.shape
        if tensor.is_floating_point():
            assert torch.equal(tensor, old)
    assert graph.params(keep, dict(dense.named_parameters())) == sum(p.numel() for p in model.parameters())


def check_training_step(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = sum(t.square().mean() for t in tensors_of(model.train()(inputs)))
    loss.backward()
    assert all(p.grad is None or (p.grad.shape == p.shape and p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def check_reload(model, fresh, inputs):
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    resize_(fresh, state, group_counts(model))
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, inputs), outputs(model, inputs), strict=True))
    sizes = ("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "groups", "num_groups")
    for one, other in zip(fresh.modules(), model.modules(), strict=True):
        assert [getattr(one, size, None) for size in sizes] == [getattr(other, size, None) for size in sizes]
        if isinstance(one, nn.Conv2d | nn.Linear):  # what a layer says of itself is what its weight is
            out, into = ("out_channels", "in_channels") if isinstance(one, nn.Conv2d) else ("out_features", "in_features")
            assert (getattr(one, out), getattr(one, into)) == (one.weight.shape[0], one.weight.shape[1] * getattr(one, "groups", 1))


@pytest.mark.parametrize("name", ZOO)
def test_a_shrunk_small_network_is_the_masked_one(name):
    graph = trace(make(name), example(name))
    if not graph.prunable:
        return
    for seed in range(2):  # the ends are tested below
        model = make(name)
        inputs = example(name, batch=3, seed=seed)
        check_cut(model, graph, random_keep(graph, 0.5, seeded(seed)), inputs, name not in NO_ORACLE)
    if name not in NOT_TRAINABLE:
        check_training_step(model, inputs)
    check_reload(model, make(name, seed=7), inputs)


@pytest.mark.parametrize("name", ZOO)
def test_one_unit_of_one_group_goes_or_stays(name):
    """The ends: all but one unit goes, of every group at once; one unit goes, of each group alone."""
    graph = trace(make(name), example(name))
    inputs = example(name, batch=2)
    for group in graph.prunable:
        model = make(name)
        free = sorted(set(range(group.size)) - group.fixed)
        check_cut(model, graph, {group.name: sorted(set(range(group.size)) - {free[len(free) // 2]})}, inputs, name not in NO_ORACLE)
    if graph.prunable and name not in NOT_TO_ONE:
        check_cut(make(name), graph, random_keep(graph, 1.0, seeded(1)), inputs, name not in NO_ORACLE)


@pytest.mark.parametrize("name", architectures())
def test_a_shrunk_architecture_is_the_masked_one(name):
    torch.manual_seed(0)
    dense = randomised(ARCHITECTURES[name](10, 3))
    inputs = torch.randn(2, 3, 32, 32, generator=seeded(1))
    graph = trace(dense, inputs[:1])
    for seed, rate in enumerate(RATES if name in THREE_TIMES else (0.5,)):
        model = copy.deepcopy(dense).train()
        check_cut(model, graph, random_keep(graph, rate, seeded(seed)), inputs)
        assert all(module.training for module in model.modules())
    if name in THREE_TIMES:
        check_reload(model, ARCHITECTURES[name](10, 3), inputs)
        check_training_step(model, inputs)


def test_by_hand_a_residual_network_keeps_the_named_channels():
    model = make("residual")
    graph, dense = trace(model, example("residual")), copy.deepcopy(model)
    shrink_(model, graph, {"stem.0": [1, 4, 15], "a.0": [0, 7]}, example("residual", 2))
    stem, inner = torch.tensor([1, 4, 15]), torch.tensor([0, 7])
    assert torch.equal(model.stem[0].weight, dense.stem[0].weight[stem])
    assert torch.equal(model.stem[1].running_var, dense.stem[1].running_var[stem])
    assert torch.equal(model.a[0].weight, dense.a[0].weight[inner][:, stem])
    assert torch.equal(model.b[0].weight, dense.b[0].weight[stem][:, inner])
    assert torch.equal(model.b[1].bias, dense.b[1].bias[stem])
    assert torch.equal(model.head.weight, dense.head.weight[:, stem])
    assert torch.equal(model.head.bias, dense.head.bias)


def test_by_hand_an_index_buffer_points_at_the_new_places():
    model = make("index_buffer")  # 3 1 0 2 15 14 ... 4
    graph = trace(model, example("index_buffer"))
    shrink_(model, graph, {"a.0": [0, 2, 3, 5, 14]}, example("index_buffer", 2))
    assert model.index.tolist() == [2, 0, 1, 4, 3]  # of 3 0 2 14 5


def test_by_hand_a_pad_shortcut_takes_zeros_for_what_went():
    model = make("pad_shortcut")
    graph = trace(model, example("pad_shortcut"))
    assert model.short.source.tolist() == [-1] * 4 + [*range(8)] + [-1] * 4
    shrink_(model, graph, {"stem.0": [1, 6], "b.0": [0, 4, 5, 10, 15]}, example("pad_shortcut", 2))
    assert model.short.source.tolist() == [-1, -1, 0, 1, -1]  # outputs 4, 5 and 10 read inputs 0, 1 and 6; 0 went


def test_group_convolutions_and_norms_know_their_new_number_of_groups():
    for name, keep, module, attribute, count in (
        ("depthwise", {"stem.0": [3]}, "a.0", "groups", 1),
        ("many_groups", {"stem.0": [0, 5, 6]}, "a.0", "groups", 3),
        ("two_groups", {"stem.0": [0, 5, 6]}, "a.0", "groups", 2),
        ("TiedDepthwise", {"stem.0": [0, 5, 6]}, "b", "groups", 3),
        ("group_norm", {"a": [2]}, "n", "num_groups", 1),
        ("group_norm_bare", {"a": [0, 2, 3]}, "n", "num_groups", 3),
        ("instance_norm", {"a": [0, 2, 3]}, "n", "num_features", 3),
    ):
        model = make(name)
        shrink_(model, trace(model, example(name)), keep, example(name, 2))
        assert getattr(model.get_submodule(module), attribute) == count
        check_reload(model, make(name), example(name))


def test_tied_weights_stay_tied():
    model = make("Tied")
    shrink_(model, trace(model, example("Tied")), {"stem.0": [0, 2, 9]}, example("Tied", 2))
    assert model.a.weight is model.b.weight
    assert model.a.weight.shape == (3, 3, 1, 1)
    assert (model.a.bias.shape, model.b.bias.shape) == ((3,), (3,))
    assert [(m.in_channels, m.out_channels) for m in (model.a, model.b)] == [(3, 3)] * 2


# ---- what must be refused
def bits(*things):
    found = {}
    for number, thing in enumerate(things):
        if isinstance(thing, nn.Module):
            owned = [*thing.named_parameters(), *thing.named_buffers()]
            found |= {(number, name): (id(tensor), tensor.detach().clone()) for name, tensor in owned}
            found |= {(number, name, "sizes"): repr(module) for name, module in thing.named_modules()}
        else:
            found[number, "groups"] = [[id(p) for p in group["params"]] for group in thing.param_groups]
            for place, (parameter, state) in enumerate(thing.state.items()):
                found[number, place] = (id(parameter), copy.deepcopy(state))
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def trained():
    model = make("residual").train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    step_(model, optimizer)
    return model, optimizer, EMA(model), trace(model, example("residual"))


def step_(model, optimizer, steps=2):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(example("residual", 4, seed=7)), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            return loss

        optimizer.step(closure)


def tampered(graph, how):
    graph = copy.deepcopy(graph)
    nodes = graph.record.slot_nodes
    if how == "order":  # two channels are read at each other's place
        nodes["a.0.weight", 1] = nodes["a.0.weight", 1][[1, 0, *range(2, 16)]]
    elif how == "place":  # a follower loses the wrong channel
        nodes["b.1.bias", 0] = nodes["b.1.bias", 0].flip(0)
    elif how == "forgotten":
        del nodes["head.weight", 1]
    elif how == "norm":  # same components, so the numbers agree: only the outputs tell
        nodes["stem.1.weight", 0], nodes["stem.1.bias", 0] = nodes["stem.1.weight", 0].flip(0), nodes["stem.1.bias", 0].flip(0)
    return graph


@pytest.mark.parametrize("how", ["order", "place", "forgotten", "norm"])
def test_a_wrong_graph_is_found_out_and_nothing_changes(trained, how):
    model, optimizer, ema, graph = trained
    before = bits(model, ema.model, optimizer)
    with pytest.raises(NotProved):
        shrink_(model, tampered(graph, how), {"stem.0": [1, 2, 5], "a.0": [0, 1]}, example("residual", 2), optimizer, ema)
    assert same(before, bits(model, ema.model, optimizer))
    assert all(module.training for module in model.modules())
    shrink_(model, graph, {"stem.0": [1, 2, 5], "a.0": [0, 1]}, example("residual", 2), optimizer, ema)


def test_an_output_that_differs_is_found_out_and_nothing_changes(trained, monkeypatch):
    """The numbers are right here; the values are not."""
    model, optimizer, ema, graph = trained
    from compression.tracing import cutting

    right = cutting.mask_

    def wrong(model, graph, keep):
        right(model, graph, keep)
        model.head.bias.data[0] += 0.01

    monkeypatch.setattr(cutting, "mask_", wrong)
    before = bits(model, ema.model, optimizer)
    with pytest.raises(NotProved, match="differs"):
        shrink_(model, graph, {"stem.0": [1, 2, 5]}, example("residual", 2), optimizer, ema)
    assert same(before, bits(model, ema.model, optimizer))


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("residual", {"stem": [0]}, "no channel group 'stem'"),
        ("residual", {"stem.0": [0, 16]}, "'stem.0' has 16 units"),
        ("residual", {"stem.0": [-1]}, "'stem.0' has 16 units"),
        ("residual", {"stem.0": []}, "'stem.0' must keep at least one"),
        ("residual", {"head": [0, 1]}, "'head' can't be cut: the network's output"),
        ("roll_one", {"a.0": [0, 1, 2]}, "'a.0' must keep .* fixed"),
        ("softmax", {"a.0": [0, 1, 2]}, "'softmax' in the network couples"),
    ],
)
def test_keep_sets_that_do_not_fit_are_named(name, keep, message):
    model = make(name)
    graph, before = trace(model, example(name)), bits(model)
    with pytest.raises(UserError, match=message):
        shrink_(model, graph, keep, example(name, 2))
    with pytest.raises(UserError, match=message):
        mask_(model, graph, keep)
    assert same(before, bits(model))


def test_an_average_of_another_network_is_refused(trained):
    model, optimizer, _, graph = trained
    other = EMA(make("concat"))
    before = bits(model, other.model, optimizer)
    with pytest.raises(UserError, match="moving average is of another network"):
        shrink_(model, graph, {"a.0": [0]}, example("residual", 2), optimizer, other)
    assert same(before, bits(model, other.model, optimizer))


def test_nothing_to_remove_changes_nothing(trained):
    model, optimizer, ema, graph = trained
    before = bits(model, ema.model, optimizer)
    assert shrink_(model, graph, {}, example("residual", 2), optimizer, ema) == 0
    shrink_(model, graph, {group.name: range(group.size) for group in graph.groups}, example("residual", 2), optimizer, ema)
    assert same(before, bits(model, ema.model, optimizer))


# ---- what an optimizer remembers
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, fused=True),
    "SGD plain": lambda p: torch.optim.SGD(p, 0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01, t0=1),
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
}


def test_every_optimizer_of_torch_is_tried():
    classes = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    assert classes - {"Optimizer"} <= {name.split()[0] for name in OPTIMIZERS} | {"LBFGS", "SparseAdam", "Muon"}


def decayed_groups(model):
    """Weights apart from the rest, as train.py has them."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]


def check_optimizer(model, optimizer, make_optimizer, keep, inputs, loss_of):
    graph = trace(model, inputs[:1])
    names = {id(p): name for name, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    old = {names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    indices = graph.indices(keep)
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    shrink_(model, graph, keep, inputs, optimizer)

    new = dict(model.named_parameters())
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(new[name]) for name in group] for group in order]
    assert options == [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert {id(p) for p in optimizer.state} == {id(new[name]) for name in old}
    narrow = copy.deepcopy(model)
    theirs = dict(narrow.named_parameters())
    other = make_optimizer([{**o, "params": [theirs[name] for name in group]} for o, group in zip(options, order, strict=True)])
    cut_something = False
    for name, state in old.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                for dim, index in indices.get(name, {}).items():
                    if value.shape[dim] == graph.shapes[name][dim]:
                        value, cut_something = value.index_select(dim, index), True
            state[key] = value
        assert same(optimizer.state[new[name]], state)
        other.state[theirs[name]] = copy.deepcopy(state)
    for network, stepped in ((model, optimizer), (narrow, other)):
        network.zero_grad()
        loss_of(network).backward()
        stepped.step()
    assert all(torch.equal(new[name], theirs[name]) for name in new)
    assert all(p.isfinite().all() for p in model.parameters())
    return cut_something


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_remembers_is_cut_alike(name):
    model = make("residual").train()
    optimizer = OPTIMIZERS[name](decayed_groups(model))
    step_(model, optimizer)

    def loss_of(network):
        return F.cross_entropy(network(example("residual", 4, seed=3)), torch.tensor([0, 1, 2, 3]))

    cut = check_optimizer(model, optimizer, OPTIMIZERS[name], {"stem.0": [1, 2, 5, 6], "a.0": [0, 3]}, example("residual", 2), loss_of)
    assert cut == (name != "SGD plain")
    state = copy.deepcopy(optimizer.state_dict())
    fresh = OPTIMIZERS[name](decayed_groups(model))
    fresh.load_state_dict(state)  # as a restart does


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_which_takes_matrices_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)).train()
    inputs = torch.randn(4, 3, 2, 2, generator=seeded())
    optimizer = torch.optim.Muon(model.parameters())
    model(inputs).square().mean().backward()
    optimizer.step()
    assert check_optimizer(model, optimizer, torch.optim.Muon, {"1": [2, 3, 11]}, inputs, lambda network: network(inputs).square().mean())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("net", ["residual", "conv alone"])
def test_lbfgs_is_refused_by_name(steps, net):
    model = make("residual").train()
    parameters = model.parameters() if net == "residual" else [model.b[0].bias]
    optimizer = torch.optim.LBFGS(parameters, max_iter=2)
    step_(model, optimizer, steps)
    graph, before = trace(model, example("residual")), bits(model, optimizer)
    with pytest.raises(UserError, match="LBFGS"):
        shrink_(model, graph, {"stem.0": [1, 2]}, example("residual", 2), optimizer)
    assert same(before, bits(model, optimizer))


def test_an_optimizer_of_a_part_of_the_network_and_frozen_parameters():
    model = make("residual").train()
    model.stem.requires_grad_(False)
    optimizer = torch.optim.Adam([*model.a.parameters(), *model.head.parameters()])
    step_(model, optimizer)
    kept = optimizer.state[model.head.bias]
    shrink_(model, trace(model, example("residual")), {"stem.0": [1, 2], "a.0": [0]}, example("residual", 2), optimizer)
    assert len(optimizer.state) == 6
    assert optimizer.state[model.head.bias] is kept  # what does not change stays the same object
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.a.parameters())
    step_(model, optimizer)


@pytest.mark.parametrize("name", ["residual", "index_buffer", "pad_shortcut", "many_groups", "Tied", "instance_norm"])
def test_a_moving_average_is_cut_alike(name):
    model = make(name).train()
    ema = EMA(make(name, seed=3))
    graph, before = trace(model, example(name)), copy.deepcopy(ema.model)
    keep = random_keep(graph, 0.5, seeded())
    alone = copy.deepcopy(before)
    shrink_(model, graph, keep, example(name, 2), ema=ema)
    shrink_(alone, graph, keep, example(name, 2))
    assert same(ema.model.state_dict(), alone.state_dict())
    assert repr(ema.model) == repr(alone)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    ema.update_(model)


def test_masking_is_what_a_shrunk_network_is_compared_with():
    """By hand: rows, columns, norm and bias of a removed channel are zero, all else is as it was."""
    model = make("residual")
    dense, graph = copy.deepcopy(model), trace(model, example("residual"))
    mask_(model, graph, {"a.0": [0, 1, 2, 4, 5, 6, 7]})
    assert not model.a[0].weight[3].any()
    assert (model.a[0].bias[3], model.a[1].weight[3], model.a[1].bias[3]) == (0, 0, 0)
    assert not model.b[0].weight[:, 3].any()
    rest = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    assert torch.equal(model.b[0].weight[:, rest], dense.b[0].weight[:, rest])
    assert torch.equal(model.a[1].running_mean, dense.a[1].running_mean)
    assert torch.equal(model.stem[0].weight, dense.stem[0].weight)


def test_a_cut_can_be_repeated():
    model = make("pad_shortcut")
    for _ in range(3):
        graph = trace(model, example("pad_shortcut"))
        check_cut(model, graph, random_keep(graph, 0.3, seeded()), example("pad_shortcut", 2))


def test_bfloat16_networks_are_compared_in_a_type_that_can_tell():
    model = make("residual").bfloat16()
    graph = trace(model, example("residual").bfloat16())
    assert shrink_(model, graph, random_keep(graph, 0.5, seeded()), example("residual", 2).bfloat16()) <= 1e-4
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


EXPORTED = {"pad_shortcut": (), "two_groups": (), **dict.fromkeys(("shuffle", "index_buffer", "quarters"), pytest.mark.exhaustive)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in EXPORTED.items()])
def test_an_exported_shrunk_network_agrees(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = make(name).eval()
    graph = trace(model, example(name))
    shrink_(model, graph, random_keep(graph, 0.5, seeded()), example(name, 2))
    path, inputs = tmp_path / "model.onnx", example(name, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (inputs,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    close([torch.from_numpy(found[0])], outputs(model, inputs))
