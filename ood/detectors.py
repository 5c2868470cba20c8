"""OODDetector: how unlike the training data is this frame? And those that need no network."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from rewardmodels import InvalidInput, NotFitted

Array = NDArray[Any]

# A number that never changed in training has no scale of its own; it gets this share of its size,
# so that any real change of it is strange.
CONSTANT = 1e-6
_RIDGE = 1e-6  # of a correlation matrix, whose eigenvalues sum to F


class OODDetector(ABC):
    """How unlike its training data a frame is: higher is always stranger.

    What it is given are features, vectors of F numbers, one a frame (see `ood.features`); those of
    a clip make a detector of clips. A score has no unit that another detector shares: thresholds
    come from `ood.conformal`.

    A subclass gives `_fit` and `_score`, both of arrays: for one frame at a time NumPy takes less
    than half as long as torch. `_ARRAYS` names the attributes that `_fit` leaves behind, from which
    a fingerprint is taken and a file written.
    """

    _ARRAYS: tuple[str, ...] = ()
    saveable: ClassVar[bool] = True
    """Whether settings and arrays are all there is to it."""

    width: int = 0
    """F; 0 before the first fit, and while one is under way."""

    revision: int = 0
    """How many times it has been fitted or restored."""

    @abstractmethod
    def _fit(self, features: Array) -> None:
        """Learns from `(B, F)` finite numbers of double precision."""

    @abstractmethod
    def _score(self, features: Array) -> Array:
        """`(B,)` scores of `(B, F)` finite numbers of double precision."""

    def fit(self, features: Tensor) -> Self:
        """Learns what is familiar, in place of whatever was learned before.

        Args:
            features: `(B, F)`, of B training frames.

        Raises:
            InvalidInput: Another shape, fewer than two frames, or NaN or infinity.
        """
        frames = as_array(features).astype(np.float64, copy=False)
        if frames.ndim != 2 or len(frames) < 2 or not frames.shape[1]:
            raise InvalidInput(
                "features: expected shape (B, F) with B of at least 2 and F of at least 1, got "
                f"{frames.shape}."
            )
        _check_finite(frames)
        self.width, self.revision = 0, self.revision + 1
        self.mean = frames.mean(0)
        self.scale = np.maximum(frames.std(0), CONSTANT * np.maximum(1, np.abs(self.mean)))
        self._fit(frames)
        self.width = frames.shape[1]
        return self

    def score(self, features: Tensor) -> Tensor:
        """How strange each of B frames is.

        Args:
            features: `(B, F)`.

        Returns:
            `(B,)`, double precision; higher is stranger.

        Raises:
            NotFitted: There is nothing to compare with yet.
            InvalidInput: Another shape than that learned from, or NaN or infinity.
        """
        return torch.from_numpy(self.score_array(as_array(features)))

    def score_array(self, features: Array) -> NDArray[np.float64]:
        """As `score`, from array to array, for those who ask one frame at a time."""
        return self.score_checked(self._checked(features))

    def score_checked(self, frames: Array) -> NDArray[np.float64]:
        """As `score_array`, of what is known to have `width` columns of finite numbers.

        To look at a frame twice takes as long as to score it.
        """
        # What overflows is infinitely strange: no warning has to come first.
        with np.errstate(over="ignore", invalid="ignore"):
            scores = np.asarray(self._score(frames), dtype=np.float64)
        return _no_nan(scores)

    def signed(self, features: Tensor) -> Tensor:
        """What is strange about each of B frames, with its direction.

        Args:
            features: `(B, F)`.

        Returns:
            `(B, D)`, double precision: D numbers about 0 for familiar frames, in standard
            deviations and as far as may be uncorrelated. Where a detector has but its score, that
            alone.

        Raises:
            NotFitted: There is nothing to compare with yet.
            InvalidInput: Another shape than that learned from, or NaN or infinity.
        """
        return torch.from_numpy(self.signed_array(as_array(features)))

    def signed_array(self, features: Array) -> NDArray[np.float64]:
        """As `signed`, from array to array."""
        return self.signed_checked(self._checked(features))

    def signed_checked(self, frames: Array) -> NDArray[np.float64]:
        """As `signed_array`, of what is known to have `width` columns of finite numbers."""
        with np.errstate(over="ignore", invalid="ignore"):
            signed = np.asarray(self._signed(frames), dtype=np.float64)
        return _no_nan(signed)

    def explain(self, features: Tensor) -> Tensor:
        """How much each feature had to do with it.

        Args:
            features: `(B, F)`.

        Returns:
            `(B, F)`, at least 0: as a rule the distance from the training mean, in standard
            deviations.

        Raises:
            NotFitted: There is nothing to compare with yet.
            InvalidInput: Another shape than that learned from, or NaN or infinity.
        """
        return torch.from_numpy(self._explain(self._checked(as_array(features))))

    def blame(self, features: Tensor) -> list[str]:
        """Names of the B detectors that found each frame strangest: this one's, unless joint."""
        return [type(self).__name__] * len(features)

    @property
    def fitted(self) -> bool:
        """Whether it may be asked."""
        return self.width > 0

    @property
    def settings(self) -> dict[str, Any]:
        """What it was constructed with."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @property
    def state(self) -> dict[str, Array]:
        """What it has learned.

        Raises:
            NotFitted: Nothing yet.
        """
        self._check_fitted()
        return {name: getattr(self, name) for name in ("mean", "scale", *self._ARRAYS)}

    def restore(self, state: dict[str, Array]) -> Self:
        """Takes back what `state` gave.

        Raises:
            InvalidInput: Arrays that a detector of this class doesn't have, or lacks some it has.
        """
        expected = {"mean", "scale", *self._ARRAYS}
        if set(state) != expected:
            raise InvalidInput(f"state: expected {sorted(expected)}, got {sorted(state)}.")
        for name, value in state.items():
            setattr(self, name, value)
        self.width, self.revision = len(self.mean), self.revision + 1
        return self

    @property
    def fingerprint(self) -> str:
        """A hash of settings and state, by which a threshold knows what it was calibrated for.

        Raises:
            NotFitted: Nothing has been learned yet.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(type(self).__name__.encode())
        digest.update(json.dumps(self.settings, default=repr, sort_keys=True).encode())
        for name, value in sorted(self.state.items()):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()

    def _signed(self, features: Array) -> Array:
        """`(B, D)` of `(B, F)` finite numbers of double precision."""
        return self._score(features)[:, None]

    def _explain(self, frames: Array) -> Array:
        return np.abs(self._standard(frames))

    def _standard(self, frames: Array) -> Array:
        standard: Array = frames - self.mean
        standard /= self.scale
        return standard

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise NotFitted(f"{type(self).__name__}: expected a fitted detector; call fit first.")

    def _checked(self, features: Array) -> Array:
        self._check_fitted()
        if features.ndim != 2 or features.shape[1] != self.width:
            raise InvalidInput(
                f"features: expected shape (B, {self.width}), as learned from, got "
                f"{features.shape}."
            )
        frames = features.astype(np.float64, copy=False)
        _check_finite(frames)
        return frames


