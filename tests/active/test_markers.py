"""A synthetic person marks what a search through all stretches finds."""

import math

import pytest
import torch
from scipy import stats

from active import SyntheticMarker
from rewardmodels import Clips, InvalidInput


def drawn(n: int = 20, length: int = 12, shorter: int = 0) -> Clips:
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(n, length, generator=draw)
    mask = torch.ones(n, length, dtype=torch.bool)
    mask[: n // 2, length - shorter :] = False
    return Clips(torch.zeros(n, length, 1), torch.zeros(n, length, 1), mask, rewards)


def searched(clips: Clips, length: int, threshold: float) -> list[list[int]]:
    rows = []
    for clip, (rewards, real) in enumerate(zip(clips.rewards.tolist(), clips.lengths, strict=True)):
        rewards = rewards[: int(real)]
        for good, sign in ((1, 1), (0, -1)):
            gaps = []
            for start in range(len(rewards) - length + 1):
                inside = rewards[start : start + length]
                rest = rewards[:start] + rewards[start + length :]
                if rest:
                    gaps.append(sign * (sum(inside) / length - sum(rest) / len(rest)))
            # A clip's total being fixed, the highest sum has the widest gap, too.
            if gaps and max(gaps) >= threshold:
                start = gaps.index(max(gaps))
                rows.append([clip, start, start + length - 1, good])
    return rows


@pytest.mark.parametrize("shorter", [0, 3, 8, 9])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_best_and_the_worst_stretch_are_marked_if_they_stand_out(shorter, threshold):
    clips = drawn(shorter=shorter)
    marks = SyntheticMarker(4, threshold).mark(clips)
    assert marks.rows.tolist() == searched(clips, 4, threshold)
    assert 0 < len(marks) <= 40


def test_clips_no_longer_than_a_stretch_are_left_alone():
    assert len(SyntheticMarker(12).mark(drawn())) == 0
    assert len(SyntheticMarker(13).mark(drawn())) == 0


def test_mistakes_are_as_many_as_said_and_come_again():
    clips, person = drawn(1000), SyntheticMarker(3, flip_rate=0.2)
    right = SyntheticMarker(3).mark(clips).rows
    said = person.mark(clips, torch.Generator().manual_seed(1)).rows
    assert torch.equal(said[:, :3], right[:, :3])
    wrong = int((said[:, 3] != right[:, 3]).sum())
    assert stats.binomtest(wrong, 2000, 0.2).pvalue > 0.001
    assert torch.equal(person.mark(clips, torch.Generator().manual_seed(1)).rows, said)
    fewer = person.mark(clips[:100], torch.Generator().manual_seed(1)).rows
    assert torch.equal(fewer, said[:200])


def test_what_cannot_be_is_refused():
    for settings in (
        {"length": 0},
        {"threshold": -1.0},
        {"threshold": math.inf},
        {"flip_rate": 2},
    ):
        with pytest.raises(InvalidInput, match=f"{next(iter(settings))}: expected"):
            SyntheticMarker(**settings)
    with pytest.raises(InvalidInput, match=r"clips\.rewards"):
        SyntheticMarker().mark(Clips(torch.zeros(1, 9, 1), torch.zeros(1, 9, 1)))
