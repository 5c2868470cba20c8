"""OODDetector, the interface of all detectors, and the ones that need no network."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone, is_outlier_detector
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from rewardmodels.errors import InvalidInput, NotFitted, require
from rewardmodels.scoring import FrameScorer

Array = NDArray[Any]

# Scale of a feature that is constant in training, relative to its size: any real change of it is
# then anomalous.
CONSTANT_SCALE = 1e-6
_RIDGE = 1e-6  # of a correlation matrix, whose eigenvalues sum to F
_SMALLEST_SCALE = 1e-12
_PROBES = 64  # frames whose scores stand for a model that can't be hashed


class OODDetector(ABC):
    """Anomaly score of frames, relative to training frames; higher is more anomalous.

    A frame is a vector of F features (see `ood.features`). Scores of two detectors share no unit;
    thresholds come from `ood.conformal`.

    A subclass writes the first two of these hooks and may override the others. Each receives
    `(B, F)` finite numbers of double precision, already checked:

    - `fit_frames(frames)`: called by `fit`, after `mean` and `scale` are set. It stores what it
      learns as NumPy arrays in attributes that `learned` names, which are hashed and saved.
    - `score_frames(frames)`: `(B,)`, called by `score` and at every step of a guard.
    - `residual_frames(frames)`: `(B, D)` signed numbers for statistics such as `ood.MEWMA`; by
      default the score as one column.
    - `explain_frames(frames)`: `(B, F)` shares of the features in the score; by default the
      absolute deviations from the training mean, in standard deviations.

    Constructor arguments are kept as attributes of the same names. `ood.checks.check_detector`
    tests a subclass; `ood.DETECTORS` makes it known to `load_monitor` and the command line.

    Example:
        >>> from ood.checks import check_detector
        >>> class LargestDeviation(OODDetector):
        ...     def fit_frames(self, frames):
        ...         pass  # mean and scale are enough
        ...
        ...     def score_frames(self, frames):
        ...         return np.abs(self.standardise(frames)).max(1)
        >>> check_detector(LargestDeviation)
    """

    learned: tuple[str, ...] = ()
    """Names of the arrays of finite numbers that `fit_frames` stores."""

    saveable: ClassVar[bool] = True
    """True if settings and learned arrays are all that scoring needs."""

    num_features: int = 0
    """F; 0 before the first fit, and while one is under way."""

    revision: int = 0
    """Number of fits and restores so far."""

    @abstractmethod
    def fit_frames(self, frames: Array) -> None:
        """Learn from `(B, F)` checked frames."""

    @abstractmethod
    def score_frames(self, frames: Array) -> Array:
        """Scores `(B,)` of `(B, F)` checked frames."""

    def residual_frames(self, frames: Array) -> Array:
        """Residuals `(B, D)` of `(B, F)` checked frames."""
        return self.score_frames(frames)[:, None]

    def explain_frames(self, frames: Array) -> Array:
        """Shares `(B, F)` of the features in the scores of `(B, F)` checked frames."""
        return np.abs(self.standardise(frames))

    def fit(self, features: Tensor) -> Self:
        """Learn from training frames, in place of anything learned before.

        Args:
            features: `(B, F)`.

        Raises:
            InvalidInput: Another shape, fewer than two frames, NaN or infinity.
        """
        frames = as_array(features).astype(np.float64, copy=False)
        valid = frames.ndim == 2 and len(frames) >= 2 and frames.shape[1] > 0
        expected = "shape (B, F) with B of at least 2 and F of at least 1"
        require("features", valid, expected, frames.shape)
        _check_finite(frames)
        self.num_features, self.revision = 0, self.revision + 1
        self.mean = frames.mean(0)
        self.scale = np.maximum(frames.std(0), CONSTANT_SCALE * np.maximum(1, np.abs(self.mean)))
        self.fit_frames(frames)
        self.num_features = frames.shape[1]
        return self

    def score(self, features: Tensor) -> Tensor:
        """Anomaly scores `(B,)` of frames `(B, F)`, in double precision.

        Raises:
            NotFitted: The detector isn't fitted.
            InvalidInput: Another width than that of the training frames, NaN or infinity.
        """
        return torch.from_numpy(self.evaluate(self.check_frames(features)))

    def residuals(self, features: Tensor) -> Tensor:
        """Signed deviations `(B, D)` of frames `(B, F)` from what is normal.

        For training frames they are about 0, in standard deviations and as uncorrelated as the
        detector can make them. Raises as `score` does.
        """
        return torch.from_numpy(self.evaluate(self.check_frames(features), residuals=True))

    def explain(self, features: Tensor) -> Tensor:
        """Non-negative shares `(B, F)` of the features in the scores; raises as `score` does."""
        return torch.from_numpy(self.explain_frames(self.check_frames(features)))

    def detector_names(self, features: Tensor) -> list[str]:
        """Names of the B detectors that the frames' scores come from: this one's, unless joint."""
        return [type(self).__name__] * len(features)

    def check_frames(self, features: Tensor | Array) -> Array:
        """Convert features to an array that `evaluate` takes; raises as `score` does."""
        self.check_fitted()
        frames = as_array(features)
        if frames.ndim != 2 or frames.shape[1] != self.num_features:
            raise InvalidInput(
                f"features: expected shape (B, {self.num_features}), as learned from, got "
                f"{frames.shape}."
            )
        frames = frames.astype(np.float64, copy=False)
        _check_finite(frames)
        return frames

    def evaluate(self, frames: Array, *, residuals: bool = False) -> NDArray[np.float64]:
        """Compute scores `(B,)` or residuals `(B, D)` of frames that `check_frames` would pass.

        A check takes as long as the score of a single frame.
        """
        # A frame that overflows is infinitely anomalous, and no reason for a warning.
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.residual_frames(frames) if residuals else self.score_frames(frames)
        values = np.asarray(values, dtype=np.float64)
        # To find no NaN in a sum of squares takes a fifth of the time of a look at each number.
        if math.isfinite(np.vdot(values, values)):
            return values
        return np.where(np.isnan(values), np.inf, values)

    def standardise(self, frames: Array) -> Array:
        """Deviations of `(B, F)` frames from the training mean, in standard deviations."""
        standard: Array = frames - self.mean
        standard /= self.scale
        return standard

    @property
    def fitted(self) -> bool:
        """True once a fit has succeeded."""
        return self.num_features > 0

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @property
    def state(self) -> dict[str, Array]:
        """Learned arrays; raises NotFitted without any."""
        self.check_fitted()
        return {name: getattr(self, name) for name in ("mean", "scale", *self.learned)}

    def restore(self, state: dict[str, Array]) -> Self:
        """Set the learned arrays to an earlier `state`.

        Raises:
            InvalidInput: Too many arrays, or too few, for this class, NaN or infinity, or a mean
                and a scale that don't fit together.
        """
        expected = {"mean", "scale", *self.learned}
        require("state", set(state) == expected, f"{sorted(expected)}", sorted(state))
        mean, scale = state["mean"], state["scale"]
        valid = mean.ndim == 1 and mean.size and mean.shape == scale.shape and (scale > 0).all()
        require("state", bool(valid), "mean and scale of shape (F,), the latter above 0", "others")
        for name, value in state.items():
            setattr(self, name, value)
        self.num_features, self.revision = len(self.mean), self.revision + 1
        self.check_state()
        return self

    @property
    def fingerprint(self) -> str:
        """Hash of settings and state, by which a threshold recognises its detector."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(type(self).__name__.encode())
        digest.update(json.dumps(self.settings, default=repr, sort_keys=True).encode())
        for name, value in sorted(self.state.items()):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()

    def check_fitted(self) -> None:
        """Raise NotFitted before a fit has succeeded."""
        if not self.fitted:
            raise NotFitted(f"{type(self).__name__}: expected a fitted detector; call fit first.")

    def check_state(self) -> None:
        """Raise NotFitted before a fit has succeeded, InvalidInput for NaN or infinity since."""
        for name, value in self.state.items():
            which, got = f"{type(self).__name__}.{name}", "NaN or infinity; fit it again"
            require(which, bool(np.isfinite(value).all()), "finite numbers", got)