class Mahalanobis(OODDetector):
    r"""Distance from the training mean, in standard deviations of the direction.

    $\sqrt{(x - \mu)^\top \Sigma^{-1} (x - \mu)}$ (Lee et al. 2018, arXiv:1807.03888, eq. 2, with
    one class), whose square has a $\chi^2_F$ distribution where features are normal. A millionth is
    added to the diagonal of the correlation matrix, so that features may depend on each other.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> detector = Mahalanobis().fit(x)
        >>> bool(detector.score(x.mean(0, keepdim=True)) < 1e-3)
        True
        >>> detector.explain(x.mean(0) + torch.tensor([[0.0, 5.0, 0.0]])).argmax().item()
        1
    """

    _ARRAYS = ("whitening",)

    def _fit(self, features: Array) -> None:
        self.whitening = whitening(self._standard(features))

    def _signed(self, features: Array) -> Array:
        # Of two matrices `dot` takes half the time of `@`, for one frame.
        white: Array = self._standard(features).dot(self.whitening)
        return white

    def _score(self, features: Array) -> Array:
        white = self._signed(features)
        distance: Array = np.sqrt(np.vecdot(white, white))
        return distance


class RelativeMahalanobis(OODDetector):
    r"""How much farther from the nearest group of the training data than from all of it.

    $\min_k d_k^2(x) - d_0^2(x)$, with squared Mahalanobis distances $d_k$ from the groups' means
    under their common covariance, and $d_0$ from the mean of all (Ren et al. 2021,
    arXiv:2106.09022, §2): directions that vary as much within groups as between them say
    nothing about strangeness, and cancel. It is blind to what is far out in such a direction alone,
    so join it with another (`ood.Joint`). Frames have no labels, so k-means makes the groups.

    Args:
        groups: How many groups.
        seed: Of the groups.

    Raises:
        InvalidInput: Fewer than two groups, or fewer frames than groups.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> RelativeMahalanobis(groups=2).fit(x).score(x).shape
        torch.Size([1000])
    """

    _ARRAYS = ("whitening", "within", "centres")

    def __init__(self, groups: int = 8, seed: int = 0) -> None:
        if groups < 2:
            raise InvalidInput(f"groups: expected at least 2, got {groups}.")
        self.groups, self.seed = groups, seed

    def _fit(self, features: Array) -> None:
        if len(features) < self.groups:
            raise InvalidInput(
                f"features: expected at least {self.groups} frames, one a group, got "
                f"{len(features)}."
            )
        standard = self._standard(features)
        means = MiniBatchKMeans(self.groups, random_state=self.seed, n_init=3, batch_size=4096)
        group = means.fit_predict(standard)
        count = np.bincount(group, minlength=self.groups)
        sums = np.zeros((self.groups, standard.shape[1]))
        np.add.at(sums, group, standard)
        centres = (sums / np.maximum(count, 1)[:, None])[count > 0]
        nearest = (np.cumsum(count > 0) - 1)[group]
        self.whitening = whitening(standard)
        self.within = whitening(standard - centres[nearest])
        self.centres = centres @ self.within

    def _score(self, features: Array) -> Array:
        standard = self._standard(features)
        white, near = standard @ self.whitening, standard @ self.within
        apart = near[:, None] - self.centres
        score: Array = np.vecdot(apart, apart).min(1) - np.vecdot(white, white)
        return score


def _no_nan(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # To see from the sum of squares that there is none takes a fifth as long as to look at each.
    if math.isfinite(np.vdot(values, values)):
        return values
    return np.where(np.isnan(values), np.inf, values)


def as_array(value: Tensor | Array) -> Array:
    """Returns a tensor's numbers, or the array itself."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def whitening(centred: Array) -> Array:
    """Returns `(F, F)`, after which the covariance of these `(B, F)` is the identity."""
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    whitening: Array = vectors / np.sqrt(np.maximum(values, 0) + _RIDGE)
    return whitening


def _check_finite(frames: Array) -> None:
    if not np.isfinite(frames).all():
        row = int(np.flatnonzero(~np.isfinite(frames).all(1))[0])
        raise InvalidInput(f"features: expected finite numbers, got NaN or infinity in row {row}.")
