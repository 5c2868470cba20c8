"""Recalibration of a fitted model on held-out comparisons."""

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

from rewardmodels.arrays import ArrayLike, as_pairs, as_tensor
from rewardmodels.clips import Clips, single_frames
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, NotFitted, require
from rewardmodels.posterior import Difference, ReturnPosterior

_LOWEST, _HIGHEST = 1e-2, 1e2  # temperatures
# Of log T about 0, chosen on one split of three sets of people's comparisons: larger ones make the
# log loss of others worse with 30 or 60 comparisons to calibrate on, and hardly better with 200.
_PRIOR_SD = 0.3
_FEW = 30
_METHODS = ("temperature", "isotonic")


class ActivelyChosenWarning(UserWarning):
    """Calibration on actively chosen comparisons, which holds only for others like them."""


class FewComparisonsWarning(UserWarning):
    """Calibration on too few comparisons to say much."""


class HasPosterior(Protocol):
    """Model that can be calibrated: a fitted RewardModel, or another with this method."""

    def posterior(self, clips: Clips) -> ReturnPosterior:
        """Joint posterior over the returns of N clips."""


class Calibrated:
    r"""A fitted model with calibrated preferences and prediction sets of guaranteed coverage.

    First every function of the posterior is divided by one temperature, $R / T$: it stays one joint
    distribution, clips and pairs keep their order by mean, and `preference` integrates over it as
    before; but where T is below 1, novelty's standard deviation is divided by T twice (see
    `ReturnPosterior.tempered`). T is the most probable one given the held-out comparisons (Guo et
    al. 2017, §4.2, use their likelihood alone) and a log-normal prior about 1 with $\log T$ of
    standard deviation 0.3.
    With "isotonic", `preference` then goes through an increasing piecewise linear map (Zadrozny &
    Elkan 2002) with $f(1 - p) = 1 - f(p)$, which stays as far from 0 and 1 as one more comparison
    each way would; samples and differences don't depend on that map.

    `preference(pairs)` is calibrated for comparisons as they were given, random answers included; a
    `random_answer_rate` passed to it is mixed in on top. The model is never changed.

    Args:
        model: A fitted model.
        method: "temperature", or "isotonic" for the map as well, which needs hundreds of
            comparisons.

    Attributes:
        temperature: T; 1 before `calibrate`, above 1 for an overconfident model.

    Raises:
        InvalidInput: Another method.

    Example:
        >>> from rewardmodels import DeepEnsemble, fit
        >>> draw = torch.Generator().manual_seed(0)
        >>> clips = Clips(torch.randn(120, 5, 2, generator=draw), torch.zeros(120, 5, 1))
        >>> pairs = torch.arange(120).view(60, 2)
        >>> returns = clips.observations[..., 0].sum(1)
        >>> better = (returns[pairs[:, 1]] > returns[pairs[:, 0]]).float()
        >>> comparisons = Comparisons(clips, pairs, better)
        >>> model = fit(DeepEnsemble(members=3), comparisons[:20], epochs=5)
        >>> calibrated = Calibrated(model).calibrate(comparisons[20:], random=True)
        >>> calibrated.posterior(clips).prediction_set(pairs[:3], coverage=0.9).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, model: HasPosterior, method: Literal["temperature", "isotonic"] = "temperature"
    ) -> None:
        if method not in _METHODS:
            raise InvalidInput(f"method: expected one of {', '.join(_METHODS)}; got {method!r}.")
        self.model = model
        self.method = method
        self.temperature = 1.0
        self._map: NDArray[np.float64] | None = None
        self._scores: NDArray[np.float64] | None = None

    def calibrate(
        self,
        comparisons: Comparisons,
        *,
        random: bool,
        groups: ArrayLike | None = None,
    ) -> Calibrated:
        """Fit temperature, map and prediction sets to held-out comparisons.

        Args:
            comparisons: Held-out comparisons, of pairs like those to be predicted. A tie counts
                half each way, and not at all for prediction sets.
            random: True if their pairs were drawn at random. Those that a query strategy chose are
                the hard ones: calibrated on them, a model is underconfident on all others.
            groups: A number for each comparison, equal where comparisons resemble each other, such
                as those of one person. The temperature then counts on fewer of them: as many as
                would vary as much if they were independent. Coverage is still that of single
                comparisons.

        Returns:
            The same object; an earlier calibration is replaced.

        Raises:
            InvalidInput: No comparisons, groups that aren't as many, or clips of other shapes than
                the model's.

        Warns:
            ActivelyChosenWarning: `random` is False.
            FewComparisonsWarning: Fewer than 30 comparisons.
        """
        kind = type(comparisons).__name__
        require("comparisons", isinstance(comparisons, Comparisons), "Comparisons", kind)
        expected = "held-out comparisons to calibrate on"
        require("comparisons", len(comparisons) > 0, expected, "none")
        if groups is not None:
            groups = as_tensor("groups", groups)
            expected = f"a number for each of {len(comparisons)} comparisons"
            found = tuple(groups.shape)
            require("groups", found == (len(comparisons),), expected, f"shape {found}")
        if len(comparisons) < _FEW:
            warnings.warn(
                f"comparisons: expected at least {_FEW} to calibrate on, got {len(comparisons)}; "
                "the temperature stays near 1. Hold more out.",
                FewComparisonsWarning,
                stacklevel=2,
            )
        if not random:
            warnings.warn(
                "comparisons: expected pairs drawn at random, got actively chosen ones; those are "
                "harder than others, so temperature, map and coverage hold only for pairs chosen "
                "in the same way. Hold some random comparisons out for calibration.",
                ActivelyChosenWarning,
                stacklevel=2,
            )
        used = comparisons.compact()
        base = self.model.posterior(used.clips)
        pairs = used.pairs.to(base.mean.device)
        preference = used.preference.double().cpu()

        # The model's own probabilities: a set's coverage holds for scores that don't depend on the
        # held-out comparisons, and any increasing map of them gives the same sets.
        p = _both_ways(base, pairs)[torch.arange(len(preference)), (preference > 0.5).long()]
        self._scores = np.sort((1 - p)[preference != 0.5].numpy())

        self.temperature = _best_temperature(base, pairs, preference, groups)
        self._map = None
        if self.method == "isotonic":
            p = _both_ways(_scaled(base, self.temperature), pairs)
            edge = 1 / (len(preference) + 2)
            isotonic = IsotonicRegression(y_min=edge, y_max=1 - edge)
            isotonic.fit(p.T.flatten().numpy(), torch.cat([1 - preference, preference]).numpy())
            self._map = np.stack([isotonic.X_thresholds_, isotonic.y_thresholds_])
        return self

    def state(self) -> dict[str, Tensor]:
        """Result of `calibrate` as tensors, for `rewardmodels.save`.

        Raises:
            NotFitted: `calibrate` wasn't called yet.
        """
        state = {
            "temperature": torch.tensor(self.temperature, dtype=torch.double),
            "scores": torch.from_numpy(self._calibrated_scores()),
        }
        return state if self._map is None else state | {"map": torch.from_numpy(self._map)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.temperature = float(state["temperature"])
        self._scores = state["scores"].numpy()
        self._map = state["map"].numpy() if "map" in state else None

    def posterior(self, clips: Clips) -> CalibratedPosterior:
        """Calibrated joint posterior over the returns of N clips, in reward units.

        Raises:
            NotFitted: `calibrate` wasn't called yet, or the model isn't fitted.
            InvalidInput: Clips whose frames have other shapes than the training data's.
        """
        scores = self._calibrated_scores()
        return CalibratedPosterior(self.model.posterior(clips), self.temperature, self._map, scores)

    def frame_posterior(self, observations: ArrayLike, actions: ArrayLike) -> CalibratedPosterior:
        """Calibrated joint posterior over the rewards of B frames `(B, *obs)` and `(B, *act)`."""
        return self.posterior(single_frames(observations, actions))

    def _calibrated_scores(self) -> NDArray[np.float64]:
        if self._scores is None:
            raise NotFitted("Calibrated: expected a calibrated model; call calibrate first.")
        return self._scores


class CalibratedPosterior(ReturnPosterior):
    """Posterior divided by a temperature, with calibrated preferences and prediction sets.

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

    def difference(self, pairs: ArrayLike) -> Difference:
        return self._scaled.difference(pairs)

    def preference(self, pairs: ArrayLike, *, random_answer_rate: float = 0.0) -> Tensor:
        if self._map is None:
            return self._scaled.preference(pairs, random_answer_rate=random_answer_rate)
        both = _both_ways(self._scaled, as_pairs(pairs, len(self.mean))).numpy()
        first, second = (torch.from_numpy(np.interp(column, *self._map)) for column in both.T)
        # The map is symmetric but for rounding.
        p = ((second + 1 - first) / 2).to(self.mean)
        return (1 - random_answer_rate) * p + random_answer_rate / 2

    def prediction_set(self, pairs: ArrayLike, coverage: float = 0.9) -> Tensor:
        r"""Sets that contain the teacher's preference with at least the given probability.

        Split conformal prediction (Vovk et al. 2005; Angelopoulos & Bates 2021, §1): a clip is in
        the set if 1 - P(it is preferred) is at most the $\lceil (n + 1) \cdot \text{coverage}
        \rceil$-th smallest of the n held-out comparisons'. The guarantee holds however wrong the
        model, over the draw of both the held-out pairs and the new one (which must be
        exchangeable); not for each pair by itself. A set is never empty: the likelier clip is
        always in it.

        Args:
            pairs: `(Q, 2)` indices of clips, drawn as those calibrated on.
            coverage: Between 0 and 1.

        Returns:
            `(Q, 2)` bool, True for each clip in the set: first, second or both.

        Raises:
            InvalidInput: A coverage out of range, or one that needs more held-out comparisons.
        """
        require("coverage", 0 < coverage < 1, "a number between 0 and 1", coverage)
        n = len(self._scores)
        place = _at_least((n + 1) * coverage)
        some = f"{_at_least(coverage / (1 - coverage))} held-out comparisons (ties aside)"
        got = f"{n}; calibrate on more, or take a coverage of {n / (n + 1):.3g} or less"
        require("coverage", place <= n, f"at least {some} for a coverage of {coverage:g}", got)
        pairs = as_pairs(pairs, len(self.mean))
        p = _both_ways(self._base, pairs)
        # The same subtraction as in the scores, so that equal numbers stay equal.
        possible = (1 - p) <= self._scores[place - 1]
        return (possible | (p >= p.max(1, keepdim=True).values)).to(pairs.device)


