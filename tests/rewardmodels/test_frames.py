"""Kinds of frames: vectors, images, discrete actions, transitions, items; any network."""

import numpy as np
import pytest
import torch
from torch import nn

from rewardmodels import (
    PREDICTORS,
    Clips,
    Comparisons,
    DeepEnsemble,
    InvalidInput,
    LaplaceHead,
    RewardModel,
    fit,
    load,
    save,
    transitions,
)
from rewardmodels.frames import FrameInputs, FrameSpec

from .data import linear_clips as vectors
from .data import of_neighbours as taught


def accuracy(model: RewardModel, comparisons: Comparisons) -> float:
    p = model.posterior(comparisons.clips).preference(comparisons.pairs)
    return float(((p > 0.5) == (comparisons.preference > 0.5)).float().mean())


def images(n: int, seed: int = 0) -> Clips:
    """Bright spots on the left are good and on the right bad, whatever the colour."""
    draw = torch.Generator().manual_seed(seed)
    seen = torch.zeros(n, 2, 3, 12, 16, dtype=torch.uint8)
    column = torch.randint(16, (n, 2), generator=draw)
    colour = torch.randint(3, (n, 2), generator=draw)
    row = torch.randint(12, (n, 2), generator=draw)
    for clip in range(n):
        for frame in range(2):
            seen[clip, frame, colour[clip, frame], row[clip, frame], column[clip, frame]] = 255
    return Clips(seen, torch.zeros(n, 2, 1), rewards=7.5 - column.float())


def choices(n: int, seed: int = 0) -> Clips:
    """Of five actions the second is best, whatever is seen: no order of theirs."""
    draw = torch.Generator().manual_seed(seed)
    action = torch.randint(5, (n, 4), generator=draw)
    rewards = torch.tensor([0.0, 3.1, -1.03, 1.07, -2.01])[action]
    return Clips(torch.randn(n, 4, 2, generator=draw), action, rewards=rewards)


@pytest.mark.parametrize("cls", PREDICTORS.values(), ids=PREDICTORS)
def test_every_predictor_learns_from_images(cls):
    model = fit(cls(hidden=(16,), learning_rate=3e-3), taught(images(400)), epochs=12)
    # A coin would be right 0.5 +- 0.025 of the time.
    assert accuracy(model, taught(images(400, seed=1))) > 0.7
    assert model.posterior(images(3)).mean.shape == (3,)


@pytest.mark.parametrize("cls", PREDICTORS.values(), ids=PREDICTORS)
def test_every_predictor_learns_from_discrete_actions(cls):
    model = fit(cls(learning_rate=3e-3), taught(choices(300)), epochs=20)
    assert model.spec.discrete_actions == 5
    assert accuracy(model, taught(choices(400, seed=1))) > 0.9


@pytest.mark.parametrize("cls", PREDICTORS.values(), ids=PREDICTORS)
@pytest.mark.parametrize("form", ["module", "function"])
def test_every_predictor_takes_a_network_of_ones_own(cls, form, tmp_path):
    def make(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 20), nn.Tanh(), nn.Linear(20, 12))

    network = make(5) if form == "module" else make
    before = [p.clone() for p in network.parameters()] if form == "module" else []
    model = fit(cls(network=network, learning_rate=1e-2), taught(vectors(300)), epochs=20)
    fresh = taught(vectors(400, seed=1))
    assert accuracy(model, fresh) > 0.85
    if form == "module":  # the caller's is left as it was
        assert all(map(torch.equal, before, network.parameters()))

    save(model, tmp_path / "model")
    with pytest.raises(InvalidInput, match=r"network: expected the one .* load\(path, network"):
        load(tmp_path / "model")
    again = load(tmp_path / "model", network=network)
    one, other = (m.posterior(fresh.clips) for m in (model, again))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.variance, other.variance)


def test_members_made_by_a_function_start_apart_and_a_modules_do_not():
    def make(inputs: int) -> nn.Module:
        return nn.Linear(inputs, 4)

    for network, apart in ((make, True), (make(5), False)):
        model = DeepEnsemble(members=2, network=network)
        model.initialise(vectors(4))
        one, other = model.network
        assert torch.equal(one.body.weight, other.body.weight) is not apart
        assert not torch.equal(one.last.weight, other.last.weight)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (3, "network: expected a torch.nn.Module.*got 3"),
        (nn.Linear(4, 2), r"network: expected a module from \(B, 5\) .* RuntimeError"),
        (nn.Flatten(0), r"network: .*it gave \(10,\)"),
        (lambda inputs: nn.LSTM(inputs, 2), r"network: .*it gave \(tensor"),
    ],
)
def test_refuses_a_network_that_makes_no_features(network, message):
    with pytest.raises(InvalidInput, match=message):
        fit(LaplaceHead(network=network), taught(vectors(20)))


def test_a_network_file_is_refused_a_network_it_was_not_made_with(tmp_path):
    save(fit(LaplaceHead(), taught(vectors(20)), epochs=1), tmp_path / "model")
    with pytest.raises(InvalidInput, match="network: expected none, got Linear"):
        load(tmp_path / "model", network=nn.Linear(5, 2))


