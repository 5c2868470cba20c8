"""Fitting of reward models to all kinds of feedback, with Lightning's Trainer underneath."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
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
from rewardmodels.errors import FitDiverged, InvalidInput, check_positive, is_whole, require
from rewardmodels.model import FitReport, PairBatch, RewardModel
from rewardmodels.novelty import NoveltySetting, check_novelty

AnyModel = TypeVar("AnyModel", bound=RewardModel)

MIN_COMPARISONS = 2
_MOST_TOGETHER = 10  # comparisons, so that a small pool of clips isn't held out, or kept, as one
_MIN_HELD_OUT = 5  # fewer held-out comparisons than this are no guide to when to stop
# Weights of networks over vectors up to which one thread is quicker on a machine with other work:
# 0.5 s against 15 s for LaplaceHead with its defaults, 3.2 against 5.4 s for a million weights.
_ONE_THREAD = 1 << 20
_LONG_EPOCH = 250  # steps, of 16,000 comparisons in minibatches of 64
_SMALLER_STEPS = 4.0  # divisor of the learning rate, after a long epoch that was no better
_NUMBERS_AT_ONCE = 1 << 23  # observed, in one pass; gradients of a step's passes are added up


@dataclass(frozen=True)
class FitOptions:
    """Minibatches and early stopping of `fit`.

    Args:
        batch_size: Comparisons per step. Where their observations are many numbers, as of images,
            a step's gradient is added up over smaller parts, so that memory stays within bounds.
        patience: Epochs without a better held-out log loss before stopping. Where an epoch has more
            than 250 minibatches, as many epochs as it takes for 250 times this number of
            minibatches (with 100,000 comparisons and the defaults 4 epochs, not 20); and after one
            without a better loss training goes on from the best weights with a quarter of the
            learning rate.
        held_out: Share of the feedback held out, from 0 (none: all epochs are run) to below 1.
        groups: A number for each comparison. Those of one number are held out together, such as
            all comparisons of one person: else held-out ones are no guide to new people. None for
            groups of up to ten that share clips, by their contents: what was learned of a clip
            in one comparison would else be tested in another, and a fit to it by heart kept.
        trainer: A Lightning Trainer, for other devices, loggers or callbacks, which find the
            numbers of `FitReport` under their names at the end of each epoch. Its own
            `max_epochs` then replaces `epochs` of `fit`. It counts the epochs of earlier fits too,
            so give each fit a new one.
        progress: Show a progress bar; without effect on a trainer, which has its own setting.

    Raises:
        InvalidInput: A number out of range.
    """

    batch_size: int = 64
    patience: int = 20
    held_out: float = 0.15
    groups: Sequence[int] | Tensor | None = None
    trainer: L.Trainer | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size, patience=self.patience)
        require("held_out", 0 <= self.held_out < 1, "a share from 0 to below 1", self.held_out)


@contextmanager
def _restored_threads() -> Iterator[None]:
    """Restore torch's number of threads after the block."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_restored_threads()
