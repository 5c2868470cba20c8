"""Conformance suite of reward models: `check_reward_model`, and the checks it runs."""

from __future__ import annotations

import pickle
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, NotFitted, RewardModelsError
from rewardmodels.fitting import FitOptions, fit, isolated_randomness
from rewardmodels.likelihood import preference_probability
from rewardmodels.model import RewardModel
from rewardmodels.novelty import NoveltySetting
from rewardmodels.posterior import ReturnPosterior
from rewardmodels.saving import load, save

MakeModel = Callable[[], RewardModel]
Check = Callable[[MakeModel], None]
Make = TypeVar("Make")

_TOLERANCE = 1e-3  # of the values' scale: for sums in another order
_DRAWS = 8192
_SIGMAS = 6  # allowed standard errors between a value and the mean of 8192 draws
_OBSERVATION, _ACTION, _FRAMES = 3, 2, 5
# Moves of an input: variance of known inputs grows with the least amplitude, so only far out.
_FAR, _FAR_OF_CONSTANT, _NEAR_ONE_HALF = 1e5, 1e2, 0.05
EPOCHS = 60


class CheckFailed(RewardModelsError, AssertionError):
    """A broken promise of a reward model, with the numbers and the usual cause."""


def check_reward_model(make_model: MakeModel) -> None:
    """Run every check of `CHECKS`, and report all that fail.

    Each fits a small model to a few synthetic comparisons of short clips, on the CPU or wherever
    Lightning would train; the fits are shared, so that the list takes seconds. Nothing global is
    seeded, and no file is left behind.

    Args:
        make_model: Makes a new model, not yet fitted; called several times. A class whose
            constructor needs no arguments will do.

    Raises:
        CheckFailed: One or more promises are broken.

    Example:
        With pytest, each check is a test of its own::

            @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
            def test_my_model(check):
                check(MyRewardModel)
    """
    run_checks(CHECKS, make_model)


def run_checks(checks: Sequence[Callable[[Make], None]], make: Make) -> None:
    """Run all checks on what `make` makes; raise one CheckFailed with all that fail."""
    failures = []
    for check in checks:
        try:
            check(make)
        except CheckFailed as failure:
            failures.append(f"- {check.__name__}: {failure}")
        except Exception as error:
            error.add_note(f"Raised in {check.__module__}.{check.__name__}.")
            raise
    if failures:
        listed = "\n".join(failures)
        raise CheckFailed(f"{len(failures)} of {len(checks)} checks failed:\n{listed}")


# Fitting, saving and refusing.


def check_invalid_calls_raise(make_model: MakeModel) -> None:
    """NotFitted is raised before the first fit, and InvalidInput for frames of other shapes."""
    clips = _clips(2, seed=27)
    frames = clips.observations[0], clips.actions[0]
    new, model = make_model(), _fitted(make_model)
    wider = Clips(torch.zeros(2, 4, _OBSERVATION + 1), torch.zeros(2, 4, _ACTION))
    # As many numbers in all, which a network alone wouldn't notice.
    moved = Clips(torch.zeros(2, 4, _OBSERVATION - 1), torch.zeros(2, 4, _ACTION + 1))
    cause = "`posterior` overridden, without the checks of RewardModel's"
    for what, call, expected in (
        ("posterior before a fit", lambda: new.posterior(clips), NotFitted),
        ("frame_posterior before a fit", lambda: new.frame_posterior(*frames), NotFitted),
        ("observations too wide", lambda: model.posterior(wider), InvalidInput),
        ("a number moved to the actions", lambda: model.posterior(moved), InvalidInput),
    ):
        expect_error(expected, what, call, cause)


def check_learns_an_easy_reward(make_model: MakeModel) -> None:
    """At least 75% of 200 new pairs are predicted as the true return decides.

    Guessing would reach 75% once in 10^12 times.
    """
    clips = _clips(400, seed=23)
    pairs = torch.arange(400).view(200, 2)
    truth = (clips.returns[pairs[:, 1]] > clips.returns[pairs[:, 0]]).cpu()
    predicted = _fitted(make_model).posterior(clips).preference(pairs).cpu() > 0.5
    accuracy = float((predicted == truth).double().mean())
    if not accuracy >= 0.75:
        raise _failure(
            "an easy reward is learned",
            f"{accuracy:.0%} of 200 new pairs right, expected at least 75%",
            "a loss of the wrong sign, the second clip taken for the first, or steps too small "
            f"for 160 comparisons and {EPOCHS} epochs",
        )


