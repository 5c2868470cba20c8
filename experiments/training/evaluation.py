"""What a trained policy is worth by the task's own reward, and what it looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from experiments.envs.rendering import RenderingUnavailable, render_states
from experiments.envs.tasks import Task
from experiments.envs.vector import make_vec_env
from experiments.envs.video import write_video
from rewardmodels import Clips, RewardModel

_FRAMES_A_SECOND = 25


def play(
    agent: BaseAlgorithm,
    normalised: VecNormalize,
    task: Task,
    *,
    episodes: int,
    seed: int,
) -> Clips:
    """Plays whole episodes, all at once.

    Args:
        agent: Who acts.
        normalised: Holds the statistics by which the agent's inputs were normalised.
        task: The task.
        episodes: How many.
        seed: Of the first states; the actions' comes with the caller's.

    Returns:
        `episodes` clips with the task's own reward and, where there are any, simulator states.
    """
    venv = make_vec_env(task, episodes, seed)
    seen: Any = venv.reset()
    frames = []
    for step in range(task.horizon):
        if getattr(agent, "use_sde", False) and step % agent.sde_sample_freq == 0:
            policy: Any = agent.policy
            policy.reset_noise(episodes)  # which `predict` leaves alone
        action, _ = agent.predict(normalised.normalize_obs(seen))  # explores, as in training
        states = venv.states()
        seen, rewards, ends, infos = venv.step(action)
        led_to = np.stack([i["terminal_observation"] for i in infos]) if ends.all() else seen
        frames.append((led_to, action, rewards, states))
    venv.close()
    observations, actions, rewards, states = zip(*frames, strict=True)
    return Clips(
        _stack(observations),
        _stack(actions),
        rewards=_stack(rewards),
        states=None if states[0] is None else _stack(states),
    )


def counted(task: Task, clips: Clips) -> dict[str, Any]:
    """What a task counts besides returns, in each whole episode and on average in 1,000 steps.

    Example:
        >>> from experiments.envs.tasks import find_task
        >>> counted(find_task("backflip"), Clips(torch.zeros(2, 500, 11), torch.zeros(2, 500, 3)))
        {'backflips': [0, 0], 'backflips_per_1000_steps': 0.0}
    """
    found: dict[str, Any] = {}
    for name, count in task.counts.items():
        found[name] = [count(episode) for episode in clips.observations.numpy()]
        found[f"{name}_per_1000_steps"] = 1000 * sum(found[name]) / clips.mask.numel()
    return found


def show(task: Task, clips: Clips, path: Path, *, frames: int = 200) -> str | None:
    """Writes a video of the first clip; where that can't be done, returns the reason instead."""
    if clips.states is None:
        return f"{task.name} doesn't show the simulator's state, from which a video is drawn."
    try:
        pictures = render_states(task, clips.states[0, :frames].numpy())
    except RenderingUnavailable as error:
        return str(error)
    write_video(pictures, path, _FRAMES_A_SECOND)
    return None


def write_frames(model: RewardModel, clips: Clips, path: Path, *, frames: int = 4096) -> float:
    """Writes predicted and true reward of frames that the policy visits.

    Returns:
        The correlation of predicted with true reward over these frames.
    """
    rows = torch.linspace(0, clips.mask.numel() - 1, frames).long()
    observations, actions = (x.flatten(0, 1)[rows] for x in (clips.observations, clips.actions))
    belief = model.frame_posterior(observations, actions)
    assert clips.rewards is not None
    true = clips.rewards.flatten()[rows]
    np.savez(path, predicted=belief.mean, std=belief.variance.sqrt(), true=true)
    return float(torch.corrcoef(torch.stack([belief.mean, true]))[0, 1])


def _stack(steps: tuple[np.ndarray, ...]) -> torch.Tensor:
    stacked = torch.from_numpy(np.stack(steps, 1))
    return stacked.float() if stacked.is_floating_point() else stacked
