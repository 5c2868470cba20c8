"""The demonstration ends in a report, goes on where it stopped, and is shown again at no cost."""

import json
from functools import partial

import pytest

from experiments import demo
from experiments.cli import main
from experiments.training import learn as learning
from experiments.training.config import LearnConfig
from experiments.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("_short_updates")

WORDS = ["demo", "--task=Pendulum", "--steps=8192", "--comparisons=12"]


def test_it_goes_on_where_it_stopped_and_is_shown_again(tmp_path, capsys, monkeypatch):
    words = [*WORDS, f"--out={tmp_path / 'demo'}"]
    monkeypatch.setattr(
        demo, "LearnConfig", partial(LearnConfig, epochs=2, evaluate=2, video=False)
    )
    keep, kept = learning.Learner.save_round, []

    def keep_then_stop(learner, round, *rest):
        keep(learner, round, *rest)
        kept.append((learner.config.reward, round))
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning.Learner, "save_round", keep_then_stop)
    assert main(words) == 130
    assert f"The same command goes on: rewardmodels {' '.join(words)}" in capsys.readouterr().err
    assert main(words) == 0
    assert kept == [(arm, round) for arm in ("learned", "zero") for round in range(10)]
    printed = capsys.readouterr().out.splitlines()
    learned, zero = (RunDirectory(tmp_path / "demo" / arm) for arm in ("learned", "zero"))
    rows = {cells[1].strip(): cells for line in printed if len(cells := line.split("|")) > 3}
    for reward, run in (("learned reward", learned), ("zero reward", zero)):
        assert rows[reward][2].strip() == f"{run.final_return:.1f}".replace("-", "−")
    assert printed[-1] == f"Report: {tmp_path / 'demo' / 'learned' / 'report.html'}"

    assert main(words) == 0
    assert len(kept) == 20
    shown = capsys.readouterr().out.splitlines()
    assert shown == printed[-len(shown) :]
    result = json.loads((tmp_path / "demo" / "zero" / "result.json").read_text())
    assert result["comparisons"] == 0
    assert result["final_return"] == pytest.approx(zero.final_return)
