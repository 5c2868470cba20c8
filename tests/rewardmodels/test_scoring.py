"""Scorers of single frames agree with their models, and check what they are given."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from rewardmodels import (
    PREDICTORS,
    Clips,
    Comparisons,
    DeepEnsemble,
    Epinet,
    FrameScorer,
    GPHead,
    InvalidInput,
    LaplaceHead,
    MCDropout,
    NotFitted,
    RewardModel,
    fit,
)
from rewardmodels import scoring as scoring_module
from rewardmodels.scoring import to_numpy


def own_network(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Softplus())


COMPILED: dict[str, Callable[[], RewardModel]] = {
    **PREDICTORS,
    "randomised priors": lambda: DeepEnsemble(members=3, prior_scale=2.0),
    "one linear member": lambda: DeepEnsemble(members=1, hidden=()),
    "MCDropout, one layer": lambda: MCDropout(hidden=(16,), samples=7, rate=0.5),
    "MCDropout, three layers": lambda: MCDropout(hidden=(16, 8, 4)),
    "LaplaceHead, leaky_relu": lambda: LaplaceHead(activation="leaky_relu"),
    "DeepEnsemble, leaky_relu": lambda: DeepEnsemble(activation="leaky_relu"),
    "GPHead on the inputs": lambda: GPHead(hidden=(), inducing=30),
    "logistic regression": lambda: LaplaceHead(hidden=()),
    "Epinet, linear": lambda: Epinet(hidden=(), samples=9, index_dim=3, prior_scale=1.0),
    "observations only": lambda: Epinet(reward_of="observation"),
    "own network": lambda: LaplaceHead(network=lambda n: nn.Sequential(nn.Linear(n, 8), nn.ReLU())),
}
# Softplus isn't translated.
COPIED = {f"{name}, copied": lambda cls=cls: cls(network=own_network)
          for name, cls in PREDICTORS.items()}  # fmt: skip


def frames(n: int, seed: int = 1, offset: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Observations whose second number is far from 0 and whose last is constant, and actions."""
    draw = np.random.default_rng(seed)
    observations, actions = draw.normal(size=(n, 4)), draw.normal(size=(n, 2))
    observations[:, 1] += offset
    observations[:, 3] = 0.5
    return observations.astype(np.float32), actions.astype(np.float32)


def comparisons(seed: int = 0, offset: float = 5.0, choices: int = 0) -> Comparisons:
    observations, actions = (torch.tensor(x).unflatten(0, (60, 6)) for x in frames(360, 0, offset))
    returns = (observations[..., 0] - observations[..., 1] + actions[..., 0].abs()).sum(1)
    if choices:
        actions = torch.from_numpy(np.random.default_rng(seed).integers(choices, size=(60, 6)))
        returns = (observations[..., 0] + actions).sum(1)
    pairs = torch.arange(60).view(30, 2)
    preference = (returns[pairs[:, 1]] > returns[pairs[:, 0]]).float()
    return Comparisons(Clips(observations, actions), pairs, preference)


def worst_error(
    scorer: FrameScorer, model: RewardModel, observations: np.ndarray, actions: np.ndarray
) -> float:
    """Worst error of batches and of single frames, in units of the allowed error.

    A mean may be off by 1e-4 of the rewards' spread, a standard deviation by 1e-4 of itself and
    1e-6 of that spread.
    """
    posterior = model.frame_posterior(torch.from_numpy(observations), torch.from_numpy(actions))
    mean, std = posterior.mean.numpy(), posterior.variance.sqrt().numpy()
    alone = np.array([scorer(*frame) for frame in zip(observations, actions, strict=True)])
    return max(
        float(np.max(error))
        for means, stds in (scorer.batch(observations, actions), alone.T)
        for error in (
            np.abs(means - mean) / (1e-4 * mean.std()),
            np.abs(stds - std) / (1e-4 * (std + 1e-2 * mean.std())),
        )
    )


