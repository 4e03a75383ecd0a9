"""Knowledge distillation (arXiv:1503.02531): a student learns from labels and from a teacher's outputs.

L = w_student * L_student + w_distill * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)) + w_teacher * CE(softmax(z_t), labels)

KL is summed over the classes and averaged over the batch; z_s, z_t are the logits, T is the temperature. The last term is
constant, for the log. L_student is the classification loss alone: what a regularizer adds to it is not scaled.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.distillation.arguments import DistillationArguments
from compression.distillation.teacher import Teacher
from models.loading import LoadedClassifier, load_classifier
from models.networks import ARCHITECTURES, build, resolve_model
from models.state_dicts import load_state_
from utils.errors import UserError
from utils.loop.hooks import Hook, LoopState
from utils.spec import ModelSpec

WEIGHTS_FILES = (".pt", ".pth", ".tar", ".ckpt", ".bin")


class DistillationLossWeights(NamedTuple):
    """Weights of the three terms; they need not sum to 1."""

    distill: float = 0.5
    student: float = 0.5
    teacher: float = 0.0


def check(arguments: DistillationArguments) -> None:
    """Check values and that the teacher has weights from one place.

    Raises:
        UserError: a value is out of range, or flags do not go together.
    """
    weights = DistillationLossWeights(arguments.kd_distill_wt, arguments.kd_student_wt, arguments.kd_teacher_wt)
    _check_values(arguments.kd_temperature, weights)
    if arguments.kd_start_epoch < 0:
        raise UserError(f"--kd-start-epoch is {arguments.kd_start_epoch}; it must be at least 0")
    is_file = _is_file(arguments.kd_teacher)
    if arguments.kd_pretrained and (not arguments.kd_teacher or is_file):
        raise UserError("--kd-pretrained needs --kd-teacher with the name of a torchvision or timm network")
    if arguments.kd_resume and (is_file or arguments.kd_pretrained):
        other = f"--kd-teacher {arguments.kd_teacher}" if is_file else "--kd-pretrained"
        raise UserError(f"--kd-resume and {other} exclude each other: both say where the teacher's weights come from")
    if arguments.kd_teacher and not (is_file or arguments.kd_resume or arguments.kd_pretrained):
        raise UserError(f"--kd-teacher {arguments.kd_teacher} has no weights; give --kd-resume FILE or --kd-pretrained")


def _check_values(temperature: float, weights: DistillationLossWeights) -> None:
    if not 0 < temperature < math.inf:
        raise UserError(f"the temperature of distillation is {temperature}; it must be above 0 and finite")
    for name, weight in weights._asdict().items():
        if not 0 <= weight < math.inf:
            raise UserError(f"the {name} weight of distillation is {weight}; it must be at least 0 and finite")


def _is_file(teacher: str) -> bool:
    return Path(teacher).suffix in WEIGHTS_FILES or (Path(teacher).is_file() and Path(teacher).suffix not in (".yaml", ".yml"))


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), averaged over the batch.

    Args:
        student_logits: [B, classes]; computed with in float32 at least.
        teacher_logits: [B, classes]; gets no gradient.
        temperature: T.

    Raises:
        UserError: the two shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(f"the teacher's outputs are {list(teacher_logits.shape)}, the student's {list(student_logits.shape)}")
    student = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    teacher = teacher_logits.detach().to(student.dtype)
    logs = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return F.kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2


def load_teacher(arguments: DistillationArguments, student: ModelSpec, device: torch.device) -> Teacher:
    """Load the teacher that the arguments name.

    Raises:
        UserError: there is none, its weights can't be had, or it does not fit the student.
    """
    check(arguments)
    name, path = arguments.kd_teacher, arguments.kd_resume
    if _is_file(name):
        name, path = "", name
    if not (name or path):
        raise UserError("distillation needs a teacher; give --kd-teacher or --kd-resume")
    return Teacher(_from_file(path, name, student) if path else _pretrained(name, student), student, device=device)


def _from_file(path: str, name: str, student: ModelSpec) -> LoadedClassifier:
    try:
        loaded = load_classifier(path, name or None)
    except UserError as error:
        reason = str(error).replace("--model", "--kd-teacher")
        raise UserError(f"the teacher can't be loaded: {reason}") from None
    if not loaded.checkpoint and not loaded.named and loaded.spec.channels == student.channels:
        loaded.spec = loaded.spec.with_(mean=student.mean, std=student.std)
        loaded.notes.append("the teacher's file does not say its normalisation; it gets the student's")
    return loaded


def _pretrained(name: str, student: ModelSpec) -> LoadedClassifier:
    resolved, definition = resolve_model(name)
    if definition is not None or resolved in ARCHITECTURES:
        raise UserError(f"--kd-pretrained is for torchvision's and timm's networks; for '{name}' give a file with --kd-resume")
    from models.networks import external  # imports torchvision, which takes seconds

    state = external.pretrained_state(resolved)
    spec = ModelSpec(resolved, student.num_classes, **external.pretrained_preprocessing(resolved))
    model = build(spec)
    for key, value in model.state_dict().items():
        if key in state and state[key].shape != value.shape:  # the head, which load_state_ would leave fresh
            trained = f"{key} is {list(state[key].shape)}, not {list(value.shape)}"
            raise UserError(f"the pretrained teacher '{name}' has other classes than the student's {student.num_classes}: {trained}")
    return LoadedClassifier(model, spec, load_state_(model, state), named=False)


class KnowledgeDistillationPolicy(Hook):
    """Adds the distillation loss to a batch's loss.

    In a loop of one's own ``forward`` stands where the student would be called; without it, the teacher runs on
    ``run.inputs`` before the backward pass.

    Args:
        student_model: what ``forward`` calls.
        teacher: a ``Teacher``, or a module that becomes one.
        temperature: T.
        loss_wts: weights of the terms.

    Raises:
        UserError: a value is out of range, or teacher and student share parameters.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher: Teacher | nn.Module,
        temperature: float = 1.0,
        loss_wts: DistillationLossWeights = DistillationLossWeights(),  # noqa: B008 - immutable
    ) -> None:
        _check_values(temperature, loss_wts)
        network = teacher.model if isinstance(teacher, Teacher) else teacher
        if {id(value) for value in network.parameters()} & {id(value) for value in student_model.parameters()}:
            raise UserError("the teacher shares parameters with the student, but is frozen; give it a copy")
        self.student, self.temperature, self.weights = student_model, temperature, loss_wts
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self._forward: tuple[Tensor, Tensor] | None = None  # outputs of student and teacher

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run teacher and student on a batch; return the student's outputs."""
        outputs: Tensor = self.student(*inputs)
        self._forward = (outputs, self.teacher(*inputs)) if torch.is_grad_enabled() else None  # a validation needs no teacher
        return outputs

    def on_minibatch_begin(self, run: LoopState) -> None:
        self._forward = None

    def before_backward_pass(self, run: LoopState) -> Tensor:
        if self._forward is None and not run.inputs.numel():
            raise UserError("distillation does not know the batch: call the policy's forward(inputs) in place of the student")
        student, teacher = self._forward or (run.outputs, self.teacher(run.inputs, precision=run.precision))
        self._forward = None
        classification = run.loss_parts.get("classification", run.loss)
        others = None if run.loss is classification else run.loss - classification
        parts = {
            "classification": self.weights.student * classification,
            "distillation": self.weights.distill * distillation_loss(student, teacher, self.temperature),
        }
        if self.weights.teacher:
            if not run.targets.numel():
                raise UserError("the teacher's own loss needs the labels; leave its weight at 0 or give the targets")
            parts["teacher"] = self.weights.teacher * F.cross_entropy(teacher, run.targets)
        run.loss_parts.update(parts)
        loss = torch.stack(list(parts.values())).sum()
        return loss if others is None else others + loss

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("teacher") != self.teacher.digest:
            raise UserError("the run that is resumed was distilled from another teacher; give the same --kd-teacher or --kd-resume")
