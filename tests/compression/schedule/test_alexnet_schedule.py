"""The reference's AlexNet schedule runs unchanged on torchvision's alexnet: a quarter of the widths, 10 classes, images of 64 px."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from compression.schedule.loop import ScheduledLoop
from compression.schedule.reading import read_schedule
from compression.schedule.timeline import timeline
from models.networks import build
from models.networks.widths import resize_
from utils.spec import ModelSpec

PATH = Path(__file__).resolve().parents[3] / "data" / "schedules" / "alexnet_sensitivity.yaml"
REFERENCE = """
version: 1
pruners:
  my_pruner:
    class: 'SensitivityPruner'
    sensitivities:
      'features.module.0.weight': 0.25
      'features.module.3.weight': 0.35
      'features.module.6.weight': 0.40
      'features.module.8.weight': 0.45
      'features.module.10.weight': 0.55
      'classifier.1.weight': 0.875
      'classifier.4.weight': 0.875
      'classifier.6.weight': 0.625
lr_schedulers:
   pruning_lr:
     class: ExponentialLR
     gamma: 0.9
policies:
  - pruner:
      instance_name : 'my_pruner'
    starting_epoch: 0
    ending_epoch: 38
    frequency: 2
  - lr_scheduler:
      instance_name: pruning_lr
    starting_epoch: 24
    ending_epoch: 200
    frequency: 1
"""
SENSITIVITIES = {
    "features.0.weight": 0.25,
    "features.3.weight": 0.35,
    "features.6.weight": 0.40,
    "features.8.weight": 0.45,
    "features.10.weight": 0.55,
    "classifier.1.weight": 0.875,
    "classifier.4.weight": 0.875,
    "classifier.6.weight": 0.625,
}


def names():
    with torch.device("meta"):
        model = build(ModelSpec("alexnet", 10, imgsz=64))
    return {name: parameter.ndim for name, parameter in model.named_parameters()}


def quarter():
    """Build AlexNet with a quarter of the channels. The file names layers, whose widths play no part in it."""
    with torch.device("meta"):
        model = build(ModelSpec("alexnet", 10, imgsz=64))
        shapes = {
            name: [size // 4 if size > 10 and axis < 2 else size for axis, size in enumerate(p.shape)]
            for name, p in model.named_parameters()
        }
        resize_(model, {name: torch.empty(shape) for name, shape in shapes.items()})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.01)
    return model.train()


def test_the_alexnet_file_is_the_reference_s_character_for_character_behind_its_comment():
    text = PATH.read_text()
    assert "\n" + text[text.index("version") :] == REFERENCE
    assert yaml.safe_load(text)["pruners"]["my_pruner"]["sensitivities"]["features.module.8.weight"] == 0.45


def test_the_alexnet_timeline_and_its_drop_of_the_learning_rate():
    schedule = read_schedule(PATH, names())
    table = timeline(schedule, 90, 1.0)
    # a row for each epoch up to 36, the last that prunes; then 37 to 89, in which only the rate falls
    assert [line.split()[0] for line in table.splitlines()[1:]] == [str(epoch) for epoch in range(38)]
    assert re.search(r"^ +37 to 89 +0.02028 to 8.464e-05  pruning_lr$", table, re.MULTILINE)  # 0.9^37, 0.9^89
    assert re.search(r"^ +24 +1  my_pruner, pruning_lr$", table, re.MULTILINE)
    assert re.search(r"^ +25 +0.07179  pruning_lr$", table, re.MULTILINE)  # 0.9^25 = 0.0717898
    assert schedule.matches == {
        f"pruners.my_pruner.sensitivities.{key.replace('features.', 'features.module.')}": [key] for key in SENSITIVITIES
    }


def test_the_alexnet_schedule_runs_unchanged_its_masks_and_rates_are_those_worked_out_by_hand():
    torch.manual_seed(0)
    model = quarter()
    parameters = dict(model.named_parameters())
    initial = {name: parameters[name].detach().clone() for name in SENSITIVITIES}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = ScheduledLoop(PATH, model, optimizer, 90, 1, report=lambda line: None)
    inputs, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 7])
    rates, pruned = [], {}
    for epoch in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        loop.on_epoch_begin(epoch)
        if epoch == 0:  # asked in 0 and 2, with the deviation of the dense weights
            for name, weights in initial.items():
                expected = weights.abs() > SENSITIVITIES[name] * weights.std()
                assert torch.equal(loop.scheduler.masks.values[name].bool(), expected)
                assert torch.equal(parameters[name], weights * expected)
                assert 0.1 < float((~expected).float().mean()) < 0.9
        before = {name: parameters[name].detach().clone() for name in ("features.0.weight", "classifier.6.weight")}
        loop.on_minibatch_begin(0, inputs, labels)
        outputs = model(inputs)
        loss = loop.before_backward_pass(outputs, F.cross_entropy(outputs, labels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loop.before_parameter_optimization()
        optimizer.step()
        loop.on_minibatch_end()
        for name, mask in loop.scheduler.masks.values.items():
            assert not bool(parameters[name][mask == 0].any())
        assert all(not torch.equal(parameters[name], values) for name, values in before.items())
        loop.on_epoch_end()
        zero = {name: int((mask == 0).sum()) for name, mask in loop.scheduler.masks.values.items()}
        assert all(zero[name] >= count for name, count in pruned.items())  # nothing comes back
        assert epoch != 1 or zero == pruned  # epoch 1 does not ask
        pruned = zero
    for epoch in range(3, 90):
        rates.append(optimizer.param_groups[0]["lr"])
        loop.state.epoch = epoch
        loop.on_epoch_end()
    assert rates[:25] == [0.01] * 25  # up to epoch 24
    assert rates[25:] == pytest.approx([0.01 * 0.9**epoch for epoch in range(25, 90)], rel=1e-9)
    assert rates[25] == pytest.approx(0.000717898, rel=1e-5)
    loop.on_epoch_begin(38)  # the window lies behind; its masks do not go
    assert {name: int((mask == 0).sum()) for name, mask in loop.scheduler.masks.values.items()} == pruned
