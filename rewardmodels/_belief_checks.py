"""Checks that a belief is one coherent distribution over reward functions."""

from __future__ import annotations

import torch

from rewardmodels._checking import (
    ACTION,
    DRAWS,
    FRAMES,
    OBSERVATION,
    MakeModel,
    all_pairs_of,
    clips_of_world,
    double,
    draws_of,
    expect_same,
    expect_within,
    failed,
    far_clips,
    fitted,
)
from rewardmodels.clips import Clips
from rewardmodels.likelihood import preference_probability


def check_covariance_is_positive_semidefinite(make_model: MakeModel) -> None:
    """The covariance is symmetric, has no negative eigenvalue, and has `variance` on its diagonal.

    Eigenvalues may fall below zero by 1e-4 of the largest, which is what single precision leaves.
    """
    belief = fitted(make_model).posterior(clips_of_world(30, seed=11))
    covariance = double(belief.covariance)
    cause = "a covariance put together from parts that are no inner products"
    expect_same("covariance, and its transpose", covariance.T, covariance, cause)
    expect_same(
        "variance, and the covariance's diagonal", belief.variance, covariance.diagonal(), cause
    )
    eigenvalues = torch.linalg.eigvalsh((covariance + covariance.T) / 2)
    least, most = float(eigenvalues[0]), float(eigenvalues[-1])
    if not most > 0:
        raise failed("a fitted model is unsure of something", f"largest eigenvalue {most}", cause)
    if least < -1e-4 * most:
        numbers = f"eigenvalues from {least:.3g} to {most:.3g}"
        raise failed("the covariance is positive semidefinite", numbers, cause)


def check_samples_match_mean_and_covariance(make_model: MakeModel) -> None:
    """`rsample` draws from the distribution that `mean` and `covariance` describe.

    8192 draws of 12 clips; each mean and each product of two deviations may be off by six of its
    standard errors. The same generator gives the same draws.
    """
    belief = fitted(make_model).posterior(clips_of_world(12, seed=12))
    draws = double(draws_of(belief))
    cause = "clips drawn independently of each other, or a standard deviation used as a variance"
    if draws.shape != (DRAWS, 12):
        numbers = f"shape {tuple(draws.shape)}, expected {(DRAWS, 12)}"
        raise failed("rsample(n) draws (n, N)", numbers, "axes in another order")
    apart = draws - double(belief.mean)
    expect_within("mean of the draws, and mean", apart, torch.zeros(12), cause)
    products = apart[:, :, None] * apart[:, None, :]
    expect_within("covariance of the draws, and covariance", products, belief.covariance, cause)
    again = double(draws_of(belief))
    expect_same(
        "two draws from one generator", again, draws, "randomness from the global generator"
    )


def check_difference_agrees_with_samples(make_model: MakeModel) -> None:
    """`difference` is the second clip's return minus the first's, as the joint belief has it.

    Against the covariance, and within six standard errors against 8192 draws.
    """
    belief = fitted(make_model).posterior(clips_of_world(12, seed=13))
    first, second = all_pairs_of(12).T
    came = belief.difference(all_pairs_of(12))
    cause = (
        "marginal variances added up, where what both clips share should cancel; or the first "
        "minus the second"
    )
    mean, covariance = double(belief.mean), double(belief.covariance)
    variance = covariance.diagonal()[first] + covariance.diagonal()[second]
    variance = variance - 2 * covariance[first, second]
    apart = mean[second] - mean[first]
    expect_same("mean of a difference, and that of the means", came.mean, apart, cause)
    expect_same("variance of a difference, and the covariance's", came.variance, variance, cause)
    draws = double(draws_of(belief))
    apart = draws[:, second] - draws[:, first]
    expect_within("mean of a difference, and that of draws", apart, came.mean, cause)
    around = (apart - double(came.mean)).square()
    expect_within("variance of a difference, and that of draws", around, came.variance, cause)


def check_preference_integrates_the_belief(make_model: MakeModel) -> None:
    """`preference` is the mean over the belief of Bradley–Terry's probability, mistakes included.

    Within six standard errors of the mean over 8192 draws.
    """
    belief = fitted(make_model).posterior(far_clips(12, seed=14))
    first, second = all_pairs_of(12).T
    draws = draws_of(belief)
    for mistakes in (0.0, 0.2):
        answers = preference_probability(draws[:, second] - draws[:, first], mistake_rate=mistakes)
        came = belief.preference(all_pairs_of(12), mistake_rate=mistakes)
        cause = "the probability at the mean difference, which forgets how unsure the belief is"
        expect_within(
            f"preference at mistake_rate={mistakes}, and that of draws", answers, came, cause
        )


def check_swapping_a_pair_turns_its_answer_round(make_model: MakeModel) -> None:
    """P(second) of a pair is one minus P(second) of the pair written the other way round."""
    belief = fitted(make_model).posterior(clips_of_world(12, seed=15))
    pairs, cause = all_pairs_of(12), "a bias towards the clip written first, or towards the second"
    for mistakes in (0.0, 0.2):
        one = belief.preference(pairs, mistake_rate=mistakes)
        other = belief.preference(pairs.flip(1), mistake_rate=mistakes)
        expect_same("preference, and one minus that of swapped pairs", 1 - other, one, cause)
    one_way, other_way = belief.difference(pairs), belief.difference(pairs.flip(1))
    expect_same("difference, and minus that of swapped pairs", -other_way.mean, one_way.mean, cause)
    expect_same("variance of swapped pairs", other_way.variance, one_way.variance, cause)


