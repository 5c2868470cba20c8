"""The conformance suite: what every reward model promises, whoever wrote it."""

from __future__ import annotations

import pickle
import random
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, NotFitted, RewardModelsError
from rewardmodels.fitting import fit, isolated_randomness
from rewardmodels.likelihood import preference_probability
from rewardmodels.model import RewardModel
from rewardmodels.posterior import ReturnPosterior
from rewardmodels.saving import load, save

MakeModel = Callable[[], RewardModel]
Check = Callable[[MakeModel], None]

CLOSE = 1e-3  # of the answers' scale: sums in another order, never another answer
DRAWS = 8192
SIGMAS = 6  # standard errors between what is stated and what 8192 draws say
OBSERVATION, ACTION, FRAMES = 3, 2, 5
EPOCHS = 60


class CheckFailed(RewardModelsError, AssertionError):
    """A reward model doesn't keep a promise; says which, the numbers, and the usual cause."""


# The synthetic world: a reward that is linear in observations and actions.


def _clips_of_world(n: int, *, seed: int, scale: float = 1.0) -> Clips:
    draw = torch.Generator().manual_seed(seed)
    observations = scale * torch.randn(n, FRAMES, OBSERVATION, generator=draw)
    actions = scale * torch.randn(n, FRAMES, ACTION, generator=draw)
    rewards = observations[..., 0] - observations[..., 1] + actions[..., 0]
    return Clips(observations, actions, rewards=rewards)


def _far_clips(n: int, *, seed: int) -> Clips:
    return _clips_of_world(n, seed=seed, scale=10.0)


def _world_comparisons() -> Comparisons:
    clips, draw = _clips_of_world(80, seed=1), torch.Generator().manual_seed(2)
    first = torch.randint(80, (160,), generator=draw)
    second = (first + torch.randint(1, 80, (160,), generator=draw)) % 80
    likely = torch.sigmoid(clips.returns[second] - clips.returns[first])
    return Comparisons(
        clips, torch.stack([first, second], 1), torch.bernoulli(likely, generator=draw)
    )


@lru_cache(maxsize=4)
def _fitted(make_model: MakeModel) -> RewardModel:
    return fit(make_model(), _world_comparisons(), epochs=EPOCHS, batch_size=16)


def _all_pairs_of(n: int) -> Tensor:
    return torch.combinations(torch.arange(n))


def _draws_of(belief: ReturnPosterior) -> Tensor:
    return belief.rsample(DRAWS, torch.Generator().manual_seed(0))


def _double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


def _state_of(model: RewardModel) -> dict[str, bytes | bool]:
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


# Comparing, and what is said when it fails.


def _failed(promise: str, numbers: str, cause: str) -> CheckFailed:
    return CheckFailed(f"{promise}: {numbers}. Usual cause: {cause}.")


def _expect_same(
    what: str, came: Tensor, expected: Tensor, cause: str, scale_of: Tensor | None = None
) -> None:
    came, expected = _double(came), _double(expected)
    if came.shape != expected.shape:
        shapes = f"shape {tuple(came.shape)}, expected {tuple(expected.shape)}"
        raise _failed(what, shapes, cause)
    scale = float((expected if scale_of is None else _double(scale_of)).abs().max())
    apart = (came - expected).abs()
    # Written so that NaN fails.
    if not bool((apart <= CLOSE * scale).all()):
        worst = int(apart.nan_to_num(nan=torch.inf).argmax())
        numbers = f"{float(came.flatten()[worst]):.6g}, expected "
        numbers += f"{float(expected.flatten()[worst]):.6g} within {CLOSE * scale:.2g}"
        raise _failed(what, numbers, cause)


def _expect_within(what: str, draws: Tensor, stated: Tensor, cause: str) -> None:
    draws, stated = _double(draws), _double(stated)
    if draws.shape[1:] != stated.shape:
        shapes = f"shape {tuple(stated.shape)}, expected {tuple(draws.shape[1:])}"
        raise _failed(what, shapes, cause)
    mean = draws.mean(0)
    allowed = SIGMAS * draws.std(0) / len(draws) ** 0.5 + CLOSE * float(stated.abs().max())
    if not bool(((mean - stated).abs() <= allowed).all()):
        worst = int(((mean - stated).abs() / allowed).nan_to_num(nan=torch.inf).argmax())
        numbers = f"draws say {float(mean.flatten()[worst]):.4g} within "
        numbers += f"{float(allowed.flatten()[worst]):.2g}, stated is "
        numbers += f"{float(stated.flatten()[worst]):.4g}"
        raise _failed(what, numbers, cause)


