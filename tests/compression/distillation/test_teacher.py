from __future__ import annotations

import pytest
import torch
from torch import nn

from compression.distillation.arguments import DistillationArguments
from compression.distillation.losses import load_teacher
from compression.distillation.teacher import Teacher
from models.loading import LoadedClassifier
from models.networks import build
from tests.teachers import Fixed, Noisy
from utils.errors import UserError
from utils.files.checkpoint import save_checkpoint
from utils.loop.precision import Precision
from utils.spec import ModelSpec

CPU = torch.device("cpu")


def spec(*names, **values):
    return ModelSpec("net", len(names), imgsz=8, class_names=names, **values)


def test_the_teacher_computes_in_the_runs_precision_and_answers_in_float32():
    network = Noisy()
    types = []
    network.conv.register_forward_hook(
        lambda _, inputs, output: types.append((output.dtype, inputs[0].is_contiguous(memory_format=torch.channels_last)))
    )
    teacher = Teacher(network)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert teacher(x, precision=Precision(CPU, torch.bfloat16)).dtype == torch.float32
    assert not teacher(x).requires_grad
    types.pop()
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(x).dtype == torch.float32  # in a loop of one's own: under its autocast
    teacher(x, precision=Precision(CPU))
    assert types == [(torch.bfloat16, True), (torch.bfloat16, True), (torch.float32, True)]