@pytest.mark.parametrize("cls", PREDICTORS.values(), ids=PREDICTORS)
def test_a_reward_of_the_observation_does_not_see_actions(cls):
    model = fit(cls(reward_of="observation"), taught(vectors(100)), epochs=3)
    clips = vectors(10, seed=1)
    others = Clips(clips.observations, clips.actions + 100)
    assert torch.equal(model.posterior(clips).mean, model.posterior(others).mean)
    model = fit(cls(), taught(vectors(100)), epochs=3)
    assert not torch.allclose(model.posterior(clips).mean, model.posterior(others).mean)


@pytest.mark.parametrize("cls", PREDICTORS.values(), ids=PREDICTORS)
def test_items_are_clips_of_one_frame(cls):
    features = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    worth = features @ torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0, 0.0])
    pairs = torch.arange(400).view(200, 2)
    better = (worth[pairs[:, 1]] > worth[pairs[:, 0]]).float()
    said = Comparisons(Clips.of_items(features), pairs, better)
    model = fit(cls(learning_rate=3e-3), said[:150], epochs=30)
    assert accuracy(model, said[150:]) > 0.85


def test_a_reward_of_transitions():
    draw = torch.Generator().manual_seed(0)
    walk = torch.randn(600, 5, 2, generator=draw)
    rewards = torch.zeros(600, 5)
    rewards[:, 1:] = (walk[:, 1:] - walk[:, :-1])[..., 0].abs()
    clips = transitions(Clips(walk, torch.zeros(600, 5, 1), rewards=rewards))
    assert clips.observations.shape == (600, 4, 2, 2)
    assert torch.equal(clips.observations[7, 2], walk[7, 2:4])
    assert torch.equal(clips.rewards, rewards[:, 1:])
    said = taught(clips)
    model = fit(DeepEnsemble(learning_rate=3e-3), said[:250], epochs=40)
    assert accuracy(model, said[250:]) > 0.75
    with pytest.raises(InvalidInput, match="clips: expected at least two frames"):
        transitions(Clips(torch.zeros(3, 1, 2), torch.zeros(3, 1)))


def test_ragged_transitions_keep_their_ends():
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    clips = Clips(torch.arange(10.0).view(2, 5, 1), torch.zeros(2, 5), mask)
    assert transitions(clips).lengths.tolist() == [4, 2]


def test_inputs_are_numbers_first_and_then_the_choice():
    spec = FrameSpec((2,), (), discrete_actions=3)
    inputs = FrameInputs(spec)
    observations = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    inputs.update(observations, torch.tensor([0, 2]))
    found = inputs(observations, torch.tensor([0, 2]))
    expected = [[-1, -1, 1, 0, 0], [1, 1, 0, 0, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_images_are_normalised_by_channel():
    draw = torch.Generator().manual_seed(0)
    seen = torch.rand(50, 2, 3, 4, generator=draw) * torch.tensor([1.0, 200.0]).view(2, 1, 1)
    actions = torch.randn(50, 2, generator=draw) + 9
    inputs = FrameInputs(FrameSpec((2, 3, 4), (2,)))
    for part in (slice(0, 20), slice(20, 50)):
        inputs.update(seen[part], actions[part])
    found = inputs(seen, actions)
    np.testing.assert_allclose(found[:, 24:].mean(0), 0, atol=1e-5)
    by_channel = seen.double().numpy()
    mean, std = by_channel.mean((0, 2, 3)), by_channel.std((0, 2, 3))
    expected = (by_channel - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(found[:, :24], expected.reshape(50, 24), atol=1e-4)


@pytest.mark.parametrize("shape", [(84, 84, 4), (64, 48, 3), (28, 28, 1), (2, 84, 84, 3)])
def test_images_with_channels_last_are_refused(shape):
    clips = Clips(torch.zeros(4, 1, *shape), torch.zeros(4, 1, 1))
    model = LaplaceHead()
    with pytest.raises(
        InvalidInput, match=r"observations: .*\(C, H, W\), got .*channels last.*move"
    ):
        fit(model, Comparisons(clips, [[0, 1], [2, 3]], [0, 1]))
    assert model.spec is None
    first = (*shape[:-3], shape[-1], *shape[-3:-1])
    for fine in (first, (3, 84, 4), (4, 12, 3), (64, 4, 4)):
        FrameSpec(fine, ()).check_layout()


def test_images_before_and_after_are_one_image():
    assert FrameSpec((2, 3, 8, 9), ()).image == (6, 8, 9)
    assert FrameSpec((3, 8, 9), ()).image == (3, 8, 9)
    assert FrameSpec((8, 9), ()).image is None


@pytest.mark.parametrize("seen", [-1, 5])
def test_refuses_an_action_that_there_is_not(seen):
    model = fit(LaplaceHead(), taught(choices(40)), epochs=1)
    with pytest.raises(InvalidInput, match=rf"actions: .* from 0 to 4, got {seen}.*discrete_"):
        model.frame_posterior(torch.zeros(2, 2), torch.tensor([0, seen]))


def test_actions_that_never_came_can_be_announced():
    model = fit(LaplaceHead(discrete_actions=9), taught(choices(40)), epochs=1)
    assert model.frame_posterior(torch.zeros(1, 2), torch.tensor([8])).mean.isfinite().all()
    with pytest.raises(InvalidInput, match="actions: expected numbers from 0 to 2, got 4"):
        fit(LaplaceHead(discrete_actions=3), taught(choices(40)), epochs=1)
