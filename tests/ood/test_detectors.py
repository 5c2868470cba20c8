import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from scipy.stats import chi2, kstest
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from torch import distributions as D

from ood import (
    KNN,
    DynamicsEnsemble,
    Epistemic,
    Joint,
    Mahalanobis,
    MixtureDensity,
    OODDetector,
    RandomNetworkDistillation,
    RelativeMahalanobis,
    SklearnDetector,
)
from rewardmodels import Clips, Comparisons, DeepEnsemble, InvalidInput, NotFitted, fit

QUICK = {
    "Mahalanobis": Mahalanobis,
    "RelativeMahalanobis": lambda: RelativeMahalanobis(groups=3),
    "KNN": KNN,
    "few neighbours": lambda: KNN(k=3, frames=50),
    "MixtureDensity": lambda: MixtureDensity(components=2),
    "RandomNetworkDistillation": lambda: RandomNetworkDistillation(hidden=(16,), steps=100),
    "DynamicsEnsemble": lambda: DynamicsEnsemble(2, members=2, hidden=(8,), steps=100),
    "by error": lambda: DynamicsEnsemble(2, members=2, hidden=(8,), score_by="error", steps=100),
    "SklearnDetector": lambda: SklearnDetector(IsolationForest(n_estimators=20, random_state=0)),
    "Joint": lambda: Joint([Mahalanobis(), KNN()], [None, (0, 2)]),
    "mean": lambda: Joint([Mahalanobis(), KNN()], combine="mean"),
}


def frames(n: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated, of different scales, and far from zero."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.tensor([[1, 0.5, 0, 0, 0], [0, 1, 0, 0, 0.9], [0, 0, 5, 0, 0], [0, 0, 0, 0.1, 0],
                        [0, 0, 0, 0, 1.0]], dtype=torch.double)  # fmt: skip
    return torch.randn(n, 5, generator=draw, dtype=torch.double) @ mix + 3


