"""Run directories as `learn` leaves them, made in no time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from experiments.envs.video import write_video

COLUMNS = [
    *("step", "comparisons", "queries", "skipped", "episodes", "task_return", "learned_return"),
    *("held_out_accuracy", "held_out_log_loss", "train_log_loss", "reward_correlation", "seconds"),
]


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
    """A run directory as `learn` leaves it, with plausible numbers."""
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(reward)])
    learned = reward == "learned"
    settings = {"task": task, "reward": reward, "seed": seed, "ppo": {"n_steps": 2048}, "out": None}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    rows: list[dict[str, Any]] = []
    for i in range(rounds):
        done = (i + 1) / rounds
        rising = final * (1 / (1 + np.exp(6 - 11 * done))) if reward != "zero" else final
        row = {
            "step": 20_000 * (i + 1),
            "comparisons": min(100, 5 * (i + 1)) if learned else 0,
            "queries": min(104, 5 * (i + 1) + i // 6) if learned else 0,
            "skipped": i // 6 if learned else 0,
            "episodes": 20,
            # The first round may end before an episode does.
            "task_return": "" if i == 0 else f"{rising + 25 * rng.normal():.4f}",
            "seconds": f"{31.5 * (i + 1):.2f}",
        }
        if learned:
            row |= {
                "learned_return": f"{40 * done:.3f}",
                "held_out_accuracy": f"{0.5 + 0.38 * (1 - np.exp(-4 * done)):.4f}",
                "held_out_log_loss": f"{0.72 - 0.4 * (1 - np.exp(-4 * done)):.4f}",
                "train_log_loss": f"{0.69 - 0.5 * (1 - np.exp(-6 * done)):.4f}",
                "reward_correlation": f"{0.8 * done:.4f}",
            }
        rows.append(row)
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    if ended:
        returns = (final + 18 * np.linspace(-1, 1, 10)).round(2).tolist()
        result = {
            "task": task,
            "reward": reward,
            "algorithm": "PPO",
            "seed": seed,
            "steps": 20_000 * rounds,
            "comparisons": 100 if learned else 0,
            "queries": 104 if learned else 0,
            "final_return": final,
            "final_returns": returns,
            "held_out_accuracy": 0.873 if learned else None,
            "reward_correlation": 0.8 if learned else None,
            "wall_seconds": 787.5,
            "steps_per_second": 634.9,
            "versions": {"rewardmodels": "0.1.0", "torch": "2.8.0", "mujoco": "3.3.2"},
        }
        if not video:
            result["video_note"] = "MuJoCo found neither EGL nor OSMesa."
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
