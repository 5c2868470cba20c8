"""Detectors by how many training frames are near: neighbours, and a mixture of normals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.mixture import GaussianMixture

from ood.detectors import Array, OODDetector
from rewardmodels import InvalidInput


class KNN(OODDetector):
    r"""Distance to the k-th nearest training frame (Sun et al. 2022, arXiv:2204.06507).

    Euclidean, of features in standard deviations. Makes no assumption about the distribution, so it
    also sees what is strange between familiar frames.

    Of n training frames it keeps no more than `frames`, drawn at random: 4 F + 4 bytes each, 1 MB
    of a million frames of 23 numbers. Distances grow by a factor of $(n / \text{frames})^{1/D}$,
    where the data has D dimensions. All kept frames are compared with: among 8,192 it takes
    0.06 ms, among 100,000 0.6 ms, and of 32,768 transitions of a HalfCheetah SciPy's tree takes 2.5
    times as long for a familiar frame, and 7 times for a strange one.

    Args:
        k: Which neighbour.
        frames: How many training frames are kept.
        seed: Of the draw.

    Raises:
        InvalidInput: A number below one, or fewer training frames than k.

    Example:
        >>> import torch
        >>> detector = KNN(k=2).fit(torch.tensor([[0.0], [1.0], [3.0]]))
        >>> round(detector.score(torch.tensor([[0.0]])).item() * detector.scale.item(), 6)
        1.0
    """

    _ARRAYS = ("kept", "half_norms")
    _BLOCK = 64  # distances of which the smallest is looked at first
    _AT_ONCE = 1 << 22  # distances held at once (16 MiB)

    def __init__(self, k: int = 5, frames: int = 8192, seed: int = 0) -> None:
        for name, value in (("k", k), ("frames", frames)):
            if value < 1:
                raise InvalidInput(f"{name}: expected at least 1, got {value}.")
        if k > frames:
            raise InvalidInput(f"k: expected at most the {frames} frames that are kept, got {k}.")
        self.k, self.frames, self.seed = k, frames, seed

    def _fit(self, features: Array) -> None:
        if len(features) < self.k:
            raise InvalidInput(
                f"features: expected at least k = {self.k} frames, got {len(features)}."
            )
        if len(features) > self.frames:
            draw = np.random.default_rng(self.seed).choice(len(features), self.frames, False)
            features = features[np.sort(draw)]
        standard = self._standard(features).astype(np.float32)
        # One frame a column: the product with a single frame is then twice as quick.
        self.kept = np.ascontiguousarray(standard.T)
        self.half_norms = np.vecdot(standard, standard) / 2

    def _score(self, features: Array) -> Array:
        frames = self._standard(features)
        size = max(1, self._AT_ONCE // len(self.half_norms))
        parts = [frames[i : i + size] for i in range(0, len(frames), size)]
        each = [np.sqrt(self._nearest(row, order)[0][-1]) for row, order in self._rows(parts)]
        return np.array(each)

    def _explain(self, frames: Array) -> Array:
        """Distance to the nearest training frame, feature by feature."""
        standard = self._standard(frames)
        nearest = [self._nearest(row, order)[1][0] for row, order in self._rows([standard])]
        return np.abs(standard - self.kept.T[nearest])

    def _rows(self, parts: list[Array]) -> Iterator[tuple[Array, Array]]:
        for part in parts:
            # Half the squared distance, less the frame's own norm: enough for an order.
            orders = self.half_norms - part.astype(np.float32).dot(self.kept)
            yield from zip(part, orders, strict=True)

    def _nearest(self, frame: Array, order: Array) -> tuple[Array, Array]:
        """Squared distances `(k,)` to the nearest kept frames, in order, and which these are."""
        whole = len(order) // self._BLOCK * self._BLOCK
        blocks = order[:whole].reshape(self._BLOCK, -1).min(0)
        if self.k <= len(blocks):
            # The k-th smallest minimum of blocks bounds the k-th smallest of all: few are below,
            # and to look for them takes a sixth of the time that a partition of all takes.
            near = np.flatnonzero(order <= np.partition(blocks, self.k - 1)[self.k - 1])
        else:
            near = np.arange(len(order))
        # Infinity less infinity, for a frame past the range of single precision.
        near = near if len(near) >= self.k else np.arange(len(order))
        # Anew, and in double precision: the difference of two norms has lost its digits.
        apart = self.kept[:, near].T - frame
        squared = np.vecdot(apart, apart)
        nearest = np.argsort(squared)[: self.k]
        return squared[nearest], near[nearest]


class MixtureDensity(OODDetector):
    r"""$-\log p(x)$ in nats, under a mixture of normal distributions.

    Fitted by scikit-learn's `GaussianMixture` to features in standard deviations.

    Args:
        components: How many normal distributions.
        frames: How many training frames it is fitted to, at most, drawn at random.
        seed: Of the draw and the start.

    Raises:
        InvalidInput: A number below one, or fewer frames than components.

    Example:
        >>> import torch
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> detector = MixtureDensity(components=2).fit(x)
        >>> bool(detector.score(torch.full((1, 3), 9.0)) > detector.score(x).max())
        True
    """

    _ARRAYS = ("factors", "centres", "constants")

    def __init__(self, components: int = 8, frames: int = 50_000, seed: int = 0) -> None:
        for name, value in (("components", components), ("frames", frames)):
            if value < 1:
                raise InvalidInput(f"{name}: expected at least 1, got {value}.")
        self.components, self.frames, self.seed = components, frames, seed

    def _fit(self, features: Array) -> None:
        if len(features) < self.components:
            raise InvalidInput(
                f"features: expected at least components = {self.components} frames, got "
                f"{len(features)}."
            )
        if len(features) > self.frames:
            rows = np.random.default_rng(self.seed).choice(len(features), self.frames, False)
            features = features[rows]
        # Where EM hasn't converged, it still has a density; scikit-learn would warn.
        mixture = GaussianMixture(
            self.components, reg_covar=1e-4, max_iter=200, tol=1e-2, random_state=self.seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mixture.fit(self._standard(features))
        self.factors = mixture.precisions_cholesky_  # (K, F, F)
        self.centres = np.einsum("kf,kfg->kg", mixture.means_, self.factors)[:, None]
        log_det = np.log(np.diagonal(self.factors, axis1=1, axis2=2)).sum(1)
        normal = features.shape[1] / 2 * math.log(2 * math.pi)
        self.constants = np.log(mixture.weights_) + log_det - normal

    def _score(self, features: Array) -> Array:
        apart = self._standard(features) @ self.factors - self.centres
        log_p = self.constants[:, None] - np.vecdot(apart, apart) / 2
        most = log_p.max(0)
        score: Array = -most - np.log(np.exp(log_p - most).sum(0))
        return score
