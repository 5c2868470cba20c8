"""Fit a reward model to a file of preferences, and report how far it can be trusted.

Every comparison is predicted by a model that was fitted without its group, and calibrated on other
groups still: in five parts, or, of more than 20,000 comparisons or a file that has a column
`split`, once. The model that is kept is fitted to all comparisons, or to those of the split.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import timeit
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from torch import Tensor
from tqdm import tqdm

from experiments.analysis.page import Origin, markdown, write_page
from experiments.datasets.files import PreferenceFile
from experiments.datasets.people import HumanData, baseline
from experiments.offline.people import answers
from experiments.offline.report import fit_report
from experiments.offline.run import FittedRun
from experiments.offline.selection import candidates, choose, fit_candidate
from experiments.registry import find_class
from experiments.studies import check_least
from experiments.training.run_directory import flatten, versions
from rewardmodels import Calibrated, Clips, Comparisons, InvalidInput, RewardModel
from rewardmodels.calibration import log_loss
from rewardmodels.fitting import sharing
from rewardmodels.tables import Columns, PreferenceTable

Rows = NDArray[np.int64]

FOLDS = 5
LARGE = 20_000  # comparisons from which one part is held out instead of five in turn
CURVE = (0.125, 0.25, 0.5, 1.0)  # shares of the comparisons, each a point of the learning curve
_MOST_NUMBERS = 20_000_000  # that the regressions learn from
_TINY = 1e-12
_LEAST = 20  # comparisons of a point of the learning curve


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit.

    Args:
        file: CSV, Parquet, JSON lines, or the folder of a Hugging Face data set, with a row for
            each comparison.
        out: Directory of the model and its report; replaced if it is a fit's.
        model: A predictor's name or import path, with arguments or without, such as
            "DeepEnsemble(members=7)".
        columns: Names of the file's columns.
        features: Matrix of items (.npy or .safetensors), if the file has row numbers of it.
        embed: Folder of a language model, if the file has texts.
        jobs: Processes that fit to parts at the same time.
        seed: Of the parts, and of initial weights.

    Raises:
        InvalidInput: A number out of range, or a model of another kind.
        UnknownName: No such model.
    """

    file: Path
    out: Path = Path("runs/fit")
    model: str = "LaplaceHead"
    columns: Columns = field(default_factory=Columns)
    features: Path | None = None
    embed: Path | None = None
    jobs: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        find_class("model", self.model)
        check_least(self, jobs=1, seed=0)

    def command(self) -> str:
        """The command with these settings."""
        words, usual = (
            ["rewardmodels", "fit", str(self.file)],
            flatten(asdict(FitConfig(self.file))),
        )
        for name, value in flatten(asdict(self)).items():
            if value != usual[name]:
                words += [f"--{name}", str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Part:
    """A fitted model, and the comparisons that it is tested on.

    Args:
        model: Fitted to other groups than those tested, and calibrated on these.
        trained: Comparisons that it was fitted to.
        tested: `(Q',)` rows.
        chosen: The candidate that was chosen.
    """

    model: Calibrated
    trained: Rows
    tested: Rows
    chosen: str


def fit_file(config: FitConfig) -> dict[str, Any]:
    """Fit a model to a file of preferences, and write it with a report.

    What people answered to questions of `rewardmodels ask --label`, which is in the directory, is
    used as well. It gets `model.safetensors`, `fit.json` (settings, and the numbers of the report),
    `rows.csv` (the prediction for each row of the file) and `report.html`.

    Returns:
        Key numbers: `accuracy`, `log_loss`, `ece` and others, of predictions on held-out groups.

    Raises:
        InvalidInput: A file that can't be used, with the row, or a directory of something else.
        UnreadableFile: A damaged file.
    """
    torch.set_num_threads(1)
    started = timeit.default_timer()
    run = FittedRun(config.out)
    run.check_writable()
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        table = PreferenceFile(config.file, config.columns, config.features, config.embed).read()
    for warning in noticed:
        print(f"Note: {warning.message}", file=sys.stderr)
    table = _with_answers(table, answers(config.out))
    fitting = _Fitting(config.model, table, config.seed)
    with tqdm(bar_format="{desc}", leave=False) as bar:
        bar.set_description_str("fitting to parts of the comparisons")
        run_all = Parallel(n_jobs=1 if fitting.once else config.jobs)
        found = run_all(delayed(fitting.parts)(*split) for split in fitting.splits())
        parts = [part for of_split in found for part in of_split]
        bar.set_description_str("fitting to fewer comparisons, for the learning curve")
        fitted = range(1 if fitting.once else len(parts))  # each once, though two halves test it
        curve = pd.concat(run_all(delayed(fitting.curve)(parts, number) for number in fitted))
        bar.set_description_str("fitting the model that is kept")
        model, chosen = fitting.kept(parts)
    rows = fitting.predictions(parts)
    report = fit_report(rows, curve, chosen, grouped=table.groups is not None)
    command = config.command()
    about = {"names": table.names, "chosen": chosen, "numbers": dict(report.numbers)}
    run.write(model, rows, {**asdict(config), **about, "command": command})
    seconds = timeit.default_timer() - started
    origin = Origin(command, flatten(asdict(config)), versions(), seconds)
    page = write_page(config.out, report, origin, "fit.html.jinja")
    print(f"{report.sections[0].text.partition(';')[0]}:\n")
    print(markdown([replace(report.sections[0], title="", text="")]).partition("|")[2])
    print(f"Report: {page}")
    return dict(report.numbers)


def _with_answers(table: PreferenceTable, given: Comparisons | None) -> PreferenceTable:
    """The table, and below it what people answered since, as rows of -1 and below.

    An answer is in the group of its first item, if the table has that, else in one of its own.
    """
    if given is None:
        return table
    n, known = len(given), table.comparisons
    groups = tested = None
    if table.groups is not None:
        items = known.clips.observations[known.pairs[:, 0]].numpy()
        of_item = {x.tobytes(): int(g) for x, g in zip(items, table.groups, strict=True)}
        asked = given.clips.observations[given.pairs[:, 0]].numpy()
        new = int(table.groups.max()) + 1
        own = [of_item.get(x.tobytes(), new + k) for k, x in enumerate(asked)]
        groups = torch.cat([table.groups, torch.tensor(own)])
    if table.tested is not None:
        tested = torch.cat([table.tested, torch.zeros(n, dtype=torch.bool)])
    rows = torch.cat([table.rows, -1 - torch.arange(n)])
    return PreferenceTable(Comparisons.cat([known, given]), table.names, rows, groups, tested)


class _Fitting:
    """Fits of one predictor to comparisons of a table, and to parts of them."""

    def __init__(self, model: str, table: PreferenceTable, seed: int) -> None:
        self.table, self.seed = table, seed
        self.candidates = candidates(model)
        self.groups = sharing(table.comparisons) if table.groups is None else table.groups
        self.once = table.tested is not None or len(table) > LARGE

    def comparisons(self, rows: Rows) -> Comparisons:
        return self.table.comparisons[torch.from_numpy(rows)]

    def splits(self) -> Iterator[tuple[Rows, Rows]]:
        """Rows to fit to and to test on; no group is on both sides, but in the file's own split."""
        if self.table.tested is not None:
            tested = self.table.tested.numpy()
            yield np.flatnonzero(~tested), np.flatnonzero(tested)
            return
        folds = min(FOLDS, len(self.groups.unique()))
        if folds < 2:
            raise InvalidInput(
                f"groups: expected at least two, one to fit to and one to test on, got {folds}. "
                "Give rows that don't belong together another group, or no column of groups."
            )
        by_group = GroupKFold(folds, shuffle=True, random_state=self.seed)
        splits = by_group.split(self.groups, groups=self.groups)
        yield from itertools.islice(splits, 1 if self.once else folds)

    def parts(self, train: Rows, test: Rows) -> list[Part]:
        """The part of one split; of a single split two, for each half of what is tested."""
        chosen = choose(self.candidates, self.table.comparisons, self.groups, train, seed=self.seed)
        model, halves = self.fit(chosen, train), [test]
        if self.once:
            draw = np.random.default_rng(self.seed)
            first = (draw.permutation(int(self.groups.max()) + 1) % 2 == 0)[self.groups[test]]
            halves = [half for half in (test[first], test[~first]) if len(half)]
        return [
            Part(
                Calibrated(model).calibrate(
                    self.comparisons(half), random=True, groups=self.groups[half]
                ),
                train,
                half,
                chosen,
            )
            for half in halves
        ]

    def fit(self, chosen: str, rows: Rows) -> RewardModel:
        make, comparisons = self.candidates[chosen], self.comparisons(rows)
        return fit_candidate(make, comparisons, self.groups[rows], seed=self.seed)

    def kept(self, parts: list[Part]) -> tuple[Calibrated, str]:
        """The model that is kept, with the parts' calibration, and the candidate that it is."""
        chosen = Counter(part.chosen for part in parts).most_common(1)[0][0]
        everything = np.arange(len(self.table))
        model: Any = parts[0].model.model if self.once else self.fit(chosen, everything)
        return _with_calibration(model, parts), chosen

    def predictions(self, parts: list[Part]) -> pd.DataFrame:
        """A row for each comparison that was tested, by a model calibrated on other parts."""
        found = [
            predict(_calibrated_on_others(part, parts), self.comparisons(part.tested).compact())
            .join(self.regressions(part))
            .assign(
                row=self.table.rows[part.tested].numpy(),
                preference=self.table.comparisons.preference[part.tested].numpy(),
                group=self.groups[part.tested].numpy(),
            )
            for part in parts
        ]
        return pd.concat(found).sort_values("row", kind="stable", ignore_index=True)

    def regressions(self, part: Part) -> pd.DataFrame:
        """Probabilities by regressions on all features, and on the one that alone does best."""
        at_most = max(_LEAST, _MOST_NUMBERS // len(self.table.names))
        train = np.random.default_rng(self.seed).permutation(part.trained)[:at_most]
        some = np.concatenate([train, part.tested])
        differences = self.table[torch.from_numpy(some)].differences().double().numpy()
        comparisons, groups = self.comparisons(some), self.groups[some].numpy()
        known, asked = np.arange(len(train)), np.arange(len(train), len(some))
        sign = (comparisons.preference.numpy() - 0.5)[known, None]
        spread = np.sqrt(np.square(differences[known]).mean(0)) + 1e-12
        best = int(np.abs((differences[known] * sign).mean(0) / spread).argmax())

        def regression(columns: Any) -> NDArray[np.float64]:
            data = HumanData("file", comparisons, groups, differences[:, columns], {})
            return baseline(data, known, asked)

        return pd.DataFrame(
            {
                "regression": regression(slice(None)),
                "single column": regression([best]),
                "column": self.table.names[best],
            }
        )

    def curve(self, parts: list[Part], number: int) -> pd.DataFrame:
        """Log loss of models fitted to shares of what a part was fitted to."""
        rows, part = [], parts[number]
        calibrated = _calibrated_on_others(part, parts)
        groups, tests = self.groups[part.trained], self.comparisons(part.tested).compact()
        order = np.random.default_rng(self.seed).permutation(np.unique(groups))
        for share in CURVE:
            some = part.trained[np.isin(groups, order[: round(share * len(order))])]
            model, n = calibrated, len(some)
            if share < 1:
                if n < _LEAST:
                    continue
                model = _with_calibration(self.fit(part.chosen, some), [part])
            p = model.posterior(tests.clips).preference(tests.pairs)
            loss = log_loss(p.double().cpu(), tests.preference)
            rows.append({"part": number, "comparisons": n, "log_loss": loss})
        return pd.DataFrame(rows)


def _with_calibration(model: Any, parts: list[Part]) -> Calibrated:
    """The model with the mean calibration of parts, which were fitted to other comparisons."""
    states = [part.model.state() for part in parts]
    temperature = torch.stack([state["temperature"] for state in states]).log().mean().exp()
    scores = torch.cat([state["scores"] for state in states]).sort().values
    found = Calibrated(model)
    found.load_state({"temperature": temperature, "scores": scores})
    return found


def _calibrated_on_others(part: Part, parts: list[Part]) -> Calibrated:
    others = [other for other in parts if other is not part]
    return _with_calibration(part.model.model, others or [part])


def predict(model: Calibrated, comparisons: Comparisons) -> pd.DataFrame:
    """Predictions of Q comparisons.

    Returns:
        Columns `probability` that the second is preferred, and of the difference of returns, second
        minus first, `mean`, `std` and `novelty`, the share of its variance that comes from values
        outside the range of what was compared.
    """
    pairs = comparisons.pairs
    posterior = model.posterior(comparisons.clips)
    mean, variance = posterior.difference(pairs)
    root = _novelty_root(model, comparisons.clips)
    novel = (root[pairs[:, 1]] - root[pairs[:, 0]]).square().sum(1)
    columns = {
        "probability": posterior.preference(pairs),
        "mean": mean,
        "std": variance.sqrt(),
        "novelty": novel / variance.clamp_min(_TINY),
    }
    return _frame(columns)


def predict_items(model: Calibrated, items: Clips) -> pd.DataFrame:
    """Predictions of N items: `mean` and `std` of the reward, and `novelty` as of `predict`."""
    posterior = model.posterior(items)
    variance = posterior.variance
    novel = _novelty_root(model, items).square().sum(1)
    columns = {
        "mean": posterior.mean,
        "std": variance.sqrt(),
        "novelty": novel / variance.clamp_min(_TINY),
    }
    return _frame(columns)


def _novelty_root(model: Calibrated, clips: Clips) -> Tensor:
    fitted: Any = model.model
    root: Tensor = fitted.novelty_root(clips)
    return root / (model.temperature * min(1.0, model.temperature))


def _frame(columns: dict[str, Tensor]) -> pd.DataFrame:
    return pd.DataFrame({name: value.double().cpu().numpy() for name, value in columns.items()})
