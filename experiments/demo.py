"""Everything in a few minutes: an agent that learns from comparisons, beside one that can't."""

from __future__ import annotations

from pathlib import Path

from experiments.training.config import LearnConfig
from experiments.training.learn import learn
from experiments.training.report import write_report
from experiments.training.run_directory import RunDirectory
from experiments.training.sentences import headline


def demo(
    out: Path = Path("runs/demo"),
    task: str = "HalfCheetah",
    comparisons: int = 100,
    steps: int = 150_000,
    seed: int = 0,
) -> None:
    """Learns a task from comparisons, and beside it from a reward of zero; writes one report.

    A second call goes on where the first was interrupted, or shows what it came to.

    Args:
        out: Where the two runs and their report go.
        task: What is learned.
        comparisons: Answers of a synthetic teacher.
        steps: Environment steps of each agent.
        seed: Of everything drawn at random.
    """
    for arm in ("learned", "zero"):
        config = LearnConfig(
            task=task,
            reward=arm,
            comparisons=comparisons,
            steps=steps,
            rounds=10,
            seed=seed,
            out=Path(out) / arm,
        )
        if not (config.out / "result.json").exists():
            print(f"{task}, {arm} reward, {steps:,} steps", flush=True)
        learn(config, resume=(config.out / "config.yaml").exists())
    learned, zero = Path(out) / "learned", Path(out) / "zero"
    report = write_report(learned, references=[zero])
    print(headline(RunDirectory(learned), [RunDirectory(zero)]))
    print(f"Report: {report}")
