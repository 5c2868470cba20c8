"""The sparse variational process against dense algebra, loops and quadrature."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
from gpytorch.kernels import RBFKernel
from linear_operator.utils.warnings import NumericalWarning
from scipy.special import expit
from torch.distributions import MultivariateNormal, kl_divergence

from rewardmodels import (
    Clips,
    Comparisons,
    FitDiverged,
    FitOptions,
    GPHead,
    PairBatch,
    fit,
    negative_log_likelihood,
)
from rewardmodels.gp import _JITTER, ResidualFeatures, _cholesky

from .data import one_input

some = partial(one_input, n=20, frames=3, noisy=True, reward=lambda x: 2 * (2 * x).sin())


def fitted(comparisons: Comparisons, epochs: int = 3, **settings: Any) -> GPHead:
    """A model in double precision, so that what is compared is the formula."""
    settings = {"hidden": (8,), "inducing": 12, "random_features": 64, **settings}
    model = fit(
        GPHead(**settings), comparisons, epochs=epochs, options=FitOptions(held_out=0.0)
    ).double()
    model.after_epoch()
    model.after_fit(comparisons)
    return model


def kernel(model: GPHead, x: np.ndarray, y: np.ndarray) -> float:
    """Of two frames' features: a mean of cosines, and an inner product."""
    rff = model.rbf.base_kernel
    frequencies = (rff.randn_weights / rff.lengthscale.mT).detach().numpy()
    waves = np.cos((x - y) @ frequencies).mean()
    scale, slope = model.rbf.outputscale.item(), model.linear.variance.item()
    return scale * waves + slope * float(x @ y)


def mapped(model: GPHead, clips: Clips) -> list[np.ndarray]:
    """The feature map's values at each clip's real frames."""
    with torch.no_grad():
        return [
            model.network(model.inputs(observations[mask], actions[mask]).double()).numpy()
            for observations, actions, mask in zip(
                clips.observations, clips.actions, clips.mask, strict=True
            )
        ]


@pytest.mark.parametrize("ragged", [False, True])
def test_the_posterior_is_that_of_a_loop_over_frames(ragged):
    comparisons = some(n=8, ragged=ragged)
    model = fitted(comparisons)
    new = some(n=4, seed=1, ragged=ragged)
    clips = mapped(model, new.clips)
    reference = mapped(
        model, Clips(model.reference_observations[None], model.reference_actions[None])
    )[0]
    inducing = mapped(
        model, Clips(model.inducing_observations[None], model.inducing_actions[None])
    )[0]
    dense = np.array([[kernel(model, x, y) for y in inducing] for x in inducing])
    dense += _JITTER * dense.diagonal().mean() * np.eye(12)
    root = np.linalg.cholesky(dense)
    m = model.variational_mean.detach().numpy()
    s = model.variational_root.detach().tril().numpy()
    with torch.no_grad():
        found = model.compute_posterior(new.clips).difference(new.pairs)
    for row, (first, second) in enumerate(new.pairs.tolist()):
        a, b = clips[first], clips[second]
        # A frame more costs what the reference is worth on average.
        weights = [-1.0] * len(a) + [1.0] * len(b)
        weights += [(len(a) - len(b)) / len(reference)] * len(reference)
        frames = [*a, *b, *reference]
        prior = sum(
            w * u * kernel(model, x, y)
            for w, x in zip(weights, frames, strict=True)
            for u, y in zip(weights, frames, strict=True)
        )
        shared = [
            sum(w * kernel(model, z, x) for w, x in zip(weights, frames, strict=True))
            for z in inducing
        ]
        v = np.linalg.solve(root, np.array(shared))
        assert float(found.mean[row]) == pytest.approx(v @ m, abs=1e-8)
        variance = prior - v @ v + v @ s @ s.T @ v
        assert float(found.variance[row]) == pytest.approx(variance, rel=1e-6)


