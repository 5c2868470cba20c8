"""The last layer's Laplace approximation, against Hessians by automatic differentiation."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.linear_model import LogisticRegression

from rewardmodels import (
    Clips,
    Comparisons,
    FitOptions,
    LaplaceHead,
    fit,
    negative_log_likelihood,
    preference_probability,
)
from rewardmodels.laplace import fisher_information

from .data import one_input

some = partial(one_input, frames=5, noisy=True)


def fitted(comparisons: Comparisons, **settings: Any) -> LaplaceHead:
    """A model in double precision, so that what is compared is the formula."""
    model = LaplaceHead(**{"hidden": (16, 6), "learning_rate": 1e-2, **settings})
    fit(model, comparisons, epochs=10, options=FitOptions(held_out=0.0))
    model.double().after_epoch()
    model.after_fit(comparisons)
    return model


def features(model: LaplaceHead, clips: Clips) -> torch.Tensor:
    """Sums over real frames, one at a time, and their number."""
    rows = []
    for observations, actions, mask in zip(
        clips.observations, clips.actions, clips.mask, strict=True
    ):
        total = torch.zeros(7, dtype=torch.double)
        for frame in range(int(mask.sum())):
            hidden = model.frame_inputs.norm(
                torch.cat([observations[frame], actions[frame]]).double()
            )
            for layer in model.network.body.layers:
                hidden = torch.nn.functional.silu(layer.weight @ hidden + layer.bias)
            total = total + torch.cat([hidden, torch.ones(1)])
        rows.append(total.detach())
    return torch.stack(rows)


def hessian(model: LaplaceHead, comparisons: Comparisons, said: torch.Tensor) -> torch.Tensor:
    """That of the negative log posterior in the last layer's weights and bias."""
    rows = features(model, comparisons.clips)
    z = rows[comparisons.pairs[:, 1]] - rows[comparisons.pairs[:, 0]]

    def negative_log_posterior(weights: torch.Tensor) -> torch.Tensor:
        nll = negative_log_likelihood(
            z @ weights, said, random_answer_rate=model.random_answer_rate
        ).sum()
        return nll + model.precision / 2 * weights.square().sum()

    found: torch.Tensor = torch.func.hessian(negative_log_posterior)(model.weights.detach())
    return found


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("precision", [None, 0.3])
def test_the_covariance_is_the_inverse_hessian(ragged, precision):
    comparisons = some(ragged=ragged)
    model = fitted(comparisons, prior_precision=precision)
    expected = torch.linalg.inv(hessian(model, comparisons, comparisons.preference))
    torch.testing.assert_close(model.root @ model.root.T, expected, rtol=1e-9, atol=1e-12)