class Mahalanobis(OODDetector):
    r"""Mahalanobis distance from the training mean; its square is $\chi^2_F$ for normal features.

    $\sqrt{(x - \mu)^\top \Sigma^{-1} (x - \mu)}$ (Lee et al. 2018, arXiv:1807.03888, eq. 2, with
    one class). A millionth is added to the diagonal of the correlation matrix, so that features may
    depend on each other. Residuals are the whitened features.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> detector = Mahalanobis().fit(x)
        >>> bool(detector.score(x.mean(0, keepdim=True)) < 1e-3)
        True
        >>> detector.explain(x.mean(0) + torch.tensor([[0.0, 5.0, 0.0]])).argmax().item()
        1
    """

    learned = ("whitening",)

    def fit_frames(self, frames: Array) -> None:
        self.whitening = whitening(self.standardise(frames))

    def residual_frames(self, frames: Array) -> Array:
        # `dot` takes half the time of `@`, for one frame.
        return self.standardise(frames).dot(self.whitening)

    def score_frames(self, frames: Array) -> Array:
        white = self.residual_frames(frames)
        return np.sqrt(np.vecdot(white, white))


class RelativeMahalanobis(OODDetector):
    r"""Squared Mahalanobis distance from the nearest cluster, less that from all training frames.

    $\min_k d_k^2(x) - d_0^2(x)$, with squared distances $d_k$ from the clusters' means under their
    common covariance, and $d_0$ from the overall mean (Ren et al. 2021, arXiv:2106.09022, §2).
    Directions that vary as much within clusters as between them cancel, so it misses frames that
    are far away in such a direction alone: join it with another detector (`ood.Joint`). Frames have
    no labels, so k-means makes the clusters.

    Args:
        groups: Number of clusters.
        seed: Of k-means.

    Raises:
        InvalidInput: Fewer than two clusters, or fewer frames than clusters.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> RelativeMahalanobis(groups=2).fit(x).score(x).shape
        torch.Size([1000])
    """

    learned = ("whitening", "within", "centres")

    def __init__(self, groups: int = 8, seed: int = 0) -> None:
        require("groups", groups >= 2, "at least 2", groups)
        self.groups, self.seed = groups, seed

    def fit_frames(self, frames: Array) -> None:
        check_enough(frames, groups=self.groups)
        standard = self.standardise(frames)
        means = MiniBatchKMeans(self.groups, random_state=self.seed, n_init=3, batch_size=4096)
        used, nearest = np.unique(means.fit_predict(standard), return_inverse=True)
        centres = np.stack([standard[nearest == i].mean(0) for i in range(len(used))])
        self.whitening = whitening(standard)
        self.within = whitening(standard - centres[nearest])
        self.centres = centres @ self.within

    def score_frames(self, frames: Array) -> Array:
        standard = self.standardise(frames)
        white = standard @ self.whitening
        offsets = (standard @ self.within)[:, None] - self.centres
        return np.vecdot(offsets, offsets).min(1) - np.vecdot(white, white)


