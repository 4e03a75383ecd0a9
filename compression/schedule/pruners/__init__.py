"""Pruners: rules that decide which weights are kept. One method per file; a new one is a line in ``PRUNERS``."""

from __future__ import annotations

from dataclasses import dataclass

from compression.schedule.pruners.activation_apoz import ActivationAPoZRankedPruner
from compression.schedule.pruners.activation_mean import ActivationMeanRankedPruner
from compression.schedule.pruners.automated_gradual import AutomatedGradualPruner
from compression.schedule.pruners.baidu_rnn import BaiduRNNPruner
from compression.schedule.pruners.batch_norm_scale import BatchNormScaleRankedPruner
from compression.schedule.pruners.bernoulli import BernoulliPruner
from compression.schedule.pruners.feature_map_rank import FeatureMapRankedPruner
from compression.schedule.pruners.fm_reconstruction import FMReconstructionPruner
from compression.schedule.pruners.gradient_ranked import GradientRankedPruner
from compression.schedule.pruners.l1_ranked import L1RankedPruner
from compression.schedule.pruners.l2_ranked import L2RankedPruner
from compression.schedule.pruners.magnitude import MagnitudeParameterPruner
from compression.schedule.pruners.pruner import Decision, Moment, Pruner, PruningTask
from compression.schedule.pruners.random_level import RandomLevelStructureParameterPruner
from compression.schedule.pruners.random_ranked import RandomRankedPruner
from compression.schedule.pruners.sensitivity import SensitivityPruner
from compression.schedule.pruners.sparsities import FixedSparsity, GradualSparsity
from compression.schedule.pruners.sparsity_level import SparsityLevelParameterPruner
from compression.schedule.pruners.splicing import SplicingPruner
from compression.schedule.pruners.structure_threshold import StructureParameterPruner


def fixed_and_gradual(name: str, ranked: type) -> dict[str, type[Pruner]]:
    """Return the two forms of a kind of ``RankedPruner`` by name: one with a fixed sparsity, and NAME_AGP, whose sparsity grows."""
    forms = {name: FixedSparsity, f"{name}_AGP": GradualSparsity}
    classes = {form: type(form, (ranked, sparsity), {"__doc__": ranked.__doc__}) for form, sparsity in forms.items()}
    return {form: dataclass(kw_only=True)(made) for form, made in classes.items()}


PRUNERS: dict[str, type[Pruner]] = {
    "MagnitudeParameterPruner": MagnitudeParameterPruner,
    "SensitivityPruner": SensitivityPruner,
    "SparsityLevelParameterPruner": SparsityLevelParameterPruner,
    "AutomatedGradualPruner": AutomatedGradualPruner,
    "BaiduRNNPruner": BaiduRNNPruner,
    "SplicingPruner": SplicingPruner,
    **fixed_and_gradual("L1RankedStructureParameterPruner", L1RankedPruner),
    **fixed_and_gradual("L2RankedStructureParameterPruner", L2RankedPruner),
    **fixed_and_gradual("RandomRankedFilterPruner", RandomRankedPruner),
    "RandomLevelStructureParameterPruner": RandomLevelStructureParameterPruner,
    **fixed_and_gradual("BernoulliFilterPruner", BernoulliPruner),
    **fixed_and_gradual("GradientRankedFilterPruner", GradientRankedPruner),
    **fixed_and_gradual("ActivationAPoZRankedFilterPruner", ActivationAPoZRankedPruner),
    **fixed_and_gradual("ActivationMeanRankedFilterPruner", ActivationMeanRankedPruner),
    **fixed_and_gradual("FeatureMapRankFilterPruner", FeatureMapRankedPruner),
    **fixed_and_gradual("BatchNormScaleRankedFilterPruner", BatchNormScaleRankedPruner),
    **fixed_and_gradual("FMReconstructionChannelPruner", FMReconstructionPruner),
    "StructureParameterPruner": StructureParameterPruner,
}

__all__ = ["PRUNERS", "Decision", "Moment", "Pruner", "PruningTask"]
