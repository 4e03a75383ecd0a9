"""What Distiller got wrong, by the numbers of the list that we keep of it (10 is export, which has tests of its own).

Each test would fail if the fault were here. Some have closer tests elsewhere, which are named.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compression.schedule.loop import ScheduledLoop
from compression.schedule.pruners import PRUNERS, Moment, PruningTask
from compression.schedule.reading import read_schedule
from compression.scoring.calibration import sample
from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from models import networks
from utils.data.loaders import Draw
from utils.errors import UserError
from utils.measures.metrics import Evaluation
from utils.options import Place, build
from utils.output.logs import History
from utils.spec import ModelSpec

AGP = {"class": "AutomatedGradualPruner", "initial_sparsity": 0.25, "final_sparsity": 0.5, "weights": "weight"}
SCHEDULE = """
version: 1
pruners:
  spread: {class: SensitivityPruner, sensitivities: {'layer1.?.conv?.weight': 0.5}}
lr_schedulers:
  lr: {class: ExponentialLR, gamma: 0.5}
policies:
  - pruner: {instance_name: spread, args: {use_double_copies: true}}
    starting_epoch: 0
    ending_epoch: 3
  - lr_scheduler: {instance_name: lr}
    starting_epoch: 0
"""


def linear(*values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def loop_of(content, model, optimizer=None, epochs=10, **more):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ScheduledLoop(content, model, optimizer, epochs, 1, report=lambda _: None, **more)


def pruning(described, window, **arguments):
    return {"pruners": {"mine": described}, "policies": [{"pruner": {"instance_name": "mine", "args": arguments}, **window}]}


def step(loop, inputs, targets=None):
    """One batch; the loss is the sum of the outputs, or the cross-entropy with targets."""
    model, optimizer = loop.state.model, loop.state.optimizer
    loop.on_minibatch_begin(0, inputs, torch.zeros(len(inputs), dtype=torch.int64) if targets is None else targets)
    outputs = model(inputs)
    loss = loop.before_backward_pass(outputs, outputs.sum() if targets is None else nn.functional.cross_entropy(outputs, targets))
    optimizer.zero_grad()
    loss.backward()
    loop.before_parameter_optimization()
    optimizer.step()
    loop.on_minibatch_end()
    return loss


def small(folder, **more):
    flags = {"data": "digits", "model": "resnet20", "imgsz": 16, "batch_size": 64, "workers": 0, "device": "cpu", "amp": False}
    return TrainArguments(**{**flags, "effective_train_size": 0.1, "epochs": 2, "project": str(folder), **more})


def test_fault_1_a_restart_takes_up_policies_rates_draws_and_the_split(tmp_path):
    # processes that are killed, AMP, thinning: tests/compression/training/test_resume_schedule.py
    # by hand: tests/compression/schedule/test_policies.py
    path, last = tmp_path / "schedule.yaml", tmp_path / "runs" / "exp" / "weights" / "last.pt"
    path.write_text(SCHEDULE)
    last.parent.mkdir(parents=True)
    arguments = small(tmp_path / "runs", compress=str(path), augment="default", mixup=0.3, dropout=0.1)
    whole = ClassifierCompressor(arguments)
    whole.train_one_epoch()
    whole.save_checkpoint(last)
    deviations = dict(whole.scheduler.policies[0].pruner.state_dict()["deviations"])
    whole.train_one_epoch()
    torch.manual_seed(12345)  # what another process would have drawn
    again = ClassifierCompressor(TrainArguments(resume=str(last.parent.parent)))
    assert again.run.epoch == 1
    assert again.run.optimizer.param_groups[0]["lr"] == pytest.approx(0.03 * 0.5)
    assert again.data.split("val").digest() == whole.data.split("val").digest()
    resumed = again.scheduler.policies[0].pruner.state_dict()["deviations"]
    assert resumed
    assert all(torch.equal(value, deviations[name]) for name, value in resumed.items())
    assert again.scheduler.masks.hidden
    again.train_one_epoch()
    for ours, theirs in ((again.run.model, whole.run.model), (again.run.averaged, whole.run.averaged)):
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert again.run.optimizer.param_groups[0]["lr"] == pytest.approx(0.03 * 0.25)


def test_fault_2_a_pruner_and_a_quantizer_act_on_one_weight_under_its_own_name():
    # AGP prunes half of 4 weights at epoch 0; quantized to 2^8 - 1 levels from the same epoch on, the pruned ones stay zero
    content = pruning({**AGP, "initial_sparsity": 0.5, "final_sparsity": 0.5, "weights": "0.weight"}, {"epochs": [0]})
    content["quantizers"] = {"dorefa": {"class": "DorefaQuantizer", "bits_weights": 8}}
    content["policies"].append({"quantizer": {"instance_name": "dorefa"}, "starting_epoch": 0, "ending_epoch": 4})
    loop = loop_of(content, nn.Sequential(linear(1.0, 2.0, 3.0, 4.0)))
    for epoch in range(2):
        loop.on_epoch_begin(epoch)
        step(loop, torch.ones(1, 4))
        loop.on_epoch_end()
    model = loop.state.model
    trained = next(parameter for name, parameter in model.named_parameters() if name.endswith("float_weight"))
    image = next(buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "weight")
    assert trained.flatten().tolist()[:2] == image.flatten().tolist()[:2] == [0.0, 0.0]
    assert (trained.flatten()[2:] != 0).all()


def test_fault_3_masks_are_kept_and_the_sparsity_is_final_at_the_last_epoch_that_really_acts():
    # frequency 2 on 0 to 4: the last epoch is 2, and not 3
    window = {"starting_epoch": 0, "ending_epoch": 4, "frequency": 2}
    loop = loop_of(pruning(AGP, window, keep_mask=True, use_double_copies=True), linear(1.0, 2.0, 3.0, 4.0))
    zeros, hidden = [], []
    for epoch in range(6):
        loop.on_epoch_begin(epoch)
        step(loop, torch.zeros(1, 4))
        zeros.append(int((loop.state.model.weight == 0).sum()))
        loop.on_epoch_end()
        hidden.append(bool(loop.scheduler.masks.hidden))
    assert zeros == [1, 1, 2, 2, 2, 2]  # 25 % and 50 % of 4
    assert hidden == [True, True, False, False, False, False]


def test_fault_4_the_teacher_is_in_eval_mode_and_the_regularization_is_not_scaled(tmp_path):
    # more of both: tests/compression/distillation/test_teacher.py, tests/compression/distillation/test_losses.py
    spec = ModelSpec("resnet20", 3, imgsz=16, channels=1)
    torch.manual_seed(0)
    student, teacher = networks.build(spec), networks.build(spec)
    file = str(tmp_path / "teacher.pt")
    torch.save(teacher.train().state_dict(), file)
    content = {
        "regularizers": {"l1": {"class": "L1Regularizer", "reg_regims": {"fc.weight": 0.5}}},
        "distillers": {"kd": {"class": "KnowledgeDistillation", "teacher": "resnet20", "resume": file, "student_wt": 0.0}},
        "policies": [
            {"regularizer": {"instance_name": "l1"}, "epochs": [0]},
            {"distiller": {"instance_name": "kd"}, "starting_epoch": 0},
        ],
    }
    loop = loop_of(content, student.train(), spec=spec)
    frozen = loop.scheduler.policies[1].teacher.model
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    norm = student.fc.weight.abs().sum().item()
    loop.on_epoch_begin(0)
    loss = step(loop, torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert not any(module.training for module in frozen.modules())
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())  # batch norm's statistics too
    assert loop.state.loss_parts["l1"].item() == pytest.approx(0.5 * norm)
    rest = loop.state.loss_parts["distillation"].item()
    assert loop.state.loss_parts["classification"].item() == 0  # the student's weight is 0
    assert loss.item() == pytest.approx(0.5 * norm + rest, rel=1e-5)


def ask(name, arguments, weights, epoch=0, scores=None, pruner=None):
    pruner = pruner or build(PRUNERS[name], arguments, Place("mine", {key: value.ndim for key, value in weights.items()}, {}))
    given = scores or {}
    task = PruningTask(Moment(epoch, 0, 9, 10), weights, {}, torch.Generator(), lambda _: given, lambda _: {}, nn.Identity(), lambda: None)
    return pruner, pruner.decide(task).masks


def test_fault_5_ties_are_not_over_pruned():
    _, masks = ask("SparsityLevelParameterPruner", {"levels": {"w": 0.3}}, {"w": torch.ones(2, 5)})
    assert int((masks["w"] == 0).sum()) == 3  # 30 % of 10; every weight is the same


def test_fault_5_the_highest_mean_activations_stay():
    arguments = {"group_type": "Filters", "desired_sparsity": 0.5, "weights": "w"}
    scores = {"w": torch.tensor([0.1, 0.9, 0.8, 0.2], dtype=torch.float64)}
    _, masks = ask("ActivationMeanRankedFilterPruner", arguments, {"w": torch.ones(4, 1, 1, 1)}, scores=scores)
    assert masks["w"].flatten().tolist() == [0, 1, 1, 0]


def test_fault_5_what_follows_a_leader_is_decided_anew_at_every_asking():
    arguments = {"group_type": "Filters", "desired_sparsity": 0.5, "weights": ["a", "b"], "group_dependency": "Leader"}
    weights = {"a": torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), "b": torch.tensor([9.0, 8.0]).view(2, 1, 1, 1)}
    pruner, masks = ask("L1RankedStructureParameterPruner", arguments, weights)
    assert masks["b"].flatten().tolist() == [0, 1]
    _, masks = ask("", {}, {**weights, "a": weights["a"].flip(0)}, epoch=1, pruner=pruner)
    assert masks["a"].flatten().tolist() == masks["b"].flatten().tolist() == [1, 0]


def test_fault_5_a_list_of_epochs_goes_with_gradual_pruning():
    loop = loop_of(pruning(AGP, {"epochs": [1, 3, 5]}), linear(1.0, 2.0, 3.0, 4.0))
    zeros = []
    for epoch in range(7):
        loop.on_epoch_begin(epoch)
        zeros.append(int((loop.state.model.weight == 0).sum()))
        loop.on_epoch_end()
    # in epoch 3, half of the way, 0.5 - 0.25 * 0.5^3 = 0.46875 of 4 weights: 1
    assert zeros == [0, 1, 1, 1, 1, 2, 2]


POLICIES = "policies: [{pruner: {instance_name: p}, epochs: [0]}]\n"
PRUNER = "pruners: {p: {class: MagnitudeParameterPruner, thresholds: {weight: 0.1}}}\n"
BROKEN = {
    "python tags": (PRUNER + POLICIES + "version: !!python/object/apply:os.mkdir [hacked]\n", "python/object"),
    "duplicate keys": (PRUNER + PRUNER.replace("0.1", "0.2") + POLICIES, "lines 1 and 2, with different values"),
    "unknown section": (PRUNER + POLICIES + "prunners: {}\n", "unknown section 'prunners'. Did you mean 'pruners'?"),
    "no policies": (PRUNER, "'policies' must be a list that says what acts when"),
    "a name that matches nothing": (PRUNER.replace("weight", "wieght") + POLICIES, "matches no parameter. Did you mean 'weight'?"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_fault_6_a_file_is_data_and_nothing_in_it_is_overlooked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BROKEN[name]
    path = tmp_path / "schedule.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_schedule(path, {"weight": 2})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_fault_7_the_best_is_the_most_accurate_epoch_that_is_sparse_enough():
    loop = loop_of(pruning(AGP, {"starting_epoch": 0, "ending_epoch": 2}), linear(1.0, 2.0))
    kept = []
    history = History(None, lambda run: kept.append(run.epoch), loop.scheduler.target_reached)
    for epoch, top1 in enumerate([0.9, 0.5, 0.7, 0.6]):  # dense, then as sparse as asked for, then sparser by a hair
        evaluation = Evaluation(top1, 1.0, 1.0, 4, torch.zeros(2, 2))
        run = SimpleNamespace(epoch=epoch, evaluation=evaluation, loss_sums={}, images_seen=1, optimizer=loop.state.optimizer, metrics={})
        history.on_epoch_end(run)
    assert history.best_epoch == 3
    assert kept == [0, 1, 2]  # until the sparsity is there, the best so far is kept for want of a better


@pytest.fixture(scope="module")
def compressor(tmp_path_factory):
    return ClassifierCompressor(small(tmp_path_factory.mktemp("faults"), augment="strong"))


def test_fault_7_validation_is_not_augmented(compressor):
    def drawn(dataset, seed):
        return torch.as_tensor(dataset.__getitems__([Draw(position, seed) for position in range(20)]).images)

    feed = compressor.feed
    assert torch.equal(drawn(feed.val_set, 1), drawn(feed.val_set, 2))
    assert not torch.equal(drawn(feed.train_set, 1), drawn(feed.train_set, 2))


def test_fault_7_what_a_schedule_measures_on_are_training_images(compressor):
    def contents(images):
        return {image.numpy().tobytes() for image in images}

    data, spec = compressor.data, compressor.spec
    every = {name: contents(sample(split, spec, len(split), 64, 0).images) for name, split in data.splits.items()}
    measured = contents(compressor.feed.calibration().images)
    assert len(measured) > 200
    assert measured <= every["train"]
    others = set().union(*(images for name, images in every.items() if name != "train"))
    assert others
    assert not measured & (others - every["train"])


class Ties(nn.Module):
    """a is added to b; the sum stands beside c."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, 3, 1, bias=False) for _ in range(3))
        self.head = nn.Linear(6, 2, bias=False)

    def forward(self, x):
        return self.head(torch.cat([self.a(x) + self.b(x), self.c(x)], 1).relu().mean((2, 3)))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_fault_8_thinning_knows_sums_and_joins_and_slices_what_any_optimizer_remembers(name):
    # networks of ours, averages, masks, reloading: tests/compression/schedule/test_thinning.py
    torch.manual_seed(0)
    model, options = Ties(), {} if name == "AdamW" else {"momentum": 0.9}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)
    content = {"extensions": {"thin": {"class": "FilterRemover"}}, "policies": [{"extension": {"instance_name": "thin"}, "epochs": [1]}]}
    images = torch.randn(4, 1, 3, 3)
    loop = loop_of(content, model, optimizer, examples=(images, torch.tensor([0, 1, 0, 1])))
    loop.on_epoch_begin(0)
    step(loop, images, torch.tensor([0, 1, 0, 1]))
    with torch.no_grad():
        model.a.weight[[0, 1]] = 0
        model.b.weight[[1, 2]] = 0  # of the sum, 1 alone is made by neither
        model.c.weight[0] = 0
    state = {key: value.clone() for key, value in optimizer.state[model.head.weight].items() if value.ndim}
    assert state
    before = model(images).detach()
    loop.on_epoch_begin(1)
    loop.on_minibatch_begin(0, images, torch.tensor([0, 1, 0, 1]))
    assert [len(layer.weight) for layer in (model.a, model.b, model.c)] == [2, 2, 2]
    assert torch.allclose(model(images), before, atol=1e-5)
    columns = torch.tensor([0, 2, 4, 5])  # of the sum 0 and 2, then c's second and third
    assert all(torch.equal(optimizer.state[model.head.weight][key], value[:, columns]) for key, value in state.items())
    step(loop, images, torch.tensor([0, 1, 0, 1]))


