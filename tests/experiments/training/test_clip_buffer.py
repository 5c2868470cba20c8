"""Sampled clips are within one episode and uniform, against a plain log."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from experiments.training.clip_buffer import ClipBuffer
from rewardmodels import InvalidInput


def record(clip_buffer, steps, *, end_rate=0.15, seed=0, from_step=0):
    """Adds steps whose observation says which environment and step it is; returns the ends."""
    rng = np.random.default_rng(seed)
    ends = rng.random((steps, clip_buffer.n_envs)) < end_rate
    for i in range(steps):
        place = np.stack(
            [np.arange(clip_buffer.n_envs), np.full(clip_buffer.n_envs, from_step + i)], 1
        )
        clip_buffer.add(
            place.astype(np.float32), -place.astype(np.float32), 10.0 * place[:, 1], ends[i]
        )
    return ends


def places(ends, first, length):
    """Every `(env, step)` from `first` on at which `length` frames of one episode begin."""
    steps, envs = ends.shape
    return {
        (env, start)
        for env in range(envs)
        for start in range(first, steps - length + 1)
        if not any(ends[t, env] for t in range(start, start + length - 1))
    }


@pytest.mark.parametrize(("steps", "recent"), [(12, 0), (20, 0), (47, 0), (60, 0), (47, 9)])
def test_every_place_within_an_episode_is_cut_once(steps, recent):
    clip_buffer = ClipBuffer(capacity=20, n_envs=3)
    ends = record(clip_buffer, steps, seed=steps)
    first = max(0, steps - (recent or 20))
    clips = clip_buffer.sample(4, 10_000, np.random.default_rng(0), recent=recent)
    frames = clips.observations.long()
    assert (frames[:, :, 0] == frames[:, :1, 0]).all(), "one environment"
    assert (frames[:, :, 1] == frames[:, :1, 1] + torch.arange(4)).all(), "one step after the other"
    assert (clips.actions == -clips.observations).all()
    assert (clips.rewards == 10 * clips.observations[:, :, 1]).all()
    cut = [tuple(place) for place in frames[:, 0].tolist()]
    assert len(cut) == len(set(cut))
    assert set(cut) == places(ends, first, 4)


@pytest.mark.parametrize("steps", [0, 12, 47])
def test_current_actions_are_those_since_an_episode_ended(steps):
    clip_buffer = ClipBuffer(capacity=20, n_envs=3)
    ends = record(clip_buffer, steps, seed=steps)
    for env, actions in enumerate(clip_buffer.current_actions()):
        began = max((t + 1 for t in range(steps) if ends[t, env]), default=0)
        assert [-a[1] for a in actions] == list(range(max(began, steps - 20), steps))


def test_places_are_equally_likely():
    clip_buffer = ClipBuffer(capacity=20, n_envs=2)
    ends = record(clip_buffer, 33, seed=5)
    known = sorted(places(ends, 13, 3))
    rng, draws = np.random.default_rng(0), 2000
    counts = dict.fromkeys(known, 0)
    for _ in range(draws):
        clips = clip_buffer.sample(3, 4, rng)
        for place in clips.observations[:, 0].long().tolist():
            counts[tuple(place)] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_no_clip_crosses_a_reset():
    clip_buffer = ClipBuffer(capacity=30, n_envs=2)
    clip_buffer.end_episodes()  # a reset before the first step is nothing
    record(clip_buffer, 7, end_rate=0)
    clip_buffer.end_episodes()
    record(clip_buffer, 7, end_rate=0, from_step=7)
    starts = clip_buffer.sample(5, 100, np.random.default_rng(0)).observations[:, 0, 1]
    assert sorted(set(starts.tolist())) == [0, 1, 2, 7, 8, 9]


def test_a_saved_buffer_is_read_back(tmp_path):
    one = ClipBuffer(20, 3)
    record(one, 31)
    one.save(tmp_path / "clip_buffer.npz")
    two = ClipBuffer.load(tmp_path / "clip_buffer.npz")
    for each in one, two:
        record(each, 5, seed=1, from_step=31)
    one, two = (each.sample(3, 50, np.random.default_rng(1)) for each in (one, two))
    assert (one.observations == two.observations).all()
    assert (one.rewards == two.rewards).all()


def test_a_clip_that_is_too_long_is_refused():
    clip_buffer = ClipBuffer(20, 1)
    with pytest.raises(InvalidInput, match="the 0 steps recorded so far, got 3"):
        clip_buffer.sample(3, 1, np.random.default_rng(0))
    record(clip_buffer, 6, end_rate=1)
    with pytest.raises(InvalidInput, match="at most an episode's length, got 2"):
        clip_buffer.sample(2, 1, np.random.default_rng(0))
