"""Novelty: what lies outside the compared frames is uncertain, as much as the data ask for."""

import json
import math

import lightning as L
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.integrate import quad
from scipy.stats import norm

from rewardmodels import (
    Calibrated,
    Clips,
    Comparisons,
    DeepEnsemble,
    FitOptions,
    InvalidInput,
    LaplaceHead,
    SampledPosterior,
    fit,
    load,
    save,
)
from rewardmodels.novelty import CONSTANT_AMPLITUDE, Novelty, learned_amplitudes, pseudo_shifts
from rewardmodels.posterior import expected_preference
from tests.rewardmodels.data import of_neighbours


def drawn(n: int = 300, seed: int = 0, *, unseen: float = 0.0, reward=None) -> Comparisons:
    """Pairs of clips of three frames; the last of four inputs is zero or, in some, one."""
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(2 * n, 3, 4, generator=draw)
    observations[..., 3] = (torch.rand(2 * n, 1, generator=draw) < unseen).float()
    rewards = reward(observations) if reward else observations[..., 0] - 4 * observations[..., 3]
    return of_neighbours(Clips(observations, torch.zeros(2 * n, 3, 0), rewards=rewards))


def amplitudes(comparisons: Comparisons) -> torch.Tensor:
    torch.manual_seed(0)
    observations = comparisons.clips.observations
    constant = observations.flatten(0, 1).std(0) == 0
    return learned_amplitudes(observations, comparisons, torch.ones(len(constant)), constant)


@pytest.mark.parametrize("mean", [-30.0, -1.0, 0.0, 2.0, 50.0])
@pytest.mark.parametrize("variance", [0.0, 0.3, 40.0, 1e6])
def test_the_expected_preference_is_an_integral(mean, variance):
    std = math.sqrt(variance)
    expected = 1 / (1 + math.exp(-mean))
    if std:
        points = [mean - 8 * std, mean + 8 * std, -20, 0, 20]
        low, high = min(points), max(points)
        expected, _ = quad(
            lambda x: norm.pdf(x, mean, std) / (1 + math.exp(-x)) if x > -700 else 0.0,
            low, high, points=points, limit=500,
        )  # fmt: skip
    found = expected_preference(torch.tensor(mean).double(), torch.tensor(variance).double())
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_noise_on_samples_is_that_of_a_mixture_of_normals():
    draw = torch.Generator().manual_seed(0)
    samples, root = torch.randn(4, 5, generator=draw), torch.randn(5, 2, generator=draw)
    posterior = SampledPosterior(samples).plus(root[:, :1]).plus(root[:, 1:])
    pairs = torch.tensor([[0, 1], [3, 2], [4, 4]])
    draws = posterior.rsample(200_000, draw).double()
    differences = draws[:, pairs[:, 1]] - draws[:, pairs[:, 0]]
    found = posterior.difference(pairs)
    assert torch.allclose(found.mean.double(), differences.mean(0), atol=0.03)
    assert torch.allclose(found.variance.double(), differences.var(0), rtol=0.02)
    assert torch.allclose(posterior.covariance.double(), draws.T.cov(), atol=0.06)
    p = posterior.preference(pairs, random_answer_rate=0.2)
    assert torch.allclose(p.double(), 0.8 * differences.sigmoid().mean(0) + 0.1, atol=4e-3)
    assert torch.equal(posterior.select(pairs[:, 0]).variance, posterior.variance[pairs[:, 0]])
    assert torch.allclose(posterior.scaled(3.0).variance, 9 * posterior.variance)


def test_an_input_that_was_never_seen_no_longer_misleads():
    """The reward of the unseen input is drawn anew for each seed; no model can know it."""
    found = {"learned": [], "off": []}
    for seed in range(2):
        sign = 1 if seed % 2 else -1
        tests = drawn(
            200, 100 + seed, unseen=0.5, reward=lambda x, s=sign: x[..., 0] + 4 * s * x[..., 3]
        )
        for novelty, losses in found.items():
            model = fit(LaplaceHead(weight_decay=0.0), drawn(150, seed), seed=seed, novelty=novelty)
            differ = tests.clips.observations[tests.pairs, 0, 3].diff().squeeze(1) != 0
            some = tests[differ]
            p = model.posterior(some.clips).preference(some.pairs)
            likelihood = torch.where(some.preference > 0.5, p, 1 - p)
            losses.append(float(-likelihood.clamp_min(1e-9).log().mean()))
    assert np.mean(found["learned"]) < 0.75
    assert np.mean(found["off"]) > 2 * np.mean(found["learned"])


