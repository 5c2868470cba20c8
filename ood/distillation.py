"""A detector that notices where a random function, learned from familiar frames, goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ood.detectors import Array, OODDetector
from ood.networks import BATCH, Members, check_hidden, keep, layers_of, names_of, train
from rewardmodels import InvalidInput
from rewardmodels.fitting import isolated_randomness
from rewardmodels.networks import PRIOR_GAIN
from rewardmodels.scoring import pass_hidden


class RandomNetworkDistillation(OODDetector):
    r"""$\frac1H \lVert f(x) - g(x) \rVert^2$: where a learned copy g of a random network f errs.

    Burda et al. 2019 (arXiv:1810.12894, §2.2): g is trained on familiar frames alone, and has no
    reason to be right elsewhere.

    Args:
        hidden: Widths of the hidden layers of both.
        outputs: H.
        steps: Training steps, of 256 frames.
        seed: Of both networks and the batches.

    Raises:
        InvalidInput: A number below one.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> detector = RandomNetworkDistillation(steps=200).fit(x)
        >>> bool(detector.score(torch.full((1, 3), 9.0)) > detector.score(x).max())
        True
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 32,
        steps: int = 3000,
        seed: int = 0,
    ) -> None:
        hidden = tuple(hidden)
        check_hidden(hidden)
        for name, value in (("outputs", outputs), ("steps", steps)):
            if value < 1:
                raise InvalidInput(f"{name}: expected at least 1, got {value}.")
        self.hidden, self.outputs, self.steps, self.seed = hidden, outputs, steps, seed
        layers = len(hidden) + 1
        self._ARRAYS = (*names_of("target", layers), *names_of("copy", layers))

    def _fit(self, features: Array) -> None:
        frames = torch.from_numpy(self._standard(features)).float()
        widths = (frames.shape[1], *self.hidden, self.outputs)
        with isolated_randomness(self.seed):
            target, copy = Members(1, widths, gain=PRIOR_GAIN), Members(1, widths)
            target.requires_grad_(False)

            def loss() -> Tensor:
                rows = frames[torch.randint(len(frames), (BATCH,))][None]
                return F.mse_loss(copy(rows), target(rows))

            train(copy, loss, self.steps)
        keep(self, "target", target)
        keep(self, "copy", copy)

    def _score(self, features: Array) -> Array:
        frames = self._standard(features).astype(np.float32)
        said = []
        for name in ("target", "copy"):
            *hidden, (weight, bias, _) = layers_of(self, name, len(self.hidden) + 1)
            said.append((pass_hidden(frames, hidden) @ weight + bias)[0].astype(np.float64))
        apart = said[0] - said[1]
        score: Array = np.vecdot(apart, apart) / self.outputs
        return score
