"""The ensemble: bootstraps, priors, the constant of each member, and the reference batch."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rewardmodels import Clips, DeepEnsemble, InvalidInput, PairBatch, fit

from .data import linear_clips, linear_comparisons


@pytest.fixture(scope="module")
def model() -> DeepEnsemble:
    model = DeepEnsemble(members=4, hidden=(32,), learning_rate=3e-3)
    return fit(model, linear_comparisons(200), epochs=40)


def test_the_report_says_how_well(model):
    report = model.fit_report
    assert 15 <= report.held_out <= 45
    assert 1 <= report.epochs <= 40
    assert report.held_out_accuracy > 0.8
    assert 0 < report.held_out_log_loss < math.log(2)
    assert 0 < report.train_log_loss < math.log(2)


def test_lengths_that_differ_keep_the_constant(model):
    clips = linear_clips(n=2)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    short = Clips(clips.observations[[0, 0]], clips.actions[[0, 0]], mask)
    frames = model.frame_posterior(clips.observations[0], clips.actions[0]).mean
    found = model.posterior(short).difference(torch.tensor([[1, 0]])).mean
    assert float(found) == pytest.approx(float(frames[2:].sum()), abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_frames_that_are_not_numbers(model, bad):
    observations, actions = torch.zeros(4, 3), torch.zeros(4, 2)
    actions[2, 1] = bad
    with pytest.raises(InvalidInput, match=r"actions: .*clip 2, frame 0"):
        model.frame_posterior(observations, actions)


def test_bootstrap_counts_are_poisson_of_mean_one():
    counts = DeepEnsemble(members=5).counts(4000).numpy()
    assert counts.shape == (4000, 5)
    seen = np.bincount(np.minimum(counts, 5).astype(int).ravel(), minlength=6)
    expected = scipy.stats.poisson.pmf(np.arange(5), 1)
    expected = counts.size * np.append(expected, 1 - expected.sum())
    assert scipy.stats.chisquare(seen, expected).pvalue > 1e-4
    # Members count independently of each other.
    apart = np.corrcoef(counts.T) - np.eye(5)
    assert np.abs(apart).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("before", [1, 2, 63, 64, 65, 500])
def test_bootstrap_counts_stay_when_comparisons_are_added(before):
    model = DeepEnsemble(members=3)
    early = model.counts(before).clone()
    assert early.shape == (before, 3)
    assert torch.equal(model.counts(4 * before)[:before], early)


def test_bootstraps_of_two_seeds_differ_and_last():
    some = linear_comparisons(20)
    models = [fit(DeepEnsemble(members=3), some, epochs=1, seed=seed) for seed in (0, 1)]
    counts = [model.counts(20).clone() for model in models]
    assert not torch.equal(*counts)
    fit(models[0], some, epochs=1, seed=5)
    assert torch.equal(models[0].counts(20), counts[0])


def test_loss_is_a_loop_over_members_and_comparisons():
    some = linear_comparisons(10)
    clips = some.clips
    model = fit(DeepEnsemble(members=3, random_answer_rate=0.1), some, epochs=1)
    assert not any(name.startswith("prior") for name in model.state_dict())  # none was asked for
    index = torch.tensor([7, 2, 9])
    first, second = some.pairs[index].T
    batch = PairBatch(clips[first], clips[second], some.preference[index], index)
    counts, expected = model.counts(10), 0.0
    belief = model.posterior(clips).samples
    for member in range(3):
        for row in index.tolist():
            a, b = some.pairs[row].tolist()
            p = 0.9 / (1 + math.exp(-float(belief[member, b] - belief[member, a]))) + 0.05
            said = float(some.preference[row])
            nll = -(said * math.log(p) + (1 - said) * math.log(1 - p))
            expected += float(counts[row, member]) * nll / 9
    assert float(model.loss(batch).detach()) == pytest.approx(expected, rel=1e-4)


def test_a_member_is_its_network_and_its_prior_by_scale():
    some = linear_comparisons(10)
    clips = some.clips
    model = fit(DeepEnsemble(members=3, hidden=(8,), prior_scale=0.7), some, epochs=2)
    frames = model.inputs(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
    found = model.rewards(frames)
    for member in range(3):
        expected = 0.0
        for part, scale in ((model.network, 1.0), (model.prior, 0.7)):
            hidden = frames @ part.weights[0][member].T + part.biases[0][member, :, 0]
            hidden = hidden * torch.sigmoid(hidden)
            out = hidden @ part.weights[1][member].T + part.biases[1][member, :, 0]
            expected = expected + scale * out.squeeze(1)
        torch.testing.assert_close(found[member], expected)


def test_the_reference_is_spread_over_real_frames():
    clips = linear_clips(n=400)
    mask = torch.ones(400, 6, dtype=torch.bool)
    mask[:, 4:] = False
    observations = torch.arange(2400.0).view(400, 6, 1).masked_fill(~mask[..., None], torch.nan)
    model = DeepEnsemble(members=2)
    model.initialise(Clips(observations, clips.actions, mask))
    chosen = model.reference_observations.squeeze(1)
    assert len(chosen) == 1024
    assert chosen.unique().numel() == 1024
    assert set(chosen.tolist()) <= set(observations[mask].flatten().tolist())
    assert (chosen.min(), chosen.max()) == (0, observations[mask].max())
