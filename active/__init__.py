"""What to ask next: values of queries, batches, schedules, teachers, and the answers' store."""

from active.acquisition import (
    ACQUISITIONS,
    Acquisition,
    acquisition_named,
    d_optimal,
    difference_variance,
    expected_best,
    mutual_information,
    predictive_entropy,
    preference_variance,
)
from active.database import Conflict, Missing
from active.export import export_feedback, import_feedback
from active.feedback import Counts, FeedbackStore, Query
from active.markers import SyntheticMarker
from active.marks import Mark, Rating
from active.pairs import all_pairs
from active.query_strategy import QueryStrategy
from active.rules import BatchRule, Candidates, Power, TopK
from active.schedule import (
    SCHEDULES,
    Constant,
    Hyperbolic,
    Schedule,
    Timetable,
    WhenUnsure,
    mean_information,
)
from active.strategies import (
    BALD,
    EUBO,
    STRATEGIES,
    Disagreement,
    DOptimal,
    Entropy,
    GreedyInformation,
    KCenter,
    ScoredStrategy,
    Uniform,
)
from active.teachers import (
    TEACHERS,
    Annotator,
    SyntheticTeacher,
    Teacher,
    published_threshold,
)
from active.thompson import BestVsWorst, Thompson
from active.variety import EachClipOnce, FarthestFirst, GreedyLogDet

__all__ = [
    "ACQUISITIONS",
    "BALD",
    "EUBO",
    "SCHEDULES",
    "STRATEGIES",
    "TEACHERS",
    "Acquisition",
    "Annotator",
    "BatchRule",
    "BestVsWorst",
    "Candidates",
    "Conflict",
    "Constant",
    "Counts",
    "DOptimal",
    "Disagreement",
    "EachClipOnce",
    "Entropy",
    "FarthestFirst",
    "FeedbackStore",
    "GreedyInformation",
    "GreedyLogDet",
    "Hyperbolic",
    "KCenter",
    "Mark",
    "Missing",
    "Power",
    "Query",
    "QueryStrategy",
    "Rating",
    "Schedule",
    "ScoredStrategy",
    "SyntheticMarker",
    "SyntheticTeacher",
    "Teacher",
    "Thompson",
    "Timetable",
    "TopK",
    "Uniform",
    "WhenUnsure",
    "acquisition_named",
    "all_pairs",
    "d_optimal",
    "difference_variance",
    "expected_best",
    "export_feedback",
    "import_feedback",
    "mean_information",
    "mutual_information",
    "predictive_entropy",
    "preference_variance",
    "published_threshold",
]