def test_amplitudes_are_learned_where_extrapolation_fails():
    straight = amplitudes(drawn(800, reward=lambda x: 2 * x[..., 0]))
    peaked = amplitudes(drawn(800, reward=lambda x: -6 * (x[..., 0] - 0.8).abs()))
    assert straight[0] < 0.01
    assert peaked[0] > 10 * straight[0]
    assert straight[3] == peaked[3] == CONSTANT_AMPLITUDE


def test_pseudo_shifts_hold_out_one_end_or_the_rare_values():
    comparisons = drawn(400, unseen=0.1)
    inputs, mask = comparisons.clips.observations, comparisons.clips.mask
    shifts = pseudo_shifts(inputs, mask, comparisons.pairs, comparisons.preference)
    by_input = {shift.input: shift for shift in shifts}
    of_clips = inputs.amax(1)[comparisons.pairs]
    highest = of_clips[..., 0].max(1).values  # more of the first input is preferred
    held_out = by_input[0].held_out
    assert highest[held_out].min() >= highest[~held_out].max()
    assert 0.2 < held_out.double().mean() < 0.35
    assert by_input[3].sparse
    assert torch.equal(by_input[3].held_out, (of_clips[..., 3] > 0).any(1))


def test_amplitudes_are_learned_again_once_there_are_half_as_many_comparisons_again():
    model = fit(LaplaceHead(), drawn(100), epochs=1)
    learned = model.novelty.learned.clone()
    fit(model, drawn(120, seed=1), epochs=1)
    assert int(model.novelty.learned_from) == 100
    assert torch.equal(model.novelty.learned, learned)
    low, high = model.novelty.lowest.clone(), model.novelty.highest.clone()
    fit(model, drawn(150, seed=2), epochs=1)
    assert int(model.novelty.learned_from) == 150
    assert (model.novelty.lowest <= low).all()
    assert (model.novelty.highest >= high).all()


def test_nothing_compared_is_novel_after_a_refit_that_was_interrupted():
    class Interrupts(L.pytorch.callbacks.Callback):
        def on_train_epoch_start(self, trainer, model):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    model = fit(LaplaceHead(), drawn(60), epochs=1, novelty=1.0)
    more = drawn(60, seed=1)
    more.clips.observations.mul_(5).add_(3)  # which changes the normalisation
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[Interrupts()], enable_model_summary=False,
        **quiet,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        fit(model, more, options=FitOptions(trainer=trainer))
    for known in (drawn(60), more):
        expected = model.compute_posterior(known.clips).variance
        assert torch.equal(model.posterior(known.clips).variance, expected)


def test_few_comparisons_and_constant_inputs_have_amplitudes_that_need_no_data():
    clips = Clips(torch.ones(4, 2, 3), torch.zeros(4, 2, 1))
    model = fit(
        LaplaceHead(), Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2)), epochs=1
    )
    assert (model.novelty.learned == CONSTANT_AMPLITUDE).all()
    assert model.posterior(clips).mean.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (torch.rand(40, 3, 3, 16, 16), torch.zeros(40, 3, 1)),
        (torch.rand(40, 3, 2), torch.arange(120).view(40, 3) % 2),
        (torch.rand(40, 1, 6), torch.zeros(40, 1, 0)),
    ],
    ids=["images", "discrete actions", "items"],
)
def test_novelty_of_every_kind_of_frame(observations, actions):
    mask = torch.arange(observations.shape[1]) < torch.tensor([[1], [3]]).repeat(20, 1)
    clips = Clips(observations, actions, mask)
    pairs = torch.arange(40).view(20, 2)
    comparisons = Comparisons(clips, pairs, (torch.arange(20) % 2).float())
    model = fit(DeepEnsemble(members=2, hidden=(4,)), comparisons, epochs=1, novelty=1.0)
    novel = Clips(observations + 2, actions, mask)
    before, after = model.posterior(clips).difference(pairs), model.posterior(novel)
    assert (after.difference(pairs).variance > before.variance + 1e-6).all()
    frames = novel.observations[:2, 0], novel.actions[:2, 0]
    _, std = model.frame_scorer().batch(*(x.numpy() for x in frames))
    assert np.allclose(std**2, model.frame_posterior(*frames).variance, rtol=1e-3)


