"""Choose which pairs to have compared next, by a fitted model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from active import all_pairs
from experiments.offline.people import describe, put_questions
from experiments.offline.run import FittedRun
from experiments.registry import make_named
from experiments.studies import check_least
from rewardmodels import Calibrated, Clips
from rewardmodels.saving import write_text_atomically
from rewardmodels.tables import PreferenceTable

MOST_PAIRS = 20_000  # of items, among which queries are chosen


@dataclass(frozen=True)
class AskConfig:
    """Settings of the choice.

    Args:
        run: Directory of `rewardmodels fit`.
        file: Pairs that may be compared, or single items, any two of which may be (of one group,
            if the file has groups).
        n: Number of pairs.
        strategy: Registered name or import path, with arguments or without.
        out: CSV for them; None for `ask.csv` in the run's directory.
        label: Put them before people, by `rewardmodels label RUN`; the next fit uses the answers.
        show: What people see of an item: text with columns' names in braces, such as "{title} for
            {price}"; None for all columns of the item by name.
        seed: Of the strategy's draws.
        trust: Import the model's class, though it isn't one of rewardmodels.

    Raises:
        InvalidInput: A number out of range.
    """

    run: Path
    file: Path
    n: int = 50
    strategy: str = "GreedyInformation"
    out: Path | None = None
    label: bool = False
    show: str | None = None
    seed: int = 0
    trust: bool = False

    def __post_init__(self) -> None:
        check_least(self, n=1, seed=0)


def ask_file(config: AskConfig) -> pd.DataFrame:
    """Choose n pairs, and write the rows of the file that hold them.

    Returns:
        Of pairs, the `row` of each; of items, the rows `first` and `second`. Beside them the
        present `probability` that the second is preferred. Most wanted first where the strategy
        has an order.

    Raises:
        InvalidInput: A directory without a fit, other features, or fewer pairs than n.
        UnknownName: No such strategy.
        UnreadableFile: A damaged model or file.
    """
    torch.set_num_threads(1)
    strategy = make_named("strategy", config.strategy)
    run = FittedRun(config.run)
    model = run.model(trust=config.trust)
    frame, table = run.read(config.file)
    draw = torch.Generator().manual_seed(config.seed)
    if isinstance(table, PreferenceTable):
        clips, pairs = table.comparisons.clips, table.comparisons.pairs
        rows = table.rows[:, None].expand(-1, 2)
        of_side = [_of_side(frame, side) for side in run.columns.sides(frame)]
    else:
        clips, pairs = table.clips, _pairs(table.groups, len(table))
        rows, of_side = pairs, [frame, frame]
    candidates = torch.randperm(len(pairs), generator=draw)[:MOST_PAIRS]
    chosen = candidates[_select(strategy, model, clips, pairs[candidates], config.n, draw)]
    asked, places = clips[pairs[chosen].flatten()], torch.arange(2 * len(chosen)).view(-1, 2)
    found = pd.DataFrame(rows[chosen].numpy(), columns=["first", "second"])
    probability = model.posterior(asked).preference(places)
    found["probability"] = probability.double().cpu().numpy()
    texts = [
        describe(part.iloc[row].to_dict(), config.show)
        for pair in rows[chosen].tolist()
        for part, row in zip(of_side, pair, strict=True)
    ]
    if isinstance(table, PreferenceTable):
        found = found.rename(columns={"first": "row"}).drop(columns="second")
    out = config.out or config.run / "ask.csv"
    write_text_atomically(out, found.to_csv(index=False))
    print(f"{len(found):,} pairs of {len(pairs):,}, by {config.strategy}: {out}")
    if config.label:
        put_questions(config.run, asked, places, texts)
        print(f"To answer them: rewardmodels label {shlex.quote(str(config.run))}")
    return found


def _of_side(frame: pd.DataFrame, side: str) -> pd.DataFrame:
    """Columns of one side, without its prefix."""
    columns = {name: name.removeprefix(f"{side}_") for name in map(str, frame.columns)}
    mine = {name: short for name, short in columns.items() if name in (side, f"{side}_{short}")}
    return frame[list(mine)].rename(columns=mine)


def _select(
    strategy: object, model: Calibrated, clips: Clips, pairs: torch.Tensor, n: int,
    draw: torch.Generator,
) -> torch.Tensor:  # fmt: skip
    used, places = pairs.unique(return_inverse=True)
    chosen: torch.Tensor = strategy.select(  # type: ignore[attr-defined]
        model.posterior(clips[used]), places, n, generator=draw
    )
    return chosen


def _pairs(groups: torch.Tensor | None, n: int) -> torch.Tensor:
    """Pairs `(Q, 2)` of items that may be compared: those of one group."""
    if groups is None:
        return all_pairs(n)
    members = [(groups == group).nonzero().squeeze(1) for group in groups.unique()]
    return torch.cat([of[all_pairs(len(of))] for of in members if len(of) > 1])