def dense_laplace(
    covariance: np.ndarray, said: np.ndarray, cross: np.ndarray, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rasmussen & Williams 2006, algorithms 3.1 and 3.2, on the differences themselves."""
    f = np.zeros(len(said))
    for _ in range(50):
        p = expit(f)
        w = p * (1 - p)
        b = np.eye(len(f)) + np.sqrt(w)[:, None] * covariance * np.sqrt(w)
        target = w * f + said - p
        inner = np.linalg.solve(b, np.sqrt(w) * (covariance @ target))
        f = covariance @ (target - np.sqrt(w) * inner)
    p = expit(f)
    w = p * (1 - p)
    inverse = np.linalg.inv(covariance + np.diag(1 / w))
    variance = prior - np.einsum("iq,qr,ir->i", cross, inverse, cross)
    return cross @ (said - p), variance


@pytest.mark.filterwarnings("ignore:inducing")
@pytest.mark.parametrize("inducing", [120, 150])  # of 120 frames
def test_with_every_frame_inducing_it_is_a_dense_laplace_process(inducing):
    comparisons, new = some(n=20), some(n=30, seed=1)
    model = fitted(comparisons, hidden=(), inducing=inducing, random_features=256)
    # A prior under which answers are noisy (a difference's sd is about 0.7): there posteriors are
    # all but normal, and Laplace's mode and curvature all but the variational mean and variance.
    model.rbf.outputscale, model.linear.variance = 0.05, 0.02
    model.after_fit(comparisons)
    frames = np.concatenate(mapped(model, comparisons.clips) + mapped(model, new.clips))
    x = torch.from_numpy(frames)
    with torch.no_grad():
        dense = (model.rbf(x).to_dense() + model.linear(x).to_dense()).numpy()
    rows = np.kron(np.eye(50), np.repeat([[-1.0, 1.0]], 3, 0).T.reshape(1, -1))
    differences = rows @ dense @ rows.T
    mean, variance = dense_laplace(
        differences[:20, :20],
        comparisons.preference.numpy(),
        differences[20:, :20],
        differences.diagonal()[20:],
    )
    found = model.posterior(new.clips).difference(new.pairs)
    assert np.sqrt(differences.diagonal()).mean() == pytest.approx(0.7, abs=0.2)
    np.testing.assert_allclose(found.mean, mean, atol=0.03 * np.abs(mean).max())
    # An answer's mean curvature is below that at its mean: the variance is 1 to 2% above Laplace's.
    np.testing.assert_allclose(found.variance, variance, rtol=0.03)
    # It isn't the prior that agrees.
    assert (variance / differences.diagonal()[20:]).min() < 0.8


@pytest.mark.parametrize("random_answer_rate", [0.0, 0.1])
def test_in_the_end_the_bound_is_at_its_optimum(random_answer_rate):
    # Opper & Archambeau 2009: m = sum E[dlog p] v, and S^-1 = I - sum E[d2log p] v v'.
    comparisons = some(n=30)
    model = fitted(comparisons, random_answer_rate=random_answer_rate)
    with torch.no_grad():
        features = model.features(comparisons.clips)
        z = features[comparisons.pairs[:, 1]] - features[comparisons.pairs[:, 0]]
        v = z @ model.basis()
        root = model.variational_root.tril()
        mean = v @ model.variational_mean
        variance = z.square().sum(1) - v.square().sum(1) + (v @ root).square().sum(1)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(80))
    at = (mean + variance.sqrt() * nodes[:, None]).requires_grad_()
    nll = negative_log_likelihood(at, comparisons.preference, random_answer_rate=random_answer_rate)
    (slope,) = torch.autograd.grad(nll.sum(), at, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), at)
    expected = [weights @ part.detach() / math.sqrt(2 * math.pi) for part in (slope, curvature)]
    torch.testing.assert_close(
        model.variational_mean.detach(), -v.T @ expected[0], atol=2e-3, rtol=0
    )
    precision = torch.eye(12, dtype=torch.double) + (v * expected[1][:, None]).T @ v
    torch.testing.assert_close(torch.linalg.inv(root @ root.T), precision, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("random_answer_rate", [0.0, 0.2])
def test_the_bound_is_that_of_quadrature_and_distributions(random_answer_rate):
    comparisons = some(n=5)
    comparisons = Comparisons(
        comparisons.clips, comparisons.pairs, torch.tensor([0.0, 1.0, 0.5, 0.3, 1.0])
    )
    model = fitted(comparisons, random_answer_rate=random_answer_rate)
    assert float(model.comparison_count) == 5
    projected = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    prior_var = projected.square().sum(1) + torch.arange(5)
    found = model.bound(projected, prior_var, comparisons.preference)
    root = model.variational_root.detach().tril()
    belief = MultivariateNormal(model.variational_mean.detach(), root @ root.T)
    prior = MultivariateNormal(torch.zeros(12).double(), torch.eye(12).double())
    divergence = float(kl_divergence(belief, prior))
    assert model.divergence().item() == pytest.approx(divergence, rel=1e-9)
    total = 0.0
    for v, prior_variance, said in zip(projected, prior_var, comparisons.preference, strict=True):
        mean = float(v @ belief.mean)
        spread = math.sqrt(float(prior_variance - v @ v + v @ root @ root.T @ v))

        def weighted(
            t: float, mean: float = mean, spread: float = spread, said: float = float(said)
        ) -> float:
            p = (1 - random_answer_rate) * expit(mean + spread * t) + random_answer_rate / 2
            nll = -(said * np.log(p) + (1 - said) * np.log1p(-p))
            return float(nll * np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi))

        total += scipy.integrate.quad(weighted, -8, 8, epsabs=1e-10)[0]
    # Twenty points of Gauss–Hermite are good to about 1e-4 where variances are this large.
    assert found.item() == pytest.approx(total / 5 + divergence / 5, rel=1e-3)


def test_the_features_are_those_of_gpytorchs_kernel_and_near_the_rbf():
    comparisons = some(n=40)
    model = GPHead(random_features=8192)
    model.initialise(comparisons.clips)
    model.double().eval()
    observations, actions = comparisons.clips.observations[:, 0], comparisons.clips.actions[:, 0]
    with torch.no_grad():
        features = model.frame_features(model.inputs(observations, actions).double())
        found = features @ features.T
        x = model.network(model.inputs(observations, actions).double())
        exact = (model.rbf(x).to_dense() + model.linear(x).to_dense()).detach()
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
        rbf = RBFKernel().double()
        rbf.lengthscale = model.rbf.base_kernel.lengthscale
        scale = model.rbf.outputscale.item()
        near = scale * rbf(x).to_dense() + model.linear(x).to_dense()
    # A mean of 4096 cosines: five standard errors.
    torch.testing.assert_close(found, near, rtol=0, atol=5 * scale / math.sqrt(2 * 4096))


def test_the_start_takes_its_scales_from_the_data():
    comparisons = some(n=200)
    model = GPHead(hidden=(8,))
    model.initialise(comparisons.clips)
    model.before_fit(comparisons.clips)
    frames = model.inputs(model.reference_observations, model.reference_actions)[:512]
    apart = torch.pdist(model.network(frames)).median()
    assert model.rbf.base_kernel.lengthscale.item() == pytest.approx(apart.item(), rel=1e-4)
    with torch.no_grad():
        features = model.features(comparisons.clips)
    z = features[comparisons.pairs[:, 1]] - features[comparisons.pairs[:, 0]]
    # Of 200 pairs, whose squares are skewed.
    assert float(z.square().sum(1).mean()) == pytest.approx(4, rel=0.15)
    halves = [float(part.square().sum(1).mean()) for part in z.split([512, 3], 1)]
    assert halves == pytest.approx([2, 2], rel=0.25)


def test_the_feature_map_keeps_distances():
    model = fitted(some(n=60), epochs=30, hidden=(16, 16))
    for layer in (*model.network.inner, *model.network.outer):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.05)
    x = torch.rand(20, 3)
    # What comes closest to the bounds: a branch against, or along, each positive input.
    for sign, factor in ((-1, 0.1), (1, 1.9)):
        block = ResidualFeatures(3, (3,))
        with torch.no_grad():
            block.inner[0].parametrizations.weight.original.copy_(5 * torch.eye(3))
            block.outer[0].parametrizations.weight.original.copy_(sign * 7 * torch.eye(3))
            block.inner[0].bias.zero_()
            block.outer[0].bias.zero_()
        torch.testing.assert_close(block(x), factor * x)
    assert torch.equal(ResidualFeatures(3, ())(x), x)


def test_two_equal_clips_teach_without_breaking_a_gradient():
    comparisons = some(n=20)
    model = fit(GPHead(inducing=12), comparisons, epochs=1)
    clips = comparisons.clips[:5]
    loss = model.loss(PairBatch(clips, clips, torch.ones(5), torch.arange(5)))
    loss.backward()
    kl = model.divergence().item()
    assert loss.item() == pytest.approx(math.log(2) + kl / model.comparison_count.item(), rel=1e-4)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_matrix_that_lost_definiteness_gets_more_on_its_diagonal_or_is_refused():
    with pytest.warns(NumericalWarning, match="jitter"):
        root = _cholesky(torch.tensor([1.0, 1.0, -7e-5]).diag())
    torch.testing.assert_close(
        root @ root.T, torch.tensor([1.0, 1.0, 0.0]).diag(), atol=2e-4, rtol=0
    )
    with (
        pytest.warns(NumericalWarning, match="jitter"),
        pytest.raises(
            FitDiverged, match=r"GPHead: expected a positive definite covariance .*lower the"
        ),
    ):
        _cholesky(torch.tensor([1.0, 1.0, -1.0]).diag())
    with pytest.raises(FitDiverged, match="NaN"):
        _cholesky(torch.full((3, 3), torch.nan))


def test_a_fit_that_diverges_leaves_the_model_as_it_was():
    comparisons = some(n=20)
    model = fit(GPHead(inducing=12), comparisons, epochs=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.learning_rate = 1e30
    with pytest.raises(FitDiverged, match=r"last good weights|as before this fit"):
        fit(model, Comparisons.cat([comparisons, some(n=20, seed=1)]), epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_decay_shrinks_the_network_alone():
    model = GPHead(inducing=12, weight_decay=0.5, learning_rate=0.1)
    model.initialise(some(n=20).clips)
    model.before_fit(some(n=20).clips)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = model.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        left = 0.95 if name.startswith("network") else 1.0
        torch.testing.assert_close(value.detach(), left * before[name])


# Inducing frames.


def test_frames_that_come_twice_count_once():
    model = fitted(some(n=20), inducing=10)
    # Short, so that each frame is a direction well above the jitter.
    model.rbf.base_kernel.lengthscale = 0.3
    with torch.no_grad():
        once = model.basis()
        model.inducing_observations = model.inducing_observations.repeat(4, 1)
        model.inducing_actions = model.inducing_actions.repeat(4, 1)
        often = model.basis()
    torch.testing.assert_close(often @ often.T, once @ once.T, atol=2e-3, rtol=0)


def test_clips_of_few_distinct_frames_are_learned_from():
    draw = torch.Generator().manual_seed(0)
    frames = torch.randn(5, 2, generator=draw)
    clips = Clips(frames[torch.randint(5, (40, 3), generator=draw)], torch.zeros(40, 3, 1))
    pairs = torch.arange(40).view(20, 2)
    model = fit(GPHead(inducing=30), Comparisons(clips, pairs, torch.ones(20)), epochs=5)
    belief = model.posterior(clips)
    assert belief.mean.isfinite().all()
    assert float(torch.linalg.eigvalsh(belief.covariance)[0]) > -1e-5
    same = Clips(torch.ones(4, 10, 2), torch.ones(4, 10, 1))
    equal = Comparisons(same, torch.tensor([[0, 1], [2, 3]]), torch.full((2,), 0.5))
    assert fit(GPHead(inducing=40), equal, epochs=2).posterior(same).mean.isfinite().all()


@pytest.mark.parametrize(
    ("inducing", "frames", "comparisons"),
    [
        (61, 60, some(n=10)),
        (60, int(some(n=10, ragged=True).clips.mask.sum()), some(n=10, ragged=True)),
        (13, 12, Comparisons(some(n=10).clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))),
    ],
)
def test_of_too_few_frames_all_are_inducing_and_it_says_so(inducing, frames, comparisons):
    message = f"inducing: expected at most {frames}, .* got {inducing}"
    with pytest.warns(UserWarning, match=message):
        model = fit(GPHead(inducing=inducing), comparisons, epochs=1)
    assert len(model.inducing_observations) == inducing
    assert len(model.inducing_observations.unique(dim=0)) == frames
    # A later fit to more takes more.
    fit(model, Comparisons.cat([comparisons, some(n=40, seed=1)]), epochs=1)
    assert len(model.inducing_observations.unique(dim=0)) == inducing
    assert fit(GPHead(inducing=frames), comparisons, epochs=1).fitted


def test_inducing_frames_are_real_distinct_frames_of_what_was_compared():
    comparisons = some(n=20, ragged=True)
    model = fit(GPHead(inducing=40), comparisons, epochs=1)
    real = {
        tuple(frame.tolist()) for frame in comparisons.clips.observations[comparisons.clips.mask]
    }
    chosen = {tuple(frame.tolist()) for frame in model.inducing_observations}
    assert len(chosen) == 40
    assert chosen <= real


def test_new_inducing_frames_believe_what_the_old_did():
    comparisons, new = some(n=20), some(n=30, seed=1)
    # All frames, in another order, span what they did before.
    model = fit(GPHead(inducing=120), comparisons, epochs=3)
    before = model.posterior(new.clips).difference(new.pairs)
    old = model.inducing_observations
    model.before_fit(comparisons.clips)
    model.after_epoch()
    after = model.posterior(new.clips).difference(new.pairs)
    assert not torch.equal(model.inducing_observations, old)
    torch.testing.assert_close(after.mean, before.mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(after.variance, before.variance, atol=0.005, rtol=0.02)


def test_a_second_fit_with_more_comparisons_is_surer_and_looks_at_the_new():
    early = some(n=30)
    late = some(n=200, seed=1)
    late = Comparisons(
        Clips(late.clips.observations + 3, late.clips.actions), late.pairs, late.preference
    )
    model = fit(GPHead(inducing=40), early, epochs=5)
    belief = model.posterior(late.clips).difference(late.pairs)
    fit(model, Comparisons.cat([early, late]), epochs=10)
    assert float(model.comparison_count) < 230 * 0.95
    assert bool((model.inducing_observations[:, 0] > 3).any())
    again = model.posterior(late.clips)
    assert again.difference(late.pairs).variance.median() < belief.variance.median()
    right = (again.preference(late.pairs) > 0.5) == (late.preference > 0.5)
    assert float(right.float().mean()) > 0.6