def check_covariance_is_positive_semidefinite(make_model: MakeModel) -> None:
    """The covariance is symmetric, has no negative eigenvalue, and has `variance` on its diagonal.

    Eigenvalues may fall below zero by 1e-4 of the largest, which is what single precision leaves.
    """
    belief = _fitted(make_model).posterior(_clips_of_world(30, seed=11))
    covariance = _double(belief.covariance)
    cause = "a covariance put together from parts that are no inner products"
    _expect_same("covariance, and its transpose", covariance.T, covariance, cause)
    _expect_same(
        "variance, and the covariance's diagonal", belief.variance, covariance.diagonal(), cause
    )
    eigenvalues = torch.linalg.eigvalsh((covariance + covariance.T) / 2)
    least, most = float(eigenvalues[0]), float(eigenvalues[-1])
    if not most > 0:
        raise _failed("a fitted model is unsure of something", f"largest eigenvalue {most}", cause)
    if least < -1e-4 * most:
        numbers = f"eigenvalues from {least:.3g} to {most:.3g}"
        raise _failed("the covariance is positive semidefinite", numbers, cause)


def check_samples_match_mean_and_covariance(make_model: MakeModel) -> None:
    """`rsample` draws from the distribution that `mean` and `covariance` describe.

    8192 draws of 12 clips; each mean and each product of two deviations may be off by six of its
    standard errors. The same generator gives the same draws.
    """
    belief = _fitted(make_model).posterior(_clips_of_world(12, seed=12))
    draws = _double(_draws_of(belief))
    cause = "clips drawn independently of each other, or a standard deviation used as a variance"
    if draws.shape != (DRAWS, 12):
        numbers = f"shape {tuple(draws.shape)}, expected {(DRAWS, 12)}"
        raise _failed("rsample(n) draws (n, N)", numbers, "axes in another order")
    apart = draws - _double(belief.mean)
    _expect_within("mean of the draws, and mean", apart, torch.zeros(12), cause)
    products = apart[:, :, None] * apart[:, None, :]
    _expect_within("covariance of the draws, and covariance", products, belief.covariance, cause)
    again = _double(_draws_of(belief))
    _expect_same(
        "two draws from one generator", again, draws, "randomness from the global generator"
    )


def check_difference_agrees_with_samples(make_model: MakeModel) -> None:
    """`difference` is the second clip's return minus the first's, as the joint belief has it.

    Against the covariance, and within six standard errors against 8192 draws.
    """
    belief = _fitted(make_model).posterior(_clips_of_world(12, seed=13))
    first, second = _all_pairs_of(12).T
    came = belief.difference(_all_pairs_of(12))
    cause = (
        "marginal variances added up, where what both clips share should cancel; or the first "
        "minus the second"
    )
    mean, covariance = _double(belief.mean), _double(belief.covariance)
    variance = covariance.diagonal()[first] + covariance.diagonal()[second]
    variance = variance - 2 * covariance[first, second]
    apart = mean[second] - mean[first]
    _expect_same("mean of a difference, and that of the means", came.mean, apart, cause)
    _expect_same("variance of a difference, and the covariance's", came.variance, variance, cause)
    draws = _double(_draws_of(belief))
    apart = draws[:, second] - draws[:, first]
    _expect_within("mean of a difference, and that of draws", apart, came.mean, cause)
    around = (apart - _double(came.mean)).square()
    _expect_within("variance of a difference, and that of draws", around, came.variance, cause)


def check_preference_integrates_the_belief(make_model: MakeModel) -> None:
    """`preference` is the mean over the belief of Bradley–Terry's probability, mistakes included.

    Within six standard errors of the mean over 8192 draws.
    """
    belief = _fitted(make_model).posterior(_far_clips(12, seed=14))
    first, second = _all_pairs_of(12).T
    draws = _draws_of(belief)
    for mistakes in (0.0, 0.2):
        answers = preference_probability(
            draws[:, second] - draws[:, first], random_answer_rate=mistakes
        )
        came = belief.preference(_all_pairs_of(12), random_answer_rate=mistakes)
        cause = "the probability at the mean difference, which forgets how unsure the belief is"
        _expect_within(
            f"preference at random_answer_rate={mistakes}, and that of draws", answers, came, cause
        )


