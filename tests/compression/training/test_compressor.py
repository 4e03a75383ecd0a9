"""The class behind train.py, as a notebook uses it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch import nn

from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from models.loading import load_classifier
from tests.schedules import THINNING, filters, once
from utils.errors import UserError

THINS = {
    "version": 1,
    "pruners": {"filters": filters(["layer1.0.conv1.weight"])},
    "extensions": THINNING,
    "policies": [once("pruner", "filters", 1), once("extension", "thinning", 1)],
}


@pytest.fixture
def arguments(photos, tmp_path, monkeypatch):
    """Three epochs on 36 photos, with a schedule that thins in the second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thins.yaml").write_text(yaml.safe_dump(THINS))

    def make(**others):
        quick = {
            "data": str(photos),
            "model": "resnet20",
            "imgsz": 16,
            "batch_size": 12,
            "workers": 0,
            "epochs": 3,
            "compress": "thins.yaml",
        }
        return TrainArguments(**{**quick, **others})

    return make


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_constructor_and_the_measures_write_nothing(arguments, tmp_path):
    compressor = ClassifierCompressor(arguments())
    evaluation = compressor.validate()
    assert evaluation.images == 15
    assert compressor.test().images == 12
    assert compressor.validate(compressor.model).top1 == evaluation.top1  # nothing is trained: the average is the model
    assert "schedule pruner filters: L1RankedStructureParameterPruner, epochs 1" in compressor.summary()
    assert files(tmp_path) == ["thins.yaml"]


def test_the_loaders_are_those_of_the_run(arguments):
    loaders = ClassifierCompressor(arguments(compress="")).load_datasets()
    assert [len(batch.labels) for batch in loaders.train] == [12, 12, 12]
    assert sum(len(batch.labels) for batch in loaders.val) == 15
    assert sum(len(batch.labels) for batch in loaders.test) == 12
    half = ClassifierCompressor(arguments(compress="", effective_train_size=0.5)).load_datasets()
    assert [len(batch.labels) for batch in half.train] == [12, 6]


def test_data_without_a_test_split(arguments, photos):
    compressor = ClassifierCompressor(arguments(data=str(photos / "train"), compress=""))
    assert compressor.load_datasets().test is None
    with pytest.raises(UserError, match="test"):
        compressor.test()


def test_epochs_by_hand_and_then_the_loop_are_the_loop(arguments, tmp_path):
    loop = ClassifierCompressor(arguments(name="loop"))
    loop.run_training_loop()
    compressor = ClassifierCompressor(arguments(name="hand"))
    evaluation = compressor.train_one_epoch()
    assert evaluation.images == 15
    assert compressor.run.epoch == 1
    assert [row["top1"] for row in compressor.history.rows] == [evaluation.top1]
    assert 0 < compressor.history.rows[0]["seconds"] < 60  # of this run, not of the machine
    assert not (tmp_path / "runs/train/hand").exists()
    results = compressor.run_training_loop()
    expected, found = (torch.load(tmp_path / f"runs/train/{name}/weights/last.pt", weights_only=True) for name in ("loop", "hand"))
    assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in expected["state_dict"].items())
    assert found["state_dict"]["layer1.0.conv1.weight"].shape[0] == 8
    assert results["epochs"] == 3
    # 16 filters -> 8 in one convolution, with 16 inputs and 16 readers: 16 * 16 * 8 * (16 + 16) * 9 = 589,824 fewer
    dense = ClassifierCompressor(arguments(compress="")).profile.macs
    assert results["macs"] == json.loads((tmp_path / "runs/train/hand/results.json").read_text())["macs"] == dense - 589_824


def test_a_best_epoch_that_was_trained_by_hand_is_kept(arguments, monkeypatch):
    compressor = ClassifierCompressor(arguments(compress="", epochs=2, patience=1))
    best = compressor.train_one_epoch()
    perfect = type(best)(1.0, 1.0, 0.0, best.images, best.confusion)
    compressor.history.best = perfect  # no later epoch beats it
    average = {name: tensor.clone() for name, tensor in compressor.run.averaged.state_dict().items()}
    results = compressor.run_training_loop()
    assert results["best_epoch"] == 1
    state = torch.load(results["checkpoint"], weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in average.items())