def test_inputs_get_the_teachers_normalisation():
    ours = spec("a", "b", mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    theirs = spec("a", "b", mean=(0.0, 0.5, 0.25), std=(1.0, 0.5, 0.25))
    seen = []
    network = Fixed([0.0, 1.0])
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher = Teacher(LoadedClassifier(network, theirs), ours)
    teacher(torch.ones(1, 3, 1, 1))
    # pixels 0.5 + 1 * 0.5 = 1, 0.75, 1: (1 - 0) / 1, (0.75 - 0.5) / 0.5, (1 - 0.25) / 0.25
    assert seen[-1].flatten().tolist() == [1, 0.5, 3]
    same = Teacher(network, ours, spec=ours)
    same(torch.ones(1, 3, 1, 1))
    assert seen[-1].flatten().tolist() == [1, 1, 1]


def test_logits_come_in_the_order_of_the_students_classes():
    teacher = Teacher(Fixed([1.0, 2.0, 3.0]), spec("ant", "bee", "cat"), spec=spec("cat", "ant", "bee"))
    assert teacher(torch.zeros(1, 3, 2, 2)).tolist() == [[2, 3, 1]]
    unnamed = Teacher(Fixed([1.0, 2.0, 3.0]), spec("ant", "bee", "cat"), spec=ModelSpec("net", 3))
    assert unnamed(torch.zeros(1, 3, 2, 2)).tolist() == [[1, 2, 3]]
    assert "no class names" in unnamed.notes[0]


@pytest.mark.parametrize(
    ("network", "theirs", "message"),
    [
        (Fixed([0.0, 1.0]), spec("a", "c"), r"teacher \(net\) has other classes than the student \(net\), as 'c': a, c; a, b"),
        (Fixed([0.0, 1.0]), spec("a", "a"), "other classes"),
        (Fixed([0.0, 1.0, 2.0]), spec("a", "b", "c"), "has 3 classes, the student"),
        (Fixed([0.0, 1.0]), spec("a", "b", channels=1), r"takes 1 input channel\(s\), the student \(net\) 3"),
        (Fixed([0.0, 1.0, 2.0]), None, r"outputs for one image are \[1, 3\]; the student has 2"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()), None, "can't take the student's images of 8 px"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(network, theirs, message):
    with pytest.raises(UserError, match=message):
        Teacher(network, spec("a", "b"), spec=theirs)


def test_the_digest_is_of_values_and_not_of_their_layout():
    network = Noisy()
    digest = Teacher(network).digest  # channels-last by now
    plain = Noisy()
    plain.load_state_dict(network.state_dict())
    assert Teacher(plain).digest == digest
    with torch.no_grad():
        plain.norm.running_var[2] += 1e-6
    assert Teacher(plain).digest != digest


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ResNet-20 of two classes, as a checkpoint of ours and as a plain state dict."""
    torch.manual_seed(0)
    described = ModelSpec("resnet20", 2, imgsz=16, class_names=("dog", "cat"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    network = build(described).eval()
    folder = tmp_path_factory.mktemp("teacher")
    save_checkpoint(folder / "ours.pt", {"spec": described.to_dict(), "state_dict": network.state_dict()})
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, folder / "plain.pth")
    return folder, network


def loaded(student, **arguments):
    return load_teacher(DistillationArguments(**{name: str(value) for name, value in arguments.items()}), student, CPU)


def test_a_teacher_from_a_checkpoint(checkpoint):
    folder, network = checkpoint
    student = ModelSpec("resnet56", 2, imgsz=16, class_names=("cat", "dog"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(x * 0.5 + 0.5)[:, [1, 0]]
    ours = folder / "ours.pt"
    teachers = [loaded(student, kd_teacher=ours), loaded(student, kd_resume=ours), loaded(student, kd_teacher="resnet_20", kd_resume=ours)]
    for teacher in teachers:
        assert torch.allclose(teacher(x), expected, atol=1e-5)
    assert len({teacher.digest for teacher in teachers}) == 1


def test_a_plain_state_dict_is_fed_as_the_student_is(checkpoint):
    folder, network = checkpoint
    student = ModelSpec("resnet56", 2, imgsz=16, class_names=("cat", "dog"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    x = torch.randn(2, 3, 16, 16)
    for given in ({"kd_teacher": "resnet20", "kd_resume": folder / "plain.pth"}, {"kd_teacher": folder / "plain.pth"}):
        teacher = loaded(student, **given)
        assert torch.allclose(teacher(x), network(x), atol=1e-5)
        assert any("normalisation" in note for note in teacher.notes)
        assert any("class names" in note for note in teacher.notes)


def test_checkpoints_that_make_no_teacher(checkpoint, tmp_path):
    ours = checkpoint[0] / "ours.pt"
    student = ModelSpec("resnet56", 2, imgsz=16, class_names=("dog", "cat"))
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    for given, message in (
        ({"kd_teacher": "resnet32", "kd_resume": ours}, r"--kd-teacher resnet32 does not go with .*ours.pt, which is a resnet20"),
        ({"kd_teacher": "resnet20", "kd_resume": tmp_path / "none.pt"}, "teacher can't be loaded: no weights file"),
        ({"kd_teacher": tmp_path / "broken.pt"}, "teacher can't be loaded"),
        ({"kd_teacher": "resnet20-b", "kd_resume": checkpoint[0] / "plain.pth"}, "do not fit the network"),
        ({}, "distillation needs a teacher"),
    ):
        with pytest.raises(UserError, match=message):
            loaded(student, **given)
    with pytest.raises(UserError, match="has 2 classes, the student"):
        loaded(ModelSpec("resnet56", 3, imgsz=16), kd_teacher=ours)


def test_a_pretrained_teacher(monkeypatch):
    from models.networks import external

    torch.manual_seed(0)
    network = external.build("squeezenet1_1", 5, 3)  # its head is a convolution
    monkeypatch.setattr(external, "pretrained_state", lambda name: dict(network.state_dict()))
    arguments = DistillationArguments(kd_teacher="squeezenet1_1", kd_pretrained=True)
    x = torch.randn(1, 3, 32, 32)
    teacher = load_teacher(arguments, ModelSpec("resnet56", 5, imgsz=32), CPU)
    assert torch.allclose(teacher(x), network.eval()(x), atol=1e-5)
    with pytest.raises(
        UserError, match=r"'squeezenet1_1' has other classes than the student's 2: classifier\.1\.weight is \[5, 512, 1, 1\]"
    ):
        load_teacher(arguments, ModelSpec("resnet56", 2, imgsz=32), CPU)
    with pytest.raises(UserError, match="give a file with --kd-resume"):
        load_teacher(DistillationArguments(kd_teacher="resnet56", kd_pretrained=True), ModelSpec("resnet56", 2, imgsz=32), CPU)
    with pytest.raises(UserError, match="Did you mean 'squeezenet1_1'"):
        load_teacher(DistillationArguments(kd_teacher="squeezenet11", kd_pretrained=True), ModelSpec("resnet56", 2, imgsz=32), CPU)
