import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor

from ood import (
    KNN,
    Epistemic,
    Joint,
    Mahalanobis,
    OODDetector,
    RelativeMahalanobis,
    SklearnDetector,
)
from rewardmodels import Clips, Comparisons, DeepEnsemble, InvalidInput, fit


def frames(n: int = 400, seed: int = 0) -> torch.Tensor:
    """Normal, correlated, of different scales, and far from zero."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.tensor([[1, 0.5, 0, 0, 0], [0, 1, 0, 0, 0.9], [0, 0, 5, 0, 0], [0, 0, 0, 0.1, 0],
                        [0, 0, 0, 0, 1.0]], dtype=torch.double)  # fmt: skip
    return torch.randn(n, 5, generator=draw, dtype=torch.double) @ mix + 3


class TestMahalanobis:
    def test_is_scipys(self):
        x, new = frames(2000), frames(20, seed=1)
        inverse = np.linalg.inv(np.cov(x.numpy().T, bias=True))
        expected = [mahalanobis(row, x.mean(0), inverse) for row in new.numpy()]
        score = Mahalanobis().fit(x).score(new)
        np.testing.assert_allclose(score.numpy(), expected, rtol=1e-4)

    def test_residuals_are_white(self):
        residuals = Mahalanobis().fit(frames()).residuals(frames())
        torch.testing.assert_close(residuals.mean(0), 0 * residuals[0], atol=1e-9, rtol=0)
        torch.testing.assert_close(residuals.T.cov(), torch.eye(5).double(), atol=0.01, rtol=0)

    def test_change_of_a_constant_is_anomalous(self):
        x = torch.cat([frames(), torch.full((400, 1), 7.0)], 1)
        detector = Mahalanobis().fit(x)
        moved = x[:1].clone()
        assert detector.score(moved) < 10
        moved[0, 5] += 0.01
        assert detector.score(moved) > 100
        assert detector.explain(moved).argmax() == 5


def test_relative_mahalanobis_is_the_difference_of_two_distances():
    groups = [frames(300, seed=i) + 100 * i for i in range(3)]
    x, new = torch.cat(groups).numpy(), frames(20, seed=9).numpy() + 90
    within = np.cov(np.concatenate([g - g.mean(0) for g in groups]).T, bias=True)
    overall = np.cov(x.T, bias=True)
    # The ridge is a millionth of each variance, here as there.
    within += 1e-6 * np.diag(np.diag(overall))
    overall += 1e-6 * np.diag(np.diag(overall))
    centres = np.stack([g.mean(0).numpy() for g in groups])
    near = cdist(new, centres, "mahalanobis", VI=np.linalg.inv(within)).min(1) ** 2
    far = cdist(new, x.mean(0, keepdims=True), "mahalanobis", VI=np.linalg.inv(overall))[:, 0] ** 2
    score = RelativeMahalanobis(groups=3).fit(torch.from_numpy(x)).score(torch.from_numpy(new))
    np.testing.assert_allclose(score.numpy(), near - far, rtol=1e-5)


class NegativeNorm(OutlierMixin, BaseEstimator):
    def fit(self, x):
        return self

    def decision_function(self, x):
        return -np.linalg.norm(x, axis=1)


@pytest.mark.parametrize(
    ("estimator", "method"),
    [
        (IsolationForest(n_estimators=20, random_state=0), "score_samples"),
        (EllipticEnvelope(random_state=0), "score_samples"),
        (LocalOutlierFactor(novelty=True), "score_samples"),
        (NegativeNorm(), "decision_function"),
    ],
)
def test_sign_of_scikit_learns_scores(estimator, method):
    x, new = frames(), frames(20, seed=1)
    standard = lambda y: ((y - x.mean(0)) / x.std(0, correction=0)).numpy()  # noqa: E731
    score = SklearnDetector(estimator).fit(x).score(new)
    reference = getattr(estimator.fit(standard(x)), method)(standard(new))
    np.testing.assert_allclose(score, -reference)


@pytest.mark.parametrize("discrete", [False, True])
def test_epistemic_is_the_scorers(discrete):
    observations = torch.randn(6, 5, 2)
    actions = torch.randint(3, (6, 5)) if discrete else torch.randn(6, 5, 1)
    clips = Clips(observations, actions)
    comparisons = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    scorer = fit(DeepEnsemble(members=3), comparisons, epochs=1).frame_scorer()
    flat = torch.cat([observations.flatten(0, 1), actions.flatten(0, 1).reshape(30, 1)], 1)
    detector = Epistemic(scorer).fit(flat)
    _, std = scorer.batch(observations.flatten(0, 1), actions.flatten(0, 1))
    np.testing.assert_allclose(detector.score(flat), std)
    other = fit(DeepEnsemble(members=3), comparisons, epochs=2).frame_scorer()
    assert Epistemic(other).fit(flat).fingerprint != detector.fingerprint


class TestJoint:
    @pytest.mark.parametrize("combine", ["max", "mean"])
    def test_standardises_by_held_out_frames(self, combine):
        x, new = frames(), frames(20, seed=1)
        joint = Joint([Mahalanobis(), KNN(k=2)], [None, (1, 3)], combine, held_out=0.25).fit(x)
        each = []
        for detector, columns in ((Mahalanobis(), slice(0, 5)), (KNN(k=2), slice(1, 3))):
            detector.fit(x[:300, columns])
            held_out = detector.score(x[300:, columns])
            scores = detector.score(new[:, columns])
            each.append((scores - held_out.mean()) / held_out.std(correction=0))
        expected = torch.stack(each)
        expected = expected.amax(0) if combine == "max" else expected.mean(0)
        torch.testing.assert_close(joint.score(new), expected)

    def test_explains_by_the_detector_with_the_highest_score(self):
        joint = Joint([Mahalanobis(), KNN(k=2)], [(0, 2), (2, 5)]).fit(frames())
        new = frames(2, seed=1)
        new[0, 0] += 50
        new[1, 3] += 50
        assert joint.detector_names(new) == ["Mahalanobis of features 0 to 2",
                                             "KNN of features 2 to 5"]  # fmt: skip
        assert joint.explain(new).argmax(1).tolist() == [0, 3]
        assert (joint.explain(new)[1, :2] == 0).all()


def test_a_failed_fit_leaves_the_detector_unfitted():
    class Breaks(OODDetector):
        def fit_frames(self, frames):
            raise RuntimeError

        def score_frames(self, frames):
            return frames[:, 0]

    detector = Breaks()
    detector.num_features = 5
    with pytest.raises(RuntimeError):
        detector.fit(frames())
    assert not detector.fitted


def test_refuses():
    for call in (
        lambda: SklearnDetector(LocalOutlierFactor()),
        lambda: SklearnDetector(object()),
        lambda: RelativeMahalanobis(groups=1),
        lambda: RelativeMahalanobis().fit(frames(5)),
        lambda: Joint([]),
        lambda: Joint([KNN()], combine="min"),
        lambda: Joint([KNN()], held_out=1.0),
        lambda: Joint([KNN()], columns=[None, None]),
        lambda: Joint([KNN()]).fit(frames(3)),
    ):
        with pytest.raises(InvalidInput):
            call()
