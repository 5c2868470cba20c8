"""Run directories as `learn` writes them, made in no time, and a parser of report pages."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import yaml  # type: ignore[import-untyped]

from experiments.envs.rendering import write_video


def make_run(
    path: Path,
    reward: str = "learned",
    *,
    task: str = "Hopper-v5",
    seed: int = 0,
    rounds: int = 25,
    final: float = 812.4,
    ended: bool = True,
    frames: bool = True,
    video: bool = True,
) -> Path:
    """A run directory with plausible numbers."""
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(reward)])
    learned = reward == "learned"
    settings = {"task": task, "reward": reward, "seed": seed, "ppo": {"n_steps": 2048}, "out": None}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    number = np.arange(1, rounds + 1)
    done = number / max(rounds, 1)
    returns = 25 * rng.normal(size=rounds) + (
        final / (1 + np.exp(6 - 11 * done)) if final > 0 else final
    )
    if rounds:
        returns[0] = np.nan  # the first round may end before an episode does
    metrics = {
        "step": 20_000 * number,
        "comparisons": np.minimum(100, 5 * number) * learned,
        "task_return": returns,
        "seconds": 31.5 * number,
    }
    if learned:
        metrics |= {
            "held_out_accuracy": 0.5 + 0.38 * (1 - np.exp(-4 * done)),
            "held_out_log_loss": 0.72 - 0.4 * (1 - np.exp(-4 * done)),
            "train_log_loss": 0.69 - 0.5 * (1 - np.exp(-6 * done)),
        }
    pd.DataFrame(metrics).to_csv(path / "metrics.csv", index=False)
    if ended:
        result = {
            "task": task,
            "reward": reward,
            "seed": seed,
            "steps": 20_000 * rounds,
            "comparisons": 100 if learned else 0,
            "final_return": final,
            "final_returns": (final + 18 * np.linspace(-1, 1, 10)).round(2).tolist(),
            "held_out_accuracy": 0.873 if learned else None,
            "reward_correlation": 0.8 if learned else None,
            "wall_seconds": 787.5,
            "versions": {"torch": "2.8.0", "mujoco": "3.3.2"},
            "video_note": None if video else "MuJoCo found neither EGL nor OSMesa.",
        }
        (path / "result.json").write_text(json.dumps(result))
    if frames and learned:
        true = np.clip(rng.gamma(4, 0.4, 3000), 0, 4)
        std = 0.08 + 0.1 * np.abs(true - 1.5)
        predicted = 0.6 * true - 0.4 + std * rng.normal(size=3000)
        np.savez(path / "frames.npz", predicted=predicted, std=std, true=true)
    if video and ended:
        shade = np.linspace(0, 255, 20, dtype=np.uint8)[:, None, None, None]
        write_video(np.broadcast_to(shade, (20, 64, 96, 3)).copy(), path / "video.mp4", fps=20)
    return path


def column(run: Path, name: str) -> list[float]:
    """A column as the csv module alone reads it, empty cells left out."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


class Page(HTMLParser):
    """A page's tags with their attributes, its text, and its tables by the heading above."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = self.heading = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "h2":
            self.heading = ""
        elif tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        elif tag in ("th", "td"):
            self.tables[self.heading][-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        tag = self.tags[-1][0] if self.tags else ""
        if tag == "h2" and not self.heading:
            self.heading = data
        elif tag in ("th", "td") and data.strip():
            self.tables[self.heading][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
