"""A scorer says of one frame what its model says of a batch of them."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from rewardmodels import (
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
from rewardmodels.networks import MLP


class Doubled(MLP):
    def forward(self, frames, scales=None):
        return 2 * super().forward(frames, scales)


def own_network(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Softplus())


FOLDED: dict[str, Callable[[], RewardModel]] = {
    "DeepEnsemble": lambda: DeepEnsemble(members=5),
    "randomised priors": lambda: DeepEnsemble(members=3, prior_scale=2.0),
    "one linear member": lambda: DeepEnsemble(members=1, hidden=()),
    "MCDropout": MCDropout,
    "MCDropout, one layer": lambda: MCDropout(hidden=(16,), samples=7, rate=0.5),
    "MCDropout, three layers": lambda: MCDropout(hidden=(16, 8, 4)),
    "LaplaceHead": LaplaceHead,
    "LaplaceHead of leaky units": lambda: LaplaceHead(activation="leaky_relu"),
    "DeepEnsemble of leaky units": lambda: DeepEnsemble(activation="leaky_relu"),
    "MCDropout of leaky units": lambda: MCDropout(activation="leaky_relu"),
    "GPHead": GPHead,
    "GPHead on the inputs": lambda: GPHead(hidden=(), inducing=30),
    "logistic regression": lambda: LaplaceHead(hidden=()),
    "Epinet": Epinet,
    "Epinet, linear": lambda: Epinet(hidden=(), samples=9, index_dim=3, prior_scale=1.0),
    "an MLP that does more": lambda: LaplaceHead(network=lambda inputs: Doubled(inputs, (8,))),
    "observations only": lambda: Epinet(reward_of="observation"),
}
COPIED: dict[str, Callable[[], RewardModel]] = {
    "members of the caller's": lambda: DeepEnsemble(members=3, network=own_network),
    "MCDropout of the caller's": lambda: MCDropout(network=own_network),
    "LaplaceHead of the caller's": lambda: LaplaceHead(network=own_network),
    "Epinet of the caller's": lambda: Epinet(network=own_network),
}


def frames(n: int, seed: int = 1, offset: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Observations whose second number is far from 0 and whose last never changes, and actions."""
    draw = np.random.default_rng(seed)
    seen, done = draw.normal(size=(n, 4)), draw.normal(size=(n, 2))
    seen[:, 1] += offset
    seen[:, 3] = 0.5
    return seen.astype(np.float32), done.astype(np.float32)


def answers(seed: int = 0, offset: float = 5.0, actions: int = 0) -> Comparisons:
    seen, done = (torch.from_numpy(x).unflatten(0, (60, 6)) for x in frames(360, seed, offset))
    worth = (seen[..., 0] - seen[..., 1] + done[..., 0].abs()).sum(1)
    if actions:
        done = torch.from_numpy(np.random.default_rng(seed).integers(actions, size=(60, 6)))
        worth = (seen[..., 0] + done).sum(1)
    pairs = torch.arange(60).view(30, 2)
    return Comparisons(Clips(seen, done), pairs, (worth[pairs[:, 1]] > worth[pairs[:, 0]]).float())


def worst_error(
    scorer: FrameScorer, model: RewardModel, seen: np.ndarray, done: np.ndarray
) -> float:
    """Of batches and of single frames, in units of what is allowed, so that at most 1 will do.

    A mean may be off by 1e-4 of the rewards' spread, a standard deviation by 1e-4 of itself and
    1e-6 of that spread.
    """
    belief = model.frame_posterior(torch.from_numpy(seen), torch.from_numpy(done))
    mean, std = belief.mean.numpy(), belief.variance.sqrt().numpy()
    alone = np.array([scorer(*frame) for frame in zip(seen, done, strict=True)])
    errors = [
        error
        for means, stds in (scorer.batch(seen, done), alone.T)
        for error in (
            np.abs(means - mean) / (1e-4 * mean.std()),
            np.abs(stds - std) / (1e-4 * (std + 1e-2 * mean.std())),
        )
    ]
    return float(np.max(errors))


@pytest.fixture(scope="module", params=[*FOLDED, *COPIED])
def model(request) -> RewardModel:
    model = fit((FOLDED | COPIED)[request.param](), answers(), epochs=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # clips of one length leave some at zero
                parameter += torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter)
    model.after_epoch()
    return model


def test_agrees_with_frame_posterior(model, monkeypatch):
    monkeypatch.setattr(scoring_module, "_FRAMES_AT_ONCE", 9)  # several parts, the last a short one
    scorer = model.frame_scorer()
    assert worst_error(scorer, model, *frames(40)) <= 1
    seen, done = frames(10)
    assert worst_error(scorer, model, seen * np.float32([10, 10, 10, 1.01]), 10 * done) <= 1


def test_known_operations_are_compiled(model, request):
    name = request.node.callspec.params["model"]
    assert model.frame_scorer().compiled == (name in FOLDED)


@pytest.mark.parametrize("make", [DeepEnsemble, LaplaceHead])
def test_inputs_far_from_zero_lose_no_digits(make):
    # Two layers folded into one would subtract numbers of 1e5 that differ by one.
    model = fit(make(), answers(offset=1e5), epochs=4)
    assert worst_error(model.frame_scorer(), model, *frames(40, offset=1e5)) <= 1


