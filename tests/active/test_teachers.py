"""Errors of synthetic teachers and markers against formulas, searches and binomial intervals."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from active import FeedbackStore, HumanTeacher, Request, SyntheticMarker, SyntheticTeacher
from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import preference_probability


def clips_of(*rewards: list[float], dtype: torch.dtype = torch.float32) -> Clips:
    """Make clips of these rewards, with padding that must not be used."""
    longest = max(map(len, rewards))
    padded = [row + [1e6] * (longest - len(row)) for row in rewards]
    mask = torch.tensor([[t < len(row) for t in range(longest)] for row in rewards])
    zeros = torch.zeros(len(rewards), longest, 1)
    return Clips(zeros, zeros, mask, torch.tensor(padded, dtype=dtype))


def ask(teacher: SyntheticTeacher, clips: Clips, *pairs: tuple[int, int]) -> list[float]:
    return teacher.answer(clips, torch.tensor(pairs), torch.Generator().manual_seed(0)).tolist()


def frequency(teacher: SyntheticTeacher, clips: Clips, draws: int = 20_000) -> int:
    pairs = torch.tensor([[0, 1]]).expand(draws, 2)
    answers = teacher.answer(clips, pairs, torch.Generator().manual_seed(7))
    assert set(answers.tolist()) <= {0.0, 1.0}
    return int(answers.sum())


def assert_binomial(count: int, p: float, draws: int = 20_000) -> None:
    low, high = scipy.stats.binom.interval(1 - 1e-5, draws, p)
    assert low <= count <= high, (count / draws, p)


def test_a_rational_teacher_compares_returns_exactly():
    clips = clips_of([1.0, 2.0], [3.5], [-4.0, 1.0], [-3.0], [0.5, 0.5, 2.0])
    answers = ask(SyntheticTeacher(), clips, (0, 1), (1, 0), (2, 3), (2, 0), (0, 4))
    assert answers == [1.0, 0.0, 0.5, 1.0, 0.5]


def test_ties_are_exact_for_any_order_and_padding():
    # In floats 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ; correctly rounded they don't.
    clips = clips_of([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1] + [0.0] * 40,
                     dtype=torch.float64)  # fmt: skip
    assert ask(SyntheticTeacher(), clips, (0, 1), (1, 2), (0, 2)) == [0.5] * 3


@pytest.mark.parametrize("rationality", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_rationality_is_bradley_terry(rationality, shift):
    clips = clips_of([shift, 0.25], [shift, 0.75])
    expected = math.exp(0.75 * rationality)
    expected /= expected + math.exp(0.25 * rationality)
    assert_binomial(frequency(SyntheticTeacher(rationality), clips), expected)


def test_myopia_discounts_back_from_each_clips_own_end():
    gamma, beta = 0.8, 1.5
    first, second = [2.0, -1.0, 0.5], [1.0, 0.25]
    discounted = [
        sum(gamma ** (len(r) - t) * x for t, x in enumerate(r, 1)) for r in (first, second)
    ]
    p = 1 / (1 + math.exp(-beta * (discounted[1] - discounted[0])))
    teacher = SyntheticTeacher(beta, myopia=gamma)
    assert_binomial(frequency(teacher, clips_of(first, second)), p)
    # More padding changes nothing.
    longer = clips_of(first, second, [0.0] * 30)
    assert frequency(teacher, longer) == frequency(teacher, clips_of(first, second))


def test_the_extremes_of_myopia():
    clips = clips_of([9.0, 0.0], [0.0, 1.0])
    assert ask(SyntheticTeacher(myopia=1.0), clips, (0, 1)) == [0.0]
    assert ask(SyntheticTeacher(myopia=0.0), clips, (0, 1)) == [1.0]
    # 9 γ against 1: the preference turns at γ = 1/9.
    assert ask(SyntheticTeacher(myopia=0.112), clips, (0, 1)) == [0.0]
    assert ask(SyntheticTeacher(myopia=0.110), clips, (0, 1)) == [1.0]


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.5, 1.0])
def test_flips_have_their_rate(flip_rate):
    clips = clips_of([0.0], [1.0])
    teacher = SyntheticTeacher(flip_rate=flip_rate)
    assert_binomial(frequency(teacher, clips), 1 - flip_rate)
    # On top of a stochastic preference: P (1 - ε) + (1 - P) ε.
    p = 1 / (1 + math.exp(-2.0))
    both = SyntheticTeacher(2.0, flip_rate=flip_rate)
    assert_binomial(frequency(both, clips), p * (1 - flip_rate) + (1 - p) * flip_rate)


def test_a_flip_rate_is_half_the_random_answer_rate_of_the_likelihood():
    teacher = SyntheticTeacher(1.0, flip_rate=0.15)
    p = preference_probability(torch.tensor(0.8, dtype=torch.float64), random_answer_rate=0.3)
    assert_binomial(frequency(teacher, clips_of([0.0], [0.8])), float(p))


def test_thresholds_apply_to_the_plain_return_and_skipping_is_first():
    clips = clips_of([9.0, 0.0], [8.0, 1.0])
    # Discounted returns are 0 and 1; plain ones 9 and 9.
    teacher = SyntheticTeacher(myopia=0.0, skip_threshold=5.0)
    assert ask(teacher, clips, (0, 1)) == [1.0]
    assert ask(SyntheticTeacher(myopia=0.0, same_threshold=0.5), clips, (0, 1)) == [0.5]
    (answer,) = ask(SyntheticTeacher(skip_threshold=10.0, same_threshold=0.5), clips, (0, 1))
    assert math.isnan(answer)


# Five clips with returns 6, 4, 4, -2 and -6, of different lengths, one of a single frame.
FIVE = ([1.0, 2.0, 3.0], [4.0], [2.0, 1.0, 1.0, 0.0], [-3.0, 1.0], [-1.0, -2.0, -3.0])
NAN = math.nan


@pytest.mark.parametrize(
    ("settings", "exact", "published"),
    [
        # Pairs:      0-1  1-0  1-2  2-1  3-4  4-3  0-4
        ({}, (0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)),
        ({"flip_rate": 1.0},
         (1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 1.0), (1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0)),
        ({"skip_threshold": 4.0},  # at 4 itself only the public code skips
         (0.0, 1.0, 0.5, 0.5, NAN, NAN, 0.0), (0.0, 1.0, NAN, NAN, NAN, NAN, 0.0)),
        ({"skip_threshold": -1.0},  # returns of -2 and -6 are below: it should have been skipped
         (0.0, 1.0, 0.5, 0.5, NAN, NAN, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)),
        ({"skip_threshold": 0.0},
         (0.0, 1.0, 0.5, 0.5, NAN, NAN, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)),
        ({"same_threshold": 2.5, "flip_rate": 1.0},
         (0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 1.0), (0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 1.0)),
        ({"same_threshold": 2.0},  # at 2 itself both prefer; an exact tie is closer than that
         (0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 0.0), (0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 0.0)),
        # With half the weight a frame back, returns are 4.75, 4, 1, -0.5 and -4.25.
        ({"myopia": 0.5}, (0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0)),
        ({"myopia": 0.5, "same_threshold": 0.5},  # which looks at plain returns: 4 and 4
         (0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 0.0), (0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 0.0)),
    ],
)  # fmt: skip
def test_comparisons_by_hand_exact_and_as_published(settings, exact, published):
    pairs = ((0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3), (0, 4))
    for as_published, expected in ((False, exact), (True, published)):
        teacher = SyntheticTeacher(as_published=as_published, **settings)
        assert ask(teacher, clips_of(*FIVE), *pairs) == pytest.approx(expected, nan_ok=True)


def test_as_published_zero_rationality_is_rational_and_negative_thresholds_are_never_met():
    clips = clips_of(*FIVE)
    assert_binomial(frequency(SyntheticTeacher(rationality=0.0), clips), 0.5)
    teacher = SyntheticTeacher(rationality=0.0, same_threshold=-0.3, as_published=True)
    assert frequency(teacher, clips) == 0
    assert ask(teacher, clips, (0, 1), (1, 0), (3, 4)) == [0.0, 1.0, 0.0]
    # Between the extremes both have the same probability.
    p = 1 / (1 + math.exp(0.2 * 2))
    for as_published in (False, True):
        assert_binomial(frequency(SyntheticTeacher(0.2, as_published=as_published), clips), p)


def noisy() -> SyntheticTeacher:
    return SyntheticTeacher(0.5, 0.9, 0.1, skip_threshold=-3.0, same_threshold=0.3)


def many() -> Clips:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(20, 12, generator=generator)
    mask = torch.arange(12) < torch.randint(1, 13, (20, 1), generator=generator)
    return Clips(torch.zeros(20, 12, 1), torch.zeros(20, 12, 1), mask, rewards)


def test_a_comparison_depends_on_its_clips_and_its_place_alone():
    clips, pairs = many(), torch.combinations(torch.arange(20))

    def compare(clips: Clips, pairs: torch.Tensor) -> torch.Tensor:
        return noisy().answer(clips, pairs, torch.Generator().manual_seed(0)).nan_to_num(-1)

    whole = compare(clips, pairs)
    for n in (1, 7, 50):
        assert torch.equal(compare(clips, pairs[:n]), whole[:n])
    others = pairs.flip(0)
    others[3] = pairs[3]
    assert compare(clips, others)[3] == whole[3]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(compare(clips[order], order.argsort()[pairs]), whole)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kind, settings in {
            SyntheticTeacher: {
                "rationality": (-1.0, math.nan),
                "myopia": (-0.1, 1.1, math.nan),
                "flip_rate": (-0.1, 1.1, math.nan),
                "skip_threshold": (math.inf, math.nan),
                "same_threshold": (-0.1, math.inf, math.nan),
                "marks": (-1, 3),
            },
            HumanTeacher: {"patience": (-0.1, 1.1, math.nan)},
            SyntheticMarker: {"length": (0,), "stands_out": (-1.0, math.inf), "flip_rate": (2,)},
        }.items()
        for name, values in settings.items()
        for value in values
    ],
)
def test_bad_settings_are_refused_by_name(kind, name, value):
    with pytest.raises(InvalidInput, match=f"{name}: "):
        kind(**{name: value})


def test_bad_input_is_refused_by_name():
    with pytest.raises(InvalidInput, match="same_threshold: "):
        SyntheticTeacher(same_threshold=math.nan, as_published=True)
    without, pair = Clips(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)), torch.tensor([[0, 1]])
    with pytest.raises(InvalidInput, match=r"clips\.rewards: "):
        SyntheticTeacher().answer(without, pair)
    with pytest.raises(InvalidInput, match=r"clips\.rewards: "):
        SyntheticMarker().mark(without)
    with pytest.raises(InvalidInput, match="pairs: "):
        SyntheticTeacher().answer(many(), 20 * pair)
    assert SyntheticTeacher().answer(many(), pair[:0]).shape == (0,)


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
@pytest.mark.parametrize("stands_out", [0.0, 1.0])
def test_the_best_and_the_worst_part_are_marked_above_the_threshold(shorter, stands_out):
    clips = drawn(shorter=shorter)
    marks = SyntheticMarker(4, stands_out).mark(clips)
    threshold = stands_out * np.std(clips.rewards[clips.mask].double().numpy(), ddof=1)
    assert marks.rows.tolist() == searched(clips, 4, threshold)
    assert 0 < len(marks) <= 40


def test_clips_no_longer_than_a_part_are_not_marked():
    assert len(SyntheticMarker(12).mark(drawn())) == 0
    assert len(SyntheticMarker(13).mark(drawn())) == 0


def test_flipped_marks_have_their_rate_and_are_reproducible():
    clips, teacher = drawn(1000), SyntheticMarker(3, 0.0, flip_rate=0.2)
    right = SyntheticMarker(3, 0.0).mark(clips).rows
    flipped = teacher.mark(clips, torch.Generator().manual_seed(1)).rows
    assert torch.equal(flipped[:, :3], right[:, :3])
    wrong = int((flipped[:, 3] != right[:, 3]).sum())
    assert scipy.stats.binomtest(wrong, 2000, 0.2).pvalue > 0.001
    assert torch.equal(teacher.mark(clips, torch.Generator().manual_seed(1)).rows, flipped)
    fewer = teacher.mark(clips[:100], torch.Generator().manual_seed(1)).rows
    assert torch.equal(fewer, flipped[:200])


@pytest.mark.parametrize("marks", [0, 1, 2])
def test_a_teacher_marks_so_many_clips_of_each_pair_once(marks, tmp_path, monkeypatch):
    clips, pairs = drawn(length=25), torch.tensor([[4, 0], [2, 7], [9, 4]])
    real, answers = FeedbackStore.answer, []

    def interrupted(self, *args):
        answers.append(args)
        if len(answers) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(FeedbackStore, "answer", interrupted)
    with FeedbackStore(tmp_path / "answers.sqlite") as store:
        ids = store.add_queries(clips, pairs, round=0)
        request, teacher = Request(store, 0, 3, propose=len), SyntheticTeacher(marks=marks)
        with pytest.raises(KeyboardInterrupt):
            teacher.collect(request)
        teacher.collect(request)
        assert store.counts().answered == 3
        given = {row[1:5] for row in store.marks.rows()}
        assert len(given) == len(store.marks.rows())
        shown = [clip for id in ids for clip in store.shown(id)]
    place = dict(zip(shown, pairs.flatten().tolist(), strict=True))
    seen = clips[pairs.unique()].rewards.double()
    wanted = searched(clips, 5, 0.5 * float(seen.std()))
    marked = set(pairs[:, :marks].flatten().tolist())
    assert {(place[clip], *rest) for clip, *rest in given} == {
        tuple(row) for row in wanted if row[0] in marked
    }