def check_variance_grows_away_from_data(make_model: MakeModel) -> None:
    """The median variance of a difference is larger far from the training clips than on them."""
    model = _fitted(make_model)
    pairs = torch.arange(80).view(40, 2)
    near, far = (
        float(model.posterior(clips).difference(pairs).variance.median())
        for clips in (_clips(80, seed=1), _far_clips(80, seed=22))
    )
    if not far > near:
        raise _failure(
            "differences far from the data have a larger variance",
            f"median variance {far:.3g} far from the data, {near:.3g} on it",
            "an activation that saturates, clipped inputs, or a variance that ignores the inputs",
        )


def check_same_seed_same_fit(make_model: MakeModel) -> None:
    """Two fits with one seed agree, whatever the global generators held before."""
    posteriors = []
    for before in (1, 2):
        with isolated_randomness(before):
            model = fit(make_model(), _comparisons()[:40], epochs=2, seed=3)
            posteriors.append(model.posterior(_clips(20, seed=24)))
    one, other = posteriors
    cause = "randomness from NumPy, from Python, or drawn in the constructor, before `fit` seeds"
    _expect_same_moments("after two fits with one seed", one, other, cause)


def check_posterior_has_no_side_effects(make_model: MakeModel) -> None:
    """`posterior` leaves weights, buffers, training flags and global generators as they were.

    Called twice, in training mode or not, it returns the same, and without a gradient.
    """
    model, clips = _fitted(make_model), _clips(8, seed=25)
    expected, pairs = model.posterior(clips), torch.combinations(torch.arange(8))
    cause = "running statistics updated in `forward`, or masks drawn at each call"
    was_training = model.training
    try:
        for training in (True, False):
            model.train(training)
            before = _state(model)
            posterior = model.posterior(clips)
            posterior.difference(pairs)
            posterior.preference(pairs)
            posterior.rsample(3, torch.Generator().manual_seed(0))
            after = _state(model)
            changed = [name for name in before | after if before.get(name) != after.get(name)]
            if changed:
                mode = "training" if training else "eval"
                numbers = f"changed in {mode} mode: {', '.join(changed)}"
                raise _failure("`posterior` changes nothing", numbers, cause)
            if posterior.mean.requires_grad or posterior.covariance.requires_grad:
                raise _failure("no gradient is kept", "requires_grad=True", "a missing no_grad")
            _expect_same_moments("at a second call", posterior, expected, cause)
    finally:
        model.train(was_training)


def check_save_and_load(make_model: MakeModel) -> None:
    """`save` and `load` keep all that the posterior depends on."""
    model, clips = _fitted(make_model, "learned"), _clips(20, seed=26)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        loaded = load(path, type(model))
    cause = (
        "something learned that is no parameter and no registered buffer, or hyper-parameters "
        "that `save_hyperparameters()` didn't see"
    )
    _expect_same_moments("after loading", loaded.posterior(clips), model.posterior(clips), cause)


# The posterior as one coherent distribution over reward functions.


def check_covariance_is_positive_semidefinite(make_model: MakeModel) -> None:
    """The covariance is symmetric, has no negative eigenvalue, and has `variance` on its diagonal.

    Eigenvalues may fall below zero by 1e-4 of the largest, which is the error of single precision.
    """
    posterior = _fitted(make_model).posterior(_clips(30, seed=11))
    covariance = _double(posterior.covariance)
    cause = "a covariance put together from parts that are no inner products"
    _expect_same("covariance and its transpose", covariance.T, covariance, cause)
    diagonal = covariance.diagonal()
    _expect_same("variance and the covariance's diagonal", posterior.variance, diagonal, cause)
    eigenvalues = torch.linalg.eigvalsh((covariance + covariance.T) / 2)
    least, most = float(eigenvalues[0]), float(eigenvalues[-1])
    if not most > 0:
        raise _failure("some variance is left after a fit", f"largest eigenvalue {most}", cause)
    if least < -1e-4 * most:
        numbers = f"eigenvalues from {least:.3g} to {most:.3g}"
        raise _failure("the covariance is positive semidefinite", numbers, cause)