def test_a_saved_state_loads_and_goes_on(arguments, tmp_path):
    whole = ClassifierCompressor(arguments())
    for _ in range(2):
        whole.train_one_epoch()
    path = tmp_path / "elsewhere/weights/last.pt"
    whole.save_checkpoint(path)
    loaded = load_classifier(path)
    assert loaded.model.layer1[0].conv1.weight.shape[0] == 8
    assert loaded.spec.class_names == ("blue", "green", "red")
    resumed = ClassifierCompressor(TrainArguments(resume=str(path)))
    assert resumed.run.epoch == 2
    assert [row["epoch"] for row in resumed.history.rows] == [1, 2]
    whole.train_one_epoch()
    resumed.train_one_epoch()
    for (name, tensor), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_restarted_workers_go_on_with_their_own_run_though_it_began_from_another_s_weights(arguments, tmp_path, monkeypatch):
    first = ClassifierCompressor(arguments(compress="", epochs=1, name="first")).run_training_loop()
    begun = ClassifierCompressor(arguments(compress="", model="", resume=str(tmp_path / "runs/train/first"), reset_optimizer=True))
    begun.train_one_epoch()
    begun.save_checkpoint(tmp_path / "runs/train/exp/weights/last.pt")
    (tmp_path / "runs/train/exp/.launch").write_text("this launch")
    monkeypatch.setattr("utils.distributed.restarts", lambda: 1)
    monkeypatch.setattr("utils.distributed.launch_id", lambda: "this launch")
    flags = {"model": "", "compress": "", "resume": first["checkpoint"], "reset_optimizer": True}
    again = ClassifierCompressor(arguments(**flags), given={"resume", "reset_optimizer", "batch_size"})
    assert again.directory.path.name == "exp"
    assert again.run.epoch == 1


def test_a_script_directory_takes_the_runs(arguments, tmp_path):
    results = ClassifierCompressor(arguments(epochs=1, compress=""), script_directory=tmp_path / "scripts").run_training_loop()
    assert results["checkpoint"] == str(tmp_path / "scripts/runs/train/exp/weights/best.pt")
    assert not (tmp_path / "runs").exists()


def test_a_schedule_that_sets_the_rate_says_what_it_makes_void(arguments, tmp_path):
    (tmp_path / "rate.yaml").write_text(
        "lr_schedulers: {falling: {class: ExponentialLR, gamma: 0.5}}\n"
        "policies: [{lr_scheduler: {instance_name: falling}, starting_epoch: 0}]\n"
    )
    note = "--cos-lr and --warmup-epochs have no effect"
    assert note in ClassifierCompressor(arguments(compress="rate.yaml", cos_lr=True)).summary()
    assert note not in ClassifierCompressor(arguments(compress="rate.yaml")).summary()
    assert note not in ClassifierCompressor(arguments(cos_lr=True)).summary()


def test_what_a_resumed_run_may_be_told_is_said(arguments, tmp_path):
    compressor = ClassifierCompressor(arguments())
    compressor.train_one_epoch()
    path = tmp_path / "run/weights/last.pt"
    compressor.save_checkpoint(path)
    with pytest.raises(UserError, match=r"--compress can't be changed by --resume-from: .* --device, --verbose and --workers; .* --reset-"):
        ClassifierCompressor(arguments(resume=str(path)), given={"resume", "compress"})
    anew = ClassifierCompressor(
        arguments(resume=str(path), reset_optimizer=True, model=""), given={"resume", "reset_optimizer", "compress"}
    )
    assert anew.run.epoch == 0
    assert not anew.run.optimizer.state
    average = compressor.run.averaged.state_dict()
    assert all(torch.equal(average[name], tensor) for name, tensor in anew.model.state_dict().items() if "tracked" not in name)
    assert isinstance(anew.model.fc, nn.Linear)
