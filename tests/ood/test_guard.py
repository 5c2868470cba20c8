"""Guards change nothing before an alarm, then respond to it, and fail safe."""

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ood import (
    CUSUM,
    AlarmResponse,
    EventLog,
    Guard,
    Mahalanobis,
    Monitor,
    Spike,
    Threshold,
    VectorGuard,
    record_episodes,
)
from ood.features import hidden_layer
from rewardmodels import Clips, Comparisons, InvalidInput, LaplaceHead, fit

HORIZON, NAN = 12, float("nan")
ACTION = np.array([0.5, -0.5], np.float32)


class Drift(gym.Env):
    """Observations are noise, plus an offset at given steps; actions are recorded."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, offsets: dict[int, Any] | None = None, horizon: int = HORIZON) -> None:
        self.offsets, self.horizon = offsets or {}, horizon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count, self.taken = 0, []
        return self._observe(), {"start": True}

    def step(self, action):
        self.step_count += 1
        self.taken.append(np.array(action))
        end = self.step_count >= self.horizon
        return self._observe(), float(action[0]), False, end, {"n": self.step_count}

    def _observe(self):
        return self.np_random.standard_normal(3) + self.offsets.get(self.step_count, 0.0)


def act(observation):
    return ACTION


def make_monitor(threshold: Threshold | None = None, statistic=None) -> Monitor:
    episodes = record_episodes(Drift(), act, 100, "observation", seed=0)
    detector = Mahalanobis().fit(torch.cat(episodes))
    return Monitor(detector, statistic or Spike(), threshold or Threshold(8.0))


def guarded(offsets=None, *, monitor=None, log=None, **response) -> Guard:
    monitor = monitor or make_monitor()
    return Guard(Drift(offsets), monitor, "observation", AlarmResponse(**response), log)


def run(guard, steps=HORIZON, seed=1):
    _, info = guard.reset(seed=seed)
    return [info["guard"], *(guard.step(ACTION)[4]["guard"] for _ in range(steps))]


def acting(infos):
    return [info["acting"] for info in infos]


class TestTransparent:
    @pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5", "CartPole-v1"])
    def test_nothing_changes_below_the_threshold(self, env_id):
        bare, inner = (gym.make(env_id, max_episode_steps=30) for _ in range(2))
        bare.action_space.seed(0)
        draw = torch.randn(100, int(np.prod(bare.observation_space.shape)))
        monitor = Monitor(Mahalanobis().fit(draw), threshold=Threshold(1e300))
        response = None if env_id != "CartPole-v1" else AlarmResponse(safe_action=0)
        guard = Guard(inner, monitor, "observation", response)
        for seed in (3, 4):
            one, two = bare.reset(seed=seed), guard.reset(seed=seed)
            np.testing.assert_array_equal(one[0], two[0])
            ended = False
            while not ended:
                action = bare.action_space.sample()
                one, two = bare.step(action), guard.step(action)
                np.testing.assert_array_equal(one[0], two[0])
                assert one[1:4] == two[1:4]
                info = two[4].pop("guard")
                assert one[4] == two[4]
                assert (info["alarm"], info["acting"], info["reason"]) == (False, "agent", "")
                assert info["threshold"] == 1e300
                assert info["score"] > 0
                ended = one[2] or one[3]

    def test_info_is_the_monitors_reading(self):
        monitor = make_monitor(Threshold(1e9), CUSUM(1.0))
        infos, bare = run(guarded(monitor=monitor)), Drift()
        bare.reset(seed=1)
        observations = torch.from_numpy(np.stack([bare.step(ACTION)[0] for _ in range(HORIZON)]))
        scores = monitor.detector.score(observations)
        assert [x["score"] for x in infos[1:]] == pytest.approx(scores.tolist())
        expected = CUSUM(1.0).run(scores[None].numpy())[0]
        assert [x["statistic"] for x in infos[1:]] == pytest.approx(expected.tolist())

    def test_two_guards_of_one_monitor_are_independent(self):
        monitor = make_monitor(Threshold(1e9), CUSUM(0.0))
        one, two = guarded(monitor=monitor), guarded(monitor=monitor)
        alone = [x["statistic"] for x in run(guarded(monitor=monitor))]
        one.reset(seed=1)
        two.reset(seed=2)
        together = []
        for _ in range(HORIZON):
            together.append(one.step(ACTION)[4]["guard"]["statistic"])
            two.step(ACTION)
        assert together == alone[1:]

    @pytest.mark.filterwarnings("ignore:.*WARN")  # of unbounded spaces, and of being a wrapper
    def test_passes_gymnasiums_own_checks(self):
        check_env(guarded(), skip_render_check=True)


class TestHalt:
    def test_plays_the_safe_action_until_the_episode_ends(self):
        guard = guarded({5: np.array([0, 99, 0])})
        infos = run(guard)
        assert acting(infos) == ["agent"] * 5 + ["halted"] * 8
        assert [x["alarm"] for x in infos].index(True) == 5
        assert infos[5]["reason"].startswith("Mahalanobis: most anomalous observation[1] (")
        assert infos[-1]["reason"] == infos[5]["reason"]
        taken = np.stack(guard.env.taken)
        assert (taken[:5] == ACTION).all()
        assert (taken[5:] == 0).all()
        guard.env.offsets = {}
        assert acting(run(guard)) == ["agent"] * 13

    def test_a_safe_action_may_be_given(self):
        guard = guarded({2: 99.0}, safe_action=[1.0, 1.0])
        run(guard)
        assert (np.stack(guard.env.taken)[2:] == 1).all()

    @pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
    @pytest.mark.parametrize("step", [0, 4])
    def test_not_a_number_is_an_alarm_under_any_threshold(self, value, step):
        monitor = make_monitor(Threshold(1e300))
        infos = run(guarded({step: np.array([0, 0, value])}, monitor=monitor))
        assert [x["alarm"] for x in infos].index(True) == step
        assert acting(infos)[step:] == ["halted"] * (13 - step)
        assert "NaN or infinity" in infos[step]["reason"]
        constant = lambda before, action, after: np.zeros((1, 3))  # noqa: E731
        assert acting(run(Guard(Drift({step: value}), monitor, constant)))[step] == "halted"


class TestAsk:
    def test_gives_the_clip_that_led_to_the_alarm(self):
        clips: list[Clips] = []
        ask = lambda clip: clips.append(clip) or True  # noqa: E731
        guard = guarded({5: 99.0}, on_alarm="ask", ask=ask, clip_frames=3)
        assert acting(run(guard)) == ["agent"] * 13
        (clip,) = clips
        assert clip.observations.shape == (1, 3, 3)
        assert clip.actions.shape == (1, 3, 2)
        assert float(clip.observations[0, 2].min()) > 90 > float(clip.observations[0, 1].max())
        assert (clip.actions.numpy() == ACTION).all()

    def test_the_statistic_begins_anew_when_the_agent_goes_on(self):
        monitor = make_monitor(Threshold(60.0), CUSUM(3.0))
        infos = run(guarded({5: 99.0}, monitor=monitor, on_alarm="ask", ask=lambda clip: True))
        assert infos[5]["alarm"]
        assert infos[6]["statistic"] < 5
        assert [i for i, info in enumerate(infos) if info["reason"]] == [5]

    def test_false_halts(self):
        infos = run(guarded({5: 99.0}, on_alarm="ask", ask=lambda clip: False))
        assert acting(infos)[5:] == ["halted"] * 8
        assert "the decision was to halt" in infos[-1]["reason"]

    @pytest.mark.parametrize("answer", ["no", "yes", "", 1, 0, [True], np.array([True]), object()])
    def test_what_is_no_truth_value_halts(self, answer):
        infos = run(guarded({5: 99.0}, on_alarm="ask", ask=lambda clip: answer))
        assert acting(infos)[5:] == ["halted"] * 8
        assert "neither True nor False" in infos[-1]["reason"]
        guard = guarded({2: 99.0}, on_alarm="ask", ask=lambda clip: None, while_asking="continue")
        run(guard, 4)
        guard.decide(answer)
        assert guard.step(ACTION)[4]["guard"]["acting"] == "halted"

    def test_a_truth_value_of_numpy_is_one(self):
        infos = run(guarded({5: 99.0}, on_alarm="ask", ask=lambda clip: np.bool_(True)))
        assert acting(infos) == ["agent"] * 13

    @pytest.mark.parametrize(("while_asking", "who"), [("wait", "waiting"), ("continue", "agent")])
    def test_the_decision_may_come_later(self, while_asking, who):
        asked = []
        guard = guarded(
            {2: 99.0, 3: 99.0, 8: 99.0},
            on_alarm="ask", ask=asked.append, while_asking=while_asking,
        )  # fmt: skip
        with pytest.raises(InvalidInput, match="decision"):
            guard.decide(True)
        assert acting(run(guard, 4))[2:] == [who] * 3
        assert len(asked) == 1
        guard.decide(True)
        infos = [guard.step(ACTION)[4]["guard"] for _ in range(4)]
        assert acting(infos) == ["agent"] * 3 + [who]
        guard.decide(False)
        assert guard.step(ACTION)[4]["guard"]["acting"] == "halted"
        meanwhile = np.stack(guard.env.taken)[2:4]
        assert (meanwhile == (0 if who == "waiting" else ACTION)).all()


class TestFallback:
    def test_takes_over_and_hands_back_once_the_statistic_is_low(self):
        fallback = np.array([0.25, 0.25], np.float32)
        # An alarm at 3; at 5 below the threshold, but not low.
        guard = guarded(
            {3: 99.0, 5: np.array([0, 0, 6.0])}, monitor=make_monitor(Threshold(10.0)),
            on_alarm="fallback", fallback=lambda observation: fallback, resume_after=3,
        )  # fmt: skip
        infos = run(guard)
        assert 5 < infos[5]["statistic"] < 10
        assert acting(infos) == ["agent"] * 3 + ["fallback"] * 5 + ["agent"] * 5
        taken = np.stack(guard.env.taken)
        assert (taken[3:8] == fallback).all()
        assert (taken[:3] == ACTION).all()
        assert (taken[8:] == ACTION).all()

    def test_gets_the_observation(self):
        seen = []
        fallback = lambda observation: seen.append(observation) or ACTION  # noqa: E731
        guard = guarded({3: 99.0}, on_alarm="fallback", fallback=fallback)
        guard.reset(seed=0)
        observations = [guard.step(ACTION)[0] for _ in range(5)]
        np.testing.assert_array_equal(seen, observations[2:4])


def test_a_function_gets_the_event_and_may_halt():
    events = []
    infos = run(guarded({3: 99.0, 6: 99.0}, on_alarm=events.append))
    assert acting(infos) == ["agent"] * 13
    assert [i for i, info in enumerate(infos) if info["reason"]] == [3, 6]
    assert [event.step for event in events] == [3, 6]
    assert "observation[" in events[0].reason
    assert acting(run(guarded({3: 99.0}, on_alarm=lambda event: "halt")))[3] == "halted"


def test_events_are_lines_of_json(tmp_path):
    log = EventLog(tmp_path / "deep" / "log.jsonl")
    run(guarded({3: 99.0}, log=log, on_alarm="fallback", fallback=act, resume_after=2))
    guard = guarded({3: NAN}, log=log)
    run(guard)
    run(guard)
    events = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [x["kind"] for x in events] == ["fallback", "resume", "halt", "halt"]
    assert [(x["episode"], x["step"]) for x in events] == [(0, 3), (0, 5), (0, 3), (1, 3)]
    assert events[0]["statistic"] > events[0]["threshold"] == 8.0
    assert events[2]["score"] is None


def test_guards_by_a_predictors_hidden_layer():
    clips = Clips(torch.randn(4, 9, 3), torch.randn(4, 9, 2))
    comparisons = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    features = hidden_layer(fit(LaplaceHead(hidden=(8, 4)), comparisons, epochs=1))
    episodes = record_episodes(Drift(), act, 40, features, seed=0)
    monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:15])), Spike())
    monitor.calibrate(episodes[15:], 0.1, standardise=0)
    infos = run(Guard(Drift({6: 99.0}), monitor, features))
    assert acting(infos)[6:] == ["halted"] * 7


def test_refuses_settings_that_cannot_work():
    for settings, what in (
        ({"on_alarm": "panic"}, "on_alarm"),
        ({"on_alarm": "ask"}, "ask"),
        ({"on_alarm": "fallback"}, "fallback"),
        ({"while_asking": "sleep"}, "while_asking"),
        ({"resume_below": 0}, "resume_below"),
        ({"clip_frames": 0}, "clip_frames"),
        ({"safe_action": [7.0, 0.0]}, "safe_action"),
    ):
        with pytest.raises(InvalidInput, match=what):
            guarded(**settings)
    with pytest.raises(InvalidInput, match="safe_action"):
        Guard(gym.make("CartPole-v1"), make_monitor())
    odd, envs = Drift(), SyncVectorEnv([Drift])
    odd.observation_space, envs.metadata = spaces.Dict({}), {}
    with pytest.raises(InvalidInput, match="observations"):
        Guard(odd, make_monitor())
    with pytest.raises(InvalidInput, match="autoreset_mode"):
        VectorGuard(envs, make_monitor())


def monitor_of(frames):
    return Monitor(Mahalanobis().fit(frames), threshold=Threshold(9.0))


def spoiled(monitor):
    monitor.detector.whitening[0, 0] = NAN
    return monitor


def scoring_nan(monitor):
    monitor.detector.score_frames = lambda frames: np.full(len(frames), NAN)
    return monitor


def breaking(monitor):
    monitor.detector.score_frames = lambda frames: 1 / 0
    return monitor


class TestFailsSafe:
    def check(self, guard, reason, step=0):
        infos = run(guard)
        assert acting(infos)[step:] == ["halted"] * (13 - step)
        assert acting(infos)[:step] == ["agent"] * step
        assert infos[step]["alarm"]
        assert reason in infos[-1]["reason"], infos[-1]["reason"]
        assert (np.stack(guard.env.taken)[step:] == 0).all()

    def calibrated(self, alpha=0.1, episodes=30, **settings):
        monitor = make_monitor()
        held_out = record_episodes(Drift(), act, episodes, "observation", seed=5)
        monitor.calibrate(held_out, alpha, **settings)
        return monitor

    @pytest.mark.parametrize(
        ("made", "reason", "step"),
        [
            (lambda: guarded(monitor=Monitor(Mahalanobis())), "fit", 0),
            (lambda: guarded(monitor=Monitor(make_monitor().detector)), "threshold", 0),
            (lambda: guarded(monitor=monitor_of(torch.randn(50, 4))), "(B, 4)", 1),
            (lambda: guarded(monitor=spoiled(make_monitor())), "Mahalanobis.whitening", 0),
            (lambda: guarded(monitor=scoring_nan(make_monitor())), "Mahalanobis", 1),
            (lambda: guarded(monitor=breaking(make_monitor())), "ZeroDivisionError", 1),
            (lambda: Guard(Drift(), make_monitor(), lambda *_: None), "the monitor failed", 1),
            (
                lambda: guarded({4: 99.0}, on_alarm="ask", ask=lambda clip: 1 / 0),
                "asking failed: ZeroDivisionError", 4,
            ),
            (
                lambda: guarded({4: 99.0}, log=EventLog(Path(__file__) / "log"), on_alarm=print),
                "can't be logged", 4,
            ),
        ],
    )  # fmt: skip
    def test_what_is_missing_or_breaks(self, made, reason, step):
        self.check(made(), reason, step)

    def test_threshold_of_another_detector_or_statistic(self):
        monitor = self.calibrated()
        assert acting(run(guarded(monitor=monitor)))[0] == "agent"
        refitted = Monitor(Mahalanobis().fit(torch.randn(50, 3)), Spike(), monitor.threshold)
        self.check(guarded(monitor=refitted), "refit")
        other = Monitor(monitor.detector, CUSUM(), monitor.threshold)
        self.check(guarded(monitor=other), "CUSUM")

    def test_refit_between_episodes(self):
        monitor = self.calibrated()
        guard = guarded(monitor=monitor)
        run(guard)
        monitor.detector.fit(torch.randn(50, 3))
        self.check(guard, "calibrate")

    def test_refit_in_the_middle_of_an_episode(self):
        monitor = self.calibrated(0.01, 99, standardise=0)
        guard = guarded(monitor=monitor)
        guard.reset(seed=1)
        assert guard.step(ACTION)[4]["guard"]["acting"] == "agent"
        monitor.detector.fit(torch.randn(50, 3))
        info = guard.step(ACTION)[4]["guard"]
        assert (info["acting"], info["alarm"]) == ("halted", True)
        assert "calibrate" in info["reason"]

    @pytest.mark.parametrize("result", ["raise", "go away", 3])
    def test_function_that_fails(self, result):
        def on_alarm(event):
            if result == "raise":
                raise OSError("line is dead")
            return result

        self.check(guarded({4: 99.0}, on_alarm=on_alarm), "on_alarm failed", 4)

    @pytest.mark.parametrize(
        "action",
        ["raise", np.full(2, NAN), np.zeros(3), np.full(2, 5.0), ["0", "0"], [None, None]],
    )
    def test_fallback_that_fails(self, action):
        def fallback(observation):
            if isinstance(action, str):
                raise OSError("no policy")
            return action

        guard = guarded({4: 99.0}, on_alarm="fallback", fallback=fallback)
        infos = run(guard)
        assert acting(infos)[4:] == ["fallback"] + ["halted"] * 8
        assert "the fallback policy failed" in infos[-1]["reason"]
        assert (np.stack(guard.env.taken)[4:] == 0).all()


class TestVector:
    def guarded(self, *envs, monitor=None, features="observation", mode=None, **response):
        mode = mode or AutoresetMode.NEXT_STEP
        vector = SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=mode)
        return VectorGuard(vector, monitor or make_monitor(), features, AlarmResponse(**response))

    @pytest.mark.parametrize("mode", list(AutoresetMode))
    def test_each_environment_is_guarded_as_if_alone(self, mode):
        offsets = [{}, {4: 99.0}, {HORIZON: 99.0}]
        vector = self.guarded(*map(Drift, offsets), mode=mode)
        singles = [guarded(each) for each in offsets]
        vector.reset(seed=[1, 2, 3])
        expected = [run(guard, seed=i + 1) for i, guard in enumerate(singles)]
        actions = np.tile(ACTION, (3, 1))
        for t in range(1, HORIZON + 1):
            *_, truncated, info = vector.step(actions)
            for i in range(3):
                for key, value in expected[i][t].items():
                    if (key, t, mode) == ("acting", HORIZON, AutoresetMode.SAME_STEP):
                        value = "agent"  # of the next episode
                    found = info["guard"][key]
                    assert (found if key == "threshold" else found[i]) == value, (t, i, key)
        assert truncated.all()
        for env, guard in zip(vector.env.envs, singles, strict=True):
            np.testing.assert_array_equal(env.taken or guard.env.taken, guard.env.taken)
        # The next episode starts without alarms.
        if mode == AutoresetMode.DISABLED:
            vector.reset(options={"reset_mask": np.array([True, True, True])})
        elif mode == AutoresetMode.NEXT_STEP:
            *_, info = vector.step(actions)
            assert not info["guard"]["alarm"].any()
            assert np.isnan(info["guard"]["score"]).all()
        *_, info = vector.step(actions)
        assert info["guard"]["acting"] == ["agent"] * 3
        assert vector.controller.stream.steps.tolist() == [1, 1, 1]
        assert vector.controller.episode.tolist() == [1, 1, 1]
        for _ in range(3):
            *_, info = vector.step(actions)
        assert info["guard"]["acting"] == ["agent", "halted", "agent"]

    def test_a_step_that_only_resets_belongs_to_no_episode(self):
        events = []
        # The change: as large at the episode's end as from there to the start of the next.
        change = lambda before, action, after: after - before  # noqa: E731
        monitor = make_monitor(Threshold(30.0))
        vector = self.guarded(
            Drift({HORIZON: 99.0}), monitor=monitor, features=change, on_alarm=events.append
        )
        vector.reset(seed=0)
        for _ in range(HORIZON + 3):
            vector.step(ACTION[None])
        assert [(event.episode, event.step) for event in events] == [(0, HORIZON)]

    def test_broken_first_observation_after_a_same_step_reset(self):
        vector = self.guarded(Drift(), Drift(), mode=AutoresetMode.SAME_STEP)
        vector.reset(seed=0)
        for t in range(HORIZON):
            if t == HORIZON - 1:
                vector.env.envs[1].offsets = {0: NAN}
            *_, info = vector.step(np.tile(ACTION, (2, 1)))
        assert info["guard"]["acting"] == ["agent", "halted"]
        assert info["guard"]["alarm"].tolist() == [False, True]
        assert "first observation" in info["guard"]["reason"][1]

    def test_nothing_changes_below_the_threshold(self):
        def make():
            return gym.make_vec("Pendulum-v1", 3, vectorization_mode="sync", max_episode_steps=7)

        monitor = Monitor(Mahalanobis().fit(torch.randn(50, 3)), threshold=Threshold(1e300))
        bare, guard = make(), VectorGuard(make(), monitor, "observation")
        np.testing.assert_array_equal(bare.reset(seed=0)[0], guard.reset(seed=0)[0])
        for _ in range(20):
            actions = np.random.default_rng(0).uniform(-2, 2, (3, 1)).astype(np.float32)
            for one, two in zip(bare.step(actions)[:4], guard.step(actions)[:4], strict=True):
                np.testing.assert_array_equal(one, two)

    def test_episodes_of_different_lengths(self):
        vector = self.guarded(*(Drift({2: 99.0}, horizon=n) for n in (3, 5)))
        vector.reset(seed=0)
        who = []
        for _ in range(6):
            *_, info = vector.step(np.tile(ACTION, (2, 1)))
            who.append(info["guard"]["acting"])
        first, second = zip(*who, strict=True)
        # Three steps, one that resets, and two of the next episode; five, and one that resets.
        assert first == ("agent", "halted", "halted", "agent", "agent", "halted")
        assert second == ("agent", "halted", "halted", "halted", "halted", "agent")
