"""Marks and ratings as comparisons, and learning from them."""

import math

import pytest
import torch

from rewardmodels import (
    Clips,
    Comparisons,
    DeepEnsemble,
    FitOptions,
    InvalidInput,
    LaplaceHead,
    Marks,
    Ratings,
    fit,
)
from rewardmodels.fitting import TrainingSet

from .data import of_neighbours

WORTH = torch.tensor([1.0, -2.0])  # of a frame's inputs


def drawn(n: int = 8, length: int = 12, seed: int = 0) -> Clips:
    draw = torch.Generator().manual_seed(seed)
    frames = torch.randn(n, length, 2, generator=draw)
    return Clips(frames, torch.zeros(n, length, 1), rewards=frames @ WORTH)


def best_and_worst(clips: Clips, length: int = 3) -> Marks:
    """The best stretch of each clip marked good, the worst bad."""
    windows = clips.rewards.unfold(1, length, 1).sum(2)
    rows = [
        [clip, start, start + length - 1, good]
        for clip, of in enumerate(windows)
        for good, start in ((1, int(of.argmax())), (0, int(of.argmin())))
    ]
    return Marks(clips, torch.tensor(rows))


def test_a_mark_sets_the_mean_of_the_stretch_against_that_of_the_rest():
    clips = drawn()
    halves = torch.tensor([[0, 0, 5, 1], [3, 6, 11, 0], [5, 2, 7, 1]])
    said = Marks(clips, halves).comparisons()
    first, second = said.clips.returns[said.pairs].T
    for row, (clip, start, end, _) in enumerate(halves.tolist()):
        rewards = clips.rewards[clip].tolist()
        inside, rest = rewards[start : end + 1], rewards[:start] + rewards[end + 1 :]
        expected = 12 * (sum(inside) / 6 - sum(rest) / 6)
        assert float(second[row] - first[row]) == pytest.approx(expected, rel=1e-4)
    assert said.preference.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("first", "last"), [(0, 0), (0, 4), (3, 7), (10, 11), (11, 11), (1, 11), (0, 10)]
)
def test_frames_count_as_evenly_as_can_be(first, last):
    number = torch.arange(12.0).reshape(1, 12, 1)
    said = Marks(Clips(number, number), torch.tensor([[0, first, last, 1]])).comparisons()
    rest, stretch = said.clips.observations.squeeze(2).long()
    inside = set(range(first, last + 1))
    for shown, frames in ((stretch, inside), (rest, set(range(12)) - inside)):
        counts = torch.bincount(shown, minlength=12)
        assert set(counts.nonzero().squeeze(1).tolist()) == frames
        few = math.floor(12 / len(frames))
        assert all(few <= counts[f] <= few + (12 % len(frames) > 0) for f in frames)


def test_a_padded_clip_says_what_it_says_alone():
    clips = drawn(2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    padded = Clips(clips.observations, clips.actions, mask, clips.rewards)
    alone = Clips(clips.observations[1:, :7], clips.actions[1:, :7], rewards=clips.rewards[1:, :7])
    among = Marks(padded, torch.tensor([[0, 2, 5, 1], [1, 4, 6, 0]])).comparisons()
    single = Marks(alone, torch.tensor([[0, 4, 6, 0]])).comparisons()
    assert among.clips.lengths.tolist() == [12, 7, 12, 7]
    torch.testing.assert_close(
        among.clips.returns[among.pairs[1]], single.clips.returns[single.pairs[0]]
    )


def test_a_constant_added_to_every_frame_changes_nothing():
    clips = drawn()
    more = Clips(clips.observations, clips.actions, rewards=clips.rewards + 100)
    rows = torch.tensor([[0, 0, 4, 1], [1, 5, 5, 0], [2, 1, 11, 1]])
    for one, other in zip(*(Marks(of, rows).comparisons().clips.returns.view(2, 3).T
                            for of in (clips, more)), strict=True):  # fmt: skip
        assert float(one.diff()) == pytest.approx(float(other.diff()), abs=1e-3)


def test_a_mark_of_a_whole_clip_is_passed_over():
    clips = drawn()
    marks = Marks(clips, torch.tensor([[0, 0, 11, 1], [1, 0, 10, 1], [2, 0, 11, 0]]))
    assert marks.compared_rows().tolist() == [1]
    assert len(marks.comparisons()) == 1
    assert len(marks[:1].comparisons()) == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.tensor([[0, 1, 2]]), "expected integers of shape"),
        (torch.tensor([[0.5, 1, 2, 1]]), "got torch.float32"),
        (torch.tensor([[0, 1, 2, 1], [8, 1, 2, 1]]), "clips from 0 to 7 .* got 8 in row 1"),
        (torch.tensor([[0, 3, 2, 1]]), r"first frame <= last frame .*got \[3, 2, 11\] in row 0"),
        (torch.tensor([[0, -1, 2, 1]]), r"0 <= first frame .*got \[-1, 2, 11\]"),
        (torch.tensor([[0, 1, 12, 1]]), r"<= last frame of the clip, got \[1, 12, 11\]"),
        (torch.tensor([[0, 1, 2, 2]]), "1 for good or 0 for bad, got 2"),
    ],
)
def test_marks_that_cannot_be_are_refused(rows, said):
    with pytest.raises(InvalidInput, match=said):
        Marks(drawn(), rows)


