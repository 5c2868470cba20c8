"""The small world that checks are made in, and how they compare."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import RewardModelsError
from rewardmodels.fitting import fit
from rewardmodels.model import RewardModel
from rewardmodels.posterior import ReturnPosterior

MakeModel = Callable[[], RewardModel]

CLOSE = 1e-3  # of the answers' scale: sums in another order, never another answer
DRAWS = 8192
SIGMAS = 6  # standard errors between what is stated and what 8192 draws say
OBSERVATION, ACTION, FRAMES = 3, 2, 5
EPOCHS = 60


class CheckFailed(RewardModelsError, AssertionError):
    """A reward model doesn't keep a promise; says which, the numbers, and the usual cause."""


# The synthetic world: a reward that is linear in what is seen and done.


def clips_of_world(n: int, *, seed: int, scale: float = 1.0) -> Clips:
    draw = torch.Generator().manual_seed(seed)
    observations = scale * torch.randn(n, FRAMES, OBSERVATION, generator=draw)
    actions = scale * torch.randn(n, FRAMES, ACTION, generator=draw)
    rewards = observations[..., 0] - observations[..., 1] + actions[..., 0]
    return Clips(observations, actions, rewards=rewards)


def far_clips(n: int, *, seed: int) -> Clips:
    return clips_of_world(n, seed=seed, scale=10.0)


def world_comparisons() -> Comparisons:
    clips, draw = clips_of_world(80, seed=1), torch.Generator().manual_seed(2)
    first = torch.randint(80, (160,), generator=draw)
    second = (first + torch.randint(1, 80, (160,), generator=draw)) % 80
    likely = torch.sigmoid(clips.returns[second] - clips.returns[first])
    return Comparisons(
        clips, torch.stack([first, second], 1), torch.bernoulli(likely, generator=draw)
    )


@lru_cache(maxsize=4)
def fitted(make_model: MakeModel) -> RewardModel:
    return fit(make_model(), world_comparisons(), epochs=EPOCHS, batch_size=16)


def all_pairs_of(n: int) -> Tensor:
    return torch.combinations(torch.arange(n))


def draws_of(belief: ReturnPosterior) -> Tensor:
    return belief.rsample(DRAWS, torch.Generator().manual_seed(0))


def double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


def state_of(model: RewardModel) -> dict[str, bytes | bool]:
    # Bytes, since a NaN would differ from itself.
    state: dict[str, bytes | bool] = {
        name: double(value).numpy().tobytes() for name, value in model.state_dict().items()
    }
    for name, module in model.named_modules():
        state[f"training flag of {name or 'the model'}"] = module.training
    state["torch's global generator"] = torch.get_rng_state().numpy().tobytes()
    state["NumPy's global generator"] = pickle.dumps(np.random.get_state())  # noqa: NPY002
    state["Python's global generator"] = pickle.dumps(random.getstate())
    return state


# Comparing, and what is said when it fails.


def failed(promise: str, numbers: str, cause: str) -> CheckFailed:
    return CheckFailed(f"{promise}: {numbers}. Usual cause: {cause}.")


def expect_same(
    what: str, came: Tensor, expected: Tensor, cause: str, scale_of: Tensor | None = None
) -> None:
    came, expected = double(came), double(expected)
    if came.shape != expected.shape:
        shapes = f"shape {tuple(came.shape)}, expected {tuple(expected.shape)}"
        raise failed(what, shapes, cause)
    scale = float((expected if scale_of is None else double(scale_of)).abs().max())
    apart = (came - expected).abs()
    # Written so that NaN fails.
    if not bool((apart <= CLOSE * scale).all()):
        worst = int(apart.nan_to_num(nan=torch.inf).argmax())
        numbers = f"{float(came.flatten()[worst]):.6g}, expected "
        numbers += f"{float(expected.flatten()[worst]):.6g} within {CLOSE * scale:.2g}"
        raise failed(what, numbers, cause)


def expect_within(what: str, draws: Tensor, stated: Tensor, cause: str) -> None:
    draws, stated = double(draws), double(stated)
    if draws.shape[1:] != stated.shape:
        shapes = f"shape {tuple(stated.shape)}, expected {tuple(draws.shape[1:])}"
        raise failed(what, shapes, cause)
    mean = draws.mean(0)
    allowed = SIGMAS * draws.std(0) / len(draws) ** 0.5 + CLOSE * float(stated.abs().max())
    if not bool(((mean - stated).abs() <= allowed).all()):
        worst = int(((mean - stated).abs() / allowed).nan_to_num(nan=torch.inf).argmax())
        numbers = f"draws say {float(mean.flatten()[worst]):.4g} within "
        numbers += f"{float(allowed.flatten()[worst]):.2g}, stated is "
        numbers += f"{float(stated.flatten()[worst]):.4g}"
        raise failed(what, numbers, cause)
