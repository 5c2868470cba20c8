"""Ring buffer of the latest frames of parallel environments, from which clips are sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rewardmodels import Clips, InvalidInput

_COLUMNS = ("observations", "actions", "rewards", "ends", "states")


class ClipBuffer:
    """The last `capacity` steps of `n_envs` parallel environments.

    Args:
        capacity: Steps kept of each environment; older ones are overwritten.
        n_envs: Environments.
    """

    def __init__(self, capacity: int, n_envs: int) -> None:
        self.capacity, self.n_envs = capacity, n_envs
        self.steps = 0
        self._columns: dict[str, NDArray[np.generic]] = {}

    def add(
        self,
        observations: NDArray[np.floating],
        actions: NDArray[np.floating | np.integer],
        rewards: NDArray[np.floating],
        ends: NDArray[np.bool_],
        states: NDArray[np.floating] | None = None,
    ) -> None:
        """Add one step of every environment.

        Args:
            observations: `(n_envs, *obs)`, after the action.
            actions: `(n_envs, *act)`, or `(n_envs,)` whole numbers.
            rewards: `(n_envs,)`, the task's own, for synthetic teachers and evaluation.
            ends: `(n_envs,)`, True where the episode ended with this step.
            states: `(n_envs, s)`, simulator states before the action.
        """
        row = self.steps % self.capacity
        for name, value in zip(
            _COLUMNS, (observations, actions, rewards, ends, states), strict=True
        ):
            if value is None:
                continue
            if name not in self._columns:
                first = np.asarray(value)
                dtype = np.float32 if first.dtype.kind == "f" else first.dtype
                self._columns[name] = np.zeros((self.capacity, *first.shape), dtype)
            self._columns[name][row] = value
        self.steps += 1

    def end_episodes(self) -> None:
        """Mark the last step as the end of every episode, as at a reset."""
        if self.steps:
            self._columns["ends"][(self.steps - 1) % self.capacity] = True

    def current_actions(self) -> list[NDArray[np.generic]]:
        """Actions of each environment since its current episode began, `(T, *act)` each."""
        kept = min(self.steps, self.capacity)
        order = (self.steps - kept + np.arange(kept)) % self.capacity
        if not kept:
            return [np.empty(0)] * self.n_envs
        # Counted from the newest step back; all that is kept where no episode ended.
        lengths = np.cumsum(self._columns["ends"][order][::-1], 0) == 0
        actions = self._columns["actions"][order]
        return [actions[kept - n :, i] for i, n in enumerate(lengths.sum(0))]

    def sample(self, length: int, n: int, rng: np.random.Generator, *, recent: int = 0) -> Clips:
        """Sample n clips without replacement, uniformly from all places within an episode.

        Returns fewer clips where there are fewer places.

        Args:
            length: Frames per clip.
            n: Clips wanted.
            rng: Source of randomness.
            recent: Only from the last so many steps of each environment; 0 for all kept.

        Raises:
            InvalidInput: No episode has `length` frames in a row.
        """
        kept = min(self.steps, self.capacity, recent or self.capacity)
        order = (self.steps - kept + np.arange(kept)) % self.capacity
        starts = kept - length + 1
        if starts < 1:
            raise InvalidInput(
                f"length: expected at most the {kept} steps recorded so far, got {length}."
            )
        ends = self._columns["ends"][order].astype(np.int32)
        ended = np.concatenate([np.zeros((1, self.n_envs), np.int32), ends.cumsum(0)])
        within = ended[length - 1 : length - 1 + starts] == ended[:starts]
        start, env = np.nonzero(within)
        if len(start) == 0:
            raise InvalidInput(f"length: expected at most an episode's length, got {length}.")
        chosen = rng.choice(len(start), min(n, len(start)), replace=False)
        rows = order[start[chosen, None] + np.arange(length)]
        columns = {
            name: torch.from_numpy(column[rows, env[chosen, None]])
            for name, column in self._columns.items()
            if name != "ends"
        }
        return Clips(**columns)

    def save(self, path: Path) -> None:
        """Write the buffer to an `.npz` file."""
        np.savez(path, allow_pickle=False, steps=self.steps, **self._columns)

    @classmethod
    def load(cls, path: Path) -> ClipBuffer:
        """Read a saved buffer."""
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        buffer = cls(*columns["ends"].shape)
        buffer.steps = int(columns.pop("steps"))
        buffer._columns = columns
        return buffer
