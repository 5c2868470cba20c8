"""A detector of ours next to the figures that the authors of PEDM printed, as far as that goes.

Haider et al. 2023 ("Out-of-distribution detection for reinforcement learning agents with
probabilistic dynamics models", AAMAS, appendix, Table 7) disturb an episode from a random step on,
and ask of single frames whether they came after it: AUROC, average precision and false positives
over the frames of all episodes. Here the same is asked, of the two disturbances that have a
counterpart in `experiments.envs.shifts`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from experiments.envs.guard_episodes import Act, Episodes, load_policy, play
from experiments.envs.shifts import Severity, shifted
from experiments.envs.tasks import Task, find_task, make_env
from experiments.studies.guard import make_detector
from experiments.studies.guard_figures import Array, along
from experiments.studies.summary import markdown
from ood import MEWMA, Monitor
from rewardmodels import InvalidInput
from rewardmodels.fitting import isolated_randomness
from rewardmodels.saving import write_text_atomically

TASK, THEIRS = "HalfCheetah", "MJHalfCheetah-v0"
NEAREST: dict[tuple[str, Severity], tuple[str, str]] = {
    ("mass", "mild"): ("bm_factor_severe", "all mass times 1.5, theirs and ours"),
    ("strength", "middle"): ("act_factor_severe", "actions times 1.5; forces times 0.5"),
}
"""Each of our shifts with the disturbance nearest to it, and both in words."""

DIFFERS = """What differs, so that a gap says little of the detectors: their policy is TD3 with a
return of about 7,350 an episode, ours is PPO, weaker, and explores; their simulator is a
HalfCheetah of their own, ours Gymnasium's v5, whose inertia is scaled with its mass. Their other
disturbances (constants and noise added to actions, a force on one body) and robots (a cart-pole, a
pusher, an arm in space that reaches) have no counterpart here."""

_METRICS = ("auroc", "ap", "fpr95")


def compare_published(
    published: Path,
    agent: Path,
    detector: str = "DynamicsEnsemble",
    familiar: int = 50,
    calibration: int = 40,
    tests: int = 20,
    horizon: int = 1000,
    seed: int = 0,
    out: Path | None = None,
) -> str:
    """Prints a table of ours next to theirs, and what differs.

    Args:
        published: CSV of their figures, with columns `env`, `mod` and `<DETECTOR>_auroc`, `_ap`
            and `_fpr95`.
        agent: What `experiments.envs.guard_episodes.train` wrote of HalfCheetah.
        detector: A name of ours, or an import path.
        familiar: Episodes that it learns from; theirs are 50.
        calibration: Episodes by which the statistic is standardised; theirs has none.
        tests: Episodes of each shift, with an onset of its own each; theirs are 100.
        horizon: Steps per episode.
        seed: Of episodes, onsets and detector.
        out: Markdown file for the table; None only prints.

    Raises:
        InvalidInput: A file without their rows.
    """
    rows = [_published(published, mod) for mod, _ in NEAREST.values()]
    torch.set_num_threads(1)
    task = replace(find_task(TASK), horizon=horizon)
    act = load_policy(task, agent)
    usual = play(lambda: make_env(task), act, familiar + calibration, seed)
    size = make_env(task).observation_space.shape[0]  # type: ignore[index]
    with isolated_randomness(seed):
        fitted = make_detector(detector, size, seed).fit(torch.cat(usual.features[:familiar]))
    monitor = Monitor(fitted, MEWMA())
    monitor.calibrate(usual.features[familiar:], alpha=0.1)
    onsets, lines = np.random.default_rng(seed).integers(2, horizon, tests), []
    for ((shift, severity), (mod, words)), theirs in zip(NEAREST.items(), rows, strict=True):
        other = _shifted(task, act, shift, severity, onsets, familiar + calibration, seed)
        frames = np.stack([fitted.score(episode).numpy() for episode in other.features])
        pedm = [float(theirs[f"PEDM_{name}"]) for name in _METRICS]
        best = max((k for k in theirs if k.endswith("_auroc") and not k.startswith("PEDM")),
                   key=lambda k: float(theirs[k]))  # fmt: skip
        name = best.removesuffix("_auroc")
        cells = [
            pedm, [float(theirs[f"{name}_{metric}"]) for metric in _METRICS],
            frame_figures(frames, onsets), frame_figures(along(monitor, other), onsets),
        ]  # fmt: skip
        said = [" / ".join(f"{value:.2f}" for value in cell) for cell in cells]
        said[1] += f" ({name})"
        lines.append([f"{mod}; {shift} {severity}: {words}", *said])
    header = ["AUROC / AP / FPR at 95% TPR, of frames", "theirs: PEDM", "theirs: best other",
              f"ours: {detector}, single frames", f"ours: {detector}, MEWMA"]  # fmt: skip
    text = f"{markdown(header, lines)}\n\n{DIFFERS}\n"
    print(text)
    if out is not None:
        write_text_atomically(out, text)
    return text


def frame_figures(values: Array, onsets: Sequence[int] | Array) -> tuple[float, float, float]:
    """AUROC, average precision, and false positives at 95% true ones, of frames after an onset.

    Args:
        values: `(N, T)`, how strange each frame is; higher is stranger.
        onsets: `(N,)`, each episode's first disturbed step.

    Example:
        >>> frame_figures(np.array([[0.0, 1.0, 3.0, 2.0]]), [2])
        (1.0, 1.0, 0.0)
    """
    after = np.arange(values.shape[1]) >= np.asarray(onsets)[:, None]
    truth, flat = after.ravel(), values.ravel()
    fpr, tpr, _ = roc_curve(truth, flat)
    return (
        float(roc_auc_score(truth, flat)),
        float(average_precision_score(truth, flat)),
        float(fpr[np.argmax(tpr >= 0.95)]),
    )


def _shifted(
    task: Task, act: Act, shift: str, severity: Severity, onsets: Array, first: int, seed: int
) -> Episodes:
    played = [
        play(
            lambda onset=int(onset): shifted(make_env(task), shift, severity, onset, seed),  # type: ignore[misc]
            act, 1, seed, first=first + number,
        )
        for number, onset in enumerate(onsets)
    ]  # fmt: skip
    return Episodes(
        [each.features[0] for each in played], np.concatenate([each.rewards for each in played])
    )


def _published(file: Path, mod: str) -> dict[str, str]:
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row.get("env") == THEIRS and row.get("mod") == mod:
                return row
    raise InvalidInput(
        f"published: expected a row with env {THEIRS} and mod {mod}, got none in {file}."
    )
