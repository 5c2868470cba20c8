"""Each conformance check fails for the bug that it is there to find."""

import random

import pytest
import torch

from rewardmodels import Clips, DeepEnsemble, RewardModelsError, SampledPosterior
from rewardmodels import checks as checks_module
from rewardmodels.checks import CHECKS, CheckFailed, check_reward_model

BUGS: list[tuple[type[DeepEnsemble], str]] = []


def with_posterior(posterior: type[SampledPosterior]) -> type[DeepEnsemble]:
    class Broken(DeepEnsemble):
        def __init__(self):
            super().__init__(members=4, hidden=(32,), learning_rate=3e-3)

        def compute_posterior(self, clips):
            return posterior(super().compute_posterior(clips).samples)

    Broken.__name__ = posterior.__name__
    return Broken


def fails(check: str):
    """Register a model, or an ensemble with this posterior, that has to fail this check."""

    def register(cls):
        model = with_posterior(cls) if issubclass(cls, SampledPosterior) else cls
        BUGS.append((model, f"check_{check}"))
        return cls

    return register


# Bugs in the posterior.


@fails("covariance_is_positive_semidefinite")
class NegativeEigenvalue(SampledPosterior):
    @property
    def covariance(self):
        covariance = super().covariance
        # Correlations of -1 between all: the diagonal stays right.
        scale = covariance.diagonal().sqrt()
        return torch.where(torch.eye(len(scale)) > 0, covariance, -torch.outer(scale, scale))


@fails("covariance_is_positive_semidefinite")
class VarianceIsADeviation(SampledPosterior):
    @property
    def variance(self):
        return super().variance.sqrt()


@fails("samples_match_moments")
class MarginalDraws(SampledPosterior):
    def rsample(self, n, generator=None):
        draws = super().rsample(n, generator)
        rows = torch.rand(draws.shape, generator=generator).argsort(0)
        return draws.gather(0, rows)


@fails("samples_match_moments")
class ScaledDraws(SampledPosterior):
    def rsample(self, n, generator=None):
        return self.mean + 1.2 * (super().rsample(n, generator) - self.mean)


@fails("samples_match_moments")
class IgnoresTheGenerator(SampledPosterior):
    def rsample(self, n, generator=None):
        return super().rsample(n)


@fails("difference_matches_covariance")
class AddsMarginalVariances(SampledPosterior):
    def difference(self, pairs):
        return super().difference(pairs)._replace(variance=self.variance[pairs].sum(1))


@fails("difference_matches_covariance")
class FirstMinusSecond(SampledPosterior):
    def difference(self, pairs):
        return super().difference(pairs.flip(1))


@fails("preference_averages_over_posterior")
class PreferenceAtTheMean(SampledPosterior):
    def preference(self, pairs, *, random_answer_rate=0.0):
        p = torch.sigmoid(self.difference(pairs).mean)
        return (1 - random_answer_rate) * p + random_answer_rate / 2


@fails("preference_averages_over_posterior")
class IgnoresRandomAnswers(SampledPosterior):
    def preference(self, pairs, *, random_answer_rate=0.0):
        return super().preference(pairs)


@fails("swapping_a_pair_flips_its_preference")
class PrefersTheSecond(SampledPosterior):
    def preference(self, pairs, *, random_answer_rate=0.0):
        p = super().preference(pairs, random_answer_rate=random_answer_rate)
        return 0.95 * p + 0.05


@fails("permuting_clips_permutes_posterior")
class DependsOnPlaces(DeepEnsemble):
    def compute_posterior(self, clips):
        samples = super().compute_posterior(clips).samples
        return SampledPosterior(samples + torch.arange(len(clips)))


@fails("posterior_does_not_depend_on_batch")
class DependsOnTheBatch(DeepEnsemble):
    def compute_posterior(self, clips):
        samples = super().compute_posterior(clips).samples
        return SampledPosterior(samples - samples.mean(1, keepdim=True))


# Bugs in the model.


@fails("padding_is_ignored")
class IgnoresTheMask(DeepEnsemble):
    def returns(self, clips):
        return super().returns(Clips(clips.observations, clips.actions))


@fails("frames_sum_to_clip")
class MeanOverFrames(DeepEnsemble):
    def compute_posterior(self, clips):
        return SampledPosterior(super().compute_posterior(clips).samples / clips.lengths)


@fails("scorer_matches_frame_posterior")
class InheritsFrameMoments(DeepEnsemble):
    def compute_posterior(self, clips):
        samples = super().compute_posterior(clips).samples
        return SampledPosterior(samples - 0.1 * clips.actions.square().sum((1, 2)))


@fails("scorer_matches_frame_posterior")
class ScoresAVariance(DeepEnsemble):
    def frame_moments(self, inputs):
        mean, std = super().frame_moments(inputs)
        return mean, std**2


@fails("samples_are_centred")
class NeverCentres(DeepEnsemble):
    def after_epoch(self):
        self.gauge = torch.zeros(self.members)