def _both_ways(posterior: ReturnPosterior, pairs: Tensor) -> Tensor:
    """Probabilities `(Q, 2)` of the first and of the second, each from its own tail."""
    both = [posterior.preference(some).double().cpu() for some in (pairs.flip(1), pairs)]
    return torch.stack(both, 1)


def _scaled(posterior: ReturnPosterior, temperature: float) -> ReturnPosterior:
    try:
        return posterior.tempered(temperature)
    except NotImplementedError as error:
        raise InvalidInput(
            "model: expected one whose posterior can be scaled, such as a SampledPosterior or a "
            f"GaussianPosterior, got {type(posterior).__name__}."
        ) from error


def _best_temperature(
    posterior: ReturnPosterior, pairs: Tensor, mu: Tensor, groups: Tensor | None
) -> float:
    def losses(log_temperature: float) -> NDArray[np.float64]:
        p = _both_ways(_scaled(posterior, math.exp(log_temperature)), pairs)
        log_p = p.clamp_min(torch.finfo(torch.double).tiny).log()
        nll: NDArray[np.float64] = -((1 - mu) * log_p[:, 0] + mu * log_p[:, 1]).numpy()
        return nll

    # Averaged over the posterior, the loss may have several minima: a grid finds the lowest.
    grid = np.linspace(math.log(_LOWEST), math.log(_HIGHEST), 41)
    on_grid = np.stack([losses(x) for x in grid])
    prior = (grid / _PRIOR_SD) ** 2 / 2
    weight = 1.0
    if groups is not None:
        # Of scores that are independent between groups (Ribatet et al. 2012, §2.2).
        best = int(np.clip((on_grid.sum(1) + prior).argmin(), 1, len(grid) - 2))
        scores = on_grid[best + 1] - on_grid[best - 1]
        by_group = np.bincount(np.unique(groups.cpu(), return_inverse=True)[1], scores)
        if clustered := float(np.square(by_group).sum()):
            weight = min(1.0, float(np.square(scores).sum()) / clustered)
    best = int((weight * on_grid.sum(1) + prior).argmin())
    bracket = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = scipy.optimize.minimize_scalar(
        lambda x: weight * float(losses(x).sum()) + (x / _PRIOR_SD) ** 2 / 2,
        bounds=bracket,
        method="bounded",
        options={"xatol": 1e-4},
    )
    return math.exp(found.x)


def _at_least(number: float) -> int:
    # A product such as 10 * 0.9 may come out above the whole number that it is.
    return math.ceil(number - 1e-9)