def test_fault_9_masks_hold_on_momentum():
    # other optimizers, and averages: tests/compression/schedule/test_masks.py
    model = linear(1.0, 4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop = loop_of(pruning({"class": "MagnitudeParameterPruner", "thresholds": {"weight": 2.0}}, {"epochs": [1]}), model, optimizer)
    loop.on_epoch_begin(0)
    step(loop, torch.ones(1, 2))
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    assert momentum.tolist() == [[1, 1]]
    loop.on_epoch_begin(1)
    assert momentum.tolist() == [[0, 1]]
    step(loop, torch.ones(1, 2))
    assert momentum[0].tolist() == [0, pytest.approx(1.9)]
    assert model.weight[0].tolist() == [0, pytest.approx(4 - 0.1 - 0.19)]


@pytest.mark.parametrize("double", [False, True])
def test_fault_9_what_is_masked_in_the_forward_pass_only_is_validated_masked(double):
    described = {"class": "MagnitudeParameterPruner", "thresholds": {"weight": 2.0}}
    arguments = {"mask_on_forward_only": True, "use_double_copies": double}
    loop = loop_of(pruning(described, {"epochs": [0]}, **arguments), linear(1.0, 4.0))
    loop.on_epoch_begin(0)
    step(loop, -torch.ones(1, 2))
    assert loop.state.model(torch.tensor([1.0, 0.0])).item() == 0  # what a validation sees
    assert loop.state.model(torch.tensor([0.0, 1.0])).item() == pytest.approx(4.1)
