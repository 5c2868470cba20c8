"""Calibrated: any fitted model, its probabilities set right on comparisons that it hasn't seen."""

from __future__ import annotations

import math
import warnings
from typing import Literal, Protocol

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, NotFitted
from rewardmodels.posterior import (
    Difference,
    GaussianPosterior,
    ReturnPosterior,
    SampledPosterior,
)

_LOWEST, _HIGHEST = 1e-2, 1e2  # temperatures
# Of log T about 0: a factor of e. Of 60 held-out answers only a few are wrong, and without a prior
# these few, or their absence, would decide.
_PRIOR_SD = 1.0
_METHODS = ("temperature", "isotonic")


class ActivelyChosenWarning(UserWarning):
    """Calibrated on comparisons that were chosen, not drawn: the result is right for their like."""


class BelievesReturns(Protocol):
    """What is calibrated: a fitted RewardModel, or anything else that answers as one."""

    def posterior(self, clips: Clips) -> ReturnPosterior:
        """The joint belief about the returns of N clips."""

    def frame_posterior(self, observations: Tensor, actions: Tensor) -> ReturnPosterior:
        """The joint belief about the rewards of B frames."""


class Calibrated:
    r"""Holds a fitted model, and answers as it does but for how sure it is.

    First every function that may be drawn is divided by one temperature, $R / T$: the belief stays
    one joint distribution, clips and pairs keep their order by mean, and `preference` integrates it
    as before. T is the most probable one given the held-out answers (Guo et al. 2017, §4.2, take
    their likelihood alone) and a log-normal prior about 1 with $\log T$ of standard deviation 1.
    With "isotonic", `preference` then goes through an increasing step-wise linear map (Zadrozny &
    Elkan 2002) that keeps $f(1 - p) = 1 - f(p)$ and stays as far from certainty as one answer more
    each way would; samples and differences know nothing of that map.

    What is calibrated is `preference(pairs)`, answers as they were given, mistakes included; a
    `random_answer_rate` in the question is mixed in on top. The model is never changed.

    Args:
        model: A fitted model.
        method: "temperature", or "isotonic" for the map as well, which wants hundreds of
            answers.

    Attributes:
        temperature: T; 1 before `calibrate`, above 1 for a model that was too sure.

    Raises:
        InvalidInput: Another method.

    Example:
        >>> from rewardmodels import DeepEnsemble, fit
        >>> draw = torch.Generator().manual_seed(0)
        >>> clips = Clips(torch.randn(80, 5, 2, generator=draw), torch.zeros(80, 5, 1))
        >>> pairs = torch.arange(80).view(40, 2)
        >>> worth = clips.observations[..., 0].sum(1)
        >>> better = (worth[pairs[:, 1]] > worth[pairs[:, 0]]).float()
        >>> said = Comparisons(clips, pairs, better)
        >>> model = fit(DeepEnsemble(members=3), said[:20], epochs=5)
        >>> belief = Calibrated(model).calibrate(said[20:], random=True).posterior(clips)
        >>> belief.prediction_set(pairs[:3], coverage=0.9).shape  # may be first, may be second
        torch.Size([3, 2])
    """

    def __init__(
        self, model: BelievesReturns, method: Literal["temperature", "isotonic"] = "temperature"
    ) -> None:
        if method not in _METHODS:
            raise InvalidInput(f"method: expected one of {', '.join(_METHODS)}; got {method!r}.")
        self.model = model
        self.method = method
        self.temperature = 1.0
        self._map: NDArray[np.float64] | None = None
        self._scores: NDArray[np.float64] | None = None

    def calibrate(self, comparisons: Comparisons, *, random: bool) -> Calibrated:
        """Sets temperature, map and prediction sets from answers that the model hasn't seen.

        Args:
            comparisons: Held-out answers, of pairs like those that will be asked about. A tie
                counts as half an answer each way, and not at all for prediction sets.
            random: Whether their pairs were drawn at random. Those that a query strategy chose
                are the hard ones: calibrated on them, a model is too unsure of all others.

        Returns:
            The same object; what an earlier call set is forgotten.

        Raises:
            InvalidInput: No comparisons, or clips of other shapes than the model's.

        Warns:
            ActivelyChosenWarning: `random` is False.
        """
        if len(comparisons) == 0:
            raise InvalidInput("comparisons: expected held-out answers to calibrate on, got none.")
        if not random:
            warnings.warn(
                "comparisons: expected pairs drawn at random, got actively chosen ones; those are "
                "harder than others, so temperature, map and coverage hold for pairs chosen in "
                "the same way only. Keep some random comparisons back for calibration.",
                ActivelyChosenWarning,
                stacklevel=2,
            )
        used = comparisons.compact()
        base = self.model.posterior(used.clips)
        pairs = used.pairs.to(base.mean.device)
        said = used.preference.double().cpu()

        # The model's own probabilities: a set's coverage holds for scores that the same answers
        # had no part in, and any increasing map of them gives the same sets.
        right = _both_ways(base, pairs)[torch.arange(len(said)), (said > 0.5).long()]
        self._scores = np.sort((1 - right)[said != 0.5].numpy())

        self.temperature = _best_temperature(base, pairs, said)
        self._map = None
        if self.method == "isotonic":
            p = _both_ways(_scaled(base, self.temperature), pairs)
            edge = 1 / (len(said) + 2)
            isotonic = IsotonicRegression(y_min=edge, y_max=1 - edge)
            isotonic.fit(p.T.flatten().numpy(), torch.cat([1 - said, said]).numpy())
            self._map = np.stack([isotonic.X_thresholds_, isotonic.y_thresholds_])
        return self

    def state(self) -> dict[str, Tensor]:
        """What `calibrate` set, as tensors, for `rewardmodels.save`.

        Raises:
            NotFitted: It wasn't called yet.
        """
        if self._scores is None:
            raise NotFitted("Calibrated: expected a calibrated model; call calibrate first.")
        state = {
            "temperature": torch.tensor(self.temperature, dtype=torch.double),
            "scores": torch.from_numpy(self._scores),
        }
        return state if self._map is None else state | {"map": torch.from_numpy(self._map)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        self.temperature = float(state["temperature"])
        self._scores = state["scores"].numpy()
        self._map = state["map"].numpy() if "map" in state else None

    def posterior(self, clips: Clips) -> CalibratedPosterior:
        """The calibrated joint belief about the returns of N clips, in reward units.

        Raises:
            NotFitted: `calibrate` wasn't called yet, or the model isn't fitted.
            InvalidInput: Clips whose frames have other shapes than those learned from.
        """
        return self._calibrated(self.model.posterior(clips))

    def frame_posterior(self, observations: Tensor, actions: Tensor) -> CalibratedPosterior:
        """The calibrated joint belief about the rewards of B single frames.

        Args:
            observations: `(B, *obs)`.
            actions: `(B, *act)`.

        Raises:
            NotFitted: `calibrate` wasn't called yet, or the model isn't fitted.
            InvalidInput: Frames of other shapes than those learned from.
        """
        return self._calibrated(self.model.frame_posterior(observations, actions))

    def _calibrated(self, base: ReturnPosterior) -> CalibratedPosterior:
        if self._scores is None:
            raise NotFitted("Calibrated: expected a calibrated model; call calibrate first.")
        return CalibratedPosterior(base, self.temperature, self._map, self._scores)


class CalibratedPosterior(ReturnPosterior):
    """A belief divided by a temperature, with calibrated preferences and prediction sets.

    Made by `Calibrated.posterior`.
    """

    def __init__(
        self,
        base: ReturnPosterior,
        temperature: float,
        map: NDArray[np.float64] | None,
        scores: NDArray[np.float64],
    ) -> None:
        self._base = base
        self._scaled = _scaled(base, temperature)
        self._map, self._scores = map, scores

    @property
    def mean(self) -> Tensor:
        return self._scaled.mean

    @property
    def variance(self) -> Tensor:
        return self._scaled.variance

    @property
    def covariance(self) -> Tensor:
        return self._scaled.covariance

    def rsample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self._scaled.rsample(n, generator)

    def difference(self, pairs: Tensor) -> Difference:
        return self._scaled.difference(pairs)

    def preference(self, pairs: Tensor, *, random_answer_rate: float = 0.0) -> Tensor:
        if self._map is None:
            return self._scaled.preference(pairs, random_answer_rate=random_answer_rate)
        both = _both_ways(self._scaled, pairs).numpy()
        first, second = (torch.from_numpy(np.interp(column, *self._map)) for column in both.T)
        # The map is symmetric but for rounding.
        p = ((second + 1 - first) / 2).to(self.mean)
        return (1 - random_answer_rate) * p + random_answer_rate / 2

    def prediction_set(self, pairs: Tensor, coverage: float = 0.9) -> Tensor:
        r"""Which answers can't be ruled out: {first}, {second} or {both}.

        Split conformal prediction (Vovk et al. 2005; Angelopoulos & Bates 2021, §1): an answer is
        in the set if 1 - P(answer) is at most the $\lceil (n + 1) \cdot \text{coverage} \rceil$-th
        smallest of the n held-out answers'. A new pair's true answer is in its set with at
        least that probability, however wrong the model, over the draw of both the held-out pairs
        and the new one; not for each pair by itself. A set is never empty: the likelier answer is
        always in it.

        Args:
            pairs: `(Q, 2)` indices of clips, drawn as those calibrated on.
            coverage: Between 0 and 1.

        Returns:
            `(Q, 2)` bool, whether the first may be preferred, and whether the second may.

        Raises:
            InvalidInput: A coverage out of range, or one that needs more held-out answers.
        """
        if not 0 < coverage < 1:
            raise InvalidInput(f"coverage: expected a number between 0 and 1, got {coverage}.")
        n = len(self._scores)
        place = _at_least((n + 1) * coverage)
        if place > n:
            raise InvalidInput(
                f"coverage: expected at least {_at_least(coverage / (1 - coverage))} held-out "
                f"answers (ties aside) for a coverage of {coverage:g}, got {n}; calibrate on more, "
                f"or ask for {n / (n + 1):.3g} or less."
            )
        p = _both_ways(self._base, pairs)
        # The same subtraction as in the scores, so that equal numbers stay equal.
        possible = (1 - p) <= self._scores[place - 1]
        return (possible | (p >= p.max(1, keepdim=True).values)).to(pairs.device)


def _both_ways(belief: ReturnPosterior, pairs: Tensor) -> Tensor:
    """`(Q, 2)` probabilities of the first and of the second, each from its own tail."""
    both = [belief.preference(some).double().cpu() for some in (pairs.flip(1), pairs)]
    return torch.stack(both, 1)


def _scaled(belief: ReturnPosterior, temperature: float) -> ReturnPosterior:
    if isinstance(belief, SampledPosterior):
        return SampledPosterior(belief.samples / temperature)
    if isinstance(belief, GaussianPosterior):
        return GaussianPosterior(belief.mean / temperature, belief.root / temperature)
    raise InvalidInput(
        "model: expected one whose belief is a SampledPosterior or a GaussianPosterior, got "
        f"{type(belief).__name__}."
    )


def _best_temperature(belief: ReturnPosterior, pairs: Tensor, said: Tensor) -> float:
    def loss(log_temperature: float) -> float:
        p = _both_ways(_scaled(belief, math.exp(log_temperature)), pairs)
        log_p = p.clamp_min(torch.finfo(torch.double).tiny).log()
        nll = -float(((1 - said) * log_p[:, 0] + said * log_p[:, 1]).sum())
        return nll + (log_temperature / _PRIOR_SD) ** 2 / 2

    # With the belief integrated out the loss may have more than one valley: a grid finds the one.
    grid = np.linspace(math.log(_LOWEST), math.log(_HIGHEST), 41)
    best = int(np.argmin([loss(x) for x in grid]))
    bracket = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = scipy.optimize.minimize_scalar(
        loss, bounds=bracket, method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(found.x)


def _at_least(number: float) -> int:
    # A product such as 10 * 0.9 may come out above the whole number that it is.
    return math.ceil(number - 1e-9)