def test_a_rating_is_set_beside_the_last_that_differs_of_the_same_person():
    which, rating = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([0.5, 0.9, 0.5, 0.5, 0.5, 0.1])
    raters = torch.tensor([7, 7, 3, 7, 7, 3])
    said = Ratings(drawn(), which, rating, raters).comparisons()
    # By hand: 7 says 0.5, 0.9, 0.5, 0.5 of clips 0, 1, 3, 4, and 3 says 0.5, 0.1 of 2, 5.
    assert said.pairs.tolist() == [[0, 1], [1, 3], [1, 4], [2, 5]]
    assert said.preference.tolist() == [1, 0, 0, 0]


def test_the_last_rating_of_a_clip_is_meant():
    said = Ratings(drawn(), torch.tensor([0, 1, 0]), torch.tensor([0.1, 0.5, 0.9]))
    assert said.comparisons().pairs.tolist() == [[1, 0]]
    assert said.comparisons().preference.tolist() == [1]
    assert said.compared_rows().tolist() == [2]


def test_ratings_all_alike_say_nothing():
    said = Ratings(drawn(), torch.tensor([0, 1, 2]), torch.ones(3)).comparisons()
    assert said.pairs.shape == (0, 2)


@pytest.mark.parametrize(
    ("which", "rating", "said"),
    [
        (torch.tensor([0.5]), torch.ones(1), "which: expected integers"),
        (torch.tensor([0, 1]), torch.ones(3), "rating: expected shape"),
        (torch.tensor([0, 9]), torch.ones(2), "got 9 in row 1"),
        (torch.tensor([0]), torch.tensor([math.nan]), "rating: expected finite numbers, got nan"),
    ],
)
def test_ratings_that_cannot_be_are_refused(which, rating, said):
    with pytest.raises(InvalidInput, match=said):
        Ratings(drawn(), which, rating)


@pytest.mark.parametrize("cls", [LaplaceHead, DeepEnsemble])
def test_a_reward_is_learned_from_marks_alone(cls):
    model = fit(cls(hidden=(16,), learning_rate=1e-2), marks=best_and_worst(drawn(40)), epochs=30)
    fresh = drawn(100, seed=1)
    frames = fresh.observations.flatten(0, 1)
    believed = model.frame_posterior(frames, torch.zeros(len(frames), 1)).mean
    true = fresh.rewards.flatten()
    assert float(torch.corrcoef(torch.stack([believed, true]))[0, 1]) > 0.85


def some(n: int = 60) -> Comparisons:
    return of_neighbours(drawn(2 * n, seed=3))


def gathered(comparisons: Comparisons | None, marks: Marks, ratings: Ratings) -> TrainingSet:
    return TrainingSet.gather(comparisons, marks, ratings, FitOptions(held_out=0.3), seed=1)


def test_marks_of_a_clip_are_held_out_together_and_stay_so():
    clips = drawn(40)
    marks = best_and_worst(clips)
    ratings = Ratings(clips, torch.arange(40), clips.returns)
    few, more = gathered(some(20), marks, ratings), gathered(some(60), marks, ratings)
    alone = gathered(None, marks, ratings)
    for answers, before in ((few, 20), (more, 60), (alone, 0)):
        of_marks = answers.held_out[before : before + 80].view(40, 2)
        assert torch.equal(of_marks[:, 0], of_marks[:, 1])
        assert torch.equal(answers.held_out[before:], alone.held_out)
        assert torch.equal(answers.index[before:], alone.index)
    assert torch.equal(more.held_out[:20], few.held_out[:20])
    assert 0 < int(alone.held_out[:80].sum()) < 80


def test_all_kinds_go_into_one_fit():
    clips = drawn(30)
    model = LaplaceHead(hidden=(8,))
    ratings = Ratings(clips, torch.arange(30), clips.returns)
    fit(model, some(), marks=best_and_worst(clips), ratings=ratings, epochs=3)
    everything = gathered(some(), best_and_worst(clips), ratings)
    assert len(everything.comparisons) == 60 + 60 + 29
    report = model.fit_report
    assert report is not None
    assert report.held_out > 5


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(InvalidInput, match="got none"):
        fit(LaplaceHead())
    whole = Marks(drawn(), torch.tensor([[0, 0, 11, 1], [1, 0, 11, 1]]))
    with pytest.raises(InvalidInput, match="at least 2"):
        fit(LaplaceHead(), marks=whole)
    with pytest.raises(InvalidInput, match="groups: expected None"):
        fit(LaplaceHead(), marks=best_and_worst(drawn()), options=FitOptions(groups=[0]))
    other = Marks(Clips(torch.zeros(1, 5, 9), torch.zeros(1, 5, 1)), torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(InvalidInput, match="observations of one shape"):
        fit(LaplaceHead(), some(), marks=other)
