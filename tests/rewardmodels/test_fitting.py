"""Fits: repeatable, interruptible, and never worse than before."""

import logging
import random
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from rewardmodels import (
    Clips,
    Comparisons,
    DeepEnsemble,
    Epinet,
    FitDiverged,
    FitOptions,
    InvalidInput,
    LaplaceHead,
    PairBatch,
    fit,
    fitting,
)
from rewardmodels.fitting import TrainingSet, sharing

from .data import one_input as some


def small(**settings: Any) -> DeepEnsemble:
    return DeepEnsemble(**{"members": 2, "hidden": (8,), "learning_rate": 1e-2, **settings})


def plain(**settings: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet["enable_checkpointing"] = False
    return L.Trainer(**{**quiet, "accelerator": "cpu", **settings})


def state(model: DeepEnsemble) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class At(L.Callback):
    """Does something at the start of one epoch, counted from 0."""

    def __init__(self, epoch: int, what: Callable[[L.LightningModule], None]) -> None:
        self.epoch, self.what, self.begun = epoch, what, 0

    def on_train_epoch_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        self.begun += 1
        if trainer.current_epoch == self.epoch:
            self.what(model)


def poison(model: L.LightningModule) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def interrupt(model: L.LightningModule) -> None:
    raise KeyboardInterrupt


def test_global_generators_are_left_as_they_were():
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    fit(small(), some(), epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


class Spy(DeepEnsemble):
    """Writes down which comparisons it was trained on, and how many at a time."""

    def loss(self, batch: PairBatch) -> torch.Tensor:
        self.trained_on = {*getattr(self, "trained_on", ()), *batch.index.tolist()}
        self.sizes = [*getattr(self, "sizes", ()), len(batch.index)]
        return super().loss(batch)


def held_out_rows(n: int, seed: int = 0, **options: Any) -> set[int]:
    model = Spy(members=1, hidden=())
    fit(model, some(120)[:n], epochs=2, seed=seed, options=FitOptions(**options))
    rows = set(range(n)) - model.trained_on
    assert model.fit_report is not None
    assert model.fit_report.held_out == len(rows)
    return rows


def test_what_is_held_out_stays_so_when_comparisons_are_added():
    early, late = held_out_rows(50), held_out_rows(120)
    assert 5 <= len(early) < len(late) < 40
    assert early == {row for row in late if row < 50}
    assert held_out_rows(50, seed=1) != early
    assert held_out_rows(15) == held_out_rows(60, held_out=0.0) == set()  # few are all learned from


def test_minibatches_hold_every_row_once_an_epoch():
    model = Spy(members=1, hidden=())
    fit(model, some(50), epochs=3, options=FitOptions(batch_size=20, held_out=0.0))
    assert model.sizes == [20, 20, 10] * 3


def test_large_minibatches_are_split_and_steps_stay_the_same(monkeypatch):
    options = FitOptions(batch_size=20, held_out=0.0)
    whole, split = Spy(members=1, hidden=(4,)), Spy(members=1, hidden=(4,))
    fit(whole, some(60), epochs=3, novelty="off", options=options)
    monkeypatch.setattr(fitting, "_NUMBERS_AT_ONCE", 2 * 8 * 5)  # five pairs of clips
    fit(split, some(60), epochs=3, novelty="off", options=options)
    assert split.sizes == [5] * 12 * 3
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    expected = pytest.approx(whole.fit_report.train_log_loss, rel=1e-4)
    assert split.fit_report.train_log_loss == expected
    trainer = plain(max_epochs=1, accumulate_grad_batches=2)
    fit(split, some(60), options=FitOptions(trainer=trainer))
    assert trainer.accumulate_grad_batches == 2


def held_out_loss(model: DeepEnsemble, answers: Comparisons) -> float:
    p = model.posterior(answers.clips).preference(answers.pairs)
    return float(torch.nn.functional.binary_cross_entropy(p, answers.preference))


def test_keeps_the_best_epoch_and_stops_when_it_gets_no_better():
    answers, histories = some(60), []

    class Scores(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
            histories.append(float(trainer.callback_metrics["held_out_log_loss"]))

    # Answers by lot: what is learned from some only harms the others.
    draw = torch.Generator().manual_seed(0)
    noise = Comparisons(
        answers.clips, answers.pairs, torch.bernoulli(torch.full((60,), 0.5), generator=draw)
    )
    model = small(learning_rate=3e-2)
    rows = sorted(held_out_rows(60, held_out=0.4))
    trainer = plain(max_epochs=100, callbacks=[Scores()])
    fit(model, noise, options=FitOptions(patience=5, held_out=0.4, trainer=trainer))
    report = model.fit_report
    assert report is not None
    assert report.epochs == int(np.argmin(histories)) + 1
    assert len(histories) == report.epochs + 5 < 100
    assert report.held_out_log_loss == pytest.approx(min(histories), rel=1e-6)
    # The kept weights, not the last ones, answer.
    assert held_out_loss(model, noise[rows]) == pytest.approx(min(histories), rel=1e-4)


@pytest.mark.parametrize(("steps", "patience"), [(5, 5), (10, 5), (25, 2)])
def test_a_long_epoch_takes_more_of_the_patience_and_is_undone_if_no_better(
    steps, patience, monkeypatch
):
    monkeypatch.setattr(fitting, "_LONG_EPOCH", 10)
    started: list[tuple[float, torch.Tensor]] = []

    class Starts(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            started.append((trainer.optimizers[0].param_groups[0]["lr"], weights))

    answers = some(60)
    draw = torch.Generator().manual_seed(0)
    answers = replace(answers, preference=torch.rand(60, generator=draw).round())  # by lot
    size = -(-(60 - len(held_out_rows(60))) // steps)
    trainer = plain(max_epochs=100, callbacks=[Starts()])
    options = FitOptions(batch_size=size, patience=5, trainer=trainer)
    model = fit(small(learning_rate=0.1), answers, novelty="off", options=options)
    best = model.fit_report.epochs
    assert len(started) == best + patience < 100
    rates = [rate for rate, _ in started[best:]]
    if steps <= 10:
        assert set(rates) == {0.1}
    else:
        assert rates[1] == rates[0] / 4
        torch.testing.assert_close(started[best][1], started[best + 1][1], rtol=0, atol=0)


@pytest.mark.parametrize("predictor", [LaplaceHead, Epinet, DeepEnsemble])
def test_no_step_of_a_fit_or_of_a_posterior_copies_most_of_the_clips(
    predictor, monkeypatch, tmp_path
):
    """They may be in a memory-mapped file that is larger than memory."""
    n = 300
    np.save(tmp_path / "items.npy", np.random.default_rng(0).standard_normal((2 * n + 1, 4)))
    clips = Clips.of_items(np.load(tmp_path / "items.npy", mmap_mode="c"))
    pairs = torch.arange(2 * n).view(n, 2)  # all items but one
    copied = []
    trusted = Clips._trusted.__func__

    def spy(cls: type[Clips], tensors: dict[str, torch.Tensor]) -> Clips:
        whole = clips.observations.untyped_storage().data_ptr()
        if tensors["observations"].untyped_storage().data_ptr() != whole:
            copied.append(len(tensors["observations"]))
        return trusted(cls, tensors)

    monkeypatch.setattr(Clips, "_trusted", classmethod(spy))
    monkeypatch.setattr("rewardmodels.model._FRAMES_AT_ONCE", 50)
    monkeypatch.setattr("rewardmodels.novelty._MOST_COMPARISONS", 20)
    answers = Comparisons(clips, pairs, torch.arange(n) % 2)
    model = fit(predictor(hidden=(4,)), answers, epochs=2)
    # What is held out is in memory, about 15%.
    assert 0 < max(copied) < 0.25 * len(clips)
    copied.clear()
    assert len(model.posterior(clips).variance) == len(clips)
    assert not copied


def test_an_absurd_learning_rate_is_given_and_undone():
    model = fit(small(), some(), epochs=3)
    before, report = state(model), model.fit_report
    frames = torch.randn(5, 2), torch.zeros(5, 1)
    belief = model.frame_posterior(*frames).samples
    model.learning_rate = 1e30
    # Other inputs too, so that a normalisation which isn't put back shows.
    with pytest.raises(FitDiverged, match=r"DeepEnsemble: .*epoch \d.*Lower the learning rate"):
        fit(model, some(shift=10.0), epochs=5)
    assert model.fitted
    assert same(state(model), before)
    assert model.fit_report == report
    assert torch.equal(model.frame_posterior(*frames).samples, belief)


@pytest.mark.parametrize("held_out", [0.0, 0.15])
def test_weights_that_break_in_an_epochs_last_step_are_not_kept(held_out):
    class Late(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, model: Any, *rest: Any) -> None:
            if trainer.current_epoch == 2 and trainer.is_last_batch:
                poison(model)

    model = small()
    trainer = plain(max_epochs=3, callbacks=[Late()])
    with pytest.raises(FitDiverged, match="epoch 3"):
        fit(
            model,
            some(),
            options=FitOptions(held_out=held_out, trainer=trainer),
        )
    assert model.fitted
    assert model.fit_report is not None
    assert model.fit_report.epochs == 2
    assert model.posterior(some().clips).mean.isfinite().all()


def test_a_first_fit_that_diverges_leaves_nothing_to_ask():
    model = small(learning_rate=1e30)
    with pytest.raises(FitDiverged):
        fit(model, some(), epochs=5)
    assert not model.fitted
    model.learning_rate = 1e-2
    assert fit(model, some(), epochs=2).fitted


@pytest.mark.parametrize("epoch", [0, 3])
def test_ctrl_c_keeps_the_best_so_far_and_the_next_one_works(epoch):
    model = fit(small(), some(), epochs=1)
    before, handler = state(model), signal.getsignal(signal.SIGINT)
    callback = At(epoch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(model, some(), options=FitOptions(trainer=plain(max_epochs=9, callbacks=[callback])))
    assert callback.begun == epoch + 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.fitted
    assert not model.training
    assert same(state(model), before) is (epoch == 0)
    assert np.isfinite(held_out_loss(model, some()))
    assert fit(model, some(), epochs=1).fitted


def test_a_first_fit_that_is_interrupted_has_its_novelty():
    model, options = small(), FitOptions(trainer=plain(max_epochs=9, callbacks=[At(2, interrupt)]))
    with pytest.raises(KeyboardInterrupt):
        fit(model, some(), novelty=0.5, options=options)
    whole = fit(small(), some(), novelty=0.5, epochs=2)
    assert model.novelty.amplitude.all()
    torch.testing.assert_close(model.novelty.amplitude, whole.novelty.amplitude)


def test_another_error_comes_through_and_undoes_nothing_good():
    def broken(model: L.LightningModule) -> None:
        raise OSError("disk full")

    def leaves(model: L.LightningModule) -> None:
        raise SystemExit(3)

    for what, error in ((broken, OSError), (leaves, SystemExit)):
        model = small()
        with pytest.raises(error):
            fit(
                model,
                some(),
                options=FitOptions(trainer=plain(max_epochs=9, callbacks=[At(2, what)])),
            )
        assert model.fitted
        assert np.isfinite(held_out_loss(model, some()))


def test_goes_on_from_where_it_is():
    answers = some(100)
    once = fit(small(learning_rate=1e-3), answers, epochs=5)
    first = held_out_loss(once, answers)
    reference = once.reference_observations.clone()
    fit(once, Comparisons.cat([answers, some(20, seed=4)]), epochs=15)
    fresh = fit(small(learning_rate=1e-3), answers, epochs=1)
    assert held_out_loss(once, answers) < first < held_out_loss(fresh, answers)
    assert torch.equal(once.reference_observations, reference)


def test_a_callers_trainer_keeps_its_own_callbacks_epochs_and_logger(tmp_path: Path):
    stopping = EarlyStopping("held_out_log_loss", patience=1000)
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="held_out_accuracy", mode="max")
    logger = CSVLogger(tmp_path, name="log", version=0)
    counting = At(-1, poison)
    trainer = plain(
        max_epochs=4, enable_checkpointing=True, logger=logger,
        callbacks=[counting, stopping, checkpoint],
    )  # fmt: skip
    before = list(trainer.callbacks)
    model = fit(small(), some(), epochs=99, options=FitOptions(trainer=trainer))
    assert counting.begun == 4
    assert trainer.callbacks == before
    assert stopping.best_score == pytest.approx(model.fit_report.held_out_log_loss)
    assert Path(checkpoint.best_model_path).exists()
    rows = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train_log_loss" in rows[0]
    assert len(rows) == 5


def test_a_trainer_that_runs_nothing_is_refused():
    used = plain(max_epochs=1)
    model = fit(small(), some(), options=FitOptions(trainer=used))
    before = state(model)
    for trainer in (used, plain(max_epochs=0), plain(max_epochs=3, limit_train_batches=0)):
        with pytest.raises(InvalidInput, match="trainer: "):
            fit(model, some(shift=5.0), options=FitOptions(trainer=trainer))
        assert same(state(model), before)


def test_inputs_that_never_change_do():
    clips = Clips(torch.full((4, 3, 2), 7.0), torch.full((4, 3, 1), -1.0))
    answers = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.tensor([1.0, 0.0]))
    model = fit(small(), answers, epochs=2)
    assert float(model.posterior(clips).mean.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"comparisons": some(1)}, "comparisons: expected at least 2 .*got 1"),
        ({"options": FitOptions(held_out=0.9999)}, "held_out: .*leaves some of the 60.*0.9999"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected a whole number .*1.5"),
        ({"seed": -1}, "seed: .*from 0 .*-1"),
        ({"seed": 0.5}, "seed: .*0.5"),
        ({"comparisons": some().clips}, "comparisons: expected Comparisons, got Clips"),
        ({"marks": some()}, "marks: expected Marks, got Comparisons"),
        ({"options": {"patience": 3}}, "options: expected FitOptions, got dict"),
    ],
)
def test_refuses_before_it_starts(arguments, message):
    model = small()
    with pytest.raises(InvalidInput, match=message):
        fit(model, **{"comparisons": some(), **arguments})
    assert model.spec is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("held_out", 1.0),
        ("held_out", -0.1),
        ("patience", 0),
        ("batch_size", 0),
        ("batch_size", 2.5),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(InvalidInput, match=f"{name}: .*got {value}"):
        FitOptions(**{name: value})


def test_refuses_clips_of_other_shapes():
    model = fit(small(), some(), epochs=1)
    before = state(model)
    clips = Clips(torch.zeros(4, 4, 3), torch.zeros(4, 4, 1))
    other = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    with pytest.raises(InvalidInput, match=r"observation=\(2,\).*got .*observation=\(3,\)"):
        fit(model, other)
    assert same(state(model), before)


def test_says_nothing_of_lightnings(capfd, caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(small(), some(), epochs=2)
    out, err = capfd.readouterr()
    assert out == err == ""
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("broken", [False, True])
def test_small_networks_are_fitted_on_one_thread_and_threads_restored(broken, monkeypatch):
    threads: list[int] = []

    def note(model: L.LightningModule) -> None:
        threads.append(torch.get_num_threads())
        if broken:
            raise OSError("disk full")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for most, image in ((100, False), (10, False), (100_000, True)):
            monkeypatch.setattr(fitting, "_ONE_THREAD", most)
            clips = some().clips
            if image:
                pixels = torch.randn(len(clips), 2, 1, 5, 5)
                clips = Clips(pixels, torch.zeros(len(clips), 2, 1))
            answers = Comparisons(clips, some().pairs, some().preference)
            options = FitOptions(trainer=plain(max_epochs=1, callbacks=[At(0, note)]))
            with pytest.raises(OSError, match="disk full") if broken else nullcontext():
                fit(small(members=1), answers, novelty="off", options=options)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 2, 2]


def test_progress_is_shown_when_asked_for(capfd):
    fit(small(), some(), epochs=2, options=FitOptions(progress=True))
    assert "held_out_log_loss" in "".join(capfd.readouterr())


@pytest.mark.gpu
def test_a_gpu_learns_the_same_and_leaves_its_generator():
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    model = fit(
        small(),
        some(200),
        options=FitOptions(trainer=plain(max_epochs=20, accelerator="gpu", devices=1)),
    )
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert model.fit_report.held_out_accuracy > 0.8
    clips = some().clips
    here = model.posterior(clips).samples.cpu()
    there = model.to("cuda").posterior(clips)
    assert there.samples.is_cuda
    torch.testing.assert_close(there.samples.cpu(), here, atol=1e-3, rtol=1e-3)
    pairs = some().pairs
    torch.testing.assert_close(
        there.preference(pairs.cuda()).cpu(), model.cpu().posterior(clips).preference(pairs),
        atol=1e-3, rtol=1e-3,
    )  # fmt: skip
    assert there.rsample(3, torch.Generator().manual_seed(0)).is_cuda


def kept_back(n: int, groups: torch.Tensor | None) -> torch.Tensor:
    options = FitOptions(held_out=0.3, groups=groups)
    return TrainingSet.gather(some(n), None, None, options, seed=1).held_out


def test_groups_are_held_out_together_and_stay_so():
    groups = torch.arange(60) // 6 % 7
    kept = kept_back(60, groups)
    for group in range(7):
        assert len(kept[groups == group].unique()) == 1
    assert 0 < kept.sum() < 60
    longer = torch.cat([groups, torch.arange(20)])
    assert torch.equal(kept_back(80, longer)[:60], kept)
    # Each comparison by itself is the same as no groups.
    each = torch.arange(60)
    assert torch.equal(kept_back(60, each), kept_back(60, None))
    with pytest.raises(InvalidInput, match="groups: expected a number for each of 60"):
        fit(small(), some(60), options=FitOptions(groups=groups[:3]))


def drawn_pairs(n: int, clips: int, seed: int = 0) -> Comparisons:
    """Each comparison with clips of its own, which are copies of a few."""
    draw = np.random.default_rng(seed)
    which = np.stack([draw.choice(clips, 2, replace=False) for _ in range(n)])
    observations = torch.randn(clips, 3, 2, generator=torch.Generator().manual_seed(seed))
    copies = Clips(observations[which.flatten()], torch.zeros(2 * n, 3, 1))
    return Comparisons(copies, np.arange(2 * n).reshape(n, 2), draw.integers(2, size=n))


def test_comparisons_that_share_clips_are_held_out_together():
    # Of five clips any two comparisons meet, at the latest by a third.
    parts = [drawn_pairs(8, 5, seed) for seed in range(30)]
    answers = Comparisons.cat(parts)
    groups = sharing(answers)
    expected = torch.arange(30).repeat_interleave(8) * 8
    assert (groups // 8 * 8 == expected).all()  # none reaches into another part
    assert float((groups == expected).float().mean()) > 0.8
    held_out = TrainingSet.gather(answers, None, None, FitOptions(held_out=0.3), seed=0).held_out
    assert 0.1 < held_out.float().mean() < 0.5
    for group in groups.unique():
        assert len(held_out[groups == group].unique()) == 1


def test_groups_that_share_clips_stay_small_and_as_they_are():
    answers = drawn_pairs(200, 6)
    groups = sharing(answers)
    assert max(groups.bincount()) == 10
    assert torch.equal(sharing(answers[:120]), groups[:120])

    # A single group isn't held out whole.
    clips = Clips(torch.arange(10.0).view(10, 1, 1), torch.zeros(10, 1, 1))
    star = Comparisons(clips, [[0, i] for i in range(1, 10)], [1.0] * 9)
    options = FitOptions(held_out=0.99)
    assert TrainingSet.gather(star, None, None, options, 0).held_out.all()
    model = fit(small(members=1), star, epochs=1, options=options)
    assert model.fit_report.held_out == 0


def test_a_minibatch_is_the_rows_it_says():
    draw = torch.Generator().manual_seed(0)
    clips = Clips(torch.randn(20, 4, 3, generator=draw), torch.randn(20, 4, 1, generator=draw))
    pairs = torch.randperm(20, generator=draw).view(10, 2)
    answers = Comparisons(clips, pairs, torch.rand(10, generator=draw))
    data = TrainingSet.gather(answers, None, None, FitOptions(), seed=0)
    batch = data.batch(torch.tensor([9, 2]))
    assert batch.index.tolist() == [9, 2]
    assert torch.equal(batch.first.observations, clips.observations[pairs[[9, 2], 0]])
    assert torch.equal(batch.second.observations, clips.observations[pairs[[9, 2], 1]])
    assert torch.equal(batch.preference, answers.preference[[9, 2]])
