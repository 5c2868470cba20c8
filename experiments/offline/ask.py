"""Choose which pairs to have compared next, by a fitted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from active import all_pairs
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
    table = run.table(config.file)
    draw = torch.Generator().manual_seed(config.seed)
    if isinstance(table, PreferenceTable):
        clips, pairs = table.comparisons.clips, table.comparisons.pairs
    else:
        clips, pairs = table.items, _pairs(table.groups, len(table.items))
    candidates = torch.randperm(len(pairs), generator=draw)[:MOST_PAIRS]
    chosen = candidates[_select(strategy, model, clips, pairs[candidates], config.n, draw)]
    if isinstance(table, PreferenceTable):
        found = pd.DataFrame({"row": table.rows[chosen].numpy()})
    else:
        rows = table.rows[pairs[chosen]].numpy()
        found = pd.DataFrame({"first": rows[:, 0], "second": rows[:, 1]})
    some = model.posterior(clips[pairs[chosen].flatten()])
    places = torch.arange(2 * len(chosen)).view(-1, 2)
    found["probability"] = some.preference(places).double().cpu().numpy()
    out = config.out or config.run / "ask.csv"
    write_text_atomically(out, found.to_csv(index=False))
    print(f"{len(found):,} pairs of {len(pairs):,}, by {config.strategy}: {out}")
    return found


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
