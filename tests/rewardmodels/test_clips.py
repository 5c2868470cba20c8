"""Clips and cutting against counting by hand."""

import numpy as np
import pytest
import scipy.stats
import torch

from rewardmodels import Clips, Comparisons, InvalidInput, Marks, Ratings, cut
from rewardmodels.clips import ClipView


def ragged(*lengths: int, padding: float = float("nan")) -> Clips:
    """Clips whose observation is 100 x clip + frame, reward is 1 and padding is bad."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    frames = 100.0 * torch.arange(len(lengths))[:, None] + torch.arange(longest)
    frames = frames.masked_fill(~mask, padding)[..., None]
    rewards = torch.ones(len(lengths), longest).masked_fill(~mask, padding)
    return Clips(frames, frames.clone(), mask, rewards, frames.clone())


def test_every_place_is_equally_likely():
    trajectories = ragged(5, 3, 9, 2)
    n, length = 20_000, 3
    clips = cut(trajectories, length, n, generator=torch.Generator().manual_seed(3))
    starts, counts = np.unique(clips.observations[:, 0, 0].numpy(), return_counts=True)
    # 5 - 3 + 1, 3 - 3 + 1 and 9 - 3 + 1 places; the one that is too short is a place of its own.
    assert starts.tolist() == [0, 1, 2, 100, *range(200, 207), 300]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_a_cut_is_consecutive_frames_of_one_trajectory():
    clips = cut(ragged(8, 6), 4, 200, generator=torch.Generator().manual_seed(0))
    assert clips.mask.all()
    for part in (clips.observations, clips.actions, clips.states):
        assert (part[:, 1:, 0] - part[:, :-1, 0] == 1).all()
    assert (clips.returns == 4).all()


def test_too_short_a_trajectory_yields_its_whole_self():
    clips = cut(ragged(2, 6), 4, 300, generator=torch.Generator().manual_seed(0))
    short = clips.observations[:, 0, 0] < 100
    assert 0 < short.sum() < 300
    assert (clips.lengths == torch.where(short, 2, 4)).all()
    assert cut(ragged(2, 3), 10, 5).length == 3


def test_cut_depends_on_its_generator_alone():
    def draw() -> list[float]:
        clips = cut(ragged(50, 40), 3, 20, generator=torch.Generator().manual_seed(5))
        return clips.observations[:, 0, 0].tolist()

    first = draw()
    state = torch.get_rng_state()
    assert draw() == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("length", "n"), [(0, 3), (3, 0)])
def test_cut_refuses_nothing(length, n):
    with pytest.raises(InvalidInput, match="trajectories, length, n"):
        cut(ragged(5), length, n)
    with pytest.raises(InvalidInput, match="trajectories, length, n"):
        cut(ragged(5)[:0], 2, 2)


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 1e30])
def test_padding_is_never_looked_at(padding):
    clips = ragged(2, 5, 1, padding=padding)
    assert clips.lengths.tolist() == [2, 5, 1]
    assert clips.returns.tolist() == [2, 5, 1]
    assert (clips.observations[~clips.mask] == 0).all()


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (2, [2]),
        (-1, [3]),
        (np.int64(1), [1]),
        (torch.tensor(1), [1]),
        ((0, 1), [0, 1]),
        ([3, 3, 0], [3, 3, 0]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (slice(1, 3), [1, 2]),
        ([], []),
    ],
)
def test_any_index_keeps_the_first_axis(index, expected):
    some = ragged(2, 5, 1, 3)[index]
    assert some.observations.shape == (len(expected), 5, 1)
    assert some.observations[:, 0, 0].tolist() == [100 * i for i in expected]
    assert some.lengths.tolist() == [[2, 5, 1, 3][i] for i in expected]


def test_cat_pads_to_the_longest_and_needs_rewards_of_all():
    joined = Clips.cat([ragged(2, 1), ragged(4)])
    assert joined.lengths.tolist() == [2, 1, 4]
    assert joined.observations[:, 0, 0].tolist() == [0, 100, 0]
    assert joined.returns.tolist() == [2, 1, 4]
    plain = Clips(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1))
    assert Clips.cat([joined, plain]).rewards is None
    with pytest.raises(InvalidInput, match="task's own reward, got None"):
        _ = plain.returns
    with pytest.raises(InvalidInput, match=r"observations of one shape per frame.*\(1, 3, 2\)"):
        Clips.cat([plain, Clips(torch.zeros(1, 3, 2), torch.zeros(1, 3, 1))])
    with pytest.raises(InvalidInput, match="at least one"):
        Clips.cat([])


def bad(**changed: object) -> None:
    parts = {"observations": torch.zeros(3, 4, 2), "actions": torch.zeros(3, 4, 1), **changed}
    Clips(**parts)


def mask_without(clip: int) -> torch.Tensor:
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[clip] = False
    return mask


def with_nan(clip: int, frame: int, *shape: int) -> torch.Tensor:
    values = torch.zeros(3, 4, *shape)
    values[clip, frame] = float("nan")
    return values


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"observations": torch.zeros(3)}, r"observations: .*got \(3,\)"),
        ({"observations": torch.zeros(3, 0, 2)}, r"T of at least 1, got \(3, 0, 2\)"),
        ({"observations": "abc"}, r"observations: expected real numbers.*got dtype <U3"),
        ({"observations": [[0.0], [0.0, 1.0]]}, r"observations: .*lists of equal lengths, got"),
        ({"actions": torch.zeros(3, 4, 1) * 1j}, r"actions: expected real .*got torch.complex64"),
        ({"rewards": np.zeros((3, 4)) * 1j}, r"rewards: expected real .*got dtype complex128"),
        ({"actions": torch.zeros(3, 5, 1)}, r"actions: .*\(3, 4\).*got \(3, 5, 1\)"),
        ({"rewards": torch.zeros(3, 4, 1)}, r"rewards: .*\(3, 4\), got \(3, 4, 1\)"),
        ({"mask": torch.ones(3, 4)}, r"mask: expected dtype bool, got torch.float32"),
        ({"mask": torch.ones(3, 4, 2, dtype=torch.bool)}, r"mask: expected shape \(N, T\)"),
        ({"mask": mask_without(1)}, r"mask: .*clip 1 has none"),
        ({"observations": with_nan(2, 1, 2)}, r"observations: .*1 frame.*clip 2, frame 1"),
        ({"rewards": with_nan(0, 3)}, r"rewards: .*1 frame.*clip 0, frame 3"),
        ({"actions": torch.full((3, 4, 1), float("-inf"))}, r"actions: .*12 frame.*clip 0"),
    ],
)
def test_refuses_what_cannot_be_clips(changed, message):
    with pytest.raises(InvalidInput, match=message):
        bad(**changed)


# Comparisons.


def said(pairs: list[list[int]], preference: list[float], n: int = 4) -> Comparisons:
    clips = Clips(torch.arange(n * 2.0).view(n, 2, 1), torch.zeros(n, 2, 1))
    return Comparisons(clips, torch.tensor(pairs), torch.tensor(preference))


@pytest.mark.parametrize(
    ("pairs", "preference", "message"),
    [
        ([0, 1], [1.0], r"pairs: .*shape \(2,\)"),
        ([[0, 1, 2]], [1.0], r"pairs: .*shape \(1, 3\)"),
        ([[0.0, 0.5]], [1.0], r"pairs: expected integers.*float32"),
        ([[0.0, float("inf")]], [1.0], r"pairs: expected integers.*float32"),
        ([[0.0, float("nan")]], [1.0], r"pairs: expected integers.*float32"),
        ([[False, True]], [1.0], r"pairs: expected integers.*bool"),
        ([[0, 1]], [1.0, 0.0], r"preference: .*\(1,\).*got \(2,\)"),
        ([[0, 1], [2, 4]], [1.0, 0.0], r"pairs: .*0 to 3 \(4 clips\), got \[2, 4\] in row 1"),
        ([[0, 1], [-1, 2]], [1.0, 0.0], r"pairs: .*got \[-1, 2\] in row 1"),
        ([[3, 3]], [1.0], r"pairs: .*got \[3, 3\] in row 0"),
        ([[0, 1]], [1.5], r"preference: .*got 1.5 in row 0"),
        ([[0, 1], [1, 2]], [0.5, float("nan")], r"preference: .*leave skipped.*got nan in row 1"),
    ],
)
def test_refuses_what_cannot_be_comparisons(pairs, preference, message):
    with pytest.raises(InvalidInput, match=message):
        said(pairs, preference)


def test_other_things_than_clips_are_refused():
    for make in (Comparisons, Ratings):
        with pytest.raises(InvalidInput, match="clips: expected Clips, got Tensor"):
            make(torch.zeros(4, 2, 1), [[0, 1]], [1.0])
    with pytest.raises(InvalidInput, match="clips: expected Clips, got Tensor"):
        Marks(torch.zeros(4, 2, 1), [[0, 0, 0, 1]])


def meaning(comparisons: Comparisons) -> list[tuple[float, float, float]]:
    """Each comparison's two clips, by their contents, and its preference."""
    first, second = comparisons.clips.observations[comparisons.pairs, 0, 0].T
    return list(zip(first.tolist(), second.tolist(), comparisons.preference.tolist(), strict=True))


