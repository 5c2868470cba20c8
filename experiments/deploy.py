"""Guard the agent of a finished run: fit and calibrate a monitor, keep it, and run both."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm

from experiments.envs.perturbations import Severity, perturb
from experiments.envs.rollout import Policy, play
from experiments.envs.tasks import Task, find_task, make_env
from experiments.envs.vector import make_vec_env
from experiments.registry import load_model, make_named
from experiments.studies import check_least
from experiments.training.agents import AGENT_FILE, exploring_policy, make_agent, resume_policy
from experiments.training.run_directory import RunDirectory, check_pickled, in_short
from ood import (
    DETECTORS,
    STATISTICS,
    AlarmResponse,
    EventLog,
    Guard,
    Monitor,
    agent_fingerprint,
    load_monitor,
    save_monitor,
)
from ood.conformal import episodes_needed
from rewardmodels import Clips, InvalidInput, RewardModel, UnreadableFile
from rewardmodels.fitting import isolated_randomness
from rewardmodels.scoring import FrameScorer

_FEATURES = "transition"


@dataclass(frozen=True)
class GuardConfig:
    """Settings of a guarded agent.

    Args:
        run: Directory of a finished run of `rewardmodels learn`.
        alpha: Largest chance of a false alarm in an episode.
        detector: Registered name or import path.
        statistic: Registered name or import path.
        on_alarm: "halt" for the rest of the episode, "ask" in the terminal whether to go on, or
            "watch", which only logs alarms.
        episodes: Episodes to run under the guard.
        familiar: Episodes that the detector is fitted to.
        calibration: Episodes that the threshold is calibrated on.
        shift: Change of the environment to try the guard on, such as gravity; None for none.
        severity: Of the shift.
        onset: Steps before the shift; None for half of the episode.
        again: Replace the guard that was kept by a new one.
        trust: Import what the run's settings name, which may be a stranger's code.
        safe_action: What a halted agent does; None for zeros, where an action is a vector.
        seed: Of the episodes and of the detector.

    Raises:
        InvalidInput: A number out of range.
    """

    run: Path
    alpha: float = 0.05
    detector: str = "DynamicsEnsemble"
    statistic: str = "MEWMA"
    on_alarm: Literal["halt", "ask", "watch"] = "halt"
    episodes: int = 5
    familiar: int = 20
    calibration: int = 100
    shift: str | None = None
    severity: Severity = "middle"
    onset: int | None = None
    again: bool = False
    trust: bool = False
    safe_action: float | list[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, episodes=1, familiar=1, seed=0)
        if self.onset is not None:
            check_least(self, onset=0)
        if self.calibration < (needed := episodes_needed(self.alpha, standardise=0.25)):
            raise InvalidInput(
                f"calibration: expected at least {needed} episodes, since fewer can't promise "
                f"alpha = {self.alpha}, got {self.calibration}. Record more, or allow more alarms."
            )


def guard_run(config: GuardConfig) -> list[dict[str, Any]]:
    """Run a trained agent under a guard, which is made once and kept beside it.

    The monitor is `guard.safetensors` in the run's directory, and events are appended to
    `guard.jsonl` there. It belongs to this agent, and is refused after more training.

    Returns:
        A row for each episode, printed too: `return` by the task's own reward, `learned` by the
        model's, `doubt` (the mean standard deviation of a frame's reward), `alarm` (the step of the
        first, or None) and its `reason`.

    Raises:
        InvalidInput: A directory that isn't a run's, a run that isn't finished or has no model, a
            guard of other settings, a detector or statistic that can't be kept in a file, an action
            that isn't the environment's, or a shift that doesn't change the task.
        UnknownName: No such detector, statistic or shift.
        UnreadableFile: A damaged guard, a missing agent, or another model than the run's.
        StaleThreshold: A guard of another agent, such as this one before more training.
    """
    torch.set_num_threads(1)
    run = RunDirectory(config.run)
    _check_finished(run)
    if not config.trust:
        run.check_trusted(only=("task", "model"))
    task, seed = _task(run), config.seed
    checksum = (run.result or {}).get("model_checksum")
    model: RewardModel = load_model(run.path / "model.safetensors", run.settings, checksum)
    scorer = model.frame_scorer()
    with make_env(task) as usual_env:
        size = math.prod(usual_env.observation_space.shape or ())
        safe_action = _safe_action(config.safe_action, usual_env.action_space)

    def make_shifted(std: Any) -> gym.Env[Any, Any]:
        env = make_env(task)
        if config.shift is None:
            return env
        onset = task.horizon // 2 if config.onset is None else config.onset
        return perturb(env, config.shift, config.severity, onset, seed, observation_std=std)

    make_shifted(np.ones(size))  # refuses an unknown shift before any work
    act = _load_agent(run, task)
    file = run.path / "guard.safetensors"
    fingerprint = agent_fingerprint(run.checkpoints[-1] / AGENT_FILE)
    detector = make_named("detector", config.detector, observation_size=size, seed=seed)
    statistic = make_named("statistic", config.statistic)
    _check_saveable("detector", detector, DETECTORS)
    _check_saveable("statistic", statistic, STATISTICS)
    monitor = Monitor(detector, statistic)
    if file.exists() and not config.again:
        kept = load_monitor(file, agent=fingerprint)
        _check_same(file, kept, monitor, config.alpha)
        monitor = kept
    else:
        recorded = config.familiar + config.calibration
        print(f"Recording {recorded} episodes, to fit and calibrate a guard.", flush=True)
        with isolated_randomness(seed):
            usual = play(lambda: make_env(task), act, recorded, seed).features(_FEATURES)
        monitor.detector.fit(torch.cat(usual[: config.familiar]))
        monitor.calibrate(usual[config.familiar :], config.alpha)
        save_monitor(monitor, file, agent=fingerprint)
    # The first features of a transition are the observation before.
    env = make_shifted(monitor.detector.scale[:size])
    on_alarm: Any = {"watch": lambda event: None}.get(config.on_alarm, config.on_alarm)
    response = AlarmResponse(on_alarm=on_alarm, ask=_ask, safe_action=safe_action)
    log = EventLog(run.path / "guard.jsonl")
    rows = []
    with isolated_randomness(seed):
        for number in tqdm(range(config.episodes), unit=" episodes", leave=False):
            guard = Guard(env, monitor, _FEATURES, response, log)
            rows.append({"episode": number, **_play_guarded(guard, act, scorer, seed + number)})
    _print(rows, monitor, log)
    return rows


def _check_finished(run: RunDirectory) -> None:
    if not run.exists:
        raise InvalidInput(
            f"run: expected the directory of a run of rewardmodels learn, got {run.path}, which "
            "has no config.yaml."
        )
    if run.result is None or not run.checkpoints:
        raise InvalidInput(
            f"run: expected a finished run, got {run.path}, which isn't. To finish it: "
            f"rewardmodels learn --resume --out {run.path}"
        )
    if not (run.path / "model.safetensors").is_file():
        raise InvalidInput(
            f"run: expected a run with a reward model, got {run.path}, which has none: its reward "
            "wasn't learned, or there were no comparisons."
        )
    for name in {"task", "algorithm"} - run.settings.keys():
        raise UnreadableFile(f"{run.settings_file}: expected settings of a run, got no {name}.")
    check_pickled(run.checkpoints[-1])
    file = run.checkpoints[-1] / AGENT_FILE
    if not file.is_file():
        raise UnreadableFile(f"{file}: expected the agent of a finished run, got no such file.")


def _task(run: RunDirectory) -> Task:
    return find_task(run.settings["task"], run.settings.get("horizon"))


def _safe_action(given: float | list[float] | None, space: gym.Space[Any]) -> Any:
    action: Any = given
    if given is None and isinstance(space, gym.spaces.Box):
        action = np.zeros(space.shape)
    if action is None or not space.contains(action := np.asarray(action).astype(space.dtype)):
        raise InvalidInput(
            f"safe_action: expected what a halted agent does, an action in {space}, got {given}. "
            "Pass --safe_action."
        )
    return action


def _check_saveable(kind: str, part: Any, registered: dict[str, Any]) -> None:
    """Register a detector or statistic of the user's own, or raise if no file can hold it."""
    name = type(part).__name__
    if registered.setdefault(name, type(part)) is not type(part):
        raise InvalidInput(f"{kind}: expected a name that isn't one of ours, got {type(part)}.")
    try:
        json.dumps(part.settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{kind}: expected constructor arguments that are plain values, kept as attributes of "
            f"the same names, got a {name}: {error}"
        ) from error
    if not getattr(part, "saveable", True):
        raise InvalidInput(f"{kind}: expected one that a file can hold, got {name}.")


