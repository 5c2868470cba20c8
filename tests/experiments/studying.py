"""Studies of the cells of `conftest.py`, small data for real studies, and the shortest of runs."""

import numpy as np
import torch

from experiments.datasets.people import HumanData
from experiments.datasets.pools import Pool
from experiments.grid import Run, read_cell, run_cells
from experiments.training.config import LearnConfig
from rewardmodels import Clips, Comparisons, DeepEnsemble

TINY = {
    "task": "Pendulum",
    "steps": 9000,
    "rounds": 3,
    "comparisons": 20,
    "clip_length": 40,
    "candidates": 30,
    "epochs": 3,
    "evaluate": 2,
    "video": False,
}


def tiny(out, **settings) -> LearnConfig:
    """Settings of a run of seconds."""
    model = DeepEnsemble(members=2, hidden=(8,))
    return LearnConfig(**{**TINY, "model": model, **settings}, out=out)


def grid(log, *n, **more):
    return [{"n": k, "log": str(log), **more} for k in n]


def computed(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def names(out):
    return {file.name for file in out.iterdir()}


def finished(out):
    """Settings and result of every finished cell in a directory."""
    records = [read_cell(file) for file in sorted(out.glob(f"{'?' * 20}.json"))]
    return [{**record["cell"], **record["result"]} for record in records]


def run(function, cells, out, **options):
    return run_cells(function, cells, Run(out, **options), progress=False)


def small_pool(weights=(1.0, -2.0)) -> Pool:
    """Four episodes of 60 frames at each of two stages; rewards are linear in the observation."""
    frames = torch.randn(8, 60, 2, generator=torch.Generator().manual_seed(0))
    clips = Clips(frames, torch.zeros(8, 60, 1), rewards=frames @ torch.tensor(weights))
    return Pool("Pendulum", 0, clips, torch.arange(2).repeat_interleave(4), torch.tensor([0, 1]))


def small_people() -> HumanData:
    """120 pairs in groups of two, every tenth undecided, every other one held out as "odd"."""
    clips = Clips.of_items(torch.randn(240, 3, generator=torch.Generator().manual_seed(0)))
    pairs = torch.arange(240).view(120, 2)
    features = clips.observations[pairs, 0].diff(dim=1)[:, 0].double().numpy()
    preference = torch.from_numpy(features[:, 0] > 0).float()
    preference[::10] = 0.5
    known, rows = Comparisons(clips, pairs, preference), np.arange(120)
    return HumanData("trains", known, rows // 2, features, {"odd": rows % 2 == 1})
