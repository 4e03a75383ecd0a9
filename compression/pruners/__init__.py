"""Pruners: rules that say which weights stay. One method a file; a new one is a line in ``PRUNERS``."""

from __future__ import annotations

from compression.pruners.automated_gradual import AutomatedGradualPruner
from compression.pruners.baidu_rnn import BaiduRNNPruner
from compression.pruners.magnitude import MagnitudeParameterPruner
from compression.pruners.pruner import Decision, Moment, Pruner, PruningTask
from compression.pruners.sensitivity import SensitivityPruner
from compression.pruners.sparsity_level import SparsityLevelParameterPruner
from compression.pruners.splicing import SplicingPruner

PRUNERS: dict[str, type[Pruner]] = {
    "MagnitudeParameterPruner": MagnitudeParameterPruner,
    "SensitivityPruner": SensitivityPruner,
    "SparsityLevelParameterPruner": SparsityLevelParameterPruner,
    "AutomatedGradualPruner": AutomatedGradualPruner,
    "BaiduRNNPruner": BaiduRNNPruner,
    "SplicingPruner": SplicingPruner,
}

__all__ = ["PRUNERS", "Decision", "Moment", "Pruner", "PruningTask"]
