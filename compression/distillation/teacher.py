"""The teacher of distillation: a frozen network that is asked about the batches that a student trains on."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from models.loading import LoadedClassifier
from utils.errors import UserError
from utils.loop.memory_format import channels_last
from utils.loop.precision import Precision
from utils.spec import ModelSpec


class Teacher:
    """A frozen network that sees what the student sees: always in eval mode, off the tape, channels-last.

    Where both specifications are known, inputs are converted from the student's normalisation to the teacher's, and the
    logits come in the order of the student's classes.

    Args:
        network: which is frozen in place; a ``LoadedClassifier`` brings its specification.
        student: the student's specification.
        spec: the teacher's, of a plain module.
        device: the student's; None leaves the network where it is.

    Raises:
        UserError: other classes or input channels than the student's, or it can't take the student's images.
    """

    def __init__(
        self,
        network: nn.Module | LoadedClassifier,
        student: ModelSpec | None = None,
        spec: ModelSpec | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.notes = list(network.notes) if isinstance(network, LoadedClassifier) else []
        self.spec = network.spec if isinstance(network, LoadedClassifier) else spec
        model = network.model if isinstance(network, LoadedClassifier) else network
        self.order: Tensor | None = None
        self.affine: tuple[Tensor, Tensor] | None = None
        if self.spec is not None and student is not None:
            self._adapt(self.spec, student)
        self.model = channels_last(model.requires_grad_(False).eval().to(device))
        self.device = next(self.model.parameters(), torch.zeros((), device=device)).device
        self.order = None if self.order is None else self.order.to(self.device)
        self.affine = None if self.affine is None else (self.affine[0].to(self.device), self.affine[1].to(self.device))
        if student is not None:
            self._try(student)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, precision: Precision | None = None) -> Tensor:
        """Return float32 logits [B, classes] for what the student gets; without a precision under the caller's autocast."""
        images, *others = inputs
        self.model.eval()
        if self.affine is not None:
            images = images * self.affine[0] + self.affine[1]
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with precision.autocast() if precision else nullcontext():
            logits: Tensor = self.model(images, *others)
        logits = logits.float()
        return logits if self.order is None else logits[:, self.order]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the teacher's tensors, by name."""
        sha = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            sha.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _adapt(self, teacher: ModelSpec, student: ModelSpec) -> None:
        who = f"the teacher ({teacher.name})", f"the student ({student.name})"
        if teacher.channels != student.channels:
            raise UserError(f"{who[0]} takes {teacher.channels} input channel(s), {who[1]} {student.channels}; they must be the same")
        if teacher.num_classes != student.num_classes:
            raise UserError(f"{who[0]} has {teacher.num_classes} classes, {who[1]} {student.num_classes}; they must be the same")
        theirs, ours = teacher.class_names, student.class_names
        if theirs != ours and _is_named(teacher) and _is_named(student):
            if set(theirs) != set(ours) or len(set(ours)) < len(ours):
                other = next((name for name in theirs if name not in ours), theirs[0])
                raise UserError(f"{who[0]} has other classes than {who[1]}, as '{other}': {_listed(theirs)}; {_listed(ours)}")
            self.order = torch.tensor([theirs.index(name) for name in ours])
        elif theirs != ours:
            self.notes.append("one of teacher and student has no class names; the outputs are taken in the same order")
        if (teacher.mean, teacher.std) != (student.mean, student.std):
            values = (torch.tensor(row).view(1, -1, 1, 1) for row in (teacher.mean, teacher.std, student.mean, student.std))
            mean, std, student_mean, student_std = values
            self.affine = student_std / std, (student_mean - mean) / std

    def _try(self, student: ModelSpec) -> None:
        """Run one image, so that what does not fit is said before the training starts."""
        try:
            shape = list(self(torch.zeros(1, student.channels, *student.size, device=self.device)).shape)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"the teacher can't take the student's images of {student.size_text}: {reason}") from None
        if shape != [1, student.num_classes]:
            raise UserError(f"the teacher's outputs for one image are {shape}; the student has {student.num_classes} classes")


def _is_named(spec: ModelSpec) -> bool:
    return spec.class_names != ModelSpec("", spec.num_classes).class_names  # those are placeholders


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