def check_swapping_a_pair_turns_its_answer_round(make_model: MakeModel) -> None:
    """P(second) of a pair is one minus P(second) of the pair written the other way round."""
    belief = _fitted(make_model).posterior(_clips_of_world(12, seed=15))
    pairs, cause = _all_pairs_of(12), "a bias towards the clip written first, or towards the second"
    for mistakes in (0.0, 0.2):
        one = belief.preference(pairs, random_answer_rate=mistakes)
        other = belief.preference(pairs.flip(1), random_answer_rate=mistakes)
        _expect_same("preference, and one minus that of swapped pairs", 1 - other, one, cause)
    one_way, other_way = belief.difference(pairs), belief.difference(pairs.flip(1))
    _expect_same(
        "difference, and minus that of swapped pairs", -other_way.mean, one_way.mean, cause
    )
    _expect_same("variance of swapped pairs", other_way.variance, one_way.variance, cause)


def check_permuting_clips_permutes_the_posterior(make_model: MakeModel) -> None:
    """The order in which clips come changes the order of the answers, and nothing else."""
    model, clips = _fitted(make_model), _clips_of_world(20, seed=16)
    order = torch.arange(20) * 7 % 20
    belief, permuted = model.posterior(clips), model.posterior(clips[order])
    cause = "an axis reshaped where it should be transposed, or a statistic that runs along clips"
    _expect_same("mean of permuted clips", permuted.mean, belief.mean[order], cause)
    expected = belief.covariance[order][:, order]
    _expect_same("covariance of permuted clips", permuted.covariance, expected, cause)


def check_a_clip_does_not_depend_on_its_neighbours(make_model: MakeModel) -> None:
    """What is believed of some clips is the same whichever others are asked about with them."""
    model, clips = _fitted(make_model), _clips_of_world(20, seed=17)
    belief = model.posterior(clips)
    mean, covariance = belief.mean, belief.covariance
    cause = (
        "normalisation by the batch, inputs padded to the batch, or functions drawn anew at each "
        "question"
    )
    for some in (torch.tensor([3]), torch.tensor([19, 0, 7])):
        alone = model.posterior(clips[some])
        _expect_same(f"mean of clips {some.tolist()} alone", alone.mean, mean[some], cause, mean)
        expected = covariance[some][:, some]
        what = f"covariance of clips {some.tolist()} alone"
        _expect_same(what, alone.covariance, expected, cause, covariance)
    beside = model.posterior(Clips.cat([clips, _far_clips(5, seed=18)]))
    _expect_same("mean beside strange clips", beside.mean[:20], mean, cause)
    _expect_same("covariance beside strange clips", beside.covariance[:20, :20], covariance, cause)


def check_padding_changes_nothing(make_model: MakeModel) -> None:
    """What stands past a clip's end, and how far the padding goes, has no influence."""
    model, clips = _fitted(make_model), _clips_of_world(10, seed=19)
    short = Clips(clips.observations[:, :3], clips.actions[:, :3])
    mask = (torch.arange(FRAMES) < 3).expand(10, FRAMES)
    padded = Clips(clips.observations, clips.actions, mask)
    long = Clips(torch.zeros(1, 50, OBSERVATION), torch.zeros(1, 50, ACTION))
    longer = Clips.cat([short, long])[:10]
    expected = model.posterior(short)
    cause = "a sum or a mean over all T frames, where `mask` says which are real"
    for name, belief in (
        ("padded clips", model.posterior(padded)),
        ("clips padded far beyond their end", model.posterior(longer)),
    ):
        _expect_same(f"mean of {name}", belief.mean, expected.mean, cause)
        _expect_same(f"covariance of {name}", belief.covariance, expected.covariance, cause)


