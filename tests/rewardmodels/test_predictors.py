"""Properties of every predictor in the registry, beyond the conformance checks."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from jsonargparse import ArgumentParser

from rewardmodels import (
    PREDICTORS,
    Calibrated,
    Clips,
    Comparisons,
    InvalidInput,
    LaplaceHead,
    PairBatch,
    RewardModel,
    fit,
)
from rewardmodels import model as model_module
from rewardmodels.checks import CHECKS

from .data import linear_clips, linear_comparisons

NAN, INF = float("nan"), float("inf")
PAIRS = torch.arange(60).view(30, 2)
VARIANTS = [(name, {}) for name in PREDICTORS] + [("DeepEnsemble", {"prior_scale": 1.0})]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def make(request) -> Callable[[], RewardModel]:
    name, settings = request.param
    return lambda: PREDICTORS[name](learning_rate=3e-3, **settings)


@pytest.fixture(scope="module")
def model(make) -> RewardModel:
    return fit(make(), linear_comparisons(300), epochs=40)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", PREDICTORS.values(), ids=PREDICTORS)
def test_conformance(cls, check):
    check(cls)


def test_wrong_predictions_are_less_certain(model):
    fresh = linear_comparisons(1000, seed=8)
    mean, variance = model.posterior(fresh.clips).difference(fresh.pairs)
    wrong = (mean > 0) != (fresh.preference > 0.5)
    certainty = mean.abs() / variance.sqrt()
    assert 2 * certainty[wrong].median() < certainty[~wrong].median()


def test_a_clip_does_not_differ_from_itself(model):
    clips = linear_clips(n=8)
    doubled = model.posterior(Clips.cat([clips, clips]))
    assert float(doubled.variance.min()) > 0
    itself = doubled.difference(torch.stack([torch.arange(8), torch.arange(8) + 8], 1))
    scale = float(doubled.variance.max())
    torch.testing.assert_close(itself.variance, torch.zeros(8), atol=1e-8 * scale, rtol=0)
    torch.testing.assert_close(itself.mean, torch.zeros(8), atol=1e-4, rtol=0)


def test_after_epoch_is_idempotent(model):
    before = model.posterior(linear_clips())
    model.after_epoch()
    after = model.posterior(linear_clips())
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.variance, before.variance)


@pytest.mark.parametrize("at_once", [1, 17, 10**6])
def test_the_size_of_chunks_does_not_matter(model, monkeypatch, at_once):
    clips = linear_clips(n=30)
    expected = model.posterior(clips)
    monkeypatch.setattr(model_module, "_FRAMES_AT_ONCE", at_once)
    posterior = model.posterior(clips)
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.covariance, expected.covariance, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", [NAN, 1e30])
def test_gradients_ignore_padding(model, padding):
    clips = linear_clips(n=4)
    observations, actions = (
        torch.cat([value, torch.full((4, 5, value.shape[2]), padding)], 1)
        for value in (clips.observations, clips.actions)
    )
    gradients = []
    for some in (clips, Clips(observations, actions, torch.arange(11).expand(4, 11) < 6)):
        model.zero_grad()
        torch.manual_seed(5)  # the same masks and indices
        batch = PairBatch(some[:2], some[2:], torch.tensor([1.0, 0.0]), torch.arange(2))
        model.loss(batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_one_clip_and_none(model):
    clips = linear_clips(n=1)
    assert model.posterior(clips).rsample(3).shape == (3, 1)
    assert model.posterior(clips[[]]).rsample(3).shape == (3, 0)
    frames = clips.observations[0, :0], clips.actions[0, :0]
    assert model.frame_posterior(*frames).mean.shape == (0,)


def test_another_seed_gives_another_fit(make):
    one, other = (fit(make(), linear_comparisons(40), epochs=2, seed=seed) for seed in (0, 1))
    clips = linear_clips(n=10)
    assert not torch.allclose(one.posterior(clips).mean, other.posterior(clips).mean)


@pytest.mark.parametrize("preference", [0.0, 0.5, 1.0])
def test_equal_preferences_leave_a_finite_posterior(make, preference):
    some = linear_comparisons(30)
    equal = Comparisons(some.clips, some.pairs, torch.full((30,), preference))
    posterior = fit(make(), equal, epochs=4).posterior(some.clips)
    mean, variance = posterior.difference(some.pairs)
    assert mean.isfinite().all()
    assert (variance >= 0).all()
    if preference == 0.5:
        assert float((posterior.preference(some.pairs) - 0.5).abs().mean()) < 0.25


WITH_PRIORS = [("DeepEnsemble", "network.biases.2"), ("Epinet", "network.last.bias")]


@pytest.mark.parametrize(("name", "cancels"), WITH_PRIORS)
def test_priors_are_not_trained_and_the_rest_is(name, cancels):
    some = linear_comparisons(10)
    model = fit(PREDICTORS[name](prior_scale=2.0), some, epochs=1)
    before = {key: value.clone() for key, value in model.named_parameters()}
    fit(model, some, epochs=3)
    for parameter, value in model.named_parameters():
        if parameter != cancels:  # in every comparison: it only decays
            assert torch.equal(value, before[parameter]) is parameter.startswith("prior.")


@pytest.mark.parametrize("name", dict(WITH_PRIORS))
def test_larger_priors_are_less_certain_where_nothing_was_answered(name):
    known = linear_comparisons(40)
    far = Clips(known.clips.observations * 20, known.clips.actions * 20)
    spread = []
    for scale in (0.0, 1.0, 10.0):
        model = fit(PREDICTORS[name](learning_rate=3e-3, prior_scale=scale), known, epochs=20)
        spread.append(float(model.posterior(far).difference(known.pairs).variance.median()))
    assert spread[0] < spread[1] < spread[2]


@pytest.mark.parametrize("name", PREDICTORS)
def test_the_command_line_makes_it(name):
    parser = ArgumentParser()
    parser.add_argument("--model", type=RewardModel)
    line = [f"--model=rewardmodels.{name}", "--model.hidden=[8,4]"]
    made = parser.instantiate(parser.parse_args([*line, "--model.random_answer_rate=0.1"])).model
    assert made.hparams["hidden"] == (8, 4)
    assert made.random_answer_rate == 0.1


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, shared) for name in PREDICTORS for shared in (
        {"hidden": (8, 0)}, {"learning_rate": -1.0}, {"weight_decay": NAN},
        {"random_answer_rate": 1.0}, {"random_answer_rate": -0.1}, {"reward_of": "state"},
        {"activation": "tanh"}, {"discrete_actions": -1},
    )] + [
        ("DeepEnsemble", {"members": 0}), ("DeepEnsemble", {"prior_scale": -1.0}),
        ("DeepEnsemble", {"prior_scale": INF}), ("MCDropout", {"samples": 0}),
        ("MCDropout", {"hidden": ()}), ("MCDropout", {"rate": 1.0}), ("MCDropout", {"rate": NAN}),
        ("LaplaceHead", {"prior_precision": 0.0}), ("LaplaceHead", {"prior_precision": NAN}),
        ("Epinet", {"index_dim": 0}), ("Epinet", {"samples": 0}), ("Epinet", {"epinet_width": 0}),
        ("Epinet", {"training_indices": 0}), ("Epinet", {"prior_scale": -1.0}),
        ("GPHead", {"inducing": 0}), ("GPHead", {"random_features": 0}),
        ("GPHead", {"random_features": 7}), ("GPHead", {"inducing": 2.5}),
        ("DeepEnsemble", {"members": 2.5}), ("DeepEnsemble", {"members": "3"}),
        ("MCDropout", {"samples": True}), ("LaplaceHead", {"hidden": (8.5,)}),
        ("LaplaceHead", {"hidden": 8}), ("LaplaceHead", {"discrete_actions": 1.5}),
    ],
)  # fmt: skip
def test_hyper_parameters_out_of_range_are_refused(name, settings):
    ((argument, _),) = settings.items()
    with pytest.raises(InvalidInput, match=f"{argument}: "):
        PREDICTORS[name](**settings)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep", "pickle"],
)
def test_a_copy_gives_the_same_posterior_and_goes_its_own_way(make, model, copied):
    clips, state = linear_clips(n=10), torch.get_rng_state()
    again, calibrated = copied(model), copied(Calibrated(model))
    assert torch.equal(torch.get_rng_state(), state)
    expected = model.posterior(clips)
    assert torch.equal(again.posterior(clips).covariance, expected.covariance)
    assert torch.equal(calibrated.model.posterior(clips).covariance, expected.covariance)
    fit(again, linear_comparisons(20), epochs=1)
    assert torch.equal(model.posterior(clips).mean, expected.mean)
    one, other = (fit(x, linear_comparisons(20), epochs=1) for x in (make(), copied(make())))
    assert torch.equal(one.posterior(clips).mean, other.posterior(clips).mean)


def test_a_network_of_ones_own_is_copied_too():
    made = LaplaceHead(network=torch.nn.Linear(5, 3))
    one, other = (
        fit(x, linear_comparisons(20), epochs=1) for x in (made, pickle.loads(pickle.dumps(made)))
    )
    assert torch.equal(*(x.posterior(linear_clips()).mean for x in (one, other)))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_posterior(model):
    here = model.posterior(linear_clips())
    there = model.to("cuda").posterior(linear_clips())
    assert there.mean.is_cuda
    model.to("cpu")
    torch.testing.assert_close(there.mean.cpu(), here.mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(there.covariance.cpu(), here.covariance, atol=1e-3, rtol=1e-3)