@fails("samples_are_centred")
class CentresTheMeanOnly(DeepEnsemble):
    def after_epoch(self):
        super().after_epoch()
        self.gauge = torch.full_like(self.gauge, float(self.gauge.mean()))


@fails("variance_grows_away_from_data")
class SaturatesFarAway(DeepEnsemble):
    def inputs(self, observations, actions):
        frames = super().inputs(observations, actions)
        return frames * torch.exp(-frames.square().sum(1, keepdim=True) / 50)


@fails("unknown_inputs_return_to_one_half")
class IsNeverNovel(DeepEnsemble):
    def update_novelty(self, comparisons, setting):
        pass


@fails("shared_novelty_cancels")
class NoveltyOfEachClip(DeepEnsemble):
    def posterior(self, clips):
        posterior = super().posterior(clips)
        return posterior.plus(posterior.root.square().sum(1).sqrt().diag())


@fails("nothing_is_novel_where_compared")
class ComparedFramesAreNovel(DeepEnsemble):
    def update_novelty(self, comparisons, setting):
        super().update_novelty(comparisons, setting)
        self.novelty.high -= 1


@fails("learns_an_easy_reward")
class LearnsTheOpposite(DeepEnsemble):
    def loss(self, batch):
        return super().loss(type(batch)(batch.second, batch.first, batch.preference, batch.index))


@fails("same_seed_same_fit")
class DrawsItsOwnSeed(DeepEnsemble):
    def build(self, inputs):
        torch.manual_seed(random.SystemRandom().randrange(2**31))
        super().build(inputs)


@fails("posterior_has_no_side_effects")
class UpdatesNormalisation(DeepEnsemble):
    def compute_posterior(self, clips):
        self.before_fit(clips)
        return super().compute_posterior(clips)


@fails("posterior_has_no_side_effects")
class UsesTheGlobalGenerator(DeepEnsemble):
    def compute_posterior(self, clips):
        torch.rand(1)
        return super().compute_posterior(clips)


@fails("posterior_has_no_side_effects")
class StaysInEvalMode(DeepEnsemble):
    def posterior(self, clips):
        posterior = super().posterior(clips)
        self.eval()
        return posterior


@fails("posterior_has_no_side_effects")
class DependsOnTheMode(DeepEnsemble):
    def posterior(self, clips):
        posterior = super().posterior(clips)
        return SampledPosterior(posterior.samples * 2) if self.training else posterior


@fails("posterior_has_no_side_effects")
class KeepsAGradient(DeepEnsemble):
    def posterior(self, clips):
        return SampledPosterior(super().posterior(clips).samples.requires_grad_())


@fails("save_and_load")
class KeepsAPlainAttribute(DeepEnsemble):
    scale = 1.0

    def after_epoch(self):
        super().after_epoch()
        self.scale = 1.7

    def compute_posterior(self, clips):
        return SampledPosterior(super().compute_posterior(clips).samples * self.scale)


@fails("invalid_calls_raise")
class PosteriorBeforeAFit(DeepEnsemble):
    def posterior(self, clips):
        return super().posterior(clips) if self.fitted else SampledPosterior(torch.zeros(1, 2))


@fails("invalid_calls_raise")
class AcceptsAnyShape(DeepEnsemble):
    def check(self, clips):
        pass


@pytest.mark.parametrize(("broken", "check"), BUGS, ids=[broken.__name__ for broken, _ in BUGS])
def test_a_bug_is_found(broken, check, monkeypatch):
    if broken not in (LearnsTheOpposite, SaturatesFarAway):
        monkeypatch.setattr(checks_module, "EPOCHS", 5)  # enough for most bugs
    with pytest.raises(CheckFailed, match="Usual cause"):
        getattr(checks_module, check)(broken)


def test_every_check_is_listed_and_has_a_bug():
    defined = {name for name in vars(checks_module) if name.startswith("check_")}
    listed = {check.__name__ for check in CHECKS}
    assert listed == defined - {"check_reward_model"} == {check for _, check in BUGS}


def test_check_reward_model_reports_all_failures():
    with pytest.raises(CheckFailed, match=f"1 of {len(CHECKS)}") as failure:
        check_reward_model(NeverCentres)
    assert isinstance(failure.value, RewardModelsError)
    assert isinstance(failure.value, AssertionError)


def test_an_error_names_its_check(monkeypatch):
    check = checks_module.check_variance_grows_away_from_data
    monkeypatch.setattr(checks_module, "CHECKS", [check])
    monkeypatch.setattr(checks_module, "EPOCHS", 1)

    class Crashes(DeepEnsemble):
        def posterior(self, clips):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as crash:
        check_reward_model(Crashes)
    assert check.__name__ in crash.value.__notes__[0]


def test_nan_fails(monkeypatch):
    monkeypatch.setattr(checks_module, "EPOCHS", 1)

    class NotANumber(DeepEnsemble):
        def posterior(self, clips):
            return SampledPosterior(super().posterior(clips).samples * torch.nan)

    with pytest.raises(CheckFailed, match="nan"):
        checks_module.check_permuting_clips_permutes_posterior(NotANumber)
