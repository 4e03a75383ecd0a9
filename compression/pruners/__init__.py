"""Pruners: rules that say which weights stay. One method a file; a new one is a line in ``PRUNERS``."""

from __future__ import annotations

from compression.pruners.activation_apoz import ActivationAPoZRankedFilterPruner, ActivationAPoZRankedFilterPrunerAGP
from compression.pruners.activation_mean import ActivationMeanRankedFilterPruner, ActivationMeanRankedFilterPrunerAGP
from compression.pruners.automated_gradual import AutomatedGradualPruner
from compression.pruners.baidu_rnn import BaiduRNNPruner
from compression.pruners.batch_norm_scale import BatchNormScaleRankedFilterPruner, BatchNormScaleRankedFilterPrunerAGP
from compression.pruners.bernoulli import BernoulliFilterPruner, BernoulliFilterPrunerAGP
from compression.pruners.feature_map_rank import FeatureMapRankFilterPruner, FeatureMapRankFilterPrunerAGP
from compression.pruners.fm_reconstruction import FMReconstructionChannelPruner, FMReconstructionChannelPrunerAGP
from compression.pruners.gradient_ranked import GradientRankedFilterPruner, GradientRankedFilterPrunerAGP
from compression.pruners.l1_ranked import L1RankedStructureParameterPruner, L1RankedStructureParameterPrunerAGP
from compression.pruners.l2_ranked import L2RankedStructureParameterPruner, L2RankedStructureParameterPrunerAGP
from compression.pruners.magnitude import MagnitudeParameterPruner
from compression.pruners.pruner import Decision, Moment, Pruner, PruningTask
from compression.pruners.random_level import RandomLevelStructureParameterPruner
from compression.pruners.random_ranked import RandomRankedFilterPruner, RandomRankedFilterPrunerAGP
from compression.pruners.sensitivity import SensitivityPruner
from compression.pruners.sparsity_level import SparsityLevelParameterPruner
from compression.pruners.splicing import SplicingPruner
from compression.pruners.structure_threshold import StructureParameterPruner

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
