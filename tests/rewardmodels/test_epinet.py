"""The epinet: its formula, what is trained and what isn't, and one pass for all samples."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rewardmodels import Epinet, PairBatch, fit

from .data import CLIPS, COMPARISONS


@pytest.fixture(scope="module")
def model() -> Epinet:
    return fit(
        Epinet(hidden=(8, 5), index_dim=3, samples=6, prior_scale=0.7), COMPARISONS, epochs=3
    )


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.01 * x)


def one_frame(model: Epinet, frame: torch.Tensor, index: np.ndarray) -> float:
    """Osband et al. 2023, eq. 5 and 6, in NumPy, for one frame and one index."""
    x = model.frame_inputs.norm(frame).numpy()
    get = {name: value.detach().numpy() for name, value in model.named_parameters()}
    phi = x
    for layer in range(2):
        name = f"network.body.layers.{layer}"
        phi = silu(get[f"{name}.weight"] @ phi + get[f"{name}.bias"])
    base = (get["network.last.weight"] @ phi + get["network.last.bias"])[0]
    first = np.concatenate([get["of_frame.weight"], get["of_index.weight"]], 1)
    hidden = leaky(first @ np.concatenate([phi, x, index]) + get["of_frame.bias"])
    learned = index @ (get["out.weight"] @ hidden + get["out.bias"])
    prior = 0.0
    for i in range(3):
        p = x
        for layer in range(3):
            p = get[f"prior.weights.{layer}"][i] @ p + get[f"prior.biases.{layer}"][i, :, 0]
            p = silu(p) if layer < 2 else p
        prior += index[i] * p[0]
    return float(base + learned + 0.7 * prior)


def one_clip(model: Epinet, clip: int, index: np.ndarray) -> float:
    frames = torch.cat([CLIPS.observations[clip], CLIPS.actions[clip][:, None]], 1)
    return sum(one_frame(model, frame, index) for frame in frames)


def test_a_sample_is_one_index_for_every_clip_and_frame(model):
    found = model.posterior(CLIPS).samples
    for sample, index in enumerate(model.indices().numpy()):
        frames = torch.cat([model.reference_observations, model.reference_actions[:, None]], 1)
        constant = np.mean([one_frame(model, frame, index) for frame in frames])
        expected = [one_clip(model, clip, index) - 4 * constant for clip in range(20)]
        np.testing.assert_allclose(found[sample], expected, atol=1e-4)


def test_loss_is_a_loop_over_comparisons_and_indices(model, monkeypatch):
    rows = torch.tensor([3, 0, 8])
    first, second = COMPARISONS.pairs[rows].T
    batch = PairBatch(CLIPS[first], CLIPS[second], COMPARISONS.preference[rows], rows)
    drawn, draw = [], model._draw
    monkeypatch.setattr(model, "_draw", lambda n: drawn.append(draw(n)) or drawn[-1])
    found = float(model.loss(batch).detach())
    (indices,) = drawn
    assert len(indices) == model.training_indices
    losses = []
    for index in indices.numpy():
        for row in rows.tolist():
            a, b = (one_clip(model, int(clip), index) for clip in COMPARISONS.pairs[row])
            p = 1 / (1 + math.exp(a - b))
            losses.append(-math.log(p if COMPARISONS.preference[row] else 1 - p))
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_epinets_gradient_stops_at_the_features(model):
    model.zero_grad()
    frames = model.inputs(CLIPS.observations.flatten(0, 1), CLIPS.actions.flatten(0, 1))
    under = model.rewards_of(torch.randn(5, 3), frames)
    (under - model.rewards_of(torch.zeros(1, 3), frames)).square().sum().backward()
    assert float(model.out.weight.grad.abs().max()) > 0
    for parameter in model.network.parameters():
        assert float(parameter.grad.abs().max()) < 1e-4  # rounding of what cancels
    model.zero_grad()


def test_indices_are_standard_normal_and_stay():
    model = Epinet(hidden=(4,), samples=2000)
    model.initialise(CLIPS)
    indices = model.indices()
    assert indices.shape == (2000, 8)
    assert scipy.stats.kstest(indices.flatten().numpy(), "norm").pvalue > 1e-4
    torch.rand(5)
    assert torch.equal(model.indices(), indices)
    other = Epinet(hidden=(4,), samples=2000)
    other.initialise(CLIPS)
    assert not torch.equal(other.indices(), indices)


def test_frames_pass_the_base_network_once(model, monkeypatch):
    passed, features = [], model.network.features
    monkeypatch.setattr(
        model.network, "features", lambda frames: passed.append(len(frames)) or features(frames)
    )
    model.posterior(CLIPS)
    assert sum(passed) == 80
