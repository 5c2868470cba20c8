"""Every registered detector passes the conformance checks, and a broken one fails them."""

import numpy as np
import pytest
from sklearn.ensemble import IsolationForest

from ood import DETECTORS, KNN, DynamicsEnsemble, Joint, Mahalanobis, OODDetector, SklearnDetector
from ood.checks import CHECKS, OBSERVATION, check_detector
from rewardmodels.checks import CheckFailed

# Constructors for those that need arguments, or long with their defaults.
QUICK = {
    "DynamicsEnsemble": {"observation_size": OBSERVATION, "members": 2, "hidden": (8,),
                         "steps": 100},
    "RandomNetworkDistillation": {"hidden": (16,), "steps": 100},
    "Joint": {"detectors": (Mahalanobis, KNN), "columns": [None, (3, 5)]},
}  # fmt: skip
OTHERS = {
    "few neighbours": lambda: KNN(k=3, frames=50),
    "by error": lambda: DynamicsEnsemble(
        OBSERVATION, members=2, hidden=(8,), score_by="error", steps=100
    ),
    "scikit-learn": lambda: SklearnDetector(IsolationForest(n_estimators=20, random_state=0)),
    "joint of joints": lambda: Joint([Mahalanobis(), Joint([KNN(2), KNN()])], combine="mean"),
}


def quick(name):
    settings = dict(QUICK.get(name, {}))
    if "detectors" in settings:
        settings["detectors"] = [each() for each in settings["detectors"]]
    return DETECTORS[name](**settings)


MAKERS = {name: lambda name=name: quick(name) for name in DETECTORS} | OTHERS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_detectors_conform(make, check):
    check(make)


class Norm(OODDetector):
    def fit_frames(self, frames):
        pass

    def score_frames(self, frames):
        return np.linalg.norm(self.standardise(frames), axis=1)


class OfTheBatch(Norm):
    def score_frames(self, frames):
        return np.linalg.norm(frames - frames.mean(0), axis=1)


class Upside(Norm):
    def score_frames(self, frames):
        return -super().score_frames(frames)


class Random(Norm):
    learned = ("offset",)

    def fit_frames(self, frames):
        self.offset = np.random.default_rng().standard_normal(5)


class Forgetful(Norm):
    def fit_frames(self, frames):
        self.largest = np.linalg.norm(self.standardise(frames), axis=1).max()

    def score_frames(self, frames):
        return super().score_frames(frames) / getattr(self, "largest", 1.0)


class Silent(Norm):
    def explain_frames(self, frames):
        return self.standardise(frames)


class Lenient(Norm):
    def check_frames(self, features):
        return np.nan_to_num(np.asarray(features))


@pytest.mark.parametrize(
    ("cls", "failing"),
    [
        (Norm, set()),
        (OfTheBatch, {"check_score_depends_on_its_frame_alone"}),
        (Upside, {"check_distant_frames_score_higher"}),
        (Random, {"check_fit_is_reproducible"}),
        (Forgetful, {"check_state_restores_scores"}),
        (Silent, {"check_explanation_names_the_feature"}),
        (Lenient, {"check_refuses_what_it_cannot_score"}),
    ],
)
def test_a_broken_detector_fails_its_check(cls, failing):
    failed = set()
    for check in CHECKS:
        try:
            check(cls)
        except CheckFailed:
            failed.add(check.__name__)
    assert failing <= failed
    assert bool(failing) == bool(failed)
    if failing:
        with pytest.raises(CheckFailed, match=f"of {len(CHECKS)} checks failed"):
            check_detector(cls)
