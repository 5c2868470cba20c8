"""Features of steps: plain functions from arrays to the `(B, F)` that a detector sees.

A step is the observation before an action, the action, and the observation after it, of B
environments at once. As everywhere in the library, a frame is an action and the observation after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewardmodels import InvalidInput, RewardModel
from rewardmodels.errors import UnknownName

Array = NDArray[Any]
Features = Callable[[Array, Array, Array], Array]
"""From observations before `(B, *obs)`, actions `(B, *act)` and observations after to `(B, F)`."""


def observation(before: Array, action: Array, after: Array) -> Array:
    """Observation after the action, `(B, obs)`."""
    return after.reshape(len(after), -1)


def observation_action(before: Array, action: Array, after: Array) -> Array:
    """Frame as a reward model sees it, `(B, obs + act)`; a discrete action is one number."""
    return np.concatenate([after.reshape(len(after), -1), action.reshape(len(action), -1)], 1)


def transition(before: Array, action: Array, after: Array) -> Array:
    """Observation before, action and observation after, `(B, obs + act + obs)`.

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
"""Features that a guard knows by name."""


def hidden_layer(model: RewardModel) -> Features:
    """Make features of a predictor's last hidden layer, which knows what matters for reward.

    They are a snapshot: a later fit of the model doesn't change what a calibrated detector sees.

    Args:
        model: A fitted model with one network of features (`model.network.features`): LaplaceHead,
            MCDropout or Epinet. Members of an ensemble have no layer in common.

    Returns:
        A function to `(B, H)`.

    Raises:
        InvalidInput: A model that isn't fitted, or has no such network.

    Example:
        >>> from rewardmodels import Clips, Comparisons, MCDropout, fit
        >>> clips = Clips(torch.randn(4, 5, 2), torch.randn(4, 5, 1))
        >>> comparisons = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
        >>> features = hidden_layer(fit(MCDropout(hidden=(8, 4)), comparisons, epochs=1))
        >>> features(np.zeros((7, 2)), np.zeros((7, 1)), np.zeros((7, 2))).shape
        (7, 4)
    """
    if not model.fitted or not hasattr(getattr(model, "network", None), "features"):
        raise InvalidInput(
            "model: expected a fitted model with network.features, such as LaplaceHead, MCDropout "
            f"or Epinet, got {type(model).__name__}{'' if model.fitted else ', not fitted'}."
        )
    snapshot = copy.deepcopy(model).eval()

    @torch.no_grad()
    def features(before: Array, action: Array, after: Array) -> Array:
        observations = torch.as_tensor(after, dtype=torch.float32, device=snapshot.device)
        actions = torch.as_tensor(action, device=snapshot.device)
        actions = actions.float() if actions.is_floating_point() else actions
        inputs = snapshot.inputs(observations, actions)
        return snapshot.network.features(inputs).cpu().numpy()  # type: ignore[operator, union-attr]

    return features


def find_features(features: str | Features) -> Features:
    """Return the features of that name; a function is returned as it is.

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
    """Name each feature, for the reason of an alarm; None for a function of the caller's.

    Example:
        >>> feature_names("observation_action", 2, 1)
        ['observation[0]', 'observation[1]', 'action[0]']
    """
    after = [f"observation[{i}]" for i in range(observation_size)]
    action = [f"action[{i}]" for i in range(action_size)]
    before = [f"observation before[{i}]" for i in range(observation_size)]
    known: dict[Features, list[str]] = {
        observation: after,
        observation_action: after + action,
        transition: before + action + after,
    }
    return known.get(find_features(features))
