"""Minari data sets: pools written as such, and any data set read as a pool.

[Minari](https://minari.farama.org) is Farama's format for recorded behaviour, and needs the extra
`rewardmodels[minari]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.datasets.pools import Pool, make_pool
from experiments.envs.tasks import find_task, make_env
from rewardmodels import Clips, InvalidInput, UnreadableFile
from rewardmodels.saving import atomic_path

_MINARI = "minari:"


def export_pool(
    task: str,
    steps: int = 300_000,
    seed: int = 0,
    levels: int = 10,
    episodes: int = 8,
    pools: Path = Path("runs/pools"),
    out: Path | None = None,
) -> Path:
    """Train an agent, record it at every stage of its training, and write a Minari data set.

    Args:
        task: A task's name, or a Gymnasium id with a time limit.
        steps: Environment steps to train for.
        seed: Of everything that is drawn at random.
        levels: Stages at which the agent is recorded, from untrained to trained.
        episodes: Whole episodes recorded at each.
        pools: Where pools are kept; one that is there isn't made again.
        out: The data set's directory, which mustn't exist; None is Minari's own folder, from which
            `minari.load_dataset` takes it by its name.

    Returns:
        The data set's directory.

    Raises:
        InvalidInput: A number out of range, Minari isn't installed, or `out` exists.
        UnknownName: No such task.
    """
    _need_minari()
    find_task(task)
    if out is None:
        from minari.storage import get_dataset_path

        out = Path(get_dataset_path(f"rewardmodels/{_name(task, steps, seed)}-v0"))
    _need_room(out)
    pool = make_pool(task, steps=steps, seed=seed, levels=levels, episodes=episodes, folder=pools)
    write_minari(pool, out, name=_name(task, steps, seed))
    print(f"{len(pool.trajectories)} episodes of {levels} skills: {out}")
    return out


def write_minari(pool: Pool, out: Path, *, name: str) -> None:
    """Write a pool as a Minari data set, whole or not at all.

    In Minari an episode of T actions has T + 1 observations; a pool's frames are an action and the
    observation it led to. So the first frame's observation starts the episode and its action is
    left out. `infos["state"]` is the simulator's at each observation that an action followed. An
    episode's metadata has its `skill`, and `policy_steps`, for which its policy was trained.

    Args:
        pool: Of any task whose environment is there.
        out: Directory, which mustn't exist.
        name: The data set's, without a namespace and a version.

    Raises:
        InvalidInput: Minari isn't installed, or `out` exists.
    """
    _need_minari()
    _need_room(out)
    from minari import __version__
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    clips = pool.trajectories
    assert clips.rewards is not None  # or there were no pool
    out = out.absolute()  # Minari joins a relative path to itself
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as part:
        part.mkdir()
        task = find_task(pool.task)
        with make_env(task) as env:
            spec = deepcopy(env.unwrapped.spec)
            assert spec is not None  # `find_task` knows only what is registered
            spec.max_episode_steps = task.horizon  # which an unwrapped one doesn't tell
            spaces = env.observation_space, env.action_space
            storage = MinariStorage.new(part / "data", *spaces, spec, jpeg_encoding=False)
        storage.update_metadata(
            {
                "dataset_id": f"rewardmodels/{name}-v0",
                "minari_version": __version__,
                "algorithm_name": "PPO",
                "description": "Episodes of one agent at several stages of its training.",
                "rewardmodels_task": pool.task,
                "rewardmodels_seed": pool.seed,
            }
        )
        buffers, about = [], []
        for i, length in enumerate(clips.lengths.tolist()):
            states = None if clips.states is None else clips.states[i, 1:length].numpy()
            buffers.append(
                EpisodeBuffer(
                    observations=clips.observations[i, :length].numpy(),
                    actions=clips.actions[i, 1:length].numpy(),
                    rewards=clips.rewards[i, 1:length].numpy(),
                    terminations=np.zeros(length - 1, bool),
                    truncations=np.arange(1, length) == length - 1,
                    infos=None if states is None else {"state": states},
                )
            )
            skill = int(pool.skill[i])
            about.append({"skill": skill, "policy_steps": int(pool.steps[skill])})
        storage.update_episodes(buffers)
        storage.update_episode_metadata(about)


def pool_from_minari(name_or_path: str | Path, *, levels: int = 10) -> Pool:
    """Read any Minari data set with rewards as a pool.

    A frame is an action, its reward and the observation it led to. Where no skill was recorded,
    skill k of L holds the episodes whose return is in the k-th L-quantile: another meaning, as
    then no skill's returns overlap another's.

    Args:
        name_or_path: A data set that Minari has on this machine, or its directory.
        levels: L where no skill was recorded, or as many as there are episodes, if fewer.

    Returns:
        The pool; its `steps` are -1 and its `seed` 0 where they weren't recorded, and its `task` is
        then the environment's Gymnasium id or the data set's name.

    Raises:
        InvalidInput: Minari isn't installed, no such data set, no rewards to tell good from bad
            by, observations that aren't numbers, or fewer than one level.
        UnreadableFile: A damaged data set.
    """
    _need_minari()
    if levels < 1:
        raise InvalidInput(f"levels: expected at least 1, got {levels}.")
    data = _open(name_or_path)
    clips = _clips(data, name_or_path, rewarded=True)
    try:
        known = data.storage.metadata
        about = list(data.storage.get_episode_metadata(data.episode_indices))
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise _damaged(name_or_path, error) from error
    if clips.rewards is None or not clips.rewards.any():
        raise InvalidInput(
            f"name_or_path: expected a data set with rewards, got {name_or_path}, where all are 0. "
            "A synthetic teacher compares by them: take one that was recorded with the task's own."
        )
    if all("skill" in one for one in about):
        skill = torch.tensor([int(one["skill"]) for one in about])
        trained = {int(one["skill"]): int(one.get("policy_steps", -1)) for one in about}
        steps = torch.tensor([trained[k] for k in sorted(trained)])
    else:
        rank = clips.returns.argsort(stable=True).argsort()
        skill = rank * min(levels, len(clips)) // len(clips)
        steps = torch.full((int(skill.max()) + 1,), -1)
    recorded_in = data.env_spec.id if data.env_spec else data.spec.dataset_id
    task = known.get("rewardmodels_task", recorded_in)
    return Pool(task, int(known.get("rewardmodels_seed", 0)), clips, skill, steps)


def episodes_from_minari(name_or_path: str | Path) -> Clips:
    """Read the whole episodes of any Minari data set, without their rewards.

    Arguments and errors are those of `pool_from_minari`; a name may start with `minari:`.
    """
    _need_minari()
    name_or_path = str(name_or_path).removeprefix(_MINARI)
    return _clips(_open(name_or_path), name_or_path, rewarded=False)


def find_pool(task: str, folder: Path, *, progress: bool = True, **made: int) -> Pool:
    """Return a Minari data set (`minari:NAME` or path) as a pool, or a task's, made if need be.

    Arguments and errors are those of `pool_from_minari`, or of `make_pool`.
    """
    if is_minari(task):
        return pool_from_minari(task.removeprefix(_MINARI))
    return make_pool(task, folder=folder, progress=progress, **made)


def is_minari(task: str) -> bool:
    """Return True for a Minari data set, `minari:NAME` or `minari:PATH`."""
    return task.startswith(_MINARI)


def _open(name_or_path: str | Path) -> Any:
    from minari import MinariDataset, load_dataset

    path = Path(name_or_path).absolute()
    try:
        if path.is_dir():
            return MinariDataset(path / "data" if (path / "data").is_dir() else path)
        return load_dataset(str(name_or_path))
    except FileNotFoundError as error:
        raise InvalidInput(
            f"name_or_path: expected a directory or the name of a data set on this machine, got "
            f"{str(name_or_path)!r}. `minari download` fetches one, `minari list local` lists them."
        ) from error
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise UnreadableFile(
            f"{name_or_path}: expected a Minari data set, got one that can't be read ({error!r})."
        ) from error


def _clips(data: Any, name_or_path: str | Path, *, rewarded: bool) -> Clips:
    try:
        episodes = [_clip(episode, rewarded) for episode in data]
    except (OSError, KeyError, ValueError, AssertionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise _damaged(name_or_path, error) from error
    if not episodes:
        raise InvalidInput(f"name_or_path: expected episodes, got none in {name_or_path}.")
    return Clips.cat(episodes)


def _damaged(name_or_path: str | Path, error: Exception) -> UnreadableFile:
    return UnreadableFile(
        f"{name_or_path}: expected a whole Minari data set, got a damaged one ({error!r})."
    )


def _clip(episode: Any, rewarded: bool) -> Clips:
    """Convert an episode to a clip of its whole length."""
    length = len(episode.actions)
    rewards = np.asarray(episode.rewards, np.float32) if rewarded else None
    if rewards is not None and not (rewards.shape == (length,) and np.isfinite(rewards).all()):
        raise InvalidInput(
            f"name_or_path: expected a reward for each of {length} actions of episode {episode.id},"
            " got none or NaN. A synthetic teacher compares by them: take a data set with rewards."
        )
    states = (episode.infos or {}).get("state")
    return Clips(
        _tensor(episode.observations)[None, 1 : length + 1],
        _tensor(episode.actions)[None],
        rewards=None if rewards is None else torch.from_numpy(rewards)[None],
        states=None if states is None else _tensor(states)[None, :length],
    )


def _tensor(values: Any) -> Tensor:
    """Return `(T, *shape)`; dictionaries are concatenated in their order."""
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if isinstance(values, tuple):
        return torch.cat([_tensor(part).flatten(1).float() for part in values], 1)
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InvalidInput(
            f"name_or_path: expected observations and actions of numbers, got {array.dtype}."
        )
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def _name(task: str, steps: int, seed: int) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in task)
    return f"{plain}-{steps}-steps-seed-{seed}"


def _need_minari() -> None:
    if find_spec("minari") is None:
        raise InvalidInput(
            "minari: expected it to be installed, got none; pip install 'rewardmodels[minari]' "
            "brings it."
        )


def _need_room(out: Path) -> None:
    if out.exists():
        raise InvalidInput(f"out: expected a directory that doesn't exist yet, got {out}.")
