"""Pruners: rules that say which weights stay. One method a file; a new one is a line in ``PRUNERS``."""

from __future__ import annotations

from compression.schedule.pruners.activation_apoz import ActivationAPoZRankedFilterPruner, ActivationAPoZRankedFilterPrunerAGP
from compression.schedule.pruners.activation_mean import ActivationMeanRankedFilterPruner, ActivationMeanRankedFilterPrunerAGP
from compression.schedule.pruners.automated_gradual import AutomatedGradualPruner
from compression.schedule.pruners.baidu_rnn import BaiduRNNPruner
from compression.schedule.pruners.batch_norm_scale import BatchNormScaleRankedFilterPruner, BatchNormScaleRankedFilterPrunerAGP
from compression.schedule.pruners.bernoulli import BernoulliFilterPruner, BernoulliFilterPrunerAGP
from compression.schedule.pruners.feature_map_rank import FeatureMapRankFilterPruner, FeatureMapRankFilterPrunerAGP
from compression.schedule.pruners.fm_reconstruction import FMReconstructionChannelPruner, FMReconstructionChannelPrunerAGP
from compression.schedule.pruners.gradient_ranked import GradientRankedFilterPruner, GradientRankedFilterPrunerAGP
from compression.schedule.pruners.l1_ranked import L1RankedStructureParameterPruner, L1RankedStructureParameterPrunerAGP
from compression.schedule.pruners.l2_ranked import L2RankedStructureParameterPruner, L2RankedStructureParameterPrunerAGP
from compression.schedule.pruners.magnitude import MagnitudeParameterPruner
from compression.schedule.pruners.pruner import Decision, Moment, Pruner, PruningTask
from compression.schedule.pruners.random_level import RandomLevelStructureParameterPruner
from compression.schedule.pruners.random_ranked import RandomRankedFilterPruner, RandomRankedFilterPrunerAGP
from compression.schedule.pruners.sensitivity import SensitivityPruner
from compression.schedule.pruners.sparsity_level import SparsityLevelParameterPruner
from compression.schedule.pruners.splicing import SplicingPruner
from compression.schedule.pruners.structure_threshold import StructureParameterPruner

PRUNERS: dict[str, type[Pruner]] = {
    "MagnitudeParameterPruner": MagnitudeParameterPruner,
    "SensitivityPruner": SensitivityPruner,
    "SparsityLevelParameterPruner": SparsityLevelParameterPruner,
    "AutomatedGradualPruner": AutomatedGradualPruner,
    "BaiduRNNPruner": BaiduRNNPruner,
    "SplicingPruner": SplicingPruner,
    "L1RankedStructureParameterPruner": L1RankedStructureParameterPruner,
    "L1RankedStructureParameterPruner_AGP": L1RankedStructureParameterPrunerAGP,
    "L2RankedStructureParameterPruner": L2RankedStructureParameterPruner,
    "L2RankedStructureParameterPruner_AGP": L2RankedStructureParameterPrunerAGP,
    "RandomRankedFilterPruner": RandomRankedFilterPruner,
    "RandomRankedFilterPruner_AGP": RandomRankedFilterPrunerAGP,
    "RandomLevelStructureParameterPruner": RandomLevelStructureParameterPruner,
    "BernoulliFilterPruner": BernoulliFilterPruner,
    "BernoulliFilterPruner_AGP": BernoulliFilterPrunerAGP,
    "GradientRankedFilterPruner": GradientRankedFilterPruner,
    "GradientRankedFilterPruner_AGP": GradientRankedFilterPrunerAGP,
    "ActivationAPoZRankedFilterPruner": ActivationAPoZRankedFilterPruner,
    "ActivationAPoZRankedFilterPruner_AGP": ActivationAPoZRankedFilterPrunerAGP,
    "ActivationMeanRankedFilterPruner": ActivationMeanRankedFilterPruner,
    "ActivationMeanRankedFilterPruner_AGP": ActivationMeanRankedFilterPrunerAGP,
    "FeatureMapRankFilterPruner": FeatureMapRankFilterPruner,
    "FeatureMapRankFilterPruner_AGP": FeatureMapRankFilterPrunerAGP,
    "BatchNormScaleRankedFilterPruner": BatchNormScaleRankedFilterPruner,
    "BatchNormScaleRankedFilterPruner_AGP": BatchNormScaleRankedFilterPrunerAGP,
    "FMReconstructionChannelPruner": FMReconstructionChannelPruner,
    "FMReconstructionChannelPruner_AGP": FMReconstructionChannelPrunerAGP,
    "StructureParameterPruner": StructureParameterPruner,
}

__all__ = ["PRUNERS", "Decision", "Moment", "Pruner", "PruningTask"]
