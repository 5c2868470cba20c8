"""Pools: recorded episodes of an agent at every stage of its training.

A run of `learn` takes minutes, most of them spent on the policy. What a strategy, a predictor or a
detector does with a fixed set of clips takes seconds, so a pool is made once for a task and a
seed, kept in a file, and read by every cell of a study.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from experiments.envs.rollout import play_agent
from experiments.envs.tasks import Task, find_task
from experiments.envs.vector import MAX_SEED
from experiments.training.agents import PPO_ROLLOUT, ppo_on_own_reward, progress_bar, train_until
from experiments.training.run_directory import versions
from rewardmodels import Clips, InvalidInput, UnreadableFile
from rewardmodels.clips import cut
from rewardmodels.fitting import isolated_randomness
from rewardmodels.saving import atomic_path

FORMAT = 1
_COLUMNS = ("observations", "actions", "rewards", "states")


@dataclass(frozen=True, eq=False)
class Pool:
    """Whole episodes of one agent at several stages of its training.

    Each stage is a skill, numbered from worst to best by the mean true return of its episodes.
    Mostly that is the order of training, and skill 0 the untrained policy; but a return needn't
    grow with training, and `steps` says where it didn't. An episode's return may well lie among
    those of another skill.

    Args:
        task: Its name, for `find_task`.
        seed: Of the agent and its environments.
        trajectories: N whole episodes with the task's own rewards and, where there are any,
            simulator states. A frame is an action and the observation it led to, not normalised.
        skill: `(N,)` long, which policy played the episode; every one of 0 to L − 1 occurs.
        steps: `(L,)` long, environment steps for which the policy of each skill was trained.

    Raises:
        InvalidInput: Trajectories without rewards, or skills that don't fit them or `steps`.

    Example:
        >>> frames = torch.zeros(6, 100, 3), torch.zeros(6, 100, 1)
        >>> episodes = Clips(*frames, rewards=torch.ones(6, 100))
        >>> skill, steps = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 2048, 4096])
        >>> pool = Pool("Hopper", 0, episodes, skill, steps)
        >>> clips = pool.clips(8, 25, torch.Generator().manual_seed(0), skills=range(1, 3))
        >>> clips.observations.shape
        torch.Size([8, 25, 3])
    """

    task: str
    seed: int
    trajectories: Clips
    skill: Tensor
    steps: Tensor

    def __post_init__(self) -> None:
        _ = self.returns  # raises where there are no rewards
        if self.skill.dtype != torch.long or self.skill.shape != (len(self.trajectories),):
            raise InvalidInput(
                f"skill: expected a long for each of {len(self.trajectories)} trajectories, got "
                f"{self.skill.dtype} of shape {tuple(self.skill.shape)}."
            )
        if self.skill.unique().tolist() != list(range(len(self.steps))):
            raise InvalidInput(
                f"skill: expected every number from 0 to {len(self.steps) - 1}, one for each of "
                f"steps, got {self.skill.unique().tolist()}."
            )

    @property
    def returns(self) -> Tensor:
        """True returns of the episodes, `(N,)`, reward units."""
        return self.trajectories.returns

    def half(self, which: int) -> Pool:
        """Return the first half of each skill's episodes (0), or the second (1)."""
        of_skill = [(self.skill == k).nonzero().squeeze(1) for k in range(len(self.steps))]
        rows = torch.cat([rows.tensor_split(2)[which] for rows in of_skill])
        return replace(self, trajectories=self.trajectories[rows], skill=self.skill[rows])

    def clips(
        self, n: int, length: int, generator: torch.Generator, *,
        skills: slice | Sequence[int] | None = None,
    ) -> Clips:  # fmt: skip
        """Cut n clips, equally many from each skill (up to one), in random order.

        Within a skill every place is equally likely, and draws are with replacement, so clips may
        overlap: to judge on behaviour that nobody labelled, take other skills.

        Args:
            n: Clips.
            length: Frames per clip.
            generator: Source of randomness, on the CPU.
            skills: From which, e.g. `range(0, 4)` for the four worst, `slice(-3, None)` for the
                three best; None takes all.

        Raises:
            InvalidInput: Fewer than one clip, frames that no episode has, or skills that the pool
                doesn't have.
        """
        every = range(len(self.steps))
        skills = slice(None) if skills is None else skills
        chosen = sorted(set(every[skills] if isinstance(skills, slice) else skills))
        if not chosen or not set(chosen) <= set(every):
            raise InvalidInput(f"skills: expected some of 0 to {len(every) - 1}, got {chosen}.")
        if n < 1:
            raise InvalidInput(f"n: expected at least 1 clip, got {n}.")
        if not 1 <= length <= self.trajectories.length:
            raise InvalidInput(
                f"length: expected 1 to {self.trajectories.length} frames, an episode's length, "
                f"got {length}."
            )
        # Where n isn't a multiple, chance says which skills have one more.
        turn = torch.randperm(len(chosen), generator=generator).tolist()
        parts = [
            cut(self.trajectories[self.skill == chosen[k]], length, share, generator=generator)
            for place, k in enumerate(turn)
            if (share := len(range(place, n, len(turn))))
        ]
        return Clips.cat(parts)[torch.randperm(n, generator=generator)]


