"""fit: teaches any RewardModel from answers, with Lightning's Trainer underneath."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons, Marks, Ratings
from rewardmodels.errors import FitDiverged, InvalidInput
from rewardmodels.model import FitReport, PairBatch, RewardModel

AnyModel = TypeVar("AnyModel", bound=RewardModel)

MIN_COMPARISONS = 2
_MIN_HELD_OUT = 5  # fewer held-out answers than this say nothing about when to stop


def fit(
    model: AnyModel,
    comparisons: Comparisons | None = None,
    *,
    marks: Marks | None = None,
    ratings: Ratings | None = None,
    trainer: L.Trainer | None = None,
    epochs: int = 200,
    patience: int = 20,
    batch_size: int = 64,
    held_out: float = 0.15,
    groups: Sequence[int] | Tensor | None = None,
    seed: int = 0,
) -> AnyModel:
    """Fits a model to answers, and goes on from where it is if it was fitted before.

    Answers are comparisons, marks of good and bad parts of clips, and ratings of clips, in any
    mixture: each counts as one comparison (`Marks` and `Ratings` say of what).

    A share of the answers is kept back; training stops when they have not been predicted
    better for `patience` epochs, and the best weights are kept. Which ones are kept back
    depends on their place among those of their kind and the seed alone, so that one kept back
    stays so when answers are added; none are while they would be fewer than five. Marks of one
    clip are kept back together. What happened stands in `model.fit_report`. Interrupted
    (Ctrl-C), it keeps the best weights so far and raises KeyboardInterrupt.

    Args:
        model: Any predictor.
        comparisons: Q answers to which of two clips is better; None for none.
        marks: Parts of clips that are good or bad.
        ratings: How good single clips are.
        trainer: A Lightning Trainer, for other devices, loggers or callbacks, which find the
            numbers of `FitReport` under their names at the end of each epoch. Its own
            `max_epochs` then holds instead of `epochs`. It counts the epochs of earlier fits
            too, so give each fit a new one.
        epochs: The most passes over the answers.
        patience: Epochs without a better held-out log loss before stopping.
        batch_size: Answers per step.
        held_out: Share kept back, from 0 (none: all epochs are run) to below 1.
        groups: A number for each comparison. Those of one number are kept back together, such as
            all answers of one person: else the answers kept back say little of new people.
        seed: Of initial weights, the order of minibatches and what is kept back. The global
            random state is left as it was.

    Returns:
        The same model.

    Raises:
        InvalidInput: Too few answers, clips of other shapes than the model has learned, a
            number out of range, or a trainer that has no epoch left.
        FitDiverged: The loss or the belief stopped being finite; the model before this fit, or the
            best epoch's, is back in place.

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
    for name, number in (("epochs", epochs), ("patience", patience), ("batch_size", batch_size)):
        if number < 1:
            raise InvalidInput(f"{name}: expected at least 1, got {number}.")
    if not 0 <= held_out < 1:
        raise InvalidInput(f"held_out: expected a share from 0 to below 1, got {held_out}.")
    answers = Answers.gather(
        comparisons, marks, ratings, held_out=held_out, groups=groups, seed=seed
    )
    said, kept_back = answers.said, answers.kept_back
    if len(said) < MIN_COMPARISONS:
        raise InvalidInput(
            f"comparisons: expected at least {MIN_COMPARISONS} answers to learn from, got "
            f"{len(said)}."
        )
    if kept_back.sum() < _MIN_HELD_OUT:
        kept_back[:] = False
    if kept_back.all():
        raise InvalidInput(
            f"held_out: expected a share that leaves some of the {len(said)} answers to learn "
            f"from, got {held_out}."
        )

    with isolated_randomness(seed), _quiet():
        model.initialise(said.clips)
        keeper = _KeepBest(model, said[~kept_back].compact(), said[kept_back].compact(), patience)
        keeper.logs = trainer is not None  # nobody reads what our own would log
        model.before_fit(said.compact().clips)
        model.train()
        trainer = trainer or L.Trainer(max_epochs=epochs, **_PLAIN)
        # First, so that the caller's callbacks find what it logs.
        trainer.callbacks.insert(0, keeper)  # type: ignore[attr-defined]
        batches = answers.batches((~kept_back).nonzero().squeeze(1))
        # Lightning's type wants batches put together one by one.
        loader = DataLoader(batches, batch_size, shuffle=True, collate_fn=_as_is)  # type: ignore[arg-type]
        try:
            with _interruptible():
                trainer.fit(model, loader)
        finally:
            trainer.callbacks.remove(keeper)  # type: ignore[attr-defined]
            keeper.restore(model)
    if keeper.diverged:
        raise FitDiverged(
            f"{type(model).__name__}: the loss or the belief stopped being finite in epoch "
            f"{keeper.epoch}; the last good weights are back. Lower the learning rate, or look for "
            "extreme inputs."
        )
    if keeper.report is None:
        raise InvalidInput(
            "trainer: expected one that runs at least one epoch, got one that ran none (epoch "
            f"{trainer.current_epoch}, max_epochs {trainer.max_epochs}); give each fit a new one."
        )
    return model


@contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Seeds torch's global generators inside the block, and puts them back after it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class Answers:
    """Comparisons, and what marks and ratings come to as comparisons.

    What concerns one answer depends on its place among those of its kind alone, so that it stays
    when answers of any kind are added.

    Args:
        said: `Q` comparisons: those that were made, then those of marks, then those of ratings.
        index: `(Q,)` long, each one's place among the answers of its kind.
        kept_back: `(Q,)` bool.
    """

    said: Comparisons
    index: Tensor
    kept_back: Tensor

    @classmethod
    def gather(
        cls,
        comparisons: Comparisons | None,
        marks: Marks | None,
        ratings: Ratings | None,
        *,
        held_out: float,
        groups: Sequence[int] | Tensor | None,
        seed: int,
    ) -> Answers:
        """Puts all answers in one list; as `fit` has the arguments.

        Raises:
            InvalidInput: Groups that aren't as many as the comparisons, or frames of one kind of
                answer that have another shape than those of another.
        """
        parts, index, kept_back = [], [], []
        if comparisons is not None:
            parts.append(comparisons)
            index.append(torch.arange(len(comparisons)))
            kept_back.append(_draw(len(comparisons), held_out, groups, [seed]))
        elif groups is not None:
            raise InvalidInput("groups: expected none without comparisons to be grouped.")
        for kind, single in enumerate((marks, ratings), start=1):
            if single is None or not len(single):
                continue
            # Two marks of one clip share their frames: one kept back would be known already.
            clip = single.rows[:, 0] if isinstance(single, Marks) else None
            places = single.places().cpu()
            parts.append(single.comparisons())
            index.append(places)
            kept_back.append(_draw(len(single), held_out, clip, [seed, kind])[places])
        if not parts:
            raise InvalidInput(
                "comparisons: expected answers of some kind to learn from, got none."
            )
        said = parts[0] if len(parts) == 1 else Comparisons.cat(parts)
        return cls(said, torch.cat(index), torch.cat(kept_back))

    def batches(self, rows: Tensor) -> Dataset[PairBatch]:
        """Serves these rows in minibatches, as a `DataLoader` asks for them."""
        return _Batches(self, rows)


class _Batches(Dataset[PairBatch]):
    """Serves whole minibatches by index, so that nothing is collated one by one."""

    def __init__(self, answers: Answers, rows: Tensor) -> None:
        self.answers, self.rows = answers, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> PairBatch:
        rows, said = self.rows[places], self.answers.said
        first, second = said.pairs[rows].T
        index = self.answers.index[rows]
        return PairBatch(said.clips[first], said.clips[second], said.preference[rows], index)


def _draw(
    n: int, share: float, groups: Sequence[int] | Tensor | None, seed: Sequence[int]
) -> Tensor:
    """`(n,)` bool, which answers of a kind are kept back."""
    draws = np.random.default_rng(seed).random(n)
    if groups is not None:
        if len(groups) != n:
            raise InvalidInput(
                f"groups: expected a number for each of {n} comparisons, got {len(groups)}."
            )
        # A group's draw is that of its first answer, so that it stays when answers are added.
        _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        draws = draws[first[group.reshape(-1)]]
    return torch.from_numpy(draws < share)


