"""fit: teaches any RewardModel from comparisons, with Lightning's Trainer underneath."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import FitDiverged, InvalidInput
from rewardmodels.model import PairBatch, RewardModel

AnyModel = TypeVar("AnyModel", bound=RewardModel)

MIN_COMPARISONS = 2
_MIN_HELD_OUT = 5  # fewer held-out answers than this say nothing about when to stop


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        epochs: Passes over the training comparisons.
        train_log_loss: Mean loss of the epoch whose weights were kept, nats per comparison.
        held_out_log_loss: The same on comparisons kept back; NaN without any.
        held_out_accuracy: Share of decided (not tied) held-out answers that were predicted;
            NaN without any.
        held_out: How many comparisons were kept back.
    """

    epochs: int
    train_log_loss: float
    held_out_log_loss: float
    held_out_accuracy: float
    held_out: int


def fit(
    model: AnyModel,
    comparisons: Comparisons,
    *,
    trainer: L.Trainer | None = None,
    epochs: int = 200,
    patience: int = 20,
    batch_size: int = 64,
    held_out: float = 0.15,
    seed: int = 0,
) -> AnyModel:
    """Fits a model to comparisons, and goes on from where it is if it was fitted before.

    A share of the comparisons is kept back; training stops when they have not been predicted
    better for `patience` epochs, and the best weights are kept. Which ones are kept back
    depends on their place and the seed alone, so that adding answers moves none across.
    What happened stands in `model.fit_report`.

    Args:
        model: Any predictor.
        comparisons: Q answers.
        trainer: A Lightning Trainer, for other devices, loggers or callbacks. Its own
            `max_epochs` then holds instead of `epochs`.
        epochs: The most passes over the comparisons.
        patience: Epochs without a better held-out log loss before stopping.
        batch_size: Comparisons per step.
        held_out: Share kept back, from 0 (none: all epochs are run) to below 1.
        seed: Of initial weights, the order of minibatches and what is kept back. The global
            random state is left as it was.

    Returns:
        The same model.

    Raises:
        InvalidInput: Too few comparisons, or clips of other shapes than the model has learned.
        FitDiverged: The loss stopped being finite; the weights before this fit, or the best
            epoch's, are back in place.

    Example:
        >>> from rewardmodels import Clips, Comparisons, DeepEnsemble
        >>> draw = torch.Generator().manual_seed(0)
        >>> clips = Clips(torch.randn(20, 5, 2, generator=draw), torch.zeros(20, 5, 1))
        >>> pairs = torch.arange(20).view(10, 2)
        >>> worth = clips.observations[..., 0].sum(1)
        >>> better = (worth[pairs[:, 1]] > worth[pairs[:, 0]]).float()
        >>> model = fit(DeepEnsemble(members=3), Comparisons(clips, pairs, better), epochs=5)
        >>> model.posterior(clips).mean.shape
        torch.Size([20])
    """
    if len(comparisons) < MIN_COMPARISONS:
        raise InvalidInput(
            f"comparisons: expected at least {MIN_COMPARISONS} answers to learn from, got "
            f"{len(comparisons)}."
        )
    if not 0 <= held_out < 1:
        raise InvalidInput(f"held_out: expected a share from 0 to below 1, got {held_out}.")
    kept_back = torch.from_numpy(np.random.default_rng(seed).random(len(comparisons)) < held_out)
    if kept_back.sum() < _MIN_HELD_OUT:
        kept_back[:] = False

    with isolated_randomness(seed), _quiet():
        model.initialise(comparisons.clips)
        model.observe(comparisons.compact().clips)
        model.train()
        keeper = _KeepBest(comparisons[kept_back].compact(), patience)
        trainer = trainer or L.Trainer(max_epochs=epochs, **_PLAIN)
        trainer.callbacks.append(keeper)  # type: ignore[attr-defined]
        answers = _Answers(comparisons, (~kept_back).nonzero().squeeze(1))
        try:
            trainer.fit(model, DataLoader(answers, batch_size, shuffle=True, collate_fn=_as_is))
        finally:
            trainer.callbacks.remove(keeper)  # type: ignore[attr-defined]
            keeper.restore(model)
    if keeper.diverged:
        raise FitDiverged(
            f"{type(model).__name__}: the training loss stopped being finite in epoch "
            f"{keeper.epoch}; the last good weights are back. Lower the learning rate, or look for "
            "extreme inputs."
        )
    model.fit_report = keeper.report
    return model


@contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Seeds torch's global generator inside the block, and puts it back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class _Answers(Dataset[PairBatch]):
    """Serves whole minibatches by index, so that nothing is collated one by one."""

    def __init__(self, comparisons: Comparisons, rows: Tensor) -> None:
        self.comparisons, self.rows = comparisons, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> PairBatch:
        index = self.rows[places]
        first, second = self.comparisons.pairs[index].T
        clips = self.comparisons.clips
        return PairBatch(clips[first], clips[second], self.comparisons.preference[index], index)


class _KeepBest(L.Callback):
    """Keeps the weights of the best epoch, and says when to stop."""

    def __init__(self, held_out: Comparisons, patience: int) -> None:
        self.held_out, self.patience = held_out, patience
        self.report: FitReport | None = None
        self.diverged = False
        self.epoch = 0
        self.best = float("inf")
        self.losses: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        self.kept = _copy(model)

    def on_train_epoch_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        self.losses, self.epoch = [], self.epoch + 1

    def on_train_batch_end(
        self, trainer: L.Trainer, model: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        assert isinstance(model, RewardModel)
        train = float(torch.stack(self.losses).mean())
        if not np.isfinite(train):
            self.diverged = trainer.should_stop = True
            return
        test, accuracy = self._score(model)
        # Without held-out answers every epoch counts as better: the last one is kept.
        if not test >= self.best:
            self.best = test if len(self.held_out) else float("inf")
            self.kept = _copy(model)
            self.report = FitReport(self.epoch, train, test, accuracy, len(self.held_out))
        elif self.report and self.epoch - self.report.epochs >= self.patience:
            trainer.should_stop = True

    def restore(self, model: RewardModel) -> None:
        """Puts the kept weights back, and settles the model if it has learned anything."""
        if not hasattr(self, "kept"):
            return
        model.load_state_dict(self.kept, strict=False)
        if self.report or model.fitted:
            model.eval()
            model.settle()
            model.fitted = True

    def _score(self, model: RewardModel) -> tuple[float, float]:
        if not len(self.held_out):
            return float("nan"), float("nan")
        model.eval()
        with torch.no_grad():
            model.settle()
            belief = model.believe(self.held_out.clips.to(model.device))
            pairs = self.held_out.pairs.to(model.device)
            second = belief.preference(pairs, mistake_rate=model.mistake_rate).cpu()
            first = belief.preference(pairs.flip(1), mistake_rate=model.mistake_rate).cpu()
        model.train()
        said = self.held_out.preference
        # Both tails from their own sigmoid: 1 - p would round a near-certain answer to certain.
        tiny = torch.finfo(second.dtype).tiny
        log_second, log_first = second.clamp_min(tiny).log(), first.clamp_min(tiny).log()
        loss = -(said * log_second + (1 - said) * log_first).mean()
        decided = said != 0.5
        right = ((second > first) == (said > 0.5))[decided].float().mean()
        return float(loss), float(right)


def _copy(model: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _as_is(batch: PairBatch) -> PairBatch:
    return batch


# What a Trainer does beyond training costs more than a small fit itself.
_PLAIN: dict[str, Any] = {
    "accelerator": "auto",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning from announcing its devices, and from advising workers for data in memory."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            yield
    finally:
        log.setLevel(level)