def _load_agent(run: RunDirectory, task: Task) -> Policy:
    file = run.checkpoints[-1] / AGENT_FILE
    with isolated_randomness(0), closing(VecNormalize(make_vec_env(task, 1, 0))) as normalised:
        agent = make_agent(run.settings["algorithm"], normalised, task, 0)
        try:
            resume_policy(agent, normalised, torch.load(file, weights_only=True))
        except Exception as error:  # of whatever its bytes may be taken for
            raise UnreadableFile(
                f"{file}: expected the agent of a finished run, got a damaged file or another's "
                f"({in_short(error)})."
            ) from error
    return exploring_policy(agent, normalised)


def _check_same(file: Path, kept: Monitor, wanted: Monitor, alpha: float) -> None:
    assert kept.threshold is not None
    for name, old, new in (
        ("alpha", kept.threshold.alpha, alpha),
        ("detector", type(kept.detector).__name__, type(wanted.detector).__name__),
        ("statistic", type(kept.statistic).__name__, type(wanted.statistic).__name__),
    ):
        if old != new:
            raise InvalidInput(
                f"{name}: expected {old}, as of the guard in {file}, got {new}. Pass --again to "
                "make another in its place."
            )


def _play_guarded(guard: Guard, act: Policy, scorer: FrameScorer, seed: int) -> dict[str, Any]:
    observation, _ = guard.reset(seed=seed)
    steps: list[tuple[Any, Any, float]] = []
    alarm, reason, ended = None, "", False
    while not ended:
        action = act(observation[None], np.zeros(0))[0]
        observation, reward, terminated, truncated, info = guard.step(action)
        ended = terminated or truncated
        steps.append((observation, action, float(reward)))
        if info["guard"]["alarm"] and alarm is None:
            alarm, reason = len(steps), info["guard"]["reason"]
    observations, actions, rewards = zip(*steps, strict=True)
    learned, doubt = scorer.batch(np.stack(observations), np.stack(actions))
    scores = {"learned": float(learned.sum()), "doubt": float(doubt.mean())}
    return {"return": sum(rewards), **scores, "alarm": alarm, "reason": reason}


def _print(rows: list[dict[str, Any]], monitor: Monitor, log: EventLog) -> None:
    threshold = monitor.threshold
    assert threshold is not None
    print(
        f"{type(monitor.detector).__name__} with {type(monitor.statistic).__name__}: at most "
        f"{threshold.alpha:g} false alarms an episode, by {threshold.episodes} episodes (below "
        f"{threshold.false_alarm_quantile(0.95):.2g} in 95% of such calibrations)."
    )
    for row in rows:
        what = f"alarm at step {row['alarm']}: {row['reason']}" if row["alarm"] else "no alarm"
        returns = f"true return {row['return']:.0f}, learned {row['learned']:.0f}"
        print(f"episode {row['episode']}: {returns}, {what}")
    print(f"Events: {log.path}")


def _ask(clip: Clips) -> bool:
    print(f"The guard has stopped the agent, after {clip.observations.shape[1]} frames like these:")
    print(clip.observations[0, -3:])
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")
