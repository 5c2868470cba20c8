"""The study of drift: shares by hand, its figure and video, and arms that ask as they say."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import studies
from experiments.studies import drift as study
from ood import Mahalanobis, Monitor, Threshold

pytestmark = pytest.mark.usefixtures("_short_updates")


def rows_of(arm, seed, true, final, alarms=(), **more):
    return [
        {"task": "Hopper", "arm": arm, "seed": seed, "start": 100.0, "final": final, "step": step,
         "true": value, "predicted": predicted, "std": 1.0, "comparisons": 12,
         "asked": 12 + 10 * len(alarms), "alarms": list(alarms), "states": None} | more
        for step, value, predicted in zip((10, 20, 30), true, (0.0, 50.0, 90.0), strict=True)
    ]  # fmt: skip


@pytest.fixture
def results():
    rows = []
    for seed in range(5):
        rows += rows_of("frozen", seed, (150, 200, 90 + seed), 80.0 + 10 * seed)
        rows += rows_of("guarded", seed, (150, 180, 190), 190.0 - seed, alarms=(12, 25))
    return pd.DataFrame(rows)


def test_shares_kept_by_hand(results):
    report = study.report(results)
    assert report.numbers["drift_kept.frozen"] == pytest.approx(0.5)
    assert report.numbers["drift_lost"] == pytest.approx(0.5)
    assert report.numbers["drift_kept"] == pytest.approx(188 / 190)
    table = report.sections[1].table.set_index("arm")
    assert table.loc["guarded", "of the frozen arm's best"].value == pytest.approx(188 / 200)
    assert table.loc["frozen", "lost 30%"] == 1.0
    assert table.loc["frozen", "predicted rose"] == 1.0
    assert (table.loc["guarded", "alarms"], table.loc["guarded", "comparisons"]) == (2, 32)


def test_the_start_and_the_end_count_as_best_and_nothing_is_kept_of_a_loss():
    rows = pd.DataFrame(
        rows_of("frozen", 0, (10, 20, 30), 50.0)  # best at the start
        + rows_of("frozen", 1, (10, 20, 30), 200.0)  # best at the end
        + rows_of("frozen", 2, (-9, -8, -7), -5.0, start=-3.0)
    )
    assert study._outcomes(rows)["kept"].tolist() == pytest.approx([0.5, 1.0, np.nan], nan_ok=True)


def test_gains_are_shares_of_the_peak_and_of_the_own_rewards():
    rows = pd.DataFrame(
        rows_of("frozen", 0, (-50, 20, -10), -40.0, start=-80.0)
        + rows_of("own", 0, (0, 60, 100), 120.0, start=-80.0)
    )
    numbers = study.report(rows).numbers
    assert numbers["drift_peak_kept.frozen"] == pytest.approx(40 / 100)
    assert numbers["drift_reached.frozen"] == pytest.approx(40 / 200)
    assert numbers["drift_reached.own"] == 1


def test_the_own_reward_is_the_tasks(agents, frozen):
    [found] = rounds(agents, "own", steps=2048).to_dict("records")
    assert found["predicted"] == pytest.approx(found["true"], rel=1e-6)
    assert (found["asked"], found["start"]) == (0, frozen["start"][0])


def test_the_figure_names_every_arm_and_marks_every_alarm(results):
    above, below = study.report(results).sections[0].figure.axes
    assert {text.get_text() for text in below.texts} == {"frozen", "guarded"}
    dots = [line.get_xdata().tolist() for line in below.lines if line.get_marker() == "o"]
    assert sum(map(len, dots)) == 10
    predicted = [line.get_ydata().tolist() for line in above.lines if line.get_linewidth() > 2]
    assert predicted == [[0, 50, 90], [0, 50, 90]]
    true = [line.get_ydata().tolist() for line in below.lines if line.get_linewidth() > 2]
    assert true == [[100, 150, 200, 92, 100], [100, 150, 180, 190, 188]]


def test_the_video_is_of_median_seeds():
    rows = []
    for arm, finals in (("frozen", (60.0, 50.0, 40.0)), ("guarded", (80.0, 70.0, 99.0))):
        for seed, final in enumerate(finals):
            first, *others = rows_of(arm, seed, (100, 90, 80), final)
            first |= {"states": [[0, 1.25 + seed / 10, *[0] * 10]] * 3, "rewards": [1.0, 2.0, 4.0]}
            rows += [first, *others]
    videos = study.report(pd.DataFrame(rows)).videos
    if not videos:
        pytest.skip("no off-screen renderer")
    frames = videos["frozen-guarded"]
    assert frames.shape == (3, study.SIDE + 48, 2 * study.SIDE, 3)
    # The states stand still, so only the text changes; and the two arms' heights differ.
    change = np.abs(frames[2].astype(int) - frames[0]).max(2) > 100
    assert change[:48].any()
    assert not change[48:].any()
    assert np.abs(frames[0][48:, :320].astype(int) - frames[0][48:, 320:]).max() > 60


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agents")
    study.prepare(settings(folder))
    return folder


def settings(folder, **change):
    return study.Settings(
        **{
            "task": "HalfCheetah", "predictor": "LaplaceHead", "comparisons": 8, "more": 8,
            "batch": 4, "length": 5, "level": 0.0, "before": 0, "steps": 3 * 2048, "horizon": 64,
            "agents": folder,
        } | change
    )  # fmt: skip


def rounds(folder, arm, **change):
    rows = study.cell(settings(folder, **change), arm, 3)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def frozen(agents):
    return rounds(agents, "frozen", steps=2048)


@pytest.mark.parametrize("arm", ["frozen", "continued", "when unsure"])
def test_arms_ask_as_they_say(agents, arm):
    found = rounds(agents, arm)
    assert found["step"].tolist() == [2048, 4096, 6144]
    wanted = {"frozen": [8, 8, 8], "continued": [8, 12, 16], "when unsure": [8, 12, 16]}
    assert found["comparisons"].tolist() == wanted[arm]
    assert found["alarms"][0] == []
    assert np.shape(found["states"][0]) == (64, 18)


@pytest.mark.parametrize(("arm", "value"), [("zero", 0.0), ("constant", 64.0), ("random", None)])
def test_trivial_rewards(agents, frozen, arm, value):
    [found] = rounds(agents, arm, steps=2048).to_dict("records")
    assert (found["asked"], found["std"]) == (0, 0)
    assert found["start"] == frozen["start"][0]
    assert found["true"] == frozen["true"][0], "the first rollout knows no reward yet"
    if value is None:  # the mean of 32 sums of 64 normal numbers
        assert 0 < abs(found["predicted"]) < 5 * np.sqrt(64 / 32)
    else:
        assert found["predicted"] == value


def test_arms_start_alike_and_repeat(agents, frozen):
    assert rounds(agents, "frozen", steps=2048).to_dict() == frozen.to_dict()
    pessimistic = rounds(agents, "pessimistic", steps=2048)
    assert pessimistic["start"][0] == frozen["start"][0]
    assert pessimistic["true"][0] == frozen["true"][0]
    assert pessimistic["predicted"][0] != frozen["predicted"][0]


def test_a_guard_without_alarms_changes_nothing(agents):
    frozen, guarded = (rounds(agents, arm, steps=4096) for arm in ("frozen", "guarded"))
    assert guarded["alarms"][0] == []
    assert guarded["true"].tolist() == frozen["true"].tolist()
    assert guarded["final"][0] == frozen["final"][0]


def test_a_guard_asks_until_the_budget_is_spent(agents, monkeypatch):
    """Every frame is anomalous: each alarm costs a batch, the one after the last ends training."""

    def always(training, episodes, alpha):
        frames = torch.cat([episodes.observations, episodes.actions], -1)
        return Monitor(Mahalanobis().fit(frames[0]), threshold=Threshold(-1e9))

    monkeypatch.setattr(study._Training, "monitor", always)
    found = rounds(agents, "guarded")
    assert found["alarms"][0] == [32, 64, 96], "at the first step of each copy"
    assert found["step"].tolist() == [32, 64, 96]
    assert found["comparisons"].tolist() == [8, 12, 16]


@pytest.mark.slow
def test_a_small_study_leaves_a_page_and_resumes(agents, tmp_path, monkeypatch):
    small = settings(agents, arms=["frozen", "guarded"], seeds=1, steps=2048)
    run = studies.Run(tmp_path)
    found = studies.run_study(study, small, run, progress=False)
    page = (tmp_path / "report.html").read_text()
    assert ("<video" in page) == bool(found.videos) == bool(list(tmp_path.glob("*.mp4")))
    assert "states" not in (tmp_path / "results.csv").read_text().split("\n")[0]
    monkeypatch.setattr(study, "_Training", None)
    again = studies.run_study(study, small, run, report_only=True)
    assert str(again.numbers) == str(found.numbers)