def fit(
    model: AnyModel,
    comparisons: Comparisons | None = None,
    *,
    marks: Marks | None = None,
    ratings: Ratings | None = None,
    epochs: int = 200,
    seed: int = 0,
    novelty: NoveltySetting = "learned",
    options: FitOptions | None = None,
) -> AnyModel:
    """Fit a model to feedback, from its current weights if it was fitted before.

    Feedback is comparisons, marks of good and bad parts of clips, and ratings of clips, in any
    mixture; marks and ratings are turned into comparisons (see `Marks` and `Ratings`).

    A share of it is held out. Training stops when the held-out log loss has not improved for
    `patience` epochs, and the best weights are kept. What is held out depends only on the seed and
    on its place among the feedback of its kind, so that it stays held out when feedback is added;
    nothing is held out while that would be fewer than five. Marks of one clip are held out
    together. The result is in `model.fit_report`. Interrupted (Ctrl-C), the model keeps the best
    weights so far, and KeyboardInterrupt is raised.

    Args:
        model: Any predictor.
        comparisons: Q comparisons.
        marks: Parts of clips that are good or bad.
        ratings: Ratings of single clips.
        epochs: Maximum number of passes over the feedback.
        seed: Of initial weights, the order of minibatches and what is held out. The global random
            state is left as it was.
        novelty: Uncertainty outside the range of the compared frames (see `Novelty`): "learned" by
            pseudo-shifts, again once there are half as many comparisons again; "off"; or an
            amplitude for all inputs, where at 1 an input that is two standard deviations (of a
            constant input, two units) out of its range matters as much as all that was learned.
        options: Minibatches, early stopping, progress bar and Trainer; None for `FitOptions()`.

    Returns:
        The same model.

    Raises:
        InvalidInput: Arguments of other types, too few comparisons, clips of other shapes than in
            earlier fits, a number out of range, or a trainer that has no epoch left.
        FitDiverged: The loss or the posterior stopped being finite; the model is back at the best
            epoch, or as before this fit.

    Example:
        >>> from rewardmodels import Clips, Comparisons, DeepEnsemble
        >>> draw = torch.Generator().manual_seed(0)
        >>> clips = Clips(torch.randn(20, 5, 2, generator=draw), torch.zeros(20, 5, 1))
        >>> pairs = torch.arange(20).view(10, 2)
        >>> returns = clips.observations[..., 0].sum(1)
        >>> better = (returns[pairs[:, 1]] > returns[pairs[:, 0]]).float()
        >>> model = fit(DeepEnsemble(members=3), Comparisons(clips, pairs, better), epochs=5)
        >>> model.posterior(clips).mean.shape
        torch.Size([20])
    """
    require("model", isinstance(model, RewardModel), "a RewardModel", repr(model))
    kinds: dict[str, tuple[object, type]] = {
        "comparisons": (comparisons, Comparisons),
        "marks": (marks, Marks),
        "ratings": (ratings, Ratings),
        "options": (options, FitOptions),
    }
    for name, (value, kind) in kinds.items():
        valid = value is None or isinstance(value, kind)
        require(name, valid, kind.__name__, type(value).__name__)
    check_positive(epochs=epochs)
    valid = is_whole(seed) and 0 <= seed < 1 << 63
    require("seed", valid, "a whole number from 0 to below 2^63", seed)
    check_novelty(novelty)
    options = options or FitOptions()
    data = TrainingSet.gather(comparisons, marks, ratings, options, seed)
    used, held_out = data.comparisons, data.held_out
    expected = f"at least {MIN_COMPARISONS} to learn from, marks and ratings included"
    require("comparisons", len(used) >= MIN_COMPARISONS, expected, len(used))
    one_group = options.groups is None and len(used) <= _MOST_TOGETHER
    if held_out.sum() < _MIN_HELD_OUT or (one_group and held_out.all()):
        held_out[:] = False
    expected = f"a share that leaves some of the {len(used)} comparisons to learn from"
    require("held_out", not held_out.all(), expected, options.held_out)

    with isolated_randomness(seed), _quiet():
        model.initialise(used.clips)
        assert model.spec is not None
        if not model.spec.image and sum(p.numel() for p in model.parameters()) <= _ONE_THREAD:
            torch.set_num_threads(1)
        stopping = _EarlyStopping(
            model, used[~held_out].view(), used[held_out].compact(), options.patience
        )
        steps = math.ceil(int((~held_out).sum()) / options.batch_size)
        if steps > _LONG_EPOCH:
            stopping.long, stopping.patience = True, -(-options.patience * _LONG_EPOCH // steps)
        # Our own trainer has no logger.
        stopping.logs = options.trainer is not None or options.progress
        model.before_fit(used.view().clips)
        model.train()
        trainer = options.trainer or L.Trainer(
            max_epochs=epochs, enable_progress_bar=options.progress, **_PLAIN
        )
        # First, so that the caller's callbacks find what it logs.
        trainer.callbacks.insert(0, stopping)  # type: ignore[attr-defined]
        batches = _Batches(data, (~held_out).nonzero().squeeze(1))
        size = options.batch_size
        parts = math.ceil(size * 2 * used.clips.observations[0].numel() / _NUMBERS_AT_ONCE)
        parts = min(max(1, parts), size)
        loader = DataLoader(
            batches, math.ceil(size / parts), shuffle=True, collate_fn=lambda batch: batch
        )
        accumulated = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = accumulated * parts
        try:
            with _interruptible():
                trainer.fit(model, loader)
        finally:
            trainer.accumulate_grad_batches = accumulated
            trainer.callbacks.remove(stopping)  # type: ignore[attr-defined]
            stopping.restore(model)
            if stopping.report is not None and not stopping.diverged:
                with isolated_randomness(seed):
                    model.update_novelty(used, novelty)  # also of a fit that was interrupted
    if stopping.diverged:
        raise FitDiverged(
            f"{type(model).__name__}: the loss or the posterior stopped being finite in epoch "
            f"{stopping.epoch}; the last good weights are back. Lower the learning rate, or look "
            "for extreme inputs."
        )
    ran = f"epoch {trainer.current_epoch}, max_epochs {trainer.max_epochs}"
    got = f"one that ran none ({ran}); give each fit a new one"
    require("trainer", stopping.report is not None, "one that runs at least one epoch", got)
    return model


@contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block, and restore them after it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Comparisons, with those that marks and ratings are turned into, and a held-out mask.

    Each row depends only on its place among the feedback of its kind, so that it stays the same
    when feedback of any kind is added.

    Args:
        comparisons: Q comparisons: those given, then those of marks, then those of ratings.
        index: `(Q,)` long, place of each among the feedback of its kind.
        held_out: `(Q,)` bool.
    """

    comparisons: Comparisons
    index: Tensor
    held_out: Tensor

    @classmethod
    def gather(
        cls,
        comparisons: Comparisons | None,
        marks: Marks | None,
        ratings: Ratings | None,
        options: FitOptions,
        seed: int,
    ) -> TrainingSet:
        """Join all kinds of feedback; arguments as of `fit`.

        Raises:
            InvalidInput: Groups that aren't as many as the comparisons, no feedback, or frames of
                one kind of feedback that have another shape than those of another.
        """
        share, groups = options.held_out, options.groups
        parts, index, held_out = [], [], []
        if comparisons is not None:
            parts.append(comparisons)
            index.append(torch.arange(len(comparisons)))
            together = sharing(comparisons) if groups is None else groups
            held_out.append(_draw_held_out(len(comparisons), share, together, [seed]))
        elif groups is not None:
            raise InvalidInput("groups: expected None without comparisons to be grouped.")
        for kind, feedback in enumerate((marks, ratings), start=1):
            if feedback is None or not len(feedback):
                continue
            # Two marks of one clip share their frames, so they are held out together.
            clip = feedback.rows[:, 0] if isinstance(feedback, Marks) else None
            rows = feedback.compared_rows().cpu()
            parts.append(feedback.comparisons())
            index.append(rows)
            held_out.append(_draw_held_out(len(feedback), share, clip, [seed, kind])[rows])
        expected = "comparisons, marks or ratings to learn from"
        require("comparisons", bool(parts), expected, "none")
        joined = parts[0] if len(parts) == 1 else Comparisons.cat(parts)
        return cls(joined, torch.cat(index), torch.cat(held_out))

    def batch(self, rows: Tensor) -> PairBatch:
        """Return these rows as one minibatch."""
        some = self.comparisons
        first, second = some.pairs[rows].T
        return PairBatch(
            some.clips[first], some.clips[second], some.preference[rows], self.index[rows]
        )


class _Batches(Dataset[PairBatch]):
    """Serves whole minibatches by index, so that nothing is collated one by one."""

    def __init__(self, data: TrainingSet, rows: Tensor) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> PairBatch:
        return self.data.batch(self.rows[places])


def sharing(comparisons: Comparisons) -> Tensor:
    """Groups `(Q,)` of up to ten comparisons that share clips, each the number of its first row.

    A comparison joins the earliest group that has one of its clips and isn't full, so that groups
    stay as they are when comparisons are added. Clips are the same where their frames are.
    """
    clips = comparisons.clips
    observations, actions = (x.cpu().numpy() for x in (clips.observations, clips.actions))
    contents = zip(observations, actions, strict=True)
    which = [hash((one.tobytes(), other.tobytes())) for one, other in contents]
    groups: list[int] = []
    of_clip: dict[int, int] = {}
    size: Counter[int] = Counter()
    for row, pair in enumerate(comparisons.pairs.tolist()):
        known = [of_clip[which[clip]] for clip in pair if which[clip] in of_clip]
        group = min((group for group in known if size[group] < _MOST_TOGETHER), default=row)
        for clip in pair:
            joined = of_clip.get(which[clip])
            if joined is None or size[joined] >= _MOST_TOGETHER:
                of_clip[which[clip]] = group
        size[group] += 1
        groups.append(group)
    return torch.tensor(groups, dtype=torch.long)


def _draw_held_out(
    n: int, share: float, groups: Sequence[int] | Tensor | None, seed: Sequence[int]
) -> Tensor:
    """Draw `(n,)` bool, about `share` of them True, equal within a group."""
    draws = np.random.default_rng(seed).random(n)
    if groups is not None:
        expected = f"a number for each of {n} comparisons"
        require("groups", len(groups) == n, expected, len(groups))
        # A group's draw is that of its first row, so that it stays when rows are added.
        _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        draws = draws[first[group.reshape(-1)]]
    return torch.from_numpy(draws < share)


class _EarlyStopping(L.Callback):
    """Keeps the weights of the best epoch, and stops when the held-out loss no longer improves."""

    def __init__(
        self, model: RewardModel, trained_on: Comparisons, held_out: Comparisons, patience: int
    ) -> None:
        self.kept = _copy(model)
        self.trained_on, self.held_out, self.patience = trained_on, held_out, patience
        self.report: FitReport | None = None
        self.diverged = False
        self.long = False
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
        # Lightning divides the loss by the number of passes that a step adds up.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.losses.append(loss * len(batch.index))
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
            model.log_dict({"train_log_loss": train}, prog_bar=True)
            if len(self.held_out):
                scores = {"held_out_log_loss": test, "held_out_accuracy": accuracy}
                model.log_dict(scores, prog_bar=True)
        # Without held-out comparisons every epoch counts as better: the last one is kept.
        if not len(self.held_out) or test < self.best:
            self.best = test
            self.kept = _copy(model)
            self.report = FitReport(self.epoch, train, test, accuracy, len(self.held_out))
        elif self.report and self.epoch - self.report.epochs >= self.patience:
            trainer.should_stop = True
        elif self.report and self.long:
            # Steps of this size only go round the minimum, for many epochs of their own.
            model.load_state_dict(self.kept, strict=False)
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] /= _SMALLER_STEPS

    def restore(self, model: RewardModel) -> None:
        """Put the kept weights back, and complete the posterior if an epoch was good."""
        model.load_state_dict(self.kept, strict=False)
        model.eval()
        if self.report:
            with torch.no_grad():
                model.after_epoch()
                model.after_fit(self.trained_on)
                for compared in (self.trained_on, self.held_out):
                    if len(compared):
                        model.extend_novelty(compared.clips)
            # `after_fit` may have changed how certain the posterior is.
            test, accuracy = self._score(model)
            self.report = replace(self.report, held_out_log_loss=test, held_out_accuracy=accuracy)
            model.fitted, model.fit_report = True, self.report

    def _sound(self, model: RewardModel) -> bool:
        # The last step of an epoch may break weights that no loss has seen, or make them so large
        # that returns overflow.
        few = model.reference_observations[:64], model.reference_actions[:64]
        with torch.no_grad():
            posterior = model.compute_posterior(Clips(*(part[:, None] for part in few)))
        return bool(posterior.mean.isfinite().all())

    def _score(self, model: RewardModel) -> tuple[float, float]:
        if not len(self.held_out):
            return float("nan"), float("nan")
        with torch.no_grad():
            posterior = model.compute_posterior(self.held_out.clips.to(model.device))
            pairs = self.held_out.pairs.to(model.device)
            second = posterior.preference(pairs, random_answer_rate=model.random_answer_rate).cpu()
            first = posterior.preference(
                pairs.flip(1), random_answer_rate=model.random_answer_rate
            ).cpu()
        preference = self.held_out.preference
        # Both tails from their own sigmoid: 1 - p would round a near-certain answer to certain.
        tiny = torch.finfo(second.dtype).tiny
        log_second, log_first = second.clamp_min(tiny).log(), first.clamp_min(tiny).log()
        loss = -(preference * log_second + (1 - preference) * log_first).mean()
        decided = preference != 0.5
        right = ((second > first) == (preference > 0.5))[decided].float().mean()
        return float(loss), float(right)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, in place of Lightning's SystemExit."""
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None


def _copy(model: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# All that a Trainer does beyond training costs more than a small fit itself.
_PLAIN: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,  # else every GPU of the machine, each with a copy of the caller's script
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's list of devices and its advice on workers for data in memory."""
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