def test_with_mistakes_it_is_that_of_the_expected_answers():
    comparisons = some()
    model = fitted(comparisons, random_answer_rate=0.2)
    rows = features(model, comparisons.clips)
    z = rows[comparisons.pairs[:, 1]] - rows[comparisons.pairs[:, 0]]
    expected_answers = preference_probability(z @ model.weights.detach(), random_answer_rate=0.2)
    expected = torch.linalg.inv(hessian(model, comparisons, expected_answers))
    torch.testing.assert_close(model.root @ model.root.T, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_posterior_is_that_of_centred_features(ragged):
    comparisons = some(ragged=ragged)
    model = fitted(comparisons)
    reference = Clips(model.reference_observations[:, None], model.reference_actions[:, None])
    rows = features(model, comparisons.clips)
    rows = rows - comparisons.clips.lengths[:, None] * features(model, reference).mean(0)
    inverse = torch.linalg.inv(hessian(model, comparisons, comparisons.preference))
    belief = model.posterior(comparisons.clips)
    torch.testing.assert_close(belief.mean, rows @ model.weights.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(belief.covariance, rows @ inverse @ rows.T, rtol=1e-7, atol=1e-9)
    z = rows[comparisons.pairs[:, 1]] - rows[comparisons.pairs[:, 0]]
    expected = torch.einsum("qi,ij,qj->q", z, inverse, z)
    came = belief.difference(comparisons.pairs).variance
    torch.testing.assert_close(came, expected, rtol=1e-7, atol=1e-9)


def log_marginal(log_precision: float, data: torch.Tensor, weights: torch.Tensor) -> float:
    """Of weights at the mode, up to a constant: log prior + log det terms, by determinants."""
    prior = float(torch.tensor(log_precision).exp()) * torch.eye(len(data), dtype=torch.double)
    log_prior = torch.logdet(prior) / 2 - weights @ prior @ weights / 2
    return float(log_prior - torch.logdet(prior + data) / 2)


@pytest.mark.parametrize("n", [10, 60, 200])
def test_the_precision_maximises_the_marginal_likelihood(n):
    comparisons = some(n)
    model = fitted(comparisons)
    weights = model.weights.detach()
    precision = float(model.precision)
    data = hessian(model, comparisons, comparisons.preference)
    data = data - precision * torch.eye(7, dtype=torch.double)
    found = scipy.optimize.minimize_scalar(
        lambda x: -log_marginal(x, data, weights), bounds=(-9, 15), options={"xatol": 1e-8}
    )
    assert precision == pytest.approx(float(torch.tensor(found.x).exp()), rel=1e-3)


@pytest.mark.parametrize("random_answer_rate", [0.0, 0.1, 0.5])
def test_fisher_information_is_the_expected_second_derivative(random_answer_rate):
    d = torch.linspace(-30, 30, 61, dtype=torch.double)
    p = preference_probability(d, random_answer_rate=random_answer_rate)

    def nll(x: torch.Tensor) -> torch.Tensor:
        return negative_log_likelihood(x, p, random_answer_rate=random_answer_rate).sum()

    expected = torch.func.hessian(nll)(d).diagonal()
    came = fisher_information(d, random_answer_rate=random_answer_rate)
    torch.testing.assert_close(came, expected, rtol=1e-6, atol=1e-15)
    extreme = fisher_information(torch.tensor([-1e30, 1e30]), random_answer_rate=random_answer_rate)
    assert extreme.tolist() == [0, 0]


class Spy(LaplaceHead):
    concluded: tuple[Comparisons, ...] = ()

    def after_fit(self, comparisons: Comparisons) -> None:
        self.concluded = (*self.concluded, comparisons)
        super().after_fit(comparisons)


def test_a_fit_concludes_once_with_what_was_trained_on():
    comparisons = some(100)
    model = fit(Spy(hidden=(8,)), comparisons, epochs=4)
    (seen,) = model.concluded
    held_out = model.fit_report.held_out
    assert held_out >= 5
    assert len(seen) == 100 - held_out
    # The report is of the belief as it is in the end, with its variance.
    trained_on = {tuple(clip.flatten().tolist()) for clip in seen.clips.observations}
    firsts = comparisons.clips.observations[::2]
    kept_back = [
        row for row, clip in enumerate(firsts) if tuple(clip.flatten().tolist()) not in trained_on
    ]
    assert len(kept_back) == held_out
    p = model.posterior(comparisons.clips).preference(comparisons.pairs[kept_back])
    loss = torch.nn.functional.binary_cross_entropy(p, comparisons.preference[kept_back])
    assert model.fit_report.held_out_log_loss == pytest.approx(float(loss), rel=1e-4)
    assert float(model.posterior(comparisons.clips).variance.min()) > 0


def test_a_fit_with_more_comparisons_takes_another_hessian_and_is_surer():
    model = fit(LaplaceHead(hidden=(8,)), some(50), epochs=2)
    before = model.root.clone()
    clips, pairs = some(50, seed=5).clips, torch.arange(100).view(50, 2)
    fewer = model.posterior(clips)
    fit(model, Comparisons.cat([some(50), some(200, seed=2)]), epochs=2)
    assert not torch.equal(model.root, before)
    more = model.posterior(clips)
    assert more.difference(pairs).variance.median() < fewer.difference(pairs).variance.median()


@pytest.mark.parametrize("standouts", [0, 1])
def test_without_hidden_layers_the_weights_are_those_of_logistic_regression(standouts):
    draw = torch.Generator().manual_seed(0)
    items = torch.randn(60, 4, generator=draw)
    pairs = torch.randint(30, (200, 2), generator=draw) + torch.tensor([0, 30])
    z = items[pairs].diff(dim=1)[:, 0]
    chance = (z @ torch.tensor([2.0, 0.3, 0.0, -0.3])).sigmoid()
    preference = (torch.rand(200, generator=draw) < chance).float()
    comparisons = Comparisons(Clips.of_items(items), pairs, preference)
    model = LaplaceHead(prior_precision=25.0, standouts=standouts, hidden=())
    fit(model, comparisons, epochs=1, options=FitOptions(held_out=0.0))
    norm = model.frame_inputs.norm
    scaled = (z / norm.scale).double().numpy()
    scaled[:, 0] *= 5 if standouts else 1  # of the first, the only one that says much
    known = LogisticRegression(C=1 / 25, fit_intercept=False, tol=1e-8)
    known.fit(scaled, preference.numpy())
    expected = known.coef_[0] * ([5, 1, 1, 1] if standouts else 1)
    assert model.weights[:-1].detach().numpy() == pytest.approx(expected, abs=1e-4)
    p = (scaled @ known.coef_[0]).clip(-50, 50)
    p = 1 / (1 + np.exp(-p))
    hessian = scaled.T @ (scaled * (p * (1 - p))[:, None]) + 25 * np.eye(4)
    factor = np.array([5, 1, 1, 1] if standouts else [1, 1, 1, 1])
    expected = np.linalg.inv(hessian) * factor * factor[:, None]
    found = (model.root @ model.root.T)[:-1, :-1].numpy()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
