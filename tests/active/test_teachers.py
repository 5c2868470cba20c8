"""Each way of erring against its formula, by exact cases and binomial intervals."""

import math

import pytest
import scipy.stats
import torch

from active import SyntheticTeacher
from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput


def clips_of(*rewards: list[float], dtype: torch.dtype = torch.float32) -> Clips:
    """Clips of these rewards, padded with what nobody may look at."""
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


def test_ties_survive_order_and_padding():
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
    felt = [sum(gamma ** (len(r) - t) * x for t, x in enumerate(r, 1)) for r in (first, second)]
    p = 1 / (1 + math.exp(-beta * (felt[1] - felt[0])))
    teacher = SyntheticTeacher(beta, myopia=gamma)
    assert_binomial(frequency(teacher, clips_of(first, second)), p)
    # Padding both far further changes nothing at all.
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
def test_mistakes_turn_the_answer_round(flip_rate):
    clips = clips_of([0.0], [1.0])
    teacher = SyntheticTeacher(flip_rate=flip_rate)
    assert_binomial(frequency(teacher, clips), 1 - flip_rate)
    # On top of a stochastic preference: P (1 - ε) + (1 - P) ε.
    p = 1 / (1 + math.exp(-2.0))
    both = SyntheticTeacher(2.0, flip_rate=flip_rate)
    assert_binomial(frequency(both, clips), p * (1 - flip_rate) + (1 - p) * flip_rate)


def test_a_mistake_of_ours_is_twice_the_likelihoods_rate():
    from rewardmodels.likelihood import preference_probability

    teacher = SyntheticTeacher(1.0, flip_rate=0.15)
    p = preference_probability(torch.tensor(0.8, dtype=torch.float64), random_answer_rate=0.3)
    assert_binomial(frequency(teacher, clips_of([0.0], [0.8])), float(p))


@pytest.mark.parametrize("threshold", [-2.5, 0.0, 2.0])
def test_skips_when_neither_clip_reaches_the_threshold(threshold):
    returns = [-4.0, -3.0, -2.5, -1.0, 0.0, 1.0, 2.0, 3.0]
    clips = clips_of(*[[0.25 * r, 0.75 * r] for r in returns])
    pairs = [(a, b) for a in range(8) for b in range(8) if a != b]
    answers = ask(SyntheticTeacher(skip_threshold=threshold), clips, *pairs)
    for answer, (a, b) in zip(answers, pairs, strict=True):
        if max(returns[a], returns[b]) < threshold:
            assert math.isnan(answer)
        else:
            assert answer == (returns[b] > returns[a])


def test_says_the_same_of_returns_that_are_close_and_mistakes_leave_that_alone():
    returns = [-3.0, -2.5, -1.0, 0.0, 0.25, 5.0]
    clips = clips_of(*[[r] for r in returns])
    pairs = [(a, b) for a in range(6) for b in range(6) if a != b]
    for rate in (0.0, 1.0):
        teacher = SyntheticTeacher(same_threshold=0.5, flip_rate=rate)
        for answer, (a, b) in zip(ask(teacher, clips, *pairs), pairs, strict=True):
            if abs(returns[a] - returns[b]) < 0.5:
                assert answer == 0.5
            else:
                assert answer == abs(rate - (returns[b] > returns[a]))


def test_thresholds_look_at_the_plain_return_and_skipping_comes_first():
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
def test_answers_by_hand_exact_and_as_published(settings, exact, published):
    pairs = ((0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3), (0, 4))
    for as_published, expected in ((False, exact), (True, published)):
        teacher = SyntheticTeacher(as_published=as_published, **settings)
        assert ask(teacher, clips_of(*FIVE), *pairs) == pytest.approx(expected, nan_ok=True)


def test_as_published_no_rationality_is_all_of_it_and_a_negative_threshold_ties_nothing():
    clips = clips_of(*FIVE)
    assert_binomial(frequency(SyntheticTeacher(rationality=0.0), clips), 0.5)
    teacher = SyntheticTeacher(rationality=0.0, same_threshold=-0.3, as_published=True)
    assert frequency(teacher, clips) == 0
    assert ask(teacher, clips, (0, 1), (1, 0), (3, 4)) == [0.0, 1.0, 0.0]
    # In between both toss the same coin.
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


def test_permuting_clips_leaves_answers_as_they_were():
    clips, pairs = many(), torch.combinations(torch.arange(20))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    before = noisy().answer(clips, pairs, torch.Generator().manual_seed(0))
    after = noisy().answer(clips[order], order.argsort()[pairs], torch.Generator().manual_seed(0))
    assert torch.equal(before.nan_to_num(-1), after.nan_to_num(-1))


def test_an_answer_does_not_depend_on_its_neighbours():
    clips, pairs = many(), torch.combinations(torch.arange(20))
    whole = noisy().answer(clips, pairs, torch.Generator().manual_seed(0))
    for n in (1, 7, 50):
        part = noisy().answer(clips, pairs[:n], torch.Generator().manual_seed(0))
        assert torch.equal(part.nan_to_num(-1), whole[:n].nan_to_num(-1))
    others = pairs.flip(0)
    others[3] = pairs[3]
    again = noisy().answer(clips, others, torch.Generator().manual_seed(0))
    assert torch.equal(again[3].nan_to_num(-1), whole[3].nan_to_num(-1))


def test_bad_input_is_refused_by_name():
    bad = {
        "rationality": (-1.0, math.nan),
        "myopia": (-0.1, 1.1, math.nan),
        "flip_rate": (-0.1, 1.1, math.nan),
        "skip_threshold": (math.inf, math.nan),
        "same_threshold": (-0.1, math.inf, math.nan),
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(InvalidInput, match=f"{name}: expected .* got {value}"):
                SyntheticTeacher(**{name: value})
    with pytest.raises(InvalidInput, match=r"same_threshold: .* got nan"):
        SyntheticTeacher(same_threshold=math.nan, as_published=True)
    without = Clips(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
    with pytest.raises(InvalidInput, match=r"clips.rewards: .*None"):
        SyntheticTeacher().answer(without, torch.tensor([[0, 1]]))
    with pytest.raises(InvalidInput, match="pairs: "):
        SyntheticTeacher().answer(many(), torch.tensor([[0, 20]]))
    assert SyntheticTeacher().answer(many(), torch.zeros(0, 2, dtype=torch.long)).shape == (0,)
