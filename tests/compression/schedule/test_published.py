"""Distiller's shipped schedules for ResNet-56 and ResNet-18 end with the counts that their headers print."""

from __future__ import annotations

import pytest
import torch

from compression.schedule.loop import ScheduledLoop
from models.networks import build
from tests.compression.schedule.test_thinning import push
from tests.schedules import elements
from utils.measures.profile import count_macs
from utils.spec import ModelSpec

FIRST_OF_STAGE_2, FIRST_OF_STAGE_3 = (1, 2, 3, 4, 6, 7), (2, 3, 5, 6, 7, 8)


def convolutions(stage, blocks, which=1):
    return [f"module.layer{stage}.{block}.conv{which}.weight" for block in blocks]


def of_filters(first, second, third, fourth, **more):
    """Return a pruner for each share: of stage 1, most of stage 2, layer3.1 and most of stage 3."""
    layers = [convolutions(1, range(9)), convolutions(2, FIRST_OF_STAGE_2), convolutions(3, [1]), convolutions(3, FIRST_OF_STAGE_3)]
    return [{"weights": names, **more, **share} for names, share in zip(layers, (first, second, third, fourth), strict=True)]


def between(low, high):
    return {"initial_sparsity": low, "final_sparsity": high}


def by_filter_rank():
    named = [{"desired_sparsity": share} for share in (0.6, 0.5, 0.1, 0.3)]
    return of_filters(*named, **{"class": "L1RankedStructureParameterPruner", "group_type": "Filters"})


def by_apoz():
    shares = between(0.1, 0.7), between(0.1, 0.6), between(0, 0.2), between(0.1, 0.4)
    return of_filters(*shares, **{"class": "ActivationAPoZRankedFilterPruner_AGP", "group_type": "Filters"})


def by_channel_rank():
    stream = [*convolutions(1, (1, 0, *range(2, 9))), "module.layer2.0.conv1.weight", "module.layer2.0.downsample.0.weight"]
    shares = [(stream, 0.7, {"group_dependency": "Leader"}), (convolutions(2, FIRST_OF_STAGE_2, 2), 0.6, {})]
    shares += [(convolutions(3, [1], 2), 0.2, {}), (convolutions(3, FIRST_OF_STAGE_3, 2), 0.4, {})]
    kind = {"class": "L1RankedStructureParameterPruner", "group_type": "Channels"}
    return [{**kind, "weights": names, "desired_sparsity": share, **more} for names, share, more in shares]


def trained(name, classes, content, epochs):
    """Run a schedule over epochs of one batch each."""
    torch.manual_seed(0)
    spec = ModelSpec(name, classes, imgsz=32)
    model = build(spec)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 3])
    loop = ScheduledLoop(content, model, torch.optim.SGD(model.parameters(), 1e-4, 0.9), epochs, 1, images)
    for epoch in range(epochs):
        loop.on_epoch_begin(epoch)
        push(loop)
        loop.on_epoch_end()
    return spec, model


@pytest.mark.parametrize(
    ("pruners", "extension", "epochs", "weights", "macs"),
    [
        (by_filter_rank(), {"class": "FilterRemover", "thinning_func_str": "remove_filters"}, [0], 634_640, 78_856_832),
        (by_channel_rank(), {"class": "StructureRemover", "thinning_func_str": "remove_channels"}, [0], 566_887, 66_592_384),
        (by_apoz(), {"class": "FilterRemover", "thinning_func_str": "remove_filters"}, [0, 2, 4], 570_704, 67_797_632),
    ],
    ids=["filter_rank", "channel_rank", "activation_apoz_v2"],
)
def test_resnet56_is_thinned_to_the_published_counts(pruners, extension, epochs, weights, macs):
    end = epochs[-1]
    when = {"epochs": [0]} if end == 0 else {"starting_epoch": 0, "ending_epoch": end, "frequency": 2}
    content = {
        "version": 1,
        "pruners": {f"p{number}": pruner for number, pruner in enumerate(pruners)},
        "extensions": {"thinner": {**extension, "arch": "resnet56_cifar", "dataset": "cifar10"}},
        "policies": [
            *({"pruner": {"instance_name": f"p{number}"}, **when} for number in range(len(pruners))),
            {"extension": {"instance_name": "thinner"}, "epochs": [end]},
        ],
    }
    spec, model = trained("resnet56-b", 10, content, end + 1)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) == weights
    assert count_macs(model, spec) == macs


def test_resnet18_by_agp_keeps_what_the_published_run_kept():
    low = ["layer2.0.conv2", "layer3.1.conv1", "layer4.0.downsample.0"]
    mid = ["layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3.0.conv2"]
    high = ["layer1.0.conv1", "layer2.1.conv2", "layer3.0.conv1"]
    parts = {"low": (low, 0.60), "mid": (mid, 0.67), "high": (high, 0.76)}
    content = {
        "pruners": {name: elements([f"module.{layer}.weight" for layer in layers], 0.05, end) for name, (layers, end) in parts.items()},
        "policies": [{"pruner": {"instance_name": name}, "starting_epoch": 0, "ending_epoch": 4, "frequency": 2} for name in parts],
    }
    _, model = trained("resnet18", 1000, content, 5)
    kept = {name: int(model.get_parameter(f"{name}.weight").count_nonzero()) for layers, _ in parts.values() for name in layers}
    published = {"layer2.0.conv2": 58_983, "layer3.1.conv1": 235_930, "layer4.0.downsample.0": 52_429}
    published |= {"layer1.1.conv1": 12_166, "layer2.0.conv1": 24_331, "layer2.0.downsample.0": 2_704, "layer3.0.conv2": 194_642}
    published |= {"layer1.0.conv1": 8_848, "layer2.1.conv2": 35_390, "layer3.0.conv1": 70_779}
    assert kept == published