def check_permuting_clips_permutes_the_posterior(make_model: MakeModel) -> None:
    """The order in which clips come changes the order of the answers, and nothing else."""
    model, clips = fitted(make_model), clips_of_world(20, seed=16)
    order = torch.arange(20) * 7 % 20
    belief, permuted = model.posterior(clips), model.posterior(clips[order])
    cause = "an axis reshaped where it should be transposed, or a statistic that runs along clips"
    expect_same("mean of permuted clips", permuted.mean, belief.mean[order], cause)
    expected = belief.covariance[order][:, order]
    expect_same("covariance of permuted clips", permuted.covariance, expected, cause)


def check_a_clip_does_not_depend_on_its_neighbours(make_model: MakeModel) -> None:
    """What is believed of some clips is the same whichever others are asked about with them."""
    model, clips = fitted(make_model), clips_of_world(20, seed=17)
    belief = model.posterior(clips)
    mean, covariance = belief.mean, belief.covariance
    cause = (
        "normalisation by the batch, inputs padded to the batch, or functions drawn anew at each "
        "question"
    )
    for some in (torch.tensor([3]), torch.tensor([19, 0, 7])):
        alone = model.posterior(clips[some])
        expect_same(f"mean of clips {some.tolist()} alone", alone.mean, mean[some], cause, mean)
        expected = covariance[some][:, some]
        expect_same(f"covariance of clips {some.tolist()} alone", alone.covariance, expected, cause,
              covariance)  # fmt: skip
    beside = model.posterior(Clips.cat([clips, far_clips(5, seed=18)]))
    expect_same("mean beside strange clips", beside.mean[:20], mean, cause)
    expect_same("covariance beside strange clips", beside.covariance[:20, :20], covariance, cause)


def check_padding_changes_nothing(make_model: MakeModel) -> None:
    """What stands past a clip's end, and how far the padding goes, has no influence."""
    model, clips = fitted(make_model), clips_of_world(10, seed=19)
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
        expect_same(f"mean of {name}", belief.mean, expected.mean, cause)
        expect_same(f"covariance of {name}", belief.covariance, expected.covariance, cause)


def check_frames_sum_to_their_clip(make_model: MakeModel) -> None:
    """`frame_posterior` and `posterior` speak of one function: frames sum to a clip's return."""
    model, clips = fitted(make_model), clips_of_world(6, seed=21)
    belief = model.posterior(clips)
    frames = model.frame_posterior(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
    cause = "a mean over frames where a return is a sum, or frames that are each centred anew"
    mean = double(frames.mean).view(6, FRAMES).sum(1)
    expect_same("mean of a clip, and the sum of its frames'", belief.mean, mean, cause)
    covariance = double(frames.covariance).view(6, FRAMES, 6, FRAMES).sum((1, 3))
    expect_same(
        "covariance of clips, and the sum of their frames'", belief.covariance, covariance, cause
    )


def check_scorer_agrees_with_frame_posterior(make_model: MakeModel) -> None:
    """`frame_scorer` says of a frame what `frame_posterior` says, near the data and far from it.

    Of many frames, and of one at a time.
    """
    model = fitted(make_model)
    scorer = model.frame_scorer()
    cause = "`fold` inherited by a model that believes something else, or `fold` without the gauge"
    for clips in (clips_of_world(4, seed=28), far_clips(4, seed=29)):
        frames = clips.observations.flatten(0, 1), clips.actions.flatten(0, 1)
        belief = model.frame_posterior(*frames)
        several = scorer.batch(*frames)
        alone = zip(*(scorer(*frame) for frame in zip(*frames, strict=True)), strict=True)
        for what, came in (("frames scored together", several), ("frames scored alone", alone)):
            means, stds = (torch.tensor(each) for each in came)
            expect_same(f"mean of {what}", means, belief.mean, cause)
            expect_same(f"standard deviation of {what}", stds, belief.variance.sqrt(), cause)


def check_every_function_is_zero_on_the_reference(make_model: MakeModel) -> None:
    """The constant that comparisons leave free is fixed, for each function that may be drawn.

    The mean over the reference batch of every sample is zero, to a hundredth of the samples'
    spread. A constant added to what a model learned therefore changes no answer.
    """
    model = fitted(make_model)
    belief = model.frame_posterior(model.reference_observations, model.reference_actions)
    draws = double(belief.rsample(64, torch.Generator().manual_seed(0)))
    furthest, spread = float(draws.mean(1).abs().max()), float(draws.std())
    if not furthest <= 1e-2 * spread:
        raise failed(
            "every sample's mean reward over the reference batch is zero",
            f"one has {furthest:.3g}, where rewards spread by {spread:.3g}",
            "`settle` that doesn't centre each function, or centres only their mean",
        )