class SklearnDetector(OODDetector):
    """Outlier detector or density of scikit-learn, on features in standard deviations.

    The score is minus its `score_samples`, or minus `decision_function` where there is no such
    method. It can't be saved: unpickling runs code.

    Args:
        estimator: IsolationForest, OneClassSVM, KernelDensity, LocalOutlierFactor(novelty=True),
            EllipticEnvelope or another with one of these methods. It is cloned, never changed.

    Raises:
        InvalidInput: It has neither.

    Example:
        >>> from sklearn.ensemble import IsolationForest
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> detector = SklearnDetector(IsolationForest(random_state=0)).fit(x)
        >>> bool(detector.score(torch.full((1, 3), 9.0)) > detector.score(x).quantile(0.99))
        True
    """

    learned = ("probe_scores",)
    saveable = False

    def __init__(self, estimator: BaseEstimator) -> None:
        if hasattr(estimator, "score_samples"):
            self.method = "score_samples"
        elif hasattr(estimator, "decision_function") and is_outlier_detector(estimator):
            self.method = "decision_function"
        else:
            raise InvalidInput(
                "estimator: expected one of scikit-learn's outlier detectors or densities, with "
                f"score_samples or decision_function, got {estimator!r}; a LocalOutlierFactor "
                "needs novelty=True."
            )
        self.estimator = estimator

    def fit_frames(self, frames: Array) -> None:
        self.fitted_estimator: Any = clone(self.estimator).fit(self.standardise(frames))
        self.probe_scores = self.score_frames(frames[:_PROBES])

    def score_frames(self, frames: Array) -> Array:
        return -getattr(self.fitted_estimator, self.method)(self.standardise(frames))