def check_samples_match_moments(make_model: MakeModel) -> None:
    """`rsample` draws from the distribution with `mean` and `covariance`.

    For 8192 draws of 12 clips, each mean and each product of two deviations may be off by six
    standard errors. The same generator gives the same draws.
    """
    posterior = _fitted(make_model).posterior(_clips(12, seed=12))
    draws = _double(_samples(posterior))
    cause = "clips drawn independently of each other, or a standard deviation used as a variance"
    if draws.shape != (_DRAWS, 12):
        numbers = f"shape {tuple(draws.shape)}, expected {(_DRAWS, 12)}"
        raise _failure("rsample(n) draws (n, N)", numbers, "axes in another order")
    deviations = draws - _double(posterior.mean)
    _expect_mean("mean of draws and mean", deviations, torch.zeros(12), cause)
    products = deviations[:, :, None] * deviations[:, None, :]
    _expect_mean("covariance of draws and covariance", products, posterior.covariance, cause)
    cause = "randomness from the global generator"
    _expect_same("two draws from one generator", _samples(posterior), draws, cause)


def check_difference_matches_covariance(make_model: MakeModel) -> None:
    """`difference` is the second clip's return minus the first's, under the joint posterior.

    Compared with the covariance, and within six standard errors with 8192 draws.
    """
    posterior = _fitted(make_model).posterior(_clips(12, seed=13))
    pairs = torch.combinations(torch.arange(12))
    mean, variance = posterior.difference(pairs)
    contrast = torch.eye(12, dtype=torch.double)[pairs].diff(dim=1).squeeze(1)  # (Q, 12)
    expected = contrast @ _double(posterior.mean)
    covariance = contrast @ _double(posterior.covariance) @ contrast.T
    draws = _double(_samples(posterior)) @ contrast.T
    cause = (
        "marginal variances added up, where what both clips share should cancel; or the first "
        "minus the second"
    )
    _expect_same("mean of a difference and of the means", mean, expected, cause)
    what = "variance of a difference and by the covariance"
    _expect_same(what, variance, covariance.diagonal(), cause)
    _expect_mean("mean of a difference and of draws", draws, mean, cause)
    squares = (draws - _double(mean)).square()
    _expect_mean("variance of a difference and of draws", squares, variance, cause)


def check_preference_averages_over_posterior(make_model: MakeModel) -> None:
    """`preference` is the posterior mean of Bradley–Terry's probability, random answers included.

    Within six standard errors of the mean over 8192 draws.
    """
    posterior = _fitted(make_model).posterior(_far_clips(12, seed=14))
    pairs = torch.combinations(torch.arange(12))
    draws = _samples(posterior)
    differences = draws[:, pairs[:, 1]] - draws[:, pairs[:, 0]]
    for rate in (0.0, 0.2):
        probability = preference_probability(differences, random_answer_rate=rate)
        preference = posterior.preference(pairs, random_answer_rate=rate)
        cause = "the probability at the mean difference, which ignores the variance"
        what = f"preference at random_answer_rate={rate} and of draws"
        _expect_mean(what, probability, preference, cause)


def check_swapping_a_pair_flips_its_preference(make_model: MakeModel) -> None:
    """P(second) of a pair is one minus P(second) of the pair written the other way round."""
    posterior = _fitted(make_model).posterior(_clips(12, seed=15))
    pairs, cause = torch.combinations(torch.arange(12)), "a bias towards the clip written first"
    swapped = pairs.flip(1)
    for rate in (0.0, 0.2):
        one, other = (posterior.preference(x, random_answer_rate=rate) for x in (pairs, swapped))
        _expect_same("preference and one minus that of swapped pairs", 1 - other, one, cause)
    mean, variance = posterior.difference(pairs)
    swapped_mean, swapped_variance = posterior.difference(swapped)
    _expect_same("difference and minus that of swapped pairs", -swapped_mean, mean, cause)
    _expect_same("variance of swapped pairs", swapped_variance, variance, cause)


def check_permuting_clips_permutes_posterior(make_model: MakeModel) -> None:
    """The order of clips changes the order of the posterior, and nothing else."""
    model, clips = _fitted(make_model), _clips(20, seed=16)
    order = torch.arange(20) * 7 % 20
    cause = "an axis reshaped where it should be transposed, or a statistic that runs along clips"
    permuted, expected = model.posterior(clips[order]), model.posterior(clips)
    _expect_same_moments("of permuted clips", permuted, expected, cause, rows=order)


