"""The conformance suite: what every reward model promises, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable

from rewardmodels._belief_checks import (
    check_a_clip_does_not_depend_on_its_neighbours,
    check_covariance_is_positive_semidefinite,
    check_difference_agrees_with_samples,
    check_every_function_is_zero_on_the_reference,
    check_frames_sum_to_their_clip,
    check_padding_changes_nothing,
    check_permuting_clips_permutes_the_posterior,
    check_preference_integrates_the_belief,
    check_samples_match_mean_and_covariance,
    check_scorer_agrees_with_frame_posterior,
    check_swapping_a_pair_turns_its_answer_round,
)
from rewardmodels._checking import CheckFailed, MakeModel
from rewardmodels._fit_checks import (
    check_asking_changes_nothing,
    check_learns_what_is_said,
    check_refuses_what_it_cannot_answer,
    check_same_seed_same_fit,
    check_saved_model_answers_the_same,
    check_surer_near_the_data,
)

__all__ = [
    "CHECKS",
    "Check",
    "CheckFailed",
    "MakeModel",
    "check_a_clip_does_not_depend_on_its_neighbours",
    "check_asking_changes_nothing",
    "check_covariance_is_positive_semidefinite",
    "check_difference_agrees_with_samples",
    "check_every_function_is_zero_on_the_reference",
    "check_frames_sum_to_their_clip",
    "check_learns_what_is_said",
    "check_padding_changes_nothing",
    "check_permuting_clips_permutes_the_posterior",
    "check_preference_integrates_the_belief",
    "check_refuses_what_it_cannot_answer",
    "check_reward_model",
    "check_same_seed_same_fit",
    "check_samples_match_mean_and_covariance",
    "check_saved_model_answers_the_same",
    "check_scorer_agrees_with_frame_posterior",
    "check_surer_near_the_data",
    "check_swapping_a_pair_turns_its_answer_round",
]

Check = Callable[[MakeModel], None]


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
        With pytest, each check is a test of its own:

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
