"""Each check passes for the ensemble, and catches the bug it is there for."""

import random

import pytest
import torch

from rewardmodels import Clips, DeepEnsemble, RewardModelsError, SampledPosterior
from rewardmodels import checks as checks_module
from rewardmodels.checks import CHECKS, CheckFailed, check_reward_model


def named(check):
    return check.__name__


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_the_ensemble_passes(check):
    check(DeepEnsemble)


def test_the_list_is_whole():
    every = {name for name in vars(checks_module) if name.startswith("check_")}
    assert {check.__name__ for check in CHECKS} | {"check_reward_model"} == every
    assert all(check.__doc__ for check in CHECKS)


# A bug in what is believed: a posterior with one wrong answer.


class Broken(DeepEnsemble):
    """Like the ensemble, but what it hands out is of another class."""

    kind: type[SampledPosterior]

    def __init__(self):
        super().__init__(members=4, hidden=(32,), learning_rate=3e-3)

    def compute_posterior(self, clips):
        return self.kind(super().compute_posterior(clips).samples)


class NegativeEigenvalue(Broken):
    class kind(SampledPosterior):
        @property
        def covariance(self):
            covariance = super().covariance
            # Correlations of -1 between all: the diagonal stays right.
            scale = covariance.diagonal().sqrt()
            return torch.where(torch.eye(len(scale)) > 0, covariance, -torch.outer(scale, scale))


class VarianceIsADeviation(Broken):
    class kind(SampledPosterior):
        @property
        def variance(self):
            return super().variance.sqrt()


class MarginalDraws(Broken):
    class kind(SampledPosterior):
        def rsample(self, n, generator=None):
            draws = super().rsample(n, generator)
            rows = torch.rand(draws.shape, generator=generator).argsort(0)
            return draws.gather(0, rows)


class ScaledDraws(Broken):
    class kind(SampledPosterior):
        def rsample(self, n, generator=None):
            return self.mean + 1.2 * (super().rsample(n, generator) - self.mean)


class IgnoresTheGenerator(Broken):
    class kind(SampledPosterior):
        def rsample(self, n, generator=None):
            return super().rsample(n)


class SumsMarginalVariances(Broken):
    class kind(SampledPosterior):
        def difference(self, pairs):
            return super().difference(pairs)._replace(variance=self.variance[pairs].sum(1))


class FirstMinusSecond(Broken):
    class kind(SampledPosterior):
        def difference(self, pairs):
            return super().difference(pairs.flip(1))


class AnswersAtTheMean(Broken):
    class kind(SampledPosterior):
        def preference(self, pairs, *, random_answer_rate=0.0):
            p = torch.sigmoid(self.difference(pairs).mean)
            return (1 - random_answer_rate) * p + random_answer_rate / 2


class ForgetsMistakes(Broken):
    class kind(SampledPosterior):
        def preference(self, pairs, *, random_answer_rate=0.0):
            return super().preference(pairs)


class LikesTheSecond(Broken):
    class kind(SampledPosterior):
        def preference(self, pairs, *, random_answer_rate=0.0):
            return 0.95 * super().preference(pairs, random_answer_rate=random_answer_rate) + 0.05


class LooksAtPlaces(Broken):
    def compute_posterior(self, clips):
        belief = super(Broken, self).compute_posterior(clips)
        return SampledPosterior(belief.samples + torch.arange(len(clips)))


class LooksAtNeighbours(Broken):
    def compute_posterior(self, clips):
        samples = super(Broken, self).compute_posterior(clips).samples
        return SampledPosterior(samples - samples.mean(1, keepdim=True))


# A bug in the model.


class ForgetsTheMask(DeepEnsemble):
    def returns(self, clips):
        return super().returns(Clips(clips.observations, clips.actions))


class MeanOverFrames(DeepEnsemble):
    def compute_posterior(self, clips):
        return SampledPosterior(super().compute_posterior(clips).samples / clips.lengths)


class FoldsWhatItsBaseBelieves(DeepEnsemble):
    def rewards(self, observations, actions):
        return super().rewards(observations, actions) - 0.1 * actions.square().sum(1)


class FoldsAVariance(DeepEnsemble):
    def fold(self):
        score = super().fold()
        return lambda inputs: (score(inputs)[0], score(inputs)[1] ** 2)


class NeverCentres(DeepEnsemble):
    def after_epoch(self):
        self.gauge = torch.zeros(self.members)


class CentresTheMeanOnly(DeepEnsemble):
    def after_epoch(self):
        super().after_epoch()
        self.gauge = torch.full_like(self.gauge, float(self.gauge.mean()))


class SaturatesFarAway(DeepEnsemble):
    def inputs(self, observations, actions):
        frames = super().inputs(observations, actions)
        return frames * torch.exp(-frames.square().sum(1, keepdim=True) / 50)


class LearnsTheOpposite(DeepEnsemble):
    def loss(self, batch):
        return super().loss(type(batch)(batch.second, batch.first, batch.preference, batch.index))


class DrawsItsOwnSeed(DeepEnsemble):
    def build(self, inputs):
        torch.manual_seed(random.SystemRandom().randrange(2**31))
        super().build(inputs)


class LearnsWhenAsked(DeepEnsemble):
    def compute_posterior(self, clips):
        self.before_fit(clips)
        return super().compute_posterior(clips)


class UsesTheGlobalGenerator(DeepEnsemble):
    def compute_posterior(self, clips):
        torch.rand(1)
        return super().compute_posterior(clips)


class StaysInEvalMode(DeepEnsemble):
    def posterior(self, clips):
        belief = super().posterior(clips)
        self.eval()
        return belief


