"""What a detector sees of a step: plain functions from arrays to `(B, F)` features.

A step is the observation before an action, the action, and the observation it led to, of B
environments at once. As everywhere in the library, a frame is an action and the observation that
it led to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewardmodels import Clips, InvalidInput, RewardModel
from rewardmodels.errors import UnknownName

Array = NDArray[Any]
Features = Callable[[Array, Array, Array], Array]
"""From observations before `(B, *obs)`, actions `(B, *act)` and observations after to `(B, F)`."""


def observation(before: Array, action: Array, after: Array) -> Array:
    """`(B, obs)`: the observation that the action led to.

    Example:
        >>> observation(np.zeros((2, 3)), np.zeros((2, 1)), np.ones((2, 3))).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    return after.reshape(len(after), -1)


def observation_action(before: Array, action: Array, after: Array) -> Array:
    """`(B, obs + act)`: a frame, as a reward model sees it; a discrete action is one number.

    Example:
        >>> observation_action(np.zeros((2, 3)), np.zeros((2, 1)), np.ones((2, 3))).shape
        (2, 4)
    """
    return np.concatenate([after.reshape(len(after), -1), action.reshape(len(action), -1)], 1)


def transition(before: Array, action: Array, after: Array) -> Array:
    """`(B, obs + act + obs)`: what was, what was done, and what came of it.

    Example:
        >>> transition(np.zeros((2, 3)), np.zeros((2, 1)), np.ones((2, 3))).shape
        (2, 7)
    """
    if not before.ndim == action.ndim == after.ndim == 2:
        before, action, after = (x.reshape(len(x), -1) for x in (before, action, after))
    return np.concatenate((before, action, after), 1)


FEATURES: dict[str, Features] = {
    f.__name__: f for f in (observation, observation_action, transition)
}
"""Those that a guard knows by name."""


def hidden(model: RewardModel) -> Features:
    """A function to `(B, H)`: a predictor's last hidden layer, which knows what matters for reward.

    It is a snapshot: a later fit of the model doesn't change what a calibrated detector is shown.

    Args:
        model: A fitted model with one network of features (`model.network.features`): LaplaceHead,
            MCDropout or Epinet. Members of an ensemble have one each, and none in common.

    Raises:
        InvalidInput: A model that isn't fitted, or has no such network.

    Example:
        >>> from rewardmodels import Comparisons, MCDropout, fit
        >>> clips = Clips(torch.randn(4, 5, 2), torch.randn(4, 5, 1))
        >>> said = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
        >>> see = hidden(fit(MCDropout(hidden=(8, 4)), said, epochs=1))
        >>> see(np.zeros((7, 2)), np.zeros((7, 1)), np.zeros((7, 2))).shape
        (7, 4)
    """
    if not model.fitted or not hasattr(getattr(model, "network", None), "features"):
        raise InvalidInput(
            "model: expected a fitted model with network.features, such as LaplaceHead, MCDropout "
            f"or Epinet, got {type(model).__name__}{'' if model.fitted else ', not fitted'}."
        )

    snapshot = copy.deepcopy(model).eval()

    @torch.no_grad()
    def see(before: Array, action: Array, after: Array) -> Array:
        seen = torch.as_tensor(after, dtype=torch.float32, device=snapshot.device)
        done = torch.as_tensor(action, device=snapshot.device)
        done = done.float() if done.is_floating_point() else done
        inputs = snapshot.inputs(seen, done)
        features: Array = snapshot.network.features(inputs).cpu().numpy()  # type: ignore[operator, union-attr]
        return features

    return see


def find_features(features: str | Features) -> Features:
    """Finds features by their name; a function is returned as it is.

    Raises:
        UnknownName: None of that name.
    """
    if callable(features):
        return features
    if features not in FEATURES:
        raise UnknownName("features", features, FEATURES)
    return FEATURES[features]


def feature_names(
    features: str | Features, observation_size: int, action_size: int
) -> list[str] | None:
    """What each feature is called, for words in a report; None where a function is one's own.

    Example:
        >>> feature_names("observation_action", 2, 1)
        ['observation[0]', 'observation[1]', 'action[0]']
    """
    now = [f"observation[{i}]" for i in range(observation_size)]
    done = [f"action[{i}]" for i in range(action_size)]
    before = [f"observation before[{i}]" for i in range(observation_size)]
    known: dict[Features, list[str]] = {
        observation: now,
        observation_action: now + done,
        transition: before + done + now,
    }
    return known.get(find_features(features))


def of_trajectories(trajectories: Clips, features: str | Features) -> list[Tensor]:
    """Features of each trajectory's steps, to fit a detector to.

    A trajectory's first frame, whose observation before isn't recorded, is left out. A threshold
    wants whole episodes, as a guard sees them: those of `ood.record_episodes`.

    Args:
        trajectories: N trajectories of T frames, each an action and the observation it led to.
        features: A name or a function.

    Returns:
        N tensors `(T - 1, F)`, as long as each trajectory is.

    Raises:
        UnknownName: None of that name.
        InvalidInput: A trajectory of one frame.

    Example:
        >>> clips = Clips(torch.zeros(2, 10, 3), torch.zeros(2, 10, 1))
        >>> [len(x) for x in of_trajectories(clips, "transition")]
        [9, 9]
    """
    see, found = find_features(features), []
    lengths = trajectories.lengths.tolist()
    if lengths and min(lengths) < 2:
        raise InvalidInput("trajectories: expected at least two frames in each, got one of one.")
    for i, length in enumerate(lengths):
        seen = trajectories.observations[i, :length].numpy()
        done = trajectories.actions[i, 1:length].numpy()
        found.append(torch.from_numpy(see(seen[:-1], done, seen[1:])))
    return found


def of_clips(features: Tensor, mask: Tensor) -> Tensor:
    """`(N, 2 F)` features of whole clips: mean and standard deviation of their frames'.

    Args:
        features: `(N, T, F)`.
        mask: `(N, T)` bool, True for real frames.

    Raises:
        InvalidInput: Shapes that don't agree.

    Example:
        >>> of_clips(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[2., 1.]])
    """
    if features.ndim != 3 or features.shape[:2] != mask.shape:
        raise InvalidInput(
            "features, mask: expected shapes (N, T, F) and (N, T), got "
            f"{tuple(features.shape)} and {tuple(mask.shape)}."
        )
    real = mask[..., None]
    count = real.sum(1).clamp_min(1)
    mean = features.masked_fill(~real, 0).sum(1) / count
    apart = (features - mean[:, None]).masked_fill(~real, 0)
    return torch.cat([mean, (apart.square().sum(1) / count).sqrt()], 1)
