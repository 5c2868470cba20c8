"""What to ask next: values of queries, batches, schedules, teachers, and the answers' store."""

from active.acquisition import (
    ACQUISITIONS,
    Acquisition,
    acquisition_named,
    all_pairs,
    mutual_information,
    preference_variance,
)
from active.feedback import Counts, FeedbackStore, Query
from active.rules import BatchRule, Candidates, Power, TopK
from active.schedule import Constant, Hyperbolic, Schedule
from active.strategies import BALD, Disagreement, QueryStrategy, ScoredStrategy, Uniform
from active.teachers import SyntheticTeacher, Teacher

__all__ = [
    "ACQUISITIONS",
    "BALD",
    "Acquisition",
    "BatchRule",
    "Candidates",
    "Constant",
    "Counts",
    "Disagreement",
    "FeedbackStore",
    "Hyperbolic",
    "Power",
    "Query",
    "QueryStrategy",
    "Schedule",
    "ScoredStrategy",
    "SyntheticTeacher",
    "Teacher",
    "TopK",
    "Uniform",
    "acquisition_named",
    "all_pairs",
    "mutual_information",
    "preference_variance",
]
