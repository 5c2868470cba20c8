"""Detectors made of others: scikit-learn's, a reward model's own doubt, and several in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone, is_outlier_detector
from torch import Tensor

from ood.detectors import Array, OODDetector, as_array
from rewardmodels import InvalidInput
from rewardmodels.scoring import FrameScorer

_SMALLEST_SCALE = 1e-12
# What others have learned isn't ours to see. For the fingerprint, what they say of as many training
# frames stands for it.
_PROBES = 64


class SklearnDetector(OODDetector):
    """Any of scikit-learn's outlier detectors and densities, on features in standard deviations.

    Theirs are high for what is normal, so the score is minus `score_samples`, or minus
    `decision_function` where there is no such method. It can't be saved: reading it back would run
    a stranger's code.

    Args:
        estimator: One with `score_samples`, such as IsolationForest, OneClassSVM, KernelDensity or
            LocalOutlierFactor(novelty=True), or an outlier detector with `decision_function`, such
            as EllipticEnvelope. It is cloned, never changed.

    Raises:
        InvalidInput: It has neither.

    Example:
        >>> from sklearn.ensemble import IsolationForest
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> detector = SklearnDetector(IsolationForest(random_state=0)).fit(x)
        >>> bool(detector.score(torch.full((1, 3), 9.0)) > detector.score(x).quantile(0.99))
        True
    """

    _ARRAYS = ("said",)
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

    def _fit(self, features: Array) -> None:
        self.fitted_estimator: Any = clone(self.estimator).fit(self._standard(features))
        self.said = self._score(features[:_PROBES])

    def _score(self, features: Array) -> Array:
        score: Array = -getattr(self.fitted_estimator, self.method)(self._standard(features))
        return score


class Epistemic(OODDetector):
    """What a reward model doesn't know: the standard deviation of a frame's reward.

    Its features are `ood.features.observation_action`. `fit` only learns which frames are familiar,
    for explanations; the doubt is the model's. As the scorer is a snapshot, a refit of the model
    calls for another, and another threshold. It can't be saved; save the model.

    Args:
        scorer: `model.frame_scorer()`.

    Example:
        >>> from rewardmodels import Clips, Comparisons, DeepEnsemble, fit
        >>> clips = Clips(torch.randn(4, 5, 2), torch.randn(4, 5, 1))
        >>> said = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
        >>> scorer = fit(DeepEnsemble(members=3), said, epochs=1).frame_scorer()
        >>> detector = Epistemic(scorer).fit(torch.randn(20, 3))
        >>> detector.score(torch.randn(7, 3)).shape
        torch.Size([7])
    """

    _ARRAYS = ("said",)
    saveable = False

    def __init__(self, scorer: FrameScorer) -> None:
        self.scorer = scorer

    @property
    def settings(self) -> dict[str, Any]:
        """None: what tells two scorers apart is what they say."""
        return {}

    def _fit(self, features: Array) -> None:
        self.said = self._score(features[:_PROBES])

    def _score(self, features: Array) -> Array:
        spec = self.scorer.spec
        size = int(np.prod(spec.observation))
        actions = features[:, size:].reshape(len(features), *spec.action)
        if spec.discrete_actions:
            actions = actions.astype(np.int64)
        seen = features[:, :size].reshape(len(features), *spec.observation)
        _, std = self.scorer.batch(seen, actions)
        return std.astype(np.float64)


class Joint(OODDetector):
    r"""Several detectors as one: their scores in standard deviations, the largest or the mean.

    Each is fitted to the first part of the training frames. The rest, held out, say what mean and
    standard deviation its score has of familiar frames: of its own training frames a score is too
    low.

    Args:
        detectors: At least one.
        columns: Which features each sees, from and up to; None for all. So one may look at
            transitions `(obs, act, obs)`, and another at the observations in them.
        combine: "max" or "mean".
        held_out: Share of the training frames, the last.

    Raises:
        InvalidInput: No detectors, columns for another number of them, an unknown way to combine,
            or a share that isn't in (0, 1).

    Example:
        >>> from ood.detectors import Mahalanobis
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> joint = Joint([Mahalanobis(), Mahalanobis()], [None, (0, 1)]).fit(x)
        >>> joint.blame(torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]]))
        ['Mahalanobis', 'Mahalanobis of features 0 to 1']
    """

    _ARRAYS = ("usual", "spread")

    def __init__(
        self,
        detectors: Sequence[OODDetector],
        columns: Sequence[tuple[int, int] | None] | None = None,
        combine: Literal["max", "mean"] = "max",
        held_out: float = 0.2,
    ) -> None:
        self.detectors = list(detectors)
        self.columns = list(columns) if columns is not None else [None] * len(self.detectors)
        if not self.detectors or len(self.columns) != len(self.detectors):
            raise InvalidInput(
                "detectors, columns: expected at least one of each, and as many, got "
                f"{len(self.detectors)} and {len(self.columns)}."
            )
        if combine not in ("max", "mean"):
            raise InvalidInput(f"combine: expected 'max' or 'mean', got {combine!r}.")
        if not 0 < held_out < 1:
            raise InvalidInput(f"held_out: expected a share in (0, 1), got {held_out}.")
        self.combine: Literal["max", "mean"] = combine
        self.held_out = held_out

    @property
    def saveable(self) -> bool:  # type: ignore[override]  # as much as each of them is
        """Whether each of the detectors is."""
        return all(detector.saveable for detector in self.detectors)

    @property
    def settings(self) -> dict[str, Any]:
        """What it was constructed with, and the fingerprints of the detectors in it."""
        prints = [detector.fingerprint for detector in self.detectors if detector.fitted]
        return {**super().settings, "detectors": prints}

    def blame(self, features: Tensor) -> list[str]:
        frames = self._checked(as_array(features))
        strangest = self._each(frames).argmax(0)
        found = []
        for which, frame in zip(strangest, frames, strict=True):
            columns = self.columns[which]
            name = self.detectors[which].blame(self._seen(torch.from_numpy(frame)[None], which))[0]
            found.append(f"{name} of features {columns[0]} to {columns[1]}" if columns else name)
        return found

    def _fit(self, features: Array) -> None:
        split = round(len(features) * (1 - self.held_out))
        if min(split, len(features) - split) < 2:
            raise InvalidInput(
                "features: expected at least two frames to fit to and two held out, got "
                f"{split} and {len(features) - split}."
            )
        for i, detector in enumerate(self.detectors):
            detector.fit(torch.from_numpy(self._seen(features[:split], i)))
        self.usual, self.spread = np.zeros((2, len(self.detectors), 1))
        self.spread += 1
        scores = self._each(features[split:])
        self.usual = scores.mean(1, keepdims=True)
        self.spread = np.maximum(scores.std(1, keepdims=True), _SMALLEST_SCALE)

    def _score(self, features: Array) -> Array:
        scores = self._each(features)
        joined: Array = scores.max(0) if self.combine == "max" else scores.mean(0)
        return joined

    def _explain(self, frames: Array) -> Array:
        """What the strangest detector of each frame says."""
        strangest, explained = self._each(frames).argmax(0), np.zeros_like(frames)
        for i, detector in enumerate(self.detectors):
            rows = np.flatnonzero(strangest == i)
            if len(rows):
                seen = torch.from_numpy(self._seen(frames[rows], i))
                first, last = self.columns[i] or (0, frames.shape[1])
                explained[rows, first:last] = detector.explain(seen).numpy()
        return explained

    def _each(self, features: Array) -> Array:
        """`(D, B)` scores of each detector, in standard deviations."""
        each = [
            detector.score_array(self._seen(features, i))
            for i, detector in enumerate(self.detectors)
        ]
        standard: Array = (np.stack(each) - self.usual) / self.spread
        return standard

    def _seen(self, features: Any, i: int) -> Any:
        columns = self.columns[i]
        return features if columns is None else features[:, columns[0] : columns[1]]
