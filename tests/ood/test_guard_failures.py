"""Whatever fails, the guard halts the agent, and says why."""

import numpy as np
import pytest
import torch

from ood import (
    CUSUM,
    AlarmResponse,
    EventLog,
    Guard,
    Mahalanobis,
    Monitor,
    Spike,
    Threshold,
    record_episodes,
)

from .drifting import ACTION, NAN, Drift, act, acting, guarded, monitor, run


class TestFailsSafe:
    def check(self, guard, why, step=0):
        infos = run(guard)
        assert acting(infos)[step:] == ["halted"] * (13 - step)
        assert acting(infos)[:step] == ["agent"] * step
        assert infos[step]["alarm"]
        assert why in infos[-1]["reason"], infos[-1]["reason"]
        assert (np.stack(guard.env.done)[step:] == 0).all()

    def test_unfitted_detector(self):
        self.check(guarded(watch=Monitor(Mahalanobis())), "call fit first")

    def test_uncalibrated_threshold(self):
        watch = Monitor(monitor().detector)
        self.check(guarded(watch=watch), "call calibrate first")

    def test_stale_threshold(self):
        watch = monitor()
        watch.calibrate(record_episodes(Drift(), act, 30, "observation", seed=5), 0.1)
        assert acting(run(guarded(watch=watch)))[0] == "agent"
        refitted = Monitor(Mahalanobis().fit(torch.randn(50, 3)), Spike(), watch.threshold)
        self.check(guarded(watch=refitted), "such as those before a refit")
        other = Monitor(watch.detector, CUSUM(), watch.threshold)
        self.check(guarded(watch=other), "CUSUM")

    def test_refit_under_way(self):
        watch = monitor()
        watch.calibrate(record_episodes(Drift(), act, 30, "observation", seed=5), 0.1)
        guard = guarded(watch=watch)
        run(guard)
        watch.detector.fit(torch.randn(50, 3))
        self.check(guard, "call calibrate again")

    def test_refit_in_the_middle_of_an_episode(self):
        watch = monitor()
        watch.calibrate(
            record_episodes(Drift(), act, 99, "observation", seed=5), 0.01, standardise=0
        )
        guard = guarded(watch=watch)
        guard.reset(seed=1)
        assert guard.step(ACTION)[4]["guard"]["acting"] == "agent"
        watch.detector.fit(torch.randn(50, 3))
        info = guard.step(ACTION)[4]["guard"]
        assert (info["acting"], info["alarm"]) == ("halted", True)
        assert "call calibrate again" in info["reason"]

    def test_wrong_shape(self):
        watch = Monitor(Mahalanobis().fit(torch.randn(50, 4)), threshold=Threshold(9.0))
        self.check(guarded(watch=watch), "expected shape (B, 4), as learned from, got (1, 3)", 1)

    def test_detector_that_raises(self):
        watch = monitor()
        watch.detector._score = lambda features: 1 / 0
        self.check(guarded(watch=watch), "ZeroDivisionError", 1)

    def test_features_that_raise(self):
        guard = Guard(Drift(), monitor(), lambda before, action, after: None)
        self.check(guard, "the monitor failed", 1)

    @pytest.mark.parametrize("said", ["raise", "go away", 3])
    def test_callback_that_fails(self, said):
        def on_alarm(event):
            if said == "raise":
                raise OSError("line is dead")
            return said

        guard = guarded({4: 99.0}, rules=AlarmResponse(on_alarm=on_alarm))
        self.check(guard, "on_alarm failed", 4)

    @pytest.mark.parametrize("answer", ["raise", np.full(2, NAN), np.zeros(3), np.full(2, 5.0)])
    def test_fallback_that_fails(self, answer):
        def fallback(observation):
            if isinstance(answer, str):
                raise OSError("no policy")
            return answer

        guard = guarded({4: 99.0}, rules=AlarmResponse(on_alarm="fallback", fallback=fallback))
        infos = run(guard)
        assert acting(infos)[4:] == ["fallback"] + ["halted"] * 8
        assert "the fallback policy failed" in infos[-1]["reason"]
        assert (np.stack(guard.env.done)[4:] == 0).all()

    def test_asking_that_fails(self):
        guard = guarded({4: 99.0}, rules=AlarmResponse(on_alarm="ask", ask=lambda clip: 1 / 0))
        self.check(guard, "asking failed: ZeroDivisionError", 4)

    def test_log_that_cannot_be_written(self, tmp_path):
        log = EventLog(tmp_path / "file" / "log.jsonl")
        (tmp_path / "file").write_text("")
        rules = AlarmResponse(on_alarm=lambda event: None, log=log)
        self.check(guarded({4: 99.0}, rules=rules), "can't be logged", 4)