def test_compacting_joining_and_choosing_keep_what_was_given():
    a, b = said([[0, 3], [3, 1]], [1.0, 0.25]), said([[1, 0]], [0.5], n=2)
    assert meaning(a) == [(0, 6, 1), (6, 2, 0.25)]
    assert meaning(a.compact()) == meaning(a)
    assert len(a.compact().clips) == 3
    assert meaning(Comparisons.cat([a, b])) == meaning(a) + meaning(b)
    assert meaning(a[1]) == meaning(a[[1]]) == meaning(a[1:]) == meaning(a)[1:]
    assert len(a[[]]) == 0


def test_whole_numbers_do_as_preferences():
    whole = Comparisons(said([[0, 1]], [1.0]).clips, torch.tensor([[0, 1]]), torch.tensor([1]))
    assert whole.preference.dtype == torch.float32


def test_a_view_is_the_clips_it_names_and_nothing_is_copied_where_all_are_compared():
    clips, rows = ragged(3, 2, 4, 1), torch.tensor([2, 0])
    view, copy = ClipView(clips, rows), clips[rows]
    assert (len(view), view.length) == (2, 4)
    for name in ("observations", "actions", "mask", "rewards", "states", "lengths", "returns"):
        for some in (view, view[:], view.to("cpu")):
            assert torch.equal(getattr(some, name), getattr(copy, name))
    assert torch.equal(view[1].observations, clips[0].observations)
    assert ClipView(Clips(clips.observations, clips.actions), rows).rewards is None
    comparisons = Comparisons(clips, [[0, 1], [2, 3]], [0.0, 1.0])
    assert comparisons.compact().clips is comparisons.view().clips is clips
    assert meaning(comparisons[1].view()) == meaning(comparisons[1])
    assert comparisons[1].view().clips[:].observations.shape[0] == 2
