"""A guard for the agent of a finished run: fitted, calibrated, kept beside it, and put to work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import yaml
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm

from experiments.envs.guard_episodes import Act, acting, play
from experiments.envs.shifts import Severity, shifted
from experiments.envs.tasks import Task, find_task, make_env
from experiments.envs.vector import make_vec_env
from experiments.registry import find_class, make_detector
from experiments.studies.limits import check_least
from experiments.training.run_directory import RunDirectory
from ood import (
    AlarmResponse,
    EventLog,
    Guard,
    Monitor,
    OODDetector,
    Statistic,
    agent_fingerprint,
    load_monitor,
    save_monitor,
)
from ood.conformal import episodes_needed
from rewardmodels import Clips, InvalidInput, RewardModel, UnreadableFile, load
from rewardmodels.fitting import isolated_randomness
from rewardmodels.scoring import FrameScorer

FEATURES = "transition"
_AGENT = ("agent.zip", "normalise.pkl")


def guard_run(
    run: Path,
    alpha: float = 0.05,
    detector: str = "DynamicsEnsemble",
    statistic: str = "MEWMA",
    on_alarm: Literal["halt", "ask", "watch"] = "halt",
    episodes: int = 5,
    familiar: int = 20,
    calibration: int = 100,
    shift: str | None = None,
    severity: Severity = "middle",
    onset: int | None = None,
    again: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Runs a trained agent under a guard, which is made at the first call and kept beside it.

    The guard is `guard.safetensors` in the run's directory, and what it did is appended to
    `guard.jsonl` there. It belongs to this agent: after more training it is refused.

    Args:
        run: Directory of a finished run of `rewardmodels learn`.
        alpha: Promised chance of a false alarm in an episode.
        detector: One of ours by name, or an import path.
        statistic: One of ours by name, or an import path.
        on_alarm: "halt" for the rest of the episode, "ask" here in the terminal whether to go on,
            or "watch", which only writes alarms down.
        episodes: To run under the guard.
        familiar: Episodes that the detector learns from.
        calibration: Episodes that the threshold is taken from.
        shift: A change of the world to try the guard on, such as gravity; None for none.
        severity: Of the shift.
        onset: Steps before the shift; None for half of the episode.
        again: Make the guard anew, in place of the one that is there.
        seed: Of the episodes, and of the detector.

    Returns:
        A row for each episode, which is printed too: `return` by the task's own reward, `learned`
        by the model's, its `doubt` (the mean standard deviation of a frame's reward), `alarm`, the
        step of the first (None without one), and `reason`.

    Raises:
        InvalidInput: A directory that isn't a run's, a run that isn't finished or has no model, a
            guard of other settings, a shift that the task can't feel, or a number out of range.
        UnknownName: A detector, statistic or shift that there isn't.
        UnreadableFile: A guard that is damaged.
        StaleThreshold: A guard of another agent, such as this one before more training.
    """
    check_least(
        ("episodes", episodes, 1), ("familiar", familiar, 1), ("seed", seed, 0),
        ("onset", onset or 0, 0),
    )  # fmt: skip
    if calibration < (needed := episodes_needed(alpha, standardise=0.25)):
        raise InvalidInput(
            f"calibration: expected at least {needed} episodes, of which none fewer can promise "
            f"alpha = {alpha}, got {calibration}. Record more, or allow more alarms."
        )
    torch.set_num_threads(1)
    task, folder, model = _read(Path(run))
    onset = task.horizon // 2 if onset is None else onset
    make: Callable[[], gym.Env[Any, Any]] = lambda: make_env(task)  # noqa: E731
    (size,) = make().observation_space.shape or (0,)
    if shift is not None:
        # Before any work: whether there is such a shift, and the task can feel it.
        shifted(make(), shift, severity, onset, seed, observation_std=np.ones(size))
    act = _load_agent(task, folder)
    file, mark = Path(run) / "guard.safetensors", agent_fingerprint(*_files(folder))
    wanted = Monitor(make_detector(detector, size, seed), _statistic(statistic))
    if file.exists() and not again:
        monitor = load_monitor(file, agent=mark)
        _check_same(file, monitor, wanted, alpha)
    else:
        monitor = _made(wanted, make, act, alpha, familiar, calibration, seed)
        save_monitor(monitor, file, agent=mark)
    env = make()
    if shift is not None:
        std = _observation_std(monitor.detector, env)
        env = shifted(env, shift, severity, onset, seed, observation_std=std)
    response: Any = {"watch": _go_on}.get(on_alarm, on_alarm)
    log = EventLog(Path(run) / "guard.jsonl")
    respond = AlarmResponse(on_alarm=response, ask=_ask if on_alarm == "ask" else None)
    rows = []
    with isolated_randomness(seed):
        for number in tqdm(range(episodes), unit=" episodes", leave=False):
            guard = Guard(env, monitor, FEATURES, respond, log)
            rows.append({"episode": number, **_guarded(guard, act, model, seed + number)})
    _show(rows, monitor, log)
    return rows