@pytest.fixture(scope="module", params=[*COMPILED, *COPIED])
def model(request) -> RewardModel:
    model = fit((COMPILED | COPIED)[request.param](), comparisons(), epochs=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # clips of one length leave some at zero
                parameter += torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter)
    model.after_epoch()
    return model


def test_agrees_with_frame_posterior(model, monkeypatch, request):
    monkeypatch.setattr(scoring_module, "_FRAMES_AT_ONCE", 9)  # several parts, the last a short one
    scorer = model.frame_scorer()
    assert scorer.compiled == (request.node.callspec.params["model"] in COMPILED)
    assert worst_error(scorer, model, *frames(40)) <= 1
    observations, actions = frames(10)
    far = observations * np.float32([10, 10, 10, 1.01]), 10 * actions
    assert worst_error(scorer, model, *far) <= 1


@pytest.mark.parametrize("make", [DeepEnsemble, LaplaceHead])
def test_inputs_far_from_zero_lose_no_digits(make):
    # A normalisation merged into the first layer would subtract numbers of 1e5 that differ by one.
    model = fit(make(), comparisons(offset=1e5), epochs=4)
    assert worst_error(model.frame_scorer(), model, *frames(40, offset=1e5)) <= 1


@pytest.mark.parametrize("make", [*PREDICTORS.values(), COPIED["Epinet, copied"]])
def test_discrete_actions(make):
    model = fit(make(), comparisons(choices=3), epochs=4)
    observations, actions = frames(40)[0], np.arange(40) % 3
    scorer = model.frame_scorer()
    assert worst_error(scorer, model, observations, actions) <= 1
    assert scorer(observations[0], 2) == scorer(observations[0], np.int32(2))
    for wrong in (3, -1, 1.0):
        with pytest.raises(InvalidInput, match="actions: "):
            scorer(observations[0], wrong)
    with pytest.raises(InvalidInput, match="got 7"):
        scorer.batch(observations[:3], np.array([0, 7, 1]))


@pytest.mark.parametrize("make", [DeepEnsemble, MCDropout])
def test_images(make):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 2, 1, 8, 8), generator=draw, dtype=torch.uint8)
    clips = Clips(images, torch.randn(8, 2, 1, generator=draw))
    some = Comparisons(clips, torch.arange(8).view(4, 2), torch.ones(4))
    model = fit(make(hidden=(8,)), some, epochs=2)
    scorer = model.frame_scorer()
    assert not scorer.compiled
    flat = images.flatten(0, 1).numpy(), clips.actions.flatten(0, 1).numpy()
    assert worst_error(scorer, model, *flat) <= 1


def test_items_without_actions():
    items = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    some = Comparisons(Clips.of_items(items), torch.arange(20).view(10, 2), torch.ones(10))
    model = fit(LaplaceHead(), some, epochs=2)
    assert worst_error(model.frame_scorer(), model, items.numpy(), np.zeros((20, 0), "f")) <= 1


def test_is_a_snapshot_that_can_be_pickled(model):
    observations, actions = frames(5)
    scorer = model.frame_scorer()
    before = scorer.batch(observations, actions)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.mul_(1.5)
        if scorer.compiled:
            scorer = pickle.loads(pickle.dumps(scorer))
        for one, other in zip(scorer.batch(observations, actions), before, strict=True):
            assert np.array_equal(one, other)
        assert not np.allclose(model.frame_scorer().batch(observations, actions)[0], before[0])
    finally:
        model.load_state_dict(state)


def test_making_one_changes_nothing(model):
    model.train()
    generator = torch.get_rng_state()
    model.frame_scorer()
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    model.eval()