def make_pool(
    task: str,
    *,
    seed: int = 0,
    steps: int = 300_000,
    levels: int = 10,
    episodes: int = 8,
    folder: Path = Path("runs/pools"),
    progress: bool = True,
) -> Pool:
    """Train PPO on the task's own reward and record it on the way, or read the pool's file.

    The policy plays as it explores (actions drawn, not their mean), in environments of its own. It
    learns the same whatever `levels` and `episodes` are, and the same again from the same seed on
    the same machine. The caller's global generators and number of threads stay as they are.

    Processes that make the same pool at once don't disturb each other, but each trains: make it
    before a study fans out. The file's header says which versions made it.

    Args:
        task: A task's name, or a Gymnasium id with a time limit.
        seed: Of everything that is drawn at random.
        steps: Environment steps to train for.
        levels: Policies, at evenly spaced steps from 0 (untrained) to `steps`, each rounded up to
            whole updates of 2,048 steps.
        episodes: Whole episodes recorded of each.
        folder: Where pools are kept; made if need be.
        progress: Show a progress bar on standard error.

    Raises:
        InvalidInput: A number out of range, a task without a time limit, or a folder that can't be
            written to.
        UnknownName: No such task.
        UnreadableFile: The pool's file is damaged.

    Example:
        >>> make_pool("Pendulum", steps=100)
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: steps: expected at least 18,432 for 10 levels, ...
    """
    found = find_task(task)
    for what, value, least in (("levels", levels, 2), ("episodes", episodes, 1)):
        if value < least:
            raise InvalidInput(f"{what}: expected at least {least}, got {value}.")
    if not 0 <= seed <= MAX_SEED:
        raise InvalidInput(f"seed: expected 0 to {MAX_SEED:,}, got {seed}.")
    if steps < (least := (levels - 1) * PPO_ROLLOUT):
        raise InvalidInput(
            f"steps: expected at least {least:,} for {levels} levels, since the policy changes "
            f"once in {PPO_ROLLOUT:,} steps, got {steps:,}. Train for longer, or take fewer levels."
        )
    name = f"{task.replace('/', '_')}-{steps}-steps-{levels}x{episodes}-seed-{seed}.v{FORMAT}"
    path = Path(folder) / f"{name}.safetensors"
    if path.exists():
        return _read(path, task, seed)
    _make_folder(path.parent)
    with progress_bar(steps, show=progress) as bar:
        recorded, trained_for = _record(found, seed, steps, levels, episodes, bar)
    best_last = torch.stack([clips.returns.mean() for clips in recorded]).argsort(stable=True)
    clips = Clips.cat([recorded[level] for level in best_last])
    skill = torch.arange(levels).repeat_interleave(episodes)
    pool = Pool(task, seed, clips, skill, torch.tensor(trained_for)[best_last])
    _write(pool, path)
    return pool


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it can't be written to")
    except OSError as error:
        raise InvalidInput(
            f"folder: expected a directory to write to, or room for one, got {folder}: {error}."
        ) from error


def _record(
    task: Task, seed: int, steps: int, levels: int, episodes: int, bar: tqdm
) -> tuple[list[Clips], list[int]]:
    """Return episodes of each level in the order of training, and its training steps."""
    recorded: list[Clips] = []
    trained_for: list[int] = []
    with ppo_on_own_reward(task, seed) as (agent, normalised):
        for level in range(levels):
            train_until(agent, steps * level // (levels - 1), bar)
            step = agent.num_timesteps
            own_seed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0] % MAX_SEED)
            # What is drawn here mustn't change what is learned next.
            with isolated_randomness(own_seed):
                clips = play_agent(agent, normalised, task, episodes=episodes, seed=own_seed)
            recorded.append(clips)
            trained_for.append(step)
            bar.set_postfix_str(f"level {level + 1}/{levels}, return {clips.returns.mean():.0f}")
    return recorded, trained_for


def _write(pool: Pool, path: Path) -> None:
    clips = pool.trajectories
    tensors = {name: getattr(clips, name) for name in _COLUMNS}
    tensors |= {"skill": pool.skill, "steps": pool.steps}
    present = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    with atomic_path(path) as temporary:
        save_file(present, temporary, {"versions": json.dumps(versions())})


def _read(path: Path, task: str, seed: int) -> Pool:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        skill, steps = tensors.pop("skill"), tensors.pop("steps")
        return Pool(task, seed, Clips(**tensors), skill, steps)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UnreadableFile(
            f"{path}: expected a pool that make_pool wrote, got a damaged file ({error!r}). "
            "Delete it, and make_pool makes it anew."
        ) from error
