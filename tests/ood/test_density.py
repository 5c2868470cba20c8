import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from ood import KNN, MixtureDensity
from ood.checks import frames
from rewardmodels import InvalidInput


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("n", [50, 1000])
def test_knn_is_scikit_learns(k, n):
    x, new = frames(n), frames(25, seed=1)
    new[0] += 1e4
    new[1] = x[3]
    scale = x.std(0, correction=0)
    tree = NearestNeighbors(n_neighbors=k).fit((x / scale).numpy())
    expected = tree.kneighbors((new / scale).numpy())[0][:, -1]
    np.testing.assert_allclose(KNN(k).fit(x).score(new), expected, rtol=1e-4, atol=1e-5)


def test_knn_keeps_a_random_subset():
    detector = KNN(k=1, frames=64).fit(frames(1000))
    assert detector.kept.shape == (5, 64)
    assert int((detector.score(frames(1000)) < 1e-5).sum()) == 64


def test_knn_explains_by_the_nearest_frame():
    x = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    explained = KNN(k=1).fit(x).explain(torch.tensor([[10.0, 8.0]]))
    torch.testing.assert_close(explained, torch.tensor([[0.0, 0.4]], dtype=torch.double))


def test_too_few_frames():
    for call in (
        lambda: KNN().fit(frames(4)),
        lambda: KNN(k=4, frames=3),
        lambda: KNN(k=0),
        lambda: MixtureDensity(5).fit(frames(4)),
        lambda: MixtureDensity(0),
    ):
        with pytest.raises(InvalidInput):
            call()


@pytest.mark.slow
def test_knn_fits_a_million_frames():
    x = torch.randn(1_000_000, 23)
    assert KNN().fit(x).score(x[:5]).isfinite().all()


def test_mixture_density_is_scikit_learns():
    x, new = frames(1000), frames(20, seed=1)
    mean, scale = x.mean(0), x.std(0, correction=0)
    reference = GaussianMixture(3, reg_covar=1e-4, max_iter=200, tol=1e-2, random_state=0)
    reference.fit(((x - mean) / scale).numpy())
    expected = -reference.score_samples(((new - mean) / scale).numpy())
    np.testing.assert_allclose(MixtureDensity(3).fit(x).score(new), expected, rtol=1e-6)
