"""The teacher that a pruned network has without being told: the dense network that it was cut from, which its file names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compression.training.arguments import TrainArguments
from utils.files.checkpoint import file_digest

TEMPERATURE, DISTILL, STUDENT = 4.0, 0.9, 0.1  # docs/training.md, "Recipes", says how they were chosen


def with_dense_teacher(arguments: TrainArguments, dense: Mapping[str, Any]) -> tuple[TrainArguments, str]:
    """Let a run distil from the dense network, if its file is still there and the same.

    Args:
        arguments: of a run without a teacher.
        dense: the file's "path" and "sha256".

    Returns:
        The arguments, and what to tell the user.
    """
    path = str(dense.get("path", ""))
    if not path or not Path(path).is_file():
        return arguments, f"not distilled: the dense network {path} is gone; --kd-resume FILE names another teacher"
    if file_digest(path) != dense.get("sha256"):
        return arguments, f"not distilled: {path} is no longer the dense network that was cut; --kd-resume {path} takes it nevertheless"
    chosen = replace(arguments, kd_resume=path, kd_temperature=TEMPERATURE, kd_distill_wt=DISTILL, kd_student_wt=STUDENT)
    return chosen, f"distils from the dense network {path}; --no-distill trains without"