def check_frames_sum_to_their_clip(make_model: MakeModel) -> None:
    """`frame_posterior` and `posterior` speak of one function: frames sum to a clip's return."""
    model, clips = _fitted(make_model), _clips_of_world(6, seed=21)
    belief = model.posterior(clips)
    frames = model.frame_posterior(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
    cause = "a mean over frames where a return is a sum, or frames that are each centred anew"
    mean = _double(frames.mean).view(6, FRAMES).sum(1)
    _expect_same("mean of a clip, and the sum of its frames'", belief.mean, mean, cause)
    covariance = _double(frames.covariance).view(6, FRAMES, 6, FRAMES).sum((1, 3))
    _expect_same(
        "covariance of clips, and the sum of their frames'", belief.covariance, covariance, cause
    )


def check_scorer_agrees_with_frame_posterior(make_model: MakeModel) -> None:
    """`frame_scorer` says of a frame what `frame_posterior` says, near the data and far from it.

    Of many frames, and of one at a time.
    """
    model = _fitted(make_model)
    scorer = model.frame_scorer()
    cause = "`fold` inherited by a model that believes something else, or `fold` without the gauge"
    for clips in (_clips_of_world(4, seed=28), _far_clips(4, seed=29)):
        frames = clips.observations.flatten(0, 1), clips.actions.flatten(0, 1)
        belief = model.frame_posterior(*frames)
        several = scorer.batch(*frames)
        alone = zip(*(scorer(*frame) for frame in zip(*frames, strict=True)), strict=True)
        for what, came in (("frames scored together", several), ("frames scored alone", alone)):
            means, stds = (torch.tensor(each) for each in came)
            _expect_same(f"mean of {what}", means, belief.mean, cause)
            _expect_same(f"standard deviation of {what}", stds, belief.variance.sqrt(), cause)


def check_every_function_is_zero_on_the_reference(make_model: MakeModel) -> None:
    """The constant that comparisons leave free is fixed, for each function that may be drawn.

    The mean over the reference batch of every sample is zero, to a hundredth of the samples'
    spread. A constant added to what a model learned therefore changes no answer.
    """
    model = _fitted(make_model)
    belief = model.frame_posterior(model.reference_observations, model.reference_actions)
    draws = _double(belief.rsample(64, torch.Generator().manual_seed(0)))
    furthest, spread = float(draws.mean(1).abs().max()), float(draws.std())
    if not furthest <= 1e-2 * spread:
        raise _failed(
            "every sample's mean reward over the reference batch is zero",
            f"one has {furthest:.3g}, where rewards spread by {spread:.3g}",
            "`after_epoch` that doesn't centre each function, or centres only their mean",
        )


def check_surer_near_the_data(make_model: MakeModel) -> None:
    """The median variance of a difference is larger far from the comparisons' clips than there."""
    model = _fitted(make_model)
    pairs = torch.arange(80).view(40, 2)
    near = float(model.posterior(_clips_of_world(80, seed=1)).difference(pairs).variance.median())
    far = float(model.posterior(_far_clips(80, seed=22)).difference(pairs).variance.median())
    if not far > near:
        raise _failed(
            "a difference between strange clips is more uncertain than between known ones",
            f"median variance {far:.3g} far from the data, {near:.3g} on it",
            "an activation that saturates, clipped inputs, or a variance that doesn't look at them",
        )


def check_learns_what_is_said(make_model: MakeModel) -> None:
    """New pairs that differ clearly are answered as the teacher would, at least 75% of the time.

    A coin would reach 75% of 200 once in 10^12 times.
    """
    clips = _clips_of_world(400, seed=23)
    pairs = torch.arange(400).view(200, 2)
    truth = (clips.returns[pairs[:, 1]] > clips.returns[pairs[:, 0]]).cpu()
    came = _fitted(make_model).posterior(clips).preference(pairs).cpu() > 0.5
    right = float((came == truth).double().mean())
    if not right >= 0.75:
        raise _failed(
            "an easy reward is learned",
            f"{right:.0%} of 200 new pairs right, expected at least 75%",
            "a loss of the wrong sign, the second clip taken for the first, or steps too small "
            f"for 160 comparisons and {EPOCHS} epochs",
        )


def check_same_seed_same_fit(make_model: MakeModel) -> None:
    """Two fits with one seed believe the same, whatever the global generators held before."""
    clips = _clips_of_world(20, seed=24)
    beliefs = []
    for before in (1, 2):
        with isolated_randomness(before):
            beliefs.append(
                fit(make_model(), _world_comparisons()[:40], epochs=2, seed=3).posterior(clips)
            )
    one, other = beliefs
    cause = "randomness from NumPy, from Python, or drawn in the constructor, before `fit` seeds"
    _expect_same("mean after two fits with one seed", one.mean, other.mean, cause)
    _expect_same("covariance after two fits with one seed", one.covariance, other.covariance, cause)


def check_asking_changes_nothing(make_model: MakeModel) -> None:
    """`posterior` leaves weights, buffers, the training flags and global generators as they were.

    Asked twice, in training mode or not, it answers the same, and without a gradient.
    """
    model, clips = _fitted(make_model), _clips_of_world(8, seed=25)
    expected = model.posterior(clips)
    cause = "running statistics updated in `forward`, or masks drawn when the model is asked"
    was_training = model.training
    try:
        for training in (True, False):
            model.train(training)
            before = _state_of(model)
            belief = model.posterior(clips)
            belief.difference(_all_pairs_of(8))
            belief.preference(_all_pairs_of(8))
            belief.rsample(3, torch.Generator().manual_seed(0))
            after = _state_of(model)
            changed = [name for name in before if before[name] != after.get(name)]
            if changed or len(before) != len(after):
                numbers = f"changed in {'training' if training else 'eval'} mode: "
                numbers += ", ".join(changed or sorted(set(after) - set(before)))
                raise _failed("asking changes nothing", numbers, cause)
            if belief.mean.requires_grad or belief.covariance.requires_grad:
                raise _failed("answers need no gradient", "requires_grad=True", "a missing no_grad")
            _expect_same("mean when asked again", belief.mean, expected.mean, cause)
            _expect_same(
                "covariance when asked again", belief.covariance, expected.covariance, cause
            )
    finally:
        model.train(was_training)


def check_saved_model_answers_the_same(make_model: MakeModel) -> None:
    """`save` and `load` keep everything that answers depend on."""
    model, clips = _fitted(make_model), _clips_of_world(20, seed=26)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        loaded = load(path, type(model))
    expected, came = model.posterior(clips), loaded.posterior(clips)
    cause = (
        "something learned that is no parameter and no registered buffer, or hyper-parameters "
        "that `save_hyperparameters()` didn't see"
    )
    _expect_same("mean after loading", came.mean, expected.mean, cause)
    _expect_same("covariance after loading", came.covariance, expected.covariance, cause)


def check_refuses_what_it_cannot_answer(make_model: MakeModel) -> None:
    """Raises NotFitted before the first fit, and InvalidInput for frames of other shapes."""
    clips = _clips_of_world(2, seed=27)
    frames = clips.observations[0], clips.actions[0]
    cause = "`posterior` overridden, without the checks of RewardModel's"
    new, model = make_model(), _fitted(make_model)
    wider = Clips(torch.zeros(2, 4, OBSERVATION + 1), torch.zeros(2, 4, ACTION))
    # As many numbers in all, which a network alone wouldn't notice.
    moved = Clips(torch.zeros(2, 4, OBSERVATION - 1), torch.zeros(2, 4, ACTION + 1))
    for what, ask, expected in (
        ("posterior before a fit", lambda: new.posterior(clips), NotFitted),
        ("frame_posterior before a fit", lambda: new.frame_posterior(*frames), NotFitted),
        ("observations too wide", lambda: model.posterior(wider), InvalidInput),
        ("a number moved to the actions", lambda: model.posterior(moved), InvalidInput),
    ):
        try:
            ask()
        except expected:
            continue
        except Exception as error:
            came = f"{type(error).__name__}: {error}"
        else:
            came = "an answer"
        raise _failed(f"{what} raises {expected.__name__}", f"got {came}", cause)


CHECKS: list[Check] = [
    check_refuses_what_it_cannot_answer,
    check_learns_what_is_said,
    check_covariance_is_positive_semidefinite,
    check_samples_match_mean_and_covariance,
    check_difference_agrees_with_samples,
    check_preference_integrates_the_belief,
    check_swapping_a_pair_turns_its_answer_round,
    check_permuting_clips_permutes_the_posterior,
    check_a_clip_does_not_depend_on_its_neighbours,
    check_padding_changes_nothing,
    check_frames_sum_to_their_clip,
    check_scorer_agrees_with_frame_posterior,
    check_every_function_is_zero_on_the_reference,
    check_surer_near_the_data,
    check_same_seed_same_fit,
    check_asking_changes_nothing,
    check_saved_model_answers_the_same,
]
"""Every check, each named after the promise that it holds a model to."""


def check_reward_model(make_model: MakeModel) -> None:
    """Runs every check of `CHECKS`, and says of all that fail why.

    Each fits a small model to a few synthetic comparisons of short clips, on the CPU or wherever
    Lightning would train; the fits are shared, so that the list takes seconds. Nothing global is
    seeded, and no file is left behind.

    Args:
        make_model: Makes a new model, not yet fitted; it is called several times. A class whose
            constructor needs no arguments is one.

    Raises:
        CheckFailed: One or more promises are broken.

    Example:
        With pytest, each check is a test of its own::

            @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
            def test_mine(check):
                check(MyRewardModel)
    """
    failures = []
    for check in CHECKS:
        try:
            check(make_model)
        except CheckFailed as failure:
            failures.append(str(failure))
        except Exception as error:
            error.add_note(f"Raised in rewardmodels.checks.{check.__name__}.")
            raise
    if failures:
        listed = "\n".join(f"- {failure}" for failure in failures)
        raise CheckFailed(f"{len(failures)} of {len(CHECKS)} checks failed:\n{listed}")