@pytest.mark.parametrize("make", QUICK.values(), ids=QUICK)
class TestEveryDetector:
    def test_score_depends_on_its_frame_alone(self, make):
        detector, new = make().fit(frames()), frames(30, seed=1)
        score, order = detector.score(new), torch.randperm(30)
        assert score.shape == (30,)
        assert score.dtype == torch.double
        torch.testing.assert_close(detector.score(new[order]), score[order], rtol=1e-5, atol=1e-5)
        alone = torch.cat([detector.score(row[None]) for row in new])
        torch.testing.assert_close(alone, score, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(detector.score(new.float()), score, rtol=1e-3, atol=1e-3)

    def test_what_is_far_out_is_stranger_than_what_was_learned(self, make):
        detector = make().fit(frames())
        if isinstance(detector, RelativeMahalanobis):
            pytest.skip("blind, as it says, where groups don't differ")
        far = frames(1, seed=2) + torch.tensor([8.0, -8.0, 40.0, 0.8, 8.0])
        assert float(detector.score(far)) > float(detector.score(frames()).quantile(0.98))
        assert float(detector.score(torch.full((1, 5), 1e30))) >= float(detector.score(far))

    def test_signed_numbers_depend_on_their_frame_alone_and_are_about_zero(self, make):
        detector, new = make().fit(frames()), frames(30, seed=1)
        signed = detector.signed(new)
        assert signed.shape[0] == 30
        assert signed.dtype == torch.double
        alone = torch.cat([detector.signed(row[None]) for row in new])
        torch.testing.assert_close(alone, signed, rtol=1e-5, atol=1e-5)
        if type(detector)._signed is OODDetector._signed:
            torch.testing.assert_close(signed[:, 0], detector.score(new))
        else:
            usual = detector.signed(frames())
            torch.testing.assert_close(usual.mean(0), 0 * usual[0], atol=0.01, rtol=0)
            torch.testing.assert_close(usual.var(0), 1 + 0 * usual[0], atol=0.02, rtol=0)
            errors = usual[:, :2] if isinstance(detector, DynamicsEnsemble) else usual
            torch.testing.assert_close(
                errors.T.cov(), torch.eye(errors.shape[1]).double(), atol=0.02, rtol=0
            )

    def test_explains_with_one_share_a_feature(self, make):
        detector, new = make().fit(frames()), frames(7, seed=1)
        explained = detector.explain(new)
        assert explained.shape == (7, 5)
        assert bool((explained >= 0).all())
        new[:, 4] += 20
        assert (detector.explain(new).argmax(1) == 4).all()
        assert len(detector.blame(new)) == 7

    def test_fingerprint_is_of_what_was_learned(self, make):
        one = make().fit(frames()).fingerprint
        assert make().fit(frames()).fingerprint == one
        other = frames()
        other[-1, 0] += 1e-3
        assert make().fit(other).fingerprint != one

    def test_refuses_what_it_cannot_use(self, make):
        detector = make()
        with pytest.raises(NotFitted, match="call fit first"):
            detector.score(frames())
        with pytest.raises(NotFitted):
            _ = detector.fingerprint
        with pytest.raises(InvalidInput, match=r"features: expected shape \(B, F\)"):
            detector.fit(torch.zeros(5))
        bad = frames()
        bad[7, 0] = float("nan")
        with pytest.raises(InvalidInput, match="row 7"):
            detector.fit(bad)
        detector.fit(frames())
        with pytest.raises(InvalidInput, match="row 7"):
            detector.score(bad)
        with pytest.raises(InvalidInput, match=r"\(B, 5\).*\(400, 4\)"):
            detector.score(frames()[:, :4])

    def test_state_restores_it(self, make):
        detector = make().fit(frames())
        if not detector.saveable or isinstance(detector, Joint):
            pytest.skip("the file's business")
        again = make().restore(detector.state)
        assert again.fingerprint == detector.fingerprint
        assert torch.equal(again.score(frames(9, 1)), detector.score(frames(9, 1)))
        with pytest.raises(InvalidInput, match="state: expected"):
            make().restore({})


class TestMahalanobis:
    def test_is_scipys(self):
        x, new = frames(2000), frames(20, seed=1)
        inverse = np.linalg.inv(np.cov(x.numpy().T, bias=True))
        expected = [mahalanobis(row, x.mean(0), inverse) for row in new.numpy()]
        score = Mahalanobis().fit(x).score(new)
        np.testing.assert_allclose(score.numpy(), expected, rtol=1e-4)

    def test_square_is_chi_squared_for_normal_features(self):
        score = Mahalanobis().fit(frames(20_000)).score(frames(2000, seed=1))
        assert kstest(score.square().numpy(), chi2(5).cdf).pvalue > 0.01

    def test_change_of_a_constant_is_strange(self):
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


class TestKNN:
    @pytest.mark.parametrize("k", [1, 5, 40])
    @pytest.mark.parametrize("n", [50, 1000])
    def test_is_scikit_learns(self, k, n):
        x, new = frames(n), frames(25, seed=1)
        new[0] += 1e4
        new[1] = x[3]
        scale = x.std(0, correction=0)
        tree = NearestNeighbors(n_neighbors=k).fit((x / scale).numpy())
        expected = tree.kneighbors((new / scale).numpy())[0][:, -1]
        np.testing.assert_allclose(KNN(k).fit(x).score(new), expected, rtol=1e-4, atol=1e-5)

    def test_keeps_a_draw_of_many(self):
        detector = KNN(k=1, frames=64).fit(frames(1000))
        assert detector.kept.shape == (5, 64)
        assert int((detector.score(frames(1000)) < 1e-5).sum()) == 64

    def test_explains_by_the_nearest(self):
        x = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
        explained = KNN(k=1).fit(x).explain(torch.tensor([[10.0, 8.0]]))
        torch.testing.assert_close(explained, torch.tensor([[0.0, 0.4]], dtype=torch.double))

    def test_refuses_fewer_frames_than_neighbours(self):
        with pytest.raises(InvalidInput, match="at least k = 5"):
            KNN().fit(frames(4))
        with pytest.raises(InvalidInput, match="k: expected at most the 3"):
            KNN(k=4, frames=3)

    @pytest.mark.slow
    def test_fits_a_million_frames(self):
        x = torch.randn(1_000_000, 23)
        assert KNN().fit(x).score(x[:5]).isfinite().all()


def test_mixture_density_is_scikit_learns():
    x, new = frames(1000), frames(20, seed=1)
    mean, scale = x.mean(0), x.std(0, correction=0)
    reference = GaussianMixture(3, reg_covar=1e-4, max_iter=200, tol=1e-2, random_state=0)
    reference.fit(((x - mean) / scale).numpy())
    expected = -reference.score_samples(((new - mean) / scale).numpy())
    np.testing.assert_allclose(MixtureDensity(3).fit(x).score(new), expected, rtol=1e-6)


def linear_system(n: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    before, action = torch.randn(2, n, 2, generator=draw, dtype=torch.double)
    noise = torch.randn(n, 2, generator=draw, dtype=torch.double)
    return torch.cat([before, action[:, :1], before + action + 0.3 * noise], 1)


class TestDynamicsEnsemble:
    def test_score_is_the_mixtures_log_density(self):
        x, new = linear_system(300), linear_system(10, seed=1)
        detector = DynamicsEnsemble(2, members=3, hidden=(8,), steps=50).fit(x)
        state = {name: torch.from_numpy(value) for name, value in detector.state.items()}
        hidden = ((new - state["mean"]) / state["scale"])[:, :3].float()
        for i in range(2):
            hidden = hidden @ state[f"member_weight{i}"] + state[f"member_bias{i}"]
            hidden = torch.nn.functional.silu(hidden) if i == 0 else hidden
        mean, raw = hidden.double().chunk(2, -1)
        soft = torch.nn.functional.softplus
        log_std = -5 + soft(1 - soft(1 - raw) + 5)
        members = D.Independent(D.Normal(mean.transpose(0, 1), log_std.transpose(0, 1).exp()), 1)
        mixture = D.MixtureSameFamily(D.Categorical(torch.ones(10, 3)), members)
        change = (new[:, 3:] - new[:, :2] - state["change_mean"]) / state["change_scale"]
        expected = -mixture.log_prob(change) / 2
        torch.testing.assert_close(detector.score(new), expected, rtol=1e-4, atol=1e-4)
        error = (change - mean).abs().mean(2).amin(0)
        detector.score_by = "error"
        torch.testing.assert_close(detector.score(new), error, rtol=1e-4, atol=1e-4)

    def test_learns_a_linear_systems_noise(self):
        # The second number moves by an action that isn't seen: its change has variance 1 + 0.09.
        x = linear_system(5000)
        detector = DynamicsEnsemble(2, members=2, hidden=(32,), steps=600).fit(x)
        scale = torch.from_numpy(detector.change_scale)
        entropy = [D.Normal(0.0, std).entropy() for std in (0.3, 1.09**0.5)]
        expected = float(torch.stack(entropy).mean() - scale.log().mean())
        assert float(detector.score(linear_system(2000, seed=1)).mean()) == pytest.approx(
            expected, abs=0.05
        )

    def test_sees_dynamics_that_changed_where_no_frame_is_strange_alone(self):
        x, new = linear_system(3000), linear_system(500, seed=1)
        turned = new.clone()
        turned[:, 3] = new[:, 0] - (new[:, 3] - new[:, 0])
        dynamics = DynamicsEnsemble(2, members=2, hidden=(32,), steps=400).fit(x)
        assert dynamics.score(turned).median() > dynamics.score(new).quantile(0.9)
        frame = Mahalanobis().fit(x[:, 3:])
        assert abs(frame.score(turned[:, 3:]).median() - frame.score(new[:, 3:]).median()) < 0.3
        assert (dynamics.explain(turned)[:, :3] == 0).all()
        assert (dynamics.explain(turned).mean(0).argmax()) == 3

    def test_refuses_features_that_are_no_transition(self):
        with pytest.raises(InvalidInput, match="at least 6 numbers"):
            DynamicsEnsemble(3).fit(frames())
        with pytest.raises(InvalidInput, match="score_by"):
            DynamicsEnsemble(3, score_by="luck")


def test_distillation_errs_where_it_has_not_been():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 2, generator=draw, dtype=torch.double)
    x[:, 0] = x[:, 0] * 0.4 + (x[:, 0] > 0.5) * 0.6  # a gap in the middle
    detector = RandomNetworkDistillation(hidden=(64,), steps=1500).fit(x)
    outside = torch.tensor([[2.5, 0.5], [0.5, -1.5]])
    assert detector.score(outside).min() > detector.score(x).quantile(0.99)


class TestAdapters:
    def test_scikit_learns_sign(self):
        x, new = frames(), frames(20, seed=1)
        standard = lambda y: ((y - x.mean(0)) / x.std(0, correction=0)).numpy()  # noqa: E731
        for estimator, method in (
            (IsolationForest(n_estimators=20, random_state=0), "score_samples"),
            (EllipticEnvelope(random_state=0), "score_samples"),
            (LocalOutlierFactor(novelty=True), "score_samples"),
        ):
            score = SklearnDetector(estimator).fit(x).score(new)
            reference = getattr(estimator.fit(standard(x)), method)(standard(new))
            np.testing.assert_allclose(score, -reference)

    def test_scikit_learns_sign_without_score_samples(self):
        class Norm(OutlierMixin, BaseEstimator):
            def fit(self, x):
                return self

            def decision_function(self, x):
                return -np.linalg.norm(x, axis=1)

        x = frames()
        expected = ((x - x.mean(0)) / x.std(0, correction=0)).norm(dim=1)
        torch.testing.assert_close(SklearnDetector(Norm()).fit(x).score(x), expected)

    @pytest.mark.parametrize("estimator", [LocalOutlierFactor(), object()])
    def test_refuses_estimators_that_score_nothing(self, estimator):
        with pytest.raises(InvalidInput, match="novelty=True"):
            SklearnDetector(estimator)

    @pytest.mark.parametrize("discrete", [False, True])
    def test_epistemic_is_the_scorers(self, discrete):
        seen = torch.randn(6, 5, 2)
        done = torch.randint(3, (6, 5)) if discrete else torch.randn(6, 5, 1)
        clips = Clips(seen, done)
        said = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
        scorer = fit(DeepEnsemble(members=3), said, epochs=1).frame_scorer()
        flat = torch.cat([seen.flatten(0, 1), done.flatten(0, 1).reshape(30, 1)], 1)
        detector = Epistemic(scorer).fit(flat)
        _, std = scorer.batch(seen.flatten(0, 1), done.flatten(0, 1))
        np.testing.assert_allclose(detector.score(flat), std)
        other = fit(DeepEnsemble(members=3), said, epochs=2).frame_scorer()
        assert Epistemic(other).fit(flat).fingerprint != detector.fingerprint

    @pytest.mark.parametrize("combine", ["max", "mean"])
    def test_joint_standardises_by_held_out_frames(self, combine):
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

    def test_joint_names_the_strangest(self):
        joint = Joint([Mahalanobis(), KNN(k=2)], [(0, 2), (2, 5)]).fit(frames())
        strange = frames(2, seed=1)
        strange[0, 0] += 50
        strange[1, 3] += 50
        assert joint.blame(strange) == [
            "Mahalanobis of features 0 to 2",
            "KNN of features 2 to 5",
        ]
        assert joint.explain(strange).argmax(1).tolist() == [0, 3]
        assert (joint.explain(strange)[1, :2] == 0).all()

    def test_joint_refuses(self):
        for kwargs in ({"combine": "min"}, {"held_out": 1.0}, {"columns": [None]}):
            with pytest.raises(InvalidInput):
                Joint([Mahalanobis(), KNN()], **kwargs)


def test_a_failed_fit_leaves_nothing_half_learned():
    class Breaks(OODDetector):
        def _fit(self, features):
            raise RuntimeError

        def _score(self, features):
            return features[:, 0]

    detector = Breaks()
    detector.width = 5
    with pytest.raises(RuntimeError):
        detector.fit(frames())
    assert not detector.fitted
