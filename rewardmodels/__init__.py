"""Reward models that learn from comparisons, and know how sure they are."""

from rewardmodels.calibrated import ActivelyChosenWarning, Calibrated
from rewardmodels.clips import Clips, cut, transitions
from rewardmodels.comparisons import Comparisons, Marks, Ratings
from rewardmodels.dropout import MCDropout
from rewardmodels.ensemble import DeepEnsemble
from rewardmodels.epinet import Epinet
from rewardmodels.errors import (
    FitDiverged,
    InvalidInput,
    NotFitted,
    RewardModelsError,
    UnknownName,
    UnreadableFile,
)
from rewardmodels.fitting import FitOptions, fit
from rewardmodels.frames import FrameSpec
from rewardmodels.gp import GPHead
from rewardmodels.laplace import LaplaceHead
from rewardmodels.likelihood import negative_log_likelihood, preference_probability
from rewardmodels.model import FitReport, PairBatch, RewardModel, SampledRewardModel
from rewardmodels.posterior import (
    Difference,
    GaussianPosterior,
    ReturnPosterior,
    SampledPosterior,
)
from rewardmodels.saving import load, save
from rewardmodels.scoring import FrameScorer

__all__ = [
    "ActivelyChosenWarning",
    "Calibrated",
    "Clips",
    "Comparisons",
    "DeepEnsemble",
    "Difference",
    "Epinet",
    "FitDiverged",
    "FitOptions",
    "FitReport",
    "FrameScorer",
    "FrameSpec",
    "GPHead",
    "GaussianPosterior",
    "InvalidInput",
    "LaplaceHead",
    "MCDropout",
    "Marks",
    "NotFitted",
    "PairBatch",
    "Ratings",
    "ReturnPosterior",
    "RewardModel",
    "RewardModelsError",
    "SampledPosterior",
    "SampledRewardModel",
    "UnknownName",
    "UnreadableFile",
    "cut",
    "fit",
    "load",
    "negative_log_likelihood",
    "preference_probability",
    "save",
    "transitions",
]
