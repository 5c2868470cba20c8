"""Reward models learned from comparisons, with a posterior over returns."""

from rewardmodels.calibrated import ActivelyChosenWarning, Calibrated, FewComparisonsWarning
from rewardmodels.clips import Clips, cut, transitions
from rewardmodels.comparisons import Comparisons, Marks, Ratings
from rewardmodels.dropout import MCDropout
from rewardmodels.ensemble import DeepEnsemble
from rewardmodels.epic import epic_distance
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
from rewardmodels.novelty import Novelty
from rewardmodels.posterior import Difference, GaussianPosterior, ReturnPosterior, SampledPosterior
from rewardmodels.saving import PREDICTORS, load, save
from rewardmodels.scoring import FrameScorer

__all__ = [
    "PREDICTORS",
    "ActivelyChosenWarning",
    "Calibrated",
    "Clips",
    "Comparisons",
    "DeepEnsemble",
    "Difference",
    "Epinet",
    "FewComparisonsWarning",
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
    "Novelty",
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
    "epic_distance",
    "fit",
    "load",
    "negative_log_likelihood",
    "preference_probability",
    "save",
    "transitions",
]