class _KeepBest(L.Callback):
    """Keeps the weights of the best epoch, and says when to stop."""

    def __init__(
        self, model: RewardModel, trained_on: Comparisons, held_out: Comparisons, patience: int
    ) -> None:
        self.kept = _copy(model)
        self.trained_on, self.held_out, self.patience = trained_on, held_out, patience
        self.report: FitReport | None = None
        self.diverged = False
        self.epoch = 0
        self.best = float("inf")
        self.losses: list[Tensor] = []  # summed over each batch
        self.seen = 0
        self.logs = True

    def on_train_epoch_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        self.losses, self.seen, self.epoch = [], 0, self.epoch + 1

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"].detach() * len(batch.index))
        self.seen += len(batch.index)

    def on_train_epoch_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        assert isinstance(model, RewardModel)
        train = float(torch.stack(self.losses).sum()) / self.seen
        model.eval()
        model.after_epoch()
        test, accuracy = self._score(model)
        sound = self._sound(model) and np.isfinite(train)
        if not sound or (len(self.held_out) and np.isnan(test)):
            self.diverged = trainer.should_stop = True
            return
        model.train()
        if self.logs:
            model.log_dict({"train_log_loss": train})
            if len(self.held_out):
                model.log_dict({"held_out_log_loss": test, "held_out_accuracy": accuracy})
        # Without held-out answers every epoch counts as better: the last one is kept.
        if not len(self.held_out) or test < self.best:
            self.best = test
            self.kept = _copy(model)
            self.report = FitReport(self.epoch, train, test, accuracy, len(self.held_out))
        elif self.report and self.epoch - self.report.epochs >= self.patience:
            trainer.should_stop = True

    def restore(self, model: RewardModel) -> None:
        """Puts the kept weights back, and concludes the fit if anything has been learned."""
        model.load_state_dict(self.kept, strict=False)
        model.eval()
        if self.report:
            with torch.no_grad():
                model.after_epoch()
                model.after_fit(self.trained_on)
            # What was concluded may have made the belief surer or less sure than each epoch's was.
            test, accuracy = self._score(model)
            self.report = replace(self.report, held_out_log_loss=test, held_out_accuracy=accuracy)
            model.fitted, model.fit_report = True, self.report

    def _sound(self, model: RewardModel) -> bool:
        # The last step of an epoch may break weights that no loss has seen, or make them so large
        # that what is believed overflows.
        few = model.reference_observations[:64], model.reference_actions[:64]
        with torch.no_grad():
            belief = model.compute_posterior(Clips(*(part[:, None] for part in few)))
        return bool(belief.mean.isfinite().all())

    def _score(self, model: RewardModel) -> tuple[float, float]:
        if not len(self.held_out):
            return float("nan"), float("nan")
        with torch.no_grad():
            belief = model.compute_posterior(self.held_out.clips.to(model.device))
            pairs = self.held_out.pairs.to(model.device)
            second = belief.preference(pairs, random_answer_rate=model.random_answer_rate).cpu()
            first = belief.preference(
                pairs.flip(1), random_answer_rate=model.random_answer_rate
            ).cpu()
        said = self.held_out.preference
        # Both tails from their own sigmoid: 1 - p would round a near-certain answer to certain.
        tiny = torch.finfo(second.dtype).tiny
        log_second, log_first = second.clamp_min(tiny).log(), first.clamp_min(tiny).log()
        loss = -(said * log_second + (1 - said) * log_first).mean()
        decided = said != 0.5
        right = ((second > first) == (said > 0.5))[decided].float().mean()
        return float(loss), float(right)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C through, which Lightning makes a SystemExit that no caller expects."""
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None


def _copy(model: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _as_is(batch: PairBatch) -> PairBatch:
    return batch


# What a Trainer does beyond training costs more than a small fit itself.
_PLAIN: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,  # else every GPU of the machine, each with a copy of the caller's script
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
            warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            yield
    finally:
        log.setLevel(level)