def _read(run: Path) -> tuple[Task, Path, FrameScorer]:
    """The task, the last checkpoint and the model of a finished run."""
    if not (run / "config.yaml").is_file():
        raise InvalidInput(
            f"run: expected the directory of a run of rewardmodels learn, got {run}, which has no "
            "config.yaml."
        )
    checkpoints = sorted(x for x in (run / "checkpoints").glob("[0-9]*") if x.is_dir())
    if RunDirectory(run).result is None or not checkpoints:
        raise InvalidInput(
            f"run: expected a finished run, got {run}, which isn't. To finish it: rewardmodels "
            f"learn --resume --out {run}"
        )
    if not (run / "model.safetensors").is_file():
        raise InvalidInput(
            f"run: expected a run with a reward model, got {run}, which has none: its reward "
            "wasn't learned, or nothing was answered."
        )
    for file in _files(checkpoints[-1]):
        if not file.is_file():
            raise UnreadableFile(f"{file}: expected the agent of a finished run, got no such file.")
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    model: RewardModel = load(run / "model.safetensors")
    return find_task(settings["task"]), checkpoints[-1], model.frame_scorer()


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in _AGENT]


def _load_agent(task: Task, folder: Path) -> Act:
    settings = yaml.safe_load((folder.parent.parent / "config.yaml").read_text("utf-8"))
    cls: Any = getattr(stable_baselines3, settings["algorithm"])
    with isolated_randomness(0), closing(make_vec_env(task, 1, 0)) as venv:
        normalised = VecNormalize.load(str(folder / "normalise.pkl"), venv)
        agent = cls.load(folder / "agent.zip", device="cpu")
    return acting(agent, normalised)


def _made(
    monitor: Monitor,
    make: Callable[[], gym.Env[Any, Any]],
    act: Act,
    alpha: float,
    familiar: int,
    calibration: int,
    seed: int,
) -> Monitor:
    print(f"Recording {familiar + calibration} episodes, to fit and calibrate a guard.", flush=True)
    with isolated_randomness(seed):
        usual = play(make, act, familiar + calibration, seed, features=FEATURES).features
    monitor.detector.fit(torch.cat(usual[:familiar]))
    monitor.calibrate(usual[familiar:], alpha)
    return monitor


def _check_same(file: Path, found: Monitor, wanted: Monitor, alpha: float) -> None:
    assert found.threshold is not None
    for name, old, new in (
        ("alpha", found.threshold.alpha, alpha),
        ("detector", type(found.detector).__name__, type(wanted.detector).__name__),
        ("statistic", type(found.statistic).__name__, type(wanted.statistic).__name__),
    ):
        if old != new:
            raise InvalidInput(
                f"{name}: expected {old}, as of the guard in {file}, got {new}. Pass --again to "
                "make another in its place."
            )


def _guarded(guard: Guard, act: Act, model: FrameScorer, seed: int) -> dict[str, Any]:
    seen, _ = guard.reset(seed=seed)
    paid, observations, actions, ended = 0.0, [], [], False
    alarm, reason, step = None, "", 0
    while not ended:
        action = act(seen[None], np.zeros(0))[0]
        seen, reward, terminated, truncated, info = guard.step(action)
        step, paid, ended = step + 1, paid + float(reward), terminated or truncated
        observations.append(seen)
        actions.append(action)
        if info["guard"]["alarm"] and alarm is None:
            alarm, reason = step, info["guard"]["reason"]
    learned, doubt = model.batch(np.stack(observations), np.stack(actions))
    return {
        "return": paid, "learned": float(learned.sum()), "doubt": float(doubt.mean()),
        "alarm": alarm, "reason": reason,
    }  # fmt: skip


def _observation_std(detector: OODDetector, env: gym.Env[Any, Any]) -> Any:
    """Of transitions, whose first numbers are the observation before."""
    (size,) = env.observation_space.shape or (0,)
    return detector.scale[:size]


def _show(rows: list[dict[str, Any]], monitor: Monitor, log: EventLog) -> None:
    threshold = monitor.threshold
    assert threshold is not None
    print(
        f"{type(monitor.detector).__name__} with {type(monitor.statistic).__name__}: at most "
        f"{threshold.alpha:g} false alarms an episode, by {threshold.episodes} episodes."
    )
    for row in rows:
        what = f"alarm at step {row['alarm']}: {row['reason']}" if row["alarm"] else "no alarm"
        print(
            f"episode {row['episode']}: true return {row['return']:.0f}, learned "
            f"{row['learned']:.0f}, {what}"
        )
    print(f"Events: {log.path}")


def _go_on(_: Any) -> None:
    """The alarm is written down, and that is all."""


def _ask(clip: Clips) -> bool:
    print(f"The guard has stopped the agent, after {clip.observations.shape[1]} frames like these:")
    print(clip.observations[0, -3:])
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _statistic(name: str) -> Statistic:
    made: Statistic = find_class("statistic", name)()
    return made