class Epistemic(OODDetector):
    """Epistemic uncertainty of a reward model: the standard deviation of a frame's reward.

    Its features are `ood.features.observation_action`. The scores are the model's; `fit` only
    learns mean and scale, for explanations. The scorer is a snapshot, so a refit of the model needs
    another detector and another threshold. It can't be saved; save the model.

    Args:
        scorer: `model.frame_scorer()`.

    Example:
        >>> from rewardmodels import Clips, Comparisons, DeepEnsemble, fit
        >>> clips = Clips(torch.randn(4, 5, 2), torch.randn(4, 5, 1))
        >>> comparisons = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
        >>> scorer = fit(DeepEnsemble(members=3), comparisons, epochs=1).frame_scorer()
        >>> Epistemic(scorer).fit(torch.randn(20, 3)).score(torch.randn(7, 3)).shape
        torch.Size([7])
    """

    learned = ("probe_scores",)
    saveable = False

    def __init__(self, scorer: FrameScorer) -> None:
        self.scorer = scorer

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing: two scorers differ by their scores, which are in the state."""
        return {}

    def fit_frames(self, frames: Array) -> None:
        self.probe_scores = self.score_frames(frames[:_PROBES])

    def score_frames(self, frames: Array) -> Array:
        spec = self.scorer.spec
        size = int(np.prod(spec.observation))
        actions = frames[:, size:].reshape(len(frames), *spec.action)
        if spec.discrete_actions:
            actions = actions.astype(np.int64)
        observations = frames[:, :size].reshape(len(frames), *spec.observation)
        _, std = self.scorer.batch(observations, actions)
        return std.astype(np.float64)


class Joint(OODDetector):
    r"""Several detectors as one: the largest or the mean of their standardised scores.

    Each is fitted to the first part of the training frames. The rest, held out, give mean and
    standard deviation of its scores: those of its own training frames are too low.

    Args:
        detectors: At least one.
        columns: First and last (excluded) feature that each sees; None for all. So one may see
            transitions `(obs, act, obs)`, and another the observations in them.
        combine: "max" or "mean".
        held_out: Share of the training frames, the last.

    Raises:
        InvalidInput: No detectors, columns for another number of them, an unknown way to combine,
            or a share that isn't in (0, 1).

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> joint = Joint([Mahalanobis(), Mahalanobis()], [None, (0, 1)]).fit(x)
        >>> joint.detector_names(torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]]))
        ['Mahalanobis', 'Mahalanobis of features 0 to 1']
    """

    learned = ("usual", "spread")

    def __init__(
        self,
        detectors: Sequence[OODDetector],
        columns: Sequence[tuple[int, int] | None] | None = None,
        combine: Literal["max", "mean"] = "max",
        held_out: float = 0.2,
    ) -> None:
        self.detectors = list(detectors)
        self.columns = list(columns) if columns is not None else [None] * len(self.detectors)
        n, m = len(self.detectors), len(self.columns)
        valid, expected = n > 0 and n == m, "at least one of each, and as many"
        require("detectors, columns", valid, expected, f"{n} and {m}")
        require("combine", combine in ("max", "mean"), "'max' or 'mean'", repr(combine))
        require("held_out", 0 < held_out < 1, "a share in (0, 1)", held_out)
        self.combine: Literal["max", "mean"] = combine
        self.held_out = held_out

    @property
    def saveable(self) -> bool:  # type: ignore[override]  # depends on the detectors
        """True if each of the detectors is."""
        return all(detector.saveable for detector in self.detectors)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, with the fingerprints of the detectors in their place."""
        prints = [detector.fingerprint for detector in self.detectors if detector.fitted]
        return {**super().settings, "detectors": prints}

    def check_state(self) -> None:
        super().check_state()
        for detector in self.detectors:
            detector.check_state()

    def detector_names(self, features: Tensor) -> list[str]:
        frames = self.check_frames(features)
        names = []
        for which, frame in zip(self._scores(frames).argmax(0), frames, strict=True):
            seen = torch.from_numpy(self._select(frame[None], which))
            name, columns = self.detectors[which].detector_names(seen)[0], self.columns[which]
            names.append(f"{name} of features {columns[0]} to {columns[1]}" if columns else name)
        return names

    def fit_frames(self, frames: Array) -> None:
        split = round(len(frames) * (1 - self.held_out))
        held_out, expected = len(frames) - split, "at least two frames to fit to and two held out"
        require("features", min(split, held_out) >= 2, expected, f"{split} and {held_out}")
        for i, detector in enumerate(self.detectors):
            detector.fit(torch.from_numpy(self._select(frames[:split], i)))
        self.usual, self.spread = np.zeros((2, len(self.detectors), 1))
        self.spread += 1
        scores = self._scores(frames[split:])
        self.usual = scores.mean(1, keepdims=True)
        self.spread = np.maximum(scores.std(1, keepdims=True), _SMALLEST_SCALE)

    def score_frames(self, frames: Array) -> Array:
        scores = self._scores(frames)
        return scores.max(0) if self.combine == "max" else scores.mean(0)

    def explain_frames(self, frames: Array) -> Array:
        """Explanation of the detector with the highest score, frame by frame."""
        highest, explained = self._scores(frames).argmax(0), np.zeros_like(frames)
        for i, detector in enumerate(self.detectors):
            rows = np.flatnonzero(highest == i)
            if len(rows):
                first, last = self.columns[i] or (0, frames.shape[1])
                explained[rows, first:last] = detector.explain_frames(self._select(frames[rows], i))
        return explained

    def _scores(self, frames: Array) -> Array:
        """Standardised scores `(D, B)` of each detector."""
        scores = [d.evaluate(self._select(frames, i)) for i, d in enumerate(self.detectors)]
        return (np.stack(scores) - self.usual) / self.spread

    def _select(self, frames: Array, i: int) -> Array:
        """Features that detector i sees."""
        columns = self.columns[i]
        return frames if columns is None else frames[:, columns[0] : columns[1]]


def as_array(value: Tensor | Array) -> Array:
    """Return a tensor's numbers, or the array itself."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def whitening(centred: Array) -> Array:
    """Return `(F, F)`, which turns the covariance of `centred` `(B, F)` into the identity."""
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    return vectors / np.sqrt(np.maximum(values, 0) + _RIDGE)


def check_enough(frames: Array, **numbers: int) -> None:
    """Raise InvalidInput for fewer frames than one of these numbers, with its name."""
    n = len(frames)
    for name, value in numbers.items():
        require("features", n >= value, f"at least {name} = {value} frames", n)


def _check_finite(frames: Array) -> None:
    if not np.isfinite(frames).all():
        row = int(np.flatnonzero(~np.isfinite(frames).all(1))[0])
        raise InvalidInput(f"features: expected finite numbers, got NaN or infinity in row {row}.")