def check_posterior_does_not_depend_on_batch(make_model: MakeModel) -> None:
    """A clip's posterior is the same whichever other clips are in the same call."""
    model, clips = _fitted(make_model), _clips(20, seed=17)
    expected = model.posterior(clips)
    cause = (
        "normalisation by the batch, inputs padded to the batch, or functions drawn at each call"
    )
    for rows in (torch.tensor([3]), torch.tensor([19, 0, 7])):
        what = f"of clips {rows.tolist()} alone"
        _expect_same_moments(what, model.posterior(clips[rows]), expected, cause, rows=rows)
    joined = model.posterior(Clips.cat([clips, _far_clips(5, seed=18)]))
    mean, covariance = joined.mean[:20], joined.covariance[:20, :20]
    _expect_same("mean beside far clips", mean, expected.mean, cause)
    _expect_same("covariance beside far clips", covariance, expected.covariance, cause)


def check_padding_is_ignored(make_model: MakeModel) -> None:
    """Values past a clip's end, and the length of the padding, have no influence."""
    model, clips = _fitted(make_model), _clips(10, seed=19)
    short = Clips(clips.observations[:, :3], clips.actions[:, :3])
    mask = (torch.arange(_FRAMES) < 3).expand(10, _FRAMES)
    padded = Clips(clips.observations, clips.actions, mask)
    long = Clips(torch.zeros(1, 50, _OBSERVATION), torch.zeros(1, 50, _ACTION))
    expected = model.posterior(short)
    cause = "a sum or a mean over all T frames, where `mask` marks the real ones"
    _expect_same_moments("of padded clips", model.posterior(padded), expected, cause)
    longer = model.posterior(Clips.cat([short, long])[:10])
    _expect_same_moments("of clips padded far beyond their end", longer, expected, cause)


