"""Synthetic clips and comparisons that several test files share."""

from collections.abc import Callable

import torch

from rewardmodels import Clips, Comparisons


def linear_clips(n: int = 60, seed: int = 0) -> Clips:
    """Clips of six frames whose reward is linear in observations and actions."""
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(n, 6, 3, generator=draw)
    actions = torch.randn(n, 6, 2, generator=draw)
    rewards = observations @ torch.tensor([1.0, -1.0, 0.0]) + actions[..., 1]
    return Clips(observations + 5, actions, rewards=rewards)


def of_neighbours(clips: Clips) -> Comparisons:
    """Error-free preferences between clips 0 and 1, 2 and 3, and so on."""
    pairs = torch.arange(len(clips) // 2 * 2).view(-1, 2)
    first, second = clips.returns[pairs].T
    return Comparisons(clips, pairs, (second > first).float())


def linear_comparisons(n: int, seed: int = 0) -> Comparisons:
    """Error-free preferences between n pairs of `linear_clips`."""
    return of_neighbours(linear_clips(2 * n, seed))


def one_input(
    n: int = 60,
    seed: int = 0,
    *,
    frames: int = 4,
    shift: float = 0.0,
    noisy: bool = False,
    ragged: bool = False,
    reward: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Comparisons:
    """Preferences between n pairs of clips whose reward depends on the first input only."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(2 * n, frames, dtype=torch.bool)
    if ragged:
        mask = torch.arange(frames) < torch.randint(1, frames + 1, (2 * n, 1), generator=draw)
    observations = torch.randn(2 * n, frames, 2, generator=draw) + shift
    clips = Clips(observations, torch.zeros(2 * n, frames, 1), mask, reward(observations[..., 0]))
    if not noisy:
        return of_neighbours(clips)
    pairs = torch.arange(2 * n).view(n, 2)
    p = torch.sigmoid(clips.returns[pairs].diff().squeeze(1))
    return Comparisons(clips, pairs, torch.bernoulli(p, generator=draw))


CLIPS = Clips(torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(20, 4))
COMPARISONS = Comparisons(CLIPS, torch.arange(20).view(10, 2), torch.tensor([1.0, 0.0]).repeat(5))
