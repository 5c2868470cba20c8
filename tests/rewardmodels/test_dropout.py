"""MC dropout: a sample is one mask for everything, and a comparison is trained under one."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rewardmodels import MCDropout, PairBatch, fit

from .data import CLIPS, COMPARISONS


@pytest.fixture(scope="module")
def model() -> MCDropout:
    return fit(MCDropout(samples=6, hidden=(8, 5), rate=0.3), COMPARISONS, epochs=3)


def one_frame(model: MCDropout, frame: torch.Tensor, masks: list[np.ndarray]) -> float:
    """A network with dropout, in NumPy, for one frame and one mask a layer."""
    hidden = model.frame_inputs.norm(frame).numpy()
    layers = [*model.network.body.layers, model.network.last]
    weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]
    for (weight, bias), mask in zip(weights[:-1], masks, strict=True):
        hidden = weight @ hidden + bias
        hidden = hidden / (1 + np.exp(-hidden)) * mask
    return float((weights[-1][0] @ hidden + weights[-1][1])[0])


def one_clip(model: MCDropout, clip: int, masks: list[np.ndarray]) -> float:
    frames = torch.cat([CLIPS.observations[clip], CLIPS.actions[clip][:, None]], 1)
    return sum(one_frame(model, frame, masks) for frame in frames)


def test_a_sample_is_one_mask_for_every_clip_and_frame(model):
    masks = [mask.squeeze(1).numpy() for mask in model.masks()]
    for sample in range(6):
        own = [mask[sample] for mask in masks]
        frames = torch.cat([model.reference_observations, model.reference_actions[:, None]], 1)
        constant = np.mean([one_frame(model, frame, own) for frame in frames])
        expected = [one_clip(model, clip, own) - 4 * constant for clip in range(20)]
        found = model.posterior(CLIPS).samples[sample]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_masks_keep_a_share_and_the_mean():
    model = MCDropout(samples=500, hidden=(40, 30), rate=0.3)
    model.initialise(CLIPS)
    masks = model.masks()
    assert [tuple(mask.shape) for mask in masks] == [(500, 1, 40), (500, 1, 30)]
    values = torch.cat([mask.flatten() for mask in masks])
    assert {round(value, 5) for value in values.unique().tolist()} == {0.0, round(1 / 0.7, 5)}
    kept = int((values > 0).sum())
    assert scipy.stats.binomtest(kept, len(values), 0.7).pvalue > 1e-4


def test_masks_are_those_of_the_model_and_stay(model):
    before = [mask.clone() for mask in model.masks()]
    torch.rand(7)
    fit(model, COMPARISONS, epochs=1, seed=9)
    assert all(torch.equal(*both) for both in zip(before, model.masks(), strict=True))
    other = fit(MCDropout(samples=6, hidden=(8, 5), rate=0.3), COMPARISONS, epochs=1, seed=1)
    assert not all(torch.equal(*both) for both in zip(before, other.masks(), strict=True))


def test_loss_is_a_loop_over_comparisons_each_under_one_mask(model, monkeypatch):
    index = torch.tensor([3, 0, 8])
    first, second = COMPARISONS.pairs[index].T
    batch = PairBatch(CLIPS[first], CLIPS[second], COMPARISONS.preference[index], index)
    drawn, draw = [], model._draw
    monkeypatch.setattr(model, "_draw", lambda n: drawn.append(draw(n)) or drawn[-1])
    found = float(model.loss(batch).detach())
    (masks,) = drawn
    expected = 0.0
    for place, row in enumerate(index.tolist()):
        own = [mask[place, 0].numpy() for mask in masks]
        a, b = (one_clip(model, int(clip), own) for clip in COMPARISONS.pairs[row])
        p = 1 / (1 + math.exp(a - b))
        expected -= math.log(p if COMPARISONS.preference[row] else 1 - p) / 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(masks[0][0], masks[0][1])


def test_in_training_too_a_clip_does_not_differ_from_itself(model):
    batch = PairBatch(CLIPS[:5], CLIPS[:5], torch.ones(5), torch.arange(5))
    assert float(model.loss(batch).detach()) == pytest.approx(math.log(2), abs=1e-5)


def test_without_dropout_all_samples_are_the_network():
    model = fit(MCDropout(samples=3, rate=0.0), COMPARISONS, epochs=1)
    assert float(model.posterior(CLIPS).variance.max()) < 1e-10