def test_lists_tensors_and_doubles_are_accepted(model):
    (observation,), (action,) = frames(1)
    scorer = model.frame_scorer()
    expected = scorer(observation, action)
    assert all(type(number) is float for number in expected)
    assert scorer(observation.tolist(), action.tolist()) == expected
    assert scorer(torch.from_numpy(observation), torch.from_numpy(action)) == expected
    assert scorer(observation.astype(np.float64), action[::-1].copy()[::-1]) == expected
    means, stds = scorer.batch(np.zeros((0, 4)), np.zeros((0, 2)))
    assert means.shape == stds.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(model, bad):
    scorer = model.frame_scorer()
    observations, actions = (part.astype(np.float64) for part in frames(300))
    for name, part in (("observations", observations), ("actions", actions)):
        was, part[290, 1] = part[290, 1], bad
        with pytest.raises(InvalidInput, match=f"{name}: "):
            scorer(observations[290], actions[290])
        with pytest.raises(InvalidInput, match=f"{name}: "):
            scorer.batch(observations, actions)
        part[290, 1] = was
    scorer.batch(observations, actions)


@pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
def test_rewards_stay_finite_however_far_out(model, size):
    scorer = model.frame_scorer()
    observations, actions = frames(3)
    observations[1] = size * np.sign(observations[1])
    found = scorer.batch(observations, actions)
    assert np.isfinite(found).all()
    expected = model.frame_posterior(observations, actions)
    np.testing.assert_allclose(found[0], expected.mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[1], expected.variance.sqrt(), rtol=1e-3)
    np.testing.assert_allclose(expected.preference([[0, 1], [2, 1]]), 0.5, atol=0.01)
    further = observations.copy()
    further[1] = 3.2e38 * np.sign(observations[1])
    np.testing.assert_array_equal(scorer.batch(further, actions), found)


def test_shapes_and_types_are_checked():
    scorer = fit(DeepEnsemble(members=2), comparisons(), epochs=1).frame_scorer()
    observations, actions = frames(3)
    for call, arguments, name in (
        (scorer, (observations, actions), "observation"),
        (scorer, (observations[0], actions[0, :1]), "action"),
        (scorer, (observations[0, :3], [*actions[0], 0.0]), "observation"),
        (scorer, (observations[0], 0), "action"),
        (scorer, (["a", "b", "c", "d"], actions[0]), "observation"),
        (scorer.batch, (observations[0], actions[0]), "observations"),
        (scorer.batch, (observations, actions[:2]), "actions"),
        (scorer.batch, (1.0, actions), "observations"),
    ):
        with pytest.raises(InvalidInput, match=f"{name}: "):
            call(*arguments)
    with pytest.raises(NotFitted, match="call fit first"):
        DeepEnsemble().frame_scorer()


def test_translation_follows_the_batch_or_is_refused():
    weight = torch.randn(4, 3, 6)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        several = torch.baddbmm(torch.ones(4, 3, 1), weight, x.T.expand(4, -1, -1))
        joined = torch.cat([several.flatten(0, 1).T, x], 1).double() / 3
        return (joined**2).mean(1), joined.unsqueeze(0).relu().sum(2).squeeze(0)

    compiled = to_numpy(function, 6)
    for batch in (0, 1, 5):
        x = torch.randn(batch, 6)
        for found, expected in zip(compiled(x.numpy()), function(x), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    for unknown in (
        lambda x: (x.sort(1).values,),
        lambda x: (torch.add(x, x, alpha=2),),
        lambda x: (x.sum(),),
        lambda x: (x.sum(1, keepdim=True),),
    ):
        assert to_numpy(unknown, 6) is None


def test_silu_is_silent_far_from_the_data():
    compiled = to_numpy(lambda x: (torch.nn.functional.silu(x),), 6)
    hidden = torch.tensor([[-1e4, -100, -1, 0, 1, 1e4]])
    with np.errstate(all="raise", under="ignore"):
        (found,) = compiled(hidden.numpy())
    np.testing.assert_allclose(found, torch.nn.functional.silu(hidden), rtol=1e-6, atol=1e-30)
