"""What a run's numbers and figures say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.analysis.figures import arm_of
from experiments.analysis.plots import ARMS
from experiments.training.run_directory import Floats, RunDirectory


def number(value: float) -> str:
    """A number as a sentence says it: three figures or whole, with a true minus sign.

    Example:
        >>> number(1234.5), number(-12.04), number(0.0512), number(float("nan"))
        ('1,234', '−12.0', '0.051', 'not known')
    """
    if not np.isfinite(value):
        return "not known"
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    if 0 < size < 1:
        digits = 3
    text = f"{value:,.{digits}f}".replace("-", "−")
    return text.lstrip("−") if float(text.replace("−", "").replace(",", "")) == 0 else text


def percent(value: float) -> str:
    """A fraction in whole per cent."""
    return f"{100 * value:.0f}%".replace("-", "−") if np.isfinite(value) else "not known"


def headline(run: RunDirectory, references: Sequence[RunDirectory] = ()) -> str:
    """What the run came to, beside its references, in one or two sentences.

    Args:
        run: The run.
        references: Other runs of the same task.

    Returns:
        Text, without markup.
    """
    reached = run.final_return
    if not np.isfinite(reached):
        return "No episode has finished yet, so there is no return to tell of."
    answers, steps = run.outcome("comparisons"), run.outcome("steps", "step")
    effort = [f"{number(steps)} steps"] if np.isfinite(steps) else []
    if answers > 0:
        effort.insert(0, f"{number(answers)} comparison{'s' if answers != 1 else ''}")
    others = "; ".join(
        f"{'another run on ' if n == 1 else f'{n} other runs on '}{name}: {text}"
        if name == arm_of(run).name
        else f"{name}{f', {n} runs' if n > 1 else ''}: {text}"
        for name, n, text in _by_arm([(r, r.final_return) for r in references])
    )
    opening = f"After {' and '.join(effort)} the agent" if effort else "The agent"
    if arm_of(run) != ARMS["learned"]:
        opening += f", trained on {arm_of(run).name},"
    text = f"{opening} reaches {number(reached)}{f' ({others})' if others else ''}"
    returns = run.final_returns
    if not run.result:
        return f"{text} in its last round. The run hasn't ended: it has no result.json."
    if len(returns) > 1:
        text += (
            f": the mean true return of {len(returns)} evaluation episodes, "
            f"from {number(min(returns))} to {number(max(returns))}"
        )
    return f"{text}.{_counts(run)}{_share(run, references)}"


def _counts(run: RunDirectory) -> str:
    """What the task counts besides returns, such as backflips."""
    ending, result = "_per_1000_steps", run.result or {}
    counted = [name.removesuffix(ending) for name in result if name.endswith(ending)]
    return "".join(
        f" In 1,000 steps of evaluation it does {number(result[name + ending])} {name} on "
        f"average, from {number(min(result[name]))} to {number(max(result[name]))} in an "
        "episode."
        for name in counted
    )


def _share(run: RunDirectory, references: Sequence[RunDirectory]) -> str:
    """How far from zero reward to the task's own reward the run came, where that has a sense."""
    means = {
        name: np.mean([r.final_return for r in references if arm_of(r) == ARMS[name]] or [np.nan])
        for name in ("zero", "task")
    }
    if arm_of(run) != ARMS["learned"] or not means["task"] > means["zero"]:
        return ""
    share = (run.final_return - means["zero"]) / (means["task"] - means["zero"])
    return f" That is {percent(float(share))} of the way from zero reward to the task's own reward."


def sentence_steps(runs: Sequence[RunDirectory]) -> str:
    """What `return_vs_steps` shows."""
    curves = [(run, run.curve("step", "task_return")) for run in runs]
    last = [(run, steps[-1], values[-1]) for run, (steps, values) in curves if len(steps)]
    together = len({step for _, step, _ in last}) == 1
    parts = [
        f"{value} with {name}{f', {n} runs' if n > 1 else ''}"
        + ("" if together else f" (at {step} steps)")
        for (name, n, value), (_, _, step) in zip(
            _by_arm([(run, value) for run, _, value in last]),
            _by_arm([(run, step) for run, step, _ in last]),
            strict=True,
        )
    ]
    when = f", at {number(last[0][1])} steps," if together else ""
    return f"In the last round{when} an episode of training returns on average {'; '.join(parts)}."


def _by_arm(values: Sequence[tuple[RunDirectory, float]]) -> list[tuple[str, int, str]]:
    """For each arm its name, how many runs have a value, and the value or its range in words."""
    groups: dict[str, list[float]] = {}
    for run, value in values:
        if np.isfinite(value):
            groups.setdefault(arm_of(run).name, []).append(float(value))
    return [
        (name, len(group), " to ".join(dict.fromkeys(map(number, (min(group), max(group))))))
        for name, group in groups.items()
    ]


def sentence_comparisons(runs: Sequence[RunDirectory]) -> str:
    """What `return_vs_comparisons` shows."""
    x, y = runs[0].curve("comparisons", "task_return")
    best = int(np.argmax(y))
    text = (
        f"The mean return goes from {number(y[0])} after {number(x[0])} comparisons to "
        f"{number(y[-1])} after {number(x[-1])}; the best round, {number(y[best])}, "
        f"came at {number(x[best])}."
    )
    if np.sum(x == x[-1]) > 1:
        text += " Training goes on after the last answer, hence the upright end."
    if any(not run.outcome("comparisons") > 0 for run in runs):
        text += " Level lines are final results of runs that asked nothing."
    return text


def sentence_held_out(run: RunDirectory) -> str:
    """What `held_out` shows."""
    x, accuracy = run.curve("comparisons", "held_out_accuracy")
    loss = run.curve("comparisons", "held_out_log_loss")[1]
    text = (
        f"After {number(x[-1])} comparisons the learned reward predicts {percent(accuracy[-1])} "
        "of the answers kept from its training (guessing: 50%)"
    )
    if len(loss):
        better = "better" if loss[-1] < np.log(2) else "no better"
        text += (
            f", with a log loss of {number(loss[-1])} nats an answer, "
            f"{better} than saying 50% each time ({number(float(np.log(2)))})"
        )
    return text + "."


def sentence_frames(frames: Mapping[str, Floats]) -> str:
    """What `predicted_vs_true` shows."""
    n, r = len(frames["true"]), correlation(frames)
    text = f"On {n:,} frames that the final policy visits, learned and true reward "
    text += (
        f"correlate by {number(r)}."
        if np.isfinite(r)
        else "have no correlation, as one of them never changes."
    )
    return text + (
        " The stronger the colour, the more frames. Dots are means of a tenth of the frames each, "
        f"bars one epistemic standard deviation ({number(float(frames['std'].mean()))} on "
        "average). Comparisons leave the learned reward's scale and offset free."
    )


def labels(runs: Sequence[RunDirectory]) -> list[str]:
    """What to call each run: its arm, and where two share one, the seed or the directory too."""
    names = [arm_of(run).name for run in runs]
    seeds = [(run.result or {}).get("seed") for run in runs]
    for i, run in enumerate(runs):
        twins = [j for j in range(len(runs)) if arm_of(runs[j]) == arm_of(run) and j != i]
        if twins:
            told_by_seed = all(seeds[j] != seeds[i] for j in twins) and seeds[i] is not None
            names[i] += f", seed {seeds[i]}" if told_by_seed else f", {run.path.name}"
    return names


def correlation(frames: Mapping[str, Floats]) -> float:
    """Pearson correlation of learned and true reward over frames; NaN where either is constant."""
    predicted, true = frames["predicted"], frames["true"]
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, true)[0, 1])
