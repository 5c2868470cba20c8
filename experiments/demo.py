"""Demonstration: an agent that learns from comparisons, beside one that gets no reward."""

from __future__ import annotations

from pathlib import Path

from experiments.analysis.page import markdown
from experiments.training.config import LearnConfig
from experiments.training.learn import learn
from experiments.training.report import results_section, write_report
from experiments.training.run_directory import RunDirectory


def demo(
    out: Path = Path("runs/demo"),
    task: str = "HalfCheetah",
    comparisons: int = 100,
    steps: int = 150_000,
    seed: int = 0,
) -> None:
    """Learn a task from comparisons and, for comparison, from zero reward; write one report.

    A second call goes on where the first was interrupted, or shows the result again.

    Args:
        out: Directory of the two runs; the report is in `learned`.
        task: What is learned.
        comparisons: Of a synthetic teacher.
        steps: Environment steps of each agent.
        seed: Of everything drawn at random.
    """
    learned, zero = (RunDirectory(Path(out) / reward) for reward in ("learned", "zero"))
    for run in (learned, zero):
        config = LearnConfig(
            task=task,
            reward="learned" if run is learned else "zero",
            comparisons=comparisons,
            steps=steps,
            rounds=10,
            seed=seed,
            out=run.path,
        )
        if run.result is None:
            with run.locked():  # refuses a directory that can't be written to
                pass
            print(f"{task}, {config.reward} reward, {steps:,} steps", flush=True)
        learn(config, resume=run.exists)
    report = write_report(learned.path, references=[zero.path])
    print(markdown([results_section([learned, zero])]))
    print(f"Report: {report}")