class DropsWhenTraining(DeepEnsemble):
    def posterior(self, clips):
        belief = super().posterior(clips)
        return SampledPosterior(belief.samples * 2) if self.training else belief


class KeepsAGradient(DeepEnsemble):
    def posterior(self, clips):
        return SampledPosterior(super().posterior(clips).samples.requires_grad_())


class KeepsAPlainAttribute(DeepEnsemble):
    scale = 1.0

    def after_epoch(self):
        super().after_epoch()
        self.scale = 1.7

    def compute_posterior(self, clips):
        return SampledPosterior(super().compute_posterior(clips).samples * self.scale)


class AnswersBeforeAFit(DeepEnsemble):
    def posterior(self, clips):
        return super().posterior(clips) if self.fitted else SampledPosterior(torch.zeros(1, 2))


class AnswersAnyShape(DeepEnsemble):
    def check(self, clips):
        pass


BUGS = [
    (NegativeEigenvalue, "covariance_is_positive_semidefinite", "eigenvalues from -"),
    (VarianceIsADeviation, "covariance_is_positive_semidefinite", "variance, and the covariance"),
    (MarginalDraws, "samples_match_mean_and_covariance", "covariance of the draws"),
    (ScaledDraws, "samples_match_mean_and_covariance", "covariance of the draws"),
    (IgnoresTheGenerator, "samples_match_mean_and_covariance", "one generator"),
    (SumsMarginalVariances, "difference_agrees_with_samples", "variance of a difference"),
    (FirstMinusSecond, "difference_agrees_with_samples", "mean of a difference"),
    (AnswersAtTheMean, "preference_integrates_the_belief", "random_answer_rate=0.0"),
    (ForgetsMistakes, "preference_integrates_the_belief", "random_answer_rate=0.2"),
    (LikesTheSecond, "swapping_a_pair_turns_its_answer_round", "swapped pairs"),
    (LooksAtPlaces, "permuting_clips_permutes_the_posterior", "mean of permuted"),
    (LooksAtNeighbours, "a_clip_does_not_depend_on_its_neighbours", r"clips \[3\] alone"),
    (ForgetsTheMask, "padding_changes_nothing", "padded"),
    (MeanOverFrames, "frames_sum_to_their_clip", "sum of its frames"),
    (FoldsWhatItsBaseBelieves, "scorer_agrees_with_frame_posterior", "mean of frames scored"),
    (FoldsAVariance, "scorer_agrees_with_frame_posterior", "standard deviation of frames scored"),
    (NeverCentres, "every_function_is_zero_on_the_reference", "reference batch is zero"),
    (CentresTheMeanOnly, "every_function_is_zero_on_the_reference", "reference batch is zero"),
    (SaturatesFarAway, "surer_near_the_data", "far from the data"),
    (LearnsTheOpposite, "learns_what_is_said", "of 200 new pairs right"),
    (DrawsItsOwnSeed, "same_seed_same_fit", "one seed"),
    (LearnsWhenAsked, "asking_changes_nothing", "frame_inputs.norm.mean"),
    (UsesTheGlobalGenerator, "asking_changes_nothing", "torch's global generator"),
    (StaysInEvalMode, "asking_changes_nothing", "training flag"),
    (DropsWhenTraining, "asking_changes_nothing", "when asked again"),
    (KeepsAGradient, "asking_changes_nothing", "need no gradient"),
    (KeepsAPlainAttribute, "saved_model_answers_the_same", "after loading"),
    (AnswersBeforeAFit, "refuses_what_it_cannot_answer", "before a fit raises NotFitted"),
    (AnswersAnyShape, "refuses_what_it_cannot_answer", "raises InvalidInput"),
]


@pytest.mark.parametrize(
    ("broken", "name", "message"), BUGS, ids=[broken.__name__ for broken, _, _ in BUGS]
)
def test_catches(broken, name, message, monkeypatch):
    if broken not in (LearnsTheOpposite, SaturatesFarAway):
        monkeypatch.setattr(checks_module, "EPOCHS", 5)  # all that most bugs need
    with pytest.raises(CheckFailed, match=rf"(?s){message}.*Usual cause: "):
        getattr(checks_module, f"check_{name}")(broken)


def test_every_check_has_a_bug_that_it_catches():
    assert {f"check_{name}" for _, name, _ in BUGS} == {check.__name__ for check in CHECKS}


def test_the_whole_list_says_all_that_failed():
    with pytest.raises(CheckFailed) as failure:
        check_reward_model(NeverCentres)
    assert str(failure.value).startswith("1 of 17 checks failed:\n- every sample's mean reward")
    assert isinstance(failure.value, RewardModelsError)
    assert isinstance(failure.value, AssertionError)


def test_a_crash_names_its_check(monkeypatch):
    monkeypatch.setattr(checks_module, "CHECKS", [checks_module.check_surer_near_the_data])
    monkeypatch.setattr(checks_module, "EPOCHS", 1)

    class Crashes(DeepEnsemble):
        def posterior(self, clips):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as crash:
        check_reward_model(Crashes)
    assert "check_surer_near_the_data" in crash.value.__notes__[0]


def test_a_belief_that_is_no_number_fails(monkeypatch):
    monkeypatch.setattr(checks_module, "EPOCHS", 1)

    class Spoilt(DeepEnsemble):
        def posterior(self, clips):
            return SampledPosterior(super().posterior(clips).samples * torch.nan)

    with pytest.raises(CheckFailed, match="nan"):
        checks_module.check_permuting_clips_permutes_the_posterior(Spoilt)