def test_a_calibrated_model_doesnt_know_either():
    model = fit(LaplaceHead(), drawn(100), epochs=20)
    calibrated = Calibrated(model).calibrate(drawn(100, seed=1), random=True)
    clips = drawn(2).clips
    clips.observations[0, :, 3] = 100.0
    pairs = torch.tensor([[0, 1]])
    assert float(calibrated.posterior(clips).preference(pairs)) == pytest.approx(0.5, abs=0.02)
    t = calibrated.temperature  # novelty, which is all of it here, is divided twice if below 1
    variance = model.posterior(clips).difference(pairs).variance / (t * min(1, t)) ** 2
    assert torch.allclose(calibrated.posterior(clips).difference(pairs).variance, variance)


def test_a_file_from_before_novelty_has_none(tmp_path):
    model = fit(DeepEnsemble(members=2), drawn(50), epochs=1)
    save(model, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["rewardmodels"]) | {"format": 2}
    del about["checksum"]  # which came later
    old = {name: value for name, value in tensors.items() if not name.startswith("novelty.")}
    save_file(old, tmp_path / "old.safetensors", {"rewardmodels": json.dumps(about)})
    far = Clips(torch.full((2, 3, 4), 9.0), torch.zeros(2, 3, 0))
    expected = model.compute_posterior(far).variance
    assert torch.equal(load(tmp_path / "old.safetensors").posterior(far).variance, expected)
    assert (load(tmp_path / "new.safetensors").posterior(far).variance > expected).all()


@pytest.mark.parametrize("novelty", ["on", None, -1.0, math.inf, math.nan])
def test_other_settings_are_refused(novelty):
    with pytest.raises(InvalidInput, match="novelty"):
        fit(LaplaceHead(), drawn(10), novelty=novelty)


@pytest.mark.parametrize("value", [1e19, 1e30])
def test_observations_whose_squares_overflow_are_refused(value):
    comparisons = drawn(10)
    comparisons.clips.observations[3, 1, 2] = value
    with pytest.raises(InvalidInput, match="rescale"):
        fit(LaplaceHead(), comparisons, epochs=1)


def test_a_value_far_beyond_all_others_gives_a_finite_posterior():
    model = fit(LaplaceHead(), drawn(50), epochs=1)
    clips = drawn(2).clips
    clips.observations[0, 0, 3] = 1e17
    assert model.posterior(clips).variance.isfinite().all()
    clips.observations[0, 0, 3] = 1e7
    posterior = model.posterior(clips)
    assert float(posterior.preference(torch.tensor([[0, 1]]))) == pytest.approx(0.5, abs=1e-3)


def test_the_range_holds_every_compared_frame_whatever_the_normalisation():
    novelty = Novelty(3)
    draw = torch.Generator().manual_seed(0)
    frames, mean, scale = torch.randn(50, 3, generator=draw), torch.tensor([1e3, 0, -7]), 1e-2
    novelty.extend(frames, mean, torch.full((3,), scale))
    novelty.amplitude = torch.ones(3)
    assert not novelty.variance(frames).any()
    novelty.extend(frames[:1], mean + 5, torch.full((3,), 2 * scale))
    old_frames = (frames * scale + mean - (mean + 5)) / (2 * scale)
    assert not novelty.variance(old_frames).any()
    assert novelty.variance(old_frames + 400).all()