def check_frames_sum_to_clip(make_model: MakeModel) -> None:
    """`frame_posterior` and `posterior` agree: rewards of frames sum to a clip's return."""
    model, clips = _fitted(make_model, "learned"), _clips(6, seed=21)
    posterior = model.posterior(clips)
    frames = model.frame_posterior(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
    cause = "a mean over frames where a return is a sum, or frames that are each centred anew"
    mean = _double(frames.mean).view(6, _FRAMES).sum(1)
    _expect_same("mean of a clip and the sum of its frames'", posterior.mean, mean, cause)
    covariance = _double(frames.covariance).view(6, _FRAMES, 6, _FRAMES).sum((1, 3))
    what = "covariance of clips and the sum of their frames'"
    _expect_same(what, posterior.covariance, covariance, cause)


def check_scorer_matches_frame_posterior(make_model: MakeModel) -> None:
    """`frame_scorer` agrees with `frame_posterior`, near the data and far from it."""
    model = _fitted(make_model, "learned")
    scorer = model.frame_scorer()
    cause = "`frame_moments` inherited by a model that overrides `compute_posterior`, or uncentred"
    for clips in (_clips(4, seed=28), _far_clips(4, seed=29)):
        frames = clips.observations.flatten(0, 1), clips.actions.flatten(0, 1)
        posterior = model.frame_posterior(*frames)
        several = scorer.batch(*frames)
        alone = zip(*(scorer(*frame) for frame in zip(*frames, strict=True)), strict=True)
        for what, found in (("frames scored together", several), ("frames scored alone", alone)):
            means, stds = (torch.tensor(each) for each in found)
            _expect_same(f"mean of {what}", means, posterior.mean, cause)
            _expect_same(f"standard deviation of {what}", stds, posterior.variance.sqrt(), cause)


def check_samples_are_centred(make_model: MakeModel) -> None:
    """The mean over the reference batch of every sample is zero, to 1% of the samples' spread.

    This fixes the constant that comparisons leave free, for each function drawn.
    """
    model = _fitted(make_model)
    posterior = model.frame_posterior(model.reference_observations, model.reference_actions)
    draws = _double(posterior.rsample(64, torch.Generator().manual_seed(0)))
    furthest, spread = float(draws.mean(1).abs().max()), float(draws.std())
    if not furthest <= 1e-2 * spread:
        raise _failure(
            "every sample's mean reward over the reference batch is zero",
            f"one has {furthest:.3g}, where rewards spread by {spread:.3g}",
            "`after_epoch` that doesn't centre each function, or centres only their mean",
        )


def check_unknown_inputs_return_to_one_half(make_model: MakeModel) -> None:
    """Clips that differ only far outside the compared frames are preferred half of the time.

    In any input, in either direction; one of them was constant in training.
    """
    model, clips = _fitted(make_model, "learned"), _without_last(_clips(1, seed=30))
    cause = "`posterior` or `update_novelty` overridden, so that the posterior lacks its `Novelty`"
    for j in range(_OBSERVATION + _ACTION):
        far = _FAR_OF_CONSTANT if j == _OBSERVATION - 1 else _FAR
        for move in (-far, far):
            observations, actions = clips.observations.clone(), clips.actions.clone()
            if j < _OBSERVATION:
                observations[..., j] += move
            else:
                actions[..., j - _OBSERVATION] += move
            both = Clips.cat([clips, Clips(observations, actions)])
            p = float(model.posterior(both).preference(torch.tensor([[0, 1]])))
            if not abs(p - 0.5) <= _NEAR_ONE_HALF:
                raise _failure(
                    "a preference far outside the compared frames is one half",
                    f"{p:.3f} with input {j} moved by {move:g}",
                    cause,
                )


def check_shared_novelty_cancels(make_model: MakeModel) -> None:
    """A novel frame that two clips share makes neither of them less certain against the other."""
    model, clips = _fitted(make_model, "learned"), _without_last(_clips(20, seed=31, scale=0.1))
    pairs = torch.arange(20).view(10, 2)
    expected = model.posterior(Clips(clips.observations[:, 1:], clips.actions[:, 1:]))
    observations, actions = clips.observations.clone(), clips.actions.clone()
    observations[:, 0], actions[:, 0] = 3.0, 3.0
    found = model.posterior(Clips(observations, actions)).difference(pairs)
    mean, variance = expected.difference(pairs)
    cause = "novelty drawn anew for each frame or clip, in place of one function of the frame"
    _expect_same("difference of clips that share a novel frame", found.mean, mean, cause)
    _expect_same("variance of such a difference", found.variance, variance, cause)


def check_nothing_is_novel_where_compared(make_model: MakeModel) -> None:
    """Novelty leaves the posterior of the compared clips as it is."""
    clips = _without_last(_comparisons().clips)
    model = _fitted(make_model, "learned")
    cause = "a variance added everywhere, or a range that leaves out some of the compared frames"
    found = model.posterior(clips)
    assert model.novelty is not None
    amplitude = model.novelty.amplitude
    try:
        model.novelty.amplitude = torch.zeros_like(amplitude)
        expected = model.posterior(clips)
    finally:
        model.novelty.amplitude = amplitude
    _expect_same_moments("of compared clips, with novelty and without", found, expected, cause)


CHECKS: list[Check] = [
    check_invalid_calls_raise,
    check_learns_an_easy_reward,
    check_covariance_is_positive_semidefinite,
    check_samples_match_moments,
    check_difference_matches_covariance,
    check_preference_averages_over_posterior,
    check_swapping_a_pair_flips_its_preference,
    check_permuting_clips_permutes_posterior,
    check_posterior_does_not_depend_on_batch,
    check_padding_is_ignored,
    check_frames_sum_to_clip,
    check_scorer_matches_frame_posterior,
    check_samples_are_centred,
    check_variance_grows_away_from_data,
    check_unknown_inputs_return_to_one_half,
    check_shared_novelty_cancels,
    check_nothing_is_novel_where_compared,
    check_same_seed_same_fit,
    check_posterior_has_no_side_effects,
    check_save_and_load,
]
"""Every check, each named after the promise that it tests."""


# Synthetic data: a reward that is linear in observations and actions.


def _clips(n: int, *, seed: int, scale: float = 1.0) -> Clips:
    draw = torch.Generator().manual_seed(seed)
    observations = scale * torch.randn(n, _FRAMES, _OBSERVATION, generator=draw)
    actions = scale * torch.randn(n, _FRAMES, _ACTION, generator=draw)
    rewards = observations[..., 0] - observations[..., 1] + actions[..., 0]
    return Clips(observations, actions, rewards=rewards)


def _far_clips(n: int, *, seed: int) -> Clips:
    return _clips(n, seed=seed, scale=10.0)


def _comparisons() -> Comparisons:
    clips, draw = _clips(80, seed=1), torch.Generator().manual_seed(2)
    first = torch.randint(80, (160,), generator=draw)
    second = (first + torch.randint(1, 80, (160,), generator=draw)) % 80
    p = torch.sigmoid(clips.returns[second] - clips.returns[first])
    return Comparisons(clips, torch.stack([first, second], 1), torch.bernoulli(p, generator=draw))


def _without_last(clips: Clips) -> Clips:
    """The same clips with the last number of the observation, which no reward needs, at zero."""
    observations = clips.observations.clone()
    observations[..., -1] = 0
    return Clips(observations, clips.actions)


@lru_cache(maxsize=8)
def _fitted(make_model: MakeModel, novelty: NoveltySetting = "off") -> RewardModel:
    comparisons = _comparisons()
    if novelty != "off":
        comparisons = replace(comparisons, clips=_without_last(comparisons.clips))
    options = FitOptions(batch_size=16)
    return fit(make_model(), comparisons, epochs=EPOCHS, options=options, novelty=novelty)


def _samples(posterior: ReturnPosterior) -> Tensor:
    return posterior.rsample(_DRAWS, torch.Generator().manual_seed(0))


def _double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


def _state(model: RewardModel) -> dict[str, bytes | bool]:
    # Bytes, since a NaN would differ from itself.
    state: dict[str, bytes | bool] = {
        name: _double(value).numpy().tobytes() for name, value in model.state_dict().items()
    }
    for name, module in model.named_modules():
        state[f"training flag of {name or 'the model'}"] = module.training
    state["torch's global generator"] = torch.get_rng_state().numpy().tobytes()
    state["NumPy's global generator"] = pickle.dumps(np.random.get_state())  # noqa: NPY002
    state["Python's global generator"] = pickle.dumps(random.getstate())
    return state


def _failure(promise: str, numbers: str, cause: str) -> CheckFailed:
    return CheckFailed(f"{promise}: {numbers}. Usual cause: {cause}.")


def expect_error(error: type[Exception], what: str, call: Callable[[], object], cause: str) -> None:
    """Raise CheckFailed unless a call raises this error."""
    found = "nothing"
    try:
        call()
    except error:
        return
    except Exception as other:
        found = f"{type(other).__name__}: {other}"
    raise _failure(f"{what} raises {error.__name__}", f"got {found}", cause)


def expect_within(
    what: str, found: Tensor, expected: Tensor, allowed: Tensor | float, cause: str
) -> None:
    """Raise CheckFailed unless all numbers found are within `allowed` of those expected."""
    found, expected = _double(found), _double(expected)
    if found.shape != expected.shape:
        shapes = f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        raise _failure(what, shapes, cause)
    excess = (found - expected).abs() - allowed
    # Written so that NaN fails.
    if not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(nan=torch.inf).argmax())
        one, other = float(found.flatten()[worst]), float(expected.flatten()[worst])
        within = float(torch.as_tensor(allowed).expand_as(expected).flatten()[worst])
        raise _failure(what, f"{one:.6g}, expected {other:.6g} within {within:.2g}", cause)


def _expect_same(
    what: str, found: Tensor, expected: Tensor, cause: str, scale_of: Tensor | None = None
) -> None:
    scale = _double(expected if scale_of is None else scale_of).abs().max()
    expect_within(what, found, expected, _TOLERANCE * float(scale), cause)


def _expect_same_moments(
    what: str,
    found: ReturnPosterior,
    expected: ReturnPosterior,
    cause: str,
    rows: Tensor | slice = slice(None),
) -> None:
    """Compare mean and covariance with those rows of the expected posterior."""
    mean, covariance = expected.mean, expected.covariance
    _expect_same(f"mean {what}", found.mean, mean[rows], cause, mean)
    _expect_same(
        f"covariance {what}", found.covariance, covariance[rows][:, rows], cause, covariance
    )


def _expect_mean(what: str, draws: Tensor, expected: Tensor, cause: str) -> None:
    """Compare the mean of draws `(n, ...)` with its expectation."""
    draws, expected = _double(draws), _double(expected)
    allowed = _SIGMAS * draws.std(0) / len(draws) ** 0.5 + _TOLERANCE * float(expected.abs().max())
    expect_within(what, expected, draws.mean(0), allowed, cause)
