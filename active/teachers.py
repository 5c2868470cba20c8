"""Synthetic teachers: answers from the task's own reward, with the ways in which people err."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from active.pairs import check_pairs
from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput

SKIPPED: Final = math.nan


class Annotator(ABC):  # noqa: B024
    """Whoever says which of two clips is better, at once (a `Teacher`) or in their own time."""


class Teacher(Annotator):
    """An annotator who answers at once."""

    @abstractmethod
    def answer(
        self, clips: Clips, pairs: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Answers every pair.

        Args:
            clips: The N clips.
            pairs: `(Q, 2)` integers, indices into clips.
            generator: Source of the teacher's randomness.

        Returns:
            `(Q,)`: 0 the first is better, 1 the second, 0.5 "the same", NaN skipped.

        Raises:
            InvalidInput: Wrong shapes, an index out of range, or clips that lack what the
                teacher judges by.
        """


@final
class SyntheticTeacher(Teacher):
    r"""A teacher who judges by the task's reward, and errs in the ways that B-Pref lists.

    For returns $R = \sum_t r_t$ and discounted returns $G = \sum_t \gamma^{H-t} r_t$ over a
    clip's H real frames (Lee et al. 2021, arXiv 2111.03026, §3 and Algorithm 1), in this order:

    1. *skip* if $\max(R_1, R_2) < d_\text{skip}$: neither shows anything worth judging;
    2. *the same* if $|R_1 - R_2| < d_\text{same}$;
    3. else prefer the second with probability $\sigma(\beta\,(G_2 - G_1))$;
    4. and with probability $\epsilon$ say the opposite of that.

    Both thresholds look at the plain return, as in the paper: a short memory changes which clip
    is preferred, not whether there is anything to see. A mistake turns a preference round, so
    it never touches "the same" or a skip.

    A mistake rate here is the paper's, the chance of the opposite answer. `mistake_rate` in
    `rewardmodels.likelihood` is the chance of a random answer, half of which are right: a model
    of this teacher has twice the rate.

    Sums are correctly rounded, so a clip's return doesn't depend on how far it was padded, and
    clips that tie exactly are seen to tie. Returns may be of either sign, and clips of any length.

    B-Pref's public code (rll-research/BPref, `get_label` in `reward_model.py`) answers otherwise
    at the edges; `as_published` does as it does, for comparisons with printed numbers:

    - a skip needs $\max(R_1, R_2) \le d_\text{skip}$, and a threshold that isn't positive skips
      nothing: where returns are negative, teachers who skip don't;
    - a rational teacher prefers the *first* of two clips that tie exactly, and errs about it;
    - a rationality of 0 (there: of 0 or below, -1 by default) is a rational teacher's;
    - a threshold for "the same" may be negative, and is then never met.

    What that code sets the thresholds to is `published_threshold`.

    Args:
        rationality: $\beta$, at least 0, per reward unit; infinity always prefers the higher
            discounted return and calls an exact tie "the same", 0 tosses a coin.
        myopia: $\gamma$ from 0 to 1, weight lost with each frame back from the clip's last: 1
            remembers all frames alike, 0 only the last.
        mistake_rate: $\epsilon$ from 0 to 1, probability of the opposite answer.
        skip_threshold: $d_\text{skip}$, reward units; None never skips.
        same_threshold: $d_\text{same}$, at least 0, reward units; None never says "the same",
            save of an exact tie at infinite rationality.
        as_published: Answer as B-Pref's public code does.

    Raises:
        InvalidInput: A value outside its range.

    Example:
        >>> clips = Clips(torch.zeros(3, 2, 1), torch.zeros(3, 2, 1),
        ...               rewards=torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.5]]))
        >>> SyntheticTeacher().answer(clips, torch.tensor([[0, 1], [1, 0], [0, 2]]))
        tensor([1.0000, 0.0000, 0.5000])
        >>> SyntheticTeacher(myopia=0.1).answer(clips, torch.tensor([[0, 1]]))
        tensor([0.])
    """

    def __init__(
        self,
        rationality: float = math.inf,
        myopia: float = 1.0,
        mistake_rate: float = 0.0,
        skip_threshold: float | None = None,
        same_threshold: float | None = None,
        as_published: bool = False,
    ) -> None:
        _require("rationality", rationality >= 0, "a number, at least 0", rationality)
        _require("myopia", 0 <= myopia <= 1, "a discount from 0 to 1", myopia)
        _require("mistake_rate", 0 <= mistake_rate <= 1, "a probability", mistake_rate)
        skip = 0.0 if skip_threshold is None else skip_threshold
        same = 0.0 if same_threshold is None else same_threshold
        _require("skip_threshold", math.isfinite(skip), "a finite number or None", skip)
        least = -math.inf if as_published else 0.0
        right = math.isfinite(same) and same >= least
        _require("same_threshold", right, "a finite number from 0 or None", same)
        self.rationality = rationality
        self.myopia = myopia
        self.mistake_rate = mistake_rate
        self.skip_threshold = skip_threshold
        self.same_threshold = same_threshold
        self.as_published = as_published

    def answer(
        self, clips: Clips, pairs: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Answers every pair from `clips.rewards`; see `Teacher.answer` and the class."""
        if clips.rewards is None:
            raise InvalidInput(
                "clips.rewards: expected the task's own reward, by which a synthetic teacher "
                "judges, got None; record the clips with rewards, or ask a person."
            )
        check_pairs(pairs, len(clips))
        used, at = torch.unique(pairs.cpu().long(), return_inverse=True)
        clips = clips[used.to(clips.mask.device)]
        plain = _discounted(clips, 1.0)
        felt = plain if self.myopia == 1 else _discounted(clips, self.myopia)
        preference = self._prefer(felt[at[:, 1]] - felt[at[:, 0]], generator)
        first, second = plain[at].unbind(1)
        if self.same_threshold is not None:
            preference[(first - second).abs() < self.same_threshold] = 0.5
        if self.skip_threshold is not None:
            preference[self._skips(torch.maximum(first, second), self.skip_threshold)] = SKIPPED
        return preference.float().to(pairs.device)

    def _skips(self, better: Tensor, threshold: float) -> Tensor:
        if self.as_published:
            return (better <= threshold) & (threshold > 0)
        return better < threshold

    def _prefer(self, difference: Tensor, generator: torch.Generator | None) -> Tensor:
        # Two draws for every pair whether needed or not, so that an answer depends on its place
        # in the batch alone, and teachers that differ in one parameter share their luck.
        device = None if generator is None else generator.device
        luck = torch.rand(
            len(difference), 2, dtype=torch.float64, generator=generator, device=device
        ).to(difference.device)
        if self.as_published and self.rationality in (0, math.inf):
            preference = (difference > 0).double()
        elif math.isinf(self.rationality):
            preference = 0.5 + 0.5 * difference.sign()
        else:
            preference = (luck[:, 0] < torch.sigmoid(self.rationality * difference)).double()
        mistaken = luck[:, 1] < self.mistake_rate
        return torch.where(mistaken, 1 - preference, preference)


# B-Pref's, as far as they are the same on every task (Lee et al. 2021, §5): those who skip, or
# say "the same", need thresholds in the task's own reward units.
TEACHERS: Final[dict[str, Callable[[], Teacher]]] = {
    "oracle": SyntheticTeacher,
    "stochastic": partial(SyntheticTeacher, rationality=1.0),
    "mistaken": partial(SyntheticTeacher, mistake_rate=0.1),
    "myopic": partial(SyntheticTeacher, myopia=0.9),
}


def published_threshold(
    share: float,
    episode_returns: Sequence[float],
    *,
    clip_length: int,
    episode_length: int,
    first_round: bool,
) -> float:
    r"""The threshold that B-Pref's public code skips, or says "the same", below.

    $\epsilon\,\bar R\,H / T$ in the first round of questions, for the mean $\bar R$ of recent
    episodes' returns, and $\epsilon^2\,\bar R\,H / T$ in every later one: `train_PEBBLE.py`
    multiplies by the share, and `set_teacher_thres_skip` and `set_teacher_thres_equal` in
    `reward_model.py` do so again. What is 10 in the first round at a share of a tenth is 1
    ever after. The paper (Lee et al. 2021, arXiv 2111.03026, §3) multiplies once, and so does the
    code's other half, PrefPPO (`on_policy_with_reward_algorithm.py`), whose every round is as
    PEBBLE's first.

    Both are of the sign of the returns. A `SyntheticTeacher` that isn't `as_published` had
    better be given thresholds in reward units.

    Args:
        share: $\epsilon$, `teacher_eps_skip` or `teacher_eps_equal` there.
        episode_returns: The task's own returns of recent training episodes, at least one.
            PEBBLE's keeps ten, and until ten have ended a zero before the first.
        clip_length: H, frames.
        episode_length: T, frames, the task's limit.
        first_round: Whether PEBBLE's has asked nothing before; True for PrefPPO.

    Returns:
        A threshold in reward units, for a `SyntheticTeacher` that answers `as_published`.

    Raises:
        InvalidInput: No episodes, or lengths below 1.

    Example:
        >>> settings = dict(clip_length=50, episode_length=1000)
        >>> published_threshold(0.1, [1500.0, 2500.0], first_round=True, **settings)
        10.0
        >>> published_threshold(0.1, [1500.0, 2500.0], first_round=False, **settings)
        1.0
    """
    if not episode_returns:
        raise InvalidInput("episode_returns: expected at least one return, got none.")
    for name, length in (("clip_length", clip_length), ("episode_length", episode_length)):
        _require(name, length >= 1, "at least 1 frame", length)
    margin = math.fsum(episode_returns) / len(episode_returns) * (clip_length / episode_length)
    return share * margin if first_round else share * (share * margin)


def _discounted(clips: Clips, discount: float) -> Tensor:
    """`(N,)` doubles on the CPU, each clip's last real frame weighing 1."""
    assert clips.rewards is not None
    mask = clips.mask.cpu()
    rewards = clips.rewards.detach().cpu().double().masked_fill(~mask, 0)
    if discount != 1:
        frames_left = mask.long().flip(1).cumsum(1).flip(1) - mask.long()
        rewards = rewards * torch.pow(discount, frames_left.double())
    # Rounded once: float sums differ with order and padding, which would break exact ties.
    return torch.tensor([math.fsum(row) for row in rewards.tolist()], dtype=torch.float64)


def _require(name: str, right: bool, expected: str, came: float) -> None:
    if not right:
        raise InvalidInput(f"{name}: expected {expected}, got {came}.")
