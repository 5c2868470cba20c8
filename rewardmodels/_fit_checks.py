"""Checks of what fitting teaches, and of what asking, saving and refusing leave as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from rewardmodels._checking import (
    ACTION,
    EPOCHS,
    OBSERVATION,
    MakeModel,
    all_pairs_of,
    clips_of_world,
    expect_same,
    failed,
    far_clips,
    fitted,
    state_of,
    world_comparisons,
)
from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput, NotFitted
from rewardmodels.fitting import fit, isolated_randomness
from rewardmodels.saving import load, save


def check_surer_near_the_data(make_model: MakeModel) -> None:
    """The median variance of a difference is larger far from the comparisons' clips than there."""
    model = fitted(make_model)
    pairs = torch.arange(80).view(40, 2)
    near = float(model.posterior(clips_of_world(80, seed=1)).difference(pairs).variance.median())
    far = float(model.posterior(far_clips(80, seed=22)).difference(pairs).variance.median())
    if not far > near:
        raise failed(
            "a difference between strange clips is more uncertain than between known ones",
            f"median variance {far:.3g} far from the data, {near:.3g} on it",
            "an activation that saturates, clipped inputs, or a variance that doesn't look at them",
        )


def check_learns_what_is_said(make_model: MakeModel) -> None:
    """New pairs that differ clearly are answered as the teacher would, at least 75% of the time.

    A coin would reach 75% of 200 once in 10^12 times.
    """
    clips = clips_of_world(400, seed=23)
    pairs = torch.arange(400).view(200, 2)
    truth = (clips.returns[pairs[:, 1]] > clips.returns[pairs[:, 0]]).cpu()
    came = fitted(make_model).posterior(clips).preference(pairs).cpu() > 0.5
    right = float((came == truth).double().mean())
    if not right >= 0.75:
        raise failed(
            "an easy reward is learned",
            f"{right:.0%} of 200 new pairs right, expected at least 75%",
            "a loss of the wrong sign, the second clip taken for the first, or steps too small "
            f"for 160 comparisons and {EPOCHS} epochs",
        )


def check_same_seed_same_fit(make_model: MakeModel) -> None:
    """Two fits with one seed believe the same, whatever the global generators held before."""
    clips = clips_of_world(20, seed=24)
    beliefs = []
    for before in (1, 2):
        with isolated_randomness(before):
            beliefs.append(
                fit(make_model(), world_comparisons()[:40], epochs=2, seed=3).posterior(clips)
            )
    one, other = beliefs
    cause = "randomness from NumPy, from Python, or drawn in the constructor, before `fit` seeds"
    expect_same("mean after two fits with one seed", one.mean, other.mean, cause)
    expect_same("covariance after two fits with one seed", one.covariance, other.covariance, cause)


def check_asking_changes_nothing(make_model: MakeModel) -> None:
    """`posterior` leaves weights, buffers, the training flags and global generators as they were.

    Asked twice, in training mode or not, it answers the same, and without a gradient.
    """
    model, clips = fitted(make_model), clips_of_world(8, seed=25)
    expected = model.posterior(clips)
    cause = "running statistics updated in `forward`, or masks drawn when the model is asked"
    was_training = model.training
    try:
        for training in (True, False):
            model.train(training)
            before = state_of(model)
            belief = model.posterior(clips)
            belief.difference(all_pairs_of(8))
            belief.preference(all_pairs_of(8))
            belief.rsample(3, torch.Generator().manual_seed(0))
            after = state_of(model)
            changed = [name for name in before if before[name] != after.get(name)]
            if changed or len(before) != len(after):
                numbers = f"changed in {'training' if training else 'eval'} mode: "
                numbers += ", ".join(changed or sorted(set(after) - set(before)))
                raise failed("asking changes nothing", numbers, cause)
            if belief.mean.requires_grad or belief.covariance.requires_grad:
                raise failed("answers need no gradient", "requires_grad=True", "a missing no_grad")
            expect_same("mean when asked again", belief.mean, expected.mean, cause)
            expect_same(
                "covariance when asked again", belief.covariance, expected.covariance, cause
            )
    finally:
        model.train(was_training)


def check_saved_model_answers_the_same(make_model: MakeModel) -> None:
    """`save` and `load` keep everything that answers depend on."""
    model, clips = fitted(make_model), clips_of_world(20, seed=26)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        loaded = load(path, type(model))
    expected, came = model.posterior(clips), loaded.posterior(clips)
    cause = (
        "something learned that is no parameter and no registered buffer, or hyper-parameters "
        "that `save_hyperparameters()` didn't see"
    )
    expect_same("mean after loading", came.mean, expected.mean, cause)
    expect_same("covariance after loading", came.covariance, expected.covariance, cause)


def check_refuses_what_it_cannot_answer(make_model: MakeModel) -> None:
    """Raises NotFitted before the first fit, and InvalidInput for frames of other shapes."""
    clips = clips_of_world(2, seed=27)
    frames = clips.observations[0], clips.actions[0]
    cause = "`posterior` overridden, without the checks of RewardModel's"
    new, model = make_model(), fitted(make_model)
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
        raise failed(f"{what} raises {expected.__name__}", f"got {came}", cause)