@pytest.mark.parametrize("make", [*FOLDED.values(), COPIED["Epinet of the caller's"]])
def test_discrete_actions(make):
    model = fit(make(), answers(actions=3), epochs=4)
    seen, _ = frames(40)
    done = np.arange(40) % 3
    scorer = model.frame_scorer()
    assert worst_error(scorer, model, seen, done) <= 1
    assert scorer(seen[0], 2) == scorer(seen[0], np.int32(2))
    for wrong, message in ((3, "from 0 to 2, got 3"), (-1, "got -1"), (1.0, "integer type")):
        with pytest.raises(InvalidInput, match=f"actions: .*{message}"):
            scorer(seen[0], wrong)
    with pytest.raises(InvalidInput, match="from 0 to 2, got 7"):
        scorer.batch(seen[:3], np.array([0, 7, 1]))


@pytest.mark.parametrize("make", [DeepEnsemble, MCDropout])
def test_images(make):
    draw = torch.Generator().manual_seed(0)
    seen = torch.randint(256, (8, 2, 1, 8, 8), generator=draw, dtype=torch.uint8)
    clips = Clips(seen, torch.randn(8, 2, 1, generator=draw))
    model = fit(make(hidden=(8,)), Comparisons(clips, torch.arange(8).view(4, 2), torch.ones(4)),
                epochs=2)  # fmt: skip
    scorer = model.frame_scorer()
    assert not scorer.compiled
    flat = seen.flatten(0, 1).numpy(), clips.actions.flatten(0, 1).numpy()
    assert worst_error(scorer, model, *flat) <= 1


def test_features_without_actions():
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    said = Comparisons(Clips.of_items(features), torch.arange(20).view(10, 2), torch.ones(10))
    model = fit(LaplaceHead(), said, epochs=2)
    nothing_done = np.zeros((20, 0), np.float32)
    assert worst_error(model.frame_scorer(), model, features.numpy(), nothing_done) <= 1


def test_is_a_snapshot(model):
    seen, done = frames(5)
    scorer = model.frame_scorer()
    before, mean = scorer.batch(seen, done), model.frame_posterior(*map(torch.tensor, (seen, done)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.mul_(1.5)
        for one, other in zip(scorer.batch(seen, done), before, strict=True):
            assert np.array_equal(one, other)
        after = model.frame_posterior(*map(torch.tensor, (seen, done)))
        assert not torch.allclose(after.mean, mean.mean)
    finally:
        model.load_state_dict(state)


def test_making_one_changes_nothing(model):
    model.train()
    generator, training = torch.get_rng_state(), model.training
    model.frame_scorer()
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), generator)
    model.eval()


@pytest.mark.parametrize("make", FOLDED.values(), ids=FOLDED)
def test_goes_to_another_process(make):
    model = fit(make(), answers(), epochs=1)
    seen, done = frames(1)
    scorer = model.frame_scorer()
    assert pickle.loads(pickle.dumps(scorer))(seen[0], done[0]) == scorer(seen[0], done[0])


def test_lists_tensors_and_doubles_will_do(model):
    (seen,), (done,) = frames(1)
    scorer = model.frame_scorer()
    expected = scorer(seen, done)
    assert all(type(number) is float for number in expected)
    assert scorer(seen.tolist(), done.tolist()) == expected
    assert scorer(torch.from_numpy(seen), torch.from_numpy(done)) == expected
    assert scorer(seen.astype(np.float64), done[::-1].copy()[::-1]) == expected


def test_no_frames(model):
    means, stds = model.frame_scorer().batch(np.zeros((0, 4)), np.zeros((0, 2)))
    assert means.shape == stds.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_refused(model, bad):
    scorer = model.frame_scorer()
    seen, done = (part.astype(np.float64) for part in frames(300))
    for name, part in (("observations", seen), ("actions", done)):
        was, part[290, 1] = part[290, 1], bad
        with pytest.raises(InvalidInput, match=f"{name}: expected finite"):
            scorer(seen[290], done[290])
        with pytest.raises(InvalidInput, match=f"{name}: expected finite"):
            scorer.batch(seen, done)
        part[290, 1] = was
    scorer.batch(seen, done)


def test_a_reward_that_overflows_is_refused(model):
    if isinstance(model, DeepEnsemble) and not model.hidden:
        model = copy.deepcopy(model)  # a linear member's small weights may take it
        model.network.weights[-1].data *= 1e3
    scorer = model.frame_scorer()
    seen, done = frames(3)
    seen[1] = 3e38 * np.sign(seen[1])
    with pytest.raises(InvalidInput, match="overflows"):
        scorer(seen[1], done[1])
    with pytest.raises(InvalidInput, match="overflows"):
        scorer.batch(seen, done)


def test_shapes_and_types_are_checked(model):
    scorer = model.frame_scorer()
    seen, done = frames(3)
    for ask, name in (
        (lambda: scorer(seen, done), r"observation: expected shape \(4,\).*got \(3, 4\)"),
        (lambda: scorer(seen[0], done[0, :1]), r"action: expected shape \(2,\).*got \(1,\)"),
        (lambda: scorer(seen[0, :3], [*done[0], 0.0]), "observation: expected shape"),
        (lambda: scorer(seen[0], 0), r"action: expected shape \(2,\).*got \(\)"),
        (lambda: scorer(["a", "b", "c", "d"], done[0]), "observation: expected numbers"),
        (lambda: scorer.batch(seen[0], done[0]), r"observations: expected shape \(4, 4\)"),
        (lambda: scorer.batch(seen, done[:2]), r"actions: expected shape \(3, 2\)"),
        (lambda: scorer.batch(1.0, done), "observations: expected shape"),
    ):
        with pytest.raises(InvalidInput, match=name):
            ask()


def test_is_asked_after_a_fit():
    with pytest.raises(NotFitted, match="call fit first"):
        DeepEnsemble().frame_scorer()
