"""A guard changes nothing until an alarm, and then does what its rules say."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

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
from ood.features import hidden
from rewardmodels import Clips, Comparisons, InvalidInput, LaplaceHead, fit

from .drifting import ACTION, HORIZON, NAN, Drift, act, acting, guarded, monitor, run


class TestTransparent:
    @pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5", "CartPole-v1"])
    def test_nothing_changes_below_the_threshold(self, env_id):
        bare, inner = (gym.make(env_id, max_episode_steps=30) for _ in range(2))
        bare.action_space.seed(0)
        watch = Monitor(Mahalanobis(), threshold=Threshold.never())
        draw = torch.randn(100, int(np.prod(bare.observation_space.shape)))
        watch.detector.fit(draw)
        rules = None if env_id != "CartPole-v1" else AlarmResponse(safe_action=0)
        guard = Guard(inner, watch, "observation", rules)
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
                assert info["threshold"] == math.inf
                assert info["score"] > 0
                ended = one[2] or one[3]

    def test_what_it_says_is_what_the_monitor_says(self):
        watch = monitor(statistic=CUSUM(1.0), threshold=Threshold(1e9))
        guard, bare = guarded(watch=watch), Drift()
        infos = run(guard)
        bare.reset(seed=1)
        seen = torch.from_numpy(np.stack([bare.step(ACTION)[0] for _ in range(HORIZON)]))
        scores = watch.detector.score(seen)
        assert [x["score"] for x in infos[1:]] == pytest.approx(scores.tolist())
        expected = CUSUM(1.0).run(scores[None].numpy())[0]
        assert [x["statistic"] for x in infos[1:]] == pytest.approx(expected.tolist())


class TestHalt:
    def test_safe_action_until_the_episode_ends(self):
        guard = guarded({5: np.array([0, 99, 0])})
        infos = run(guard)
        assert acting(infos) == ["agent"] * 5 + ["halted"] * 8
        assert [x["alarm"] for x in infos].index(True) == 5
        assert infos[5]["reason"].startswith("Mahalanobis: strangest observation[1] (")
        assert infos[-1]["reason"] == infos[5]["reason"]
        taken = np.stack(guard.env.done)
        assert (taken[:5] == ACTION).all()
        assert (taken[5:] == 0).all()
        guard.env.strange = {}
        assert acting(run(guard)) == ["agent"] * 13

    def test_ones_own_safe_action(self):
        guard = guarded({2: 99.0}, rules=AlarmResponse(safe_action=[1.0, 1.0]))
        run(guard)
        assert (np.stack(guard.env.done)[2:] == 1).all()

    @pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
    @pytest.mark.parametrize("step", [0, 4])
    def test_not_a_number_is_an_alarm_under_any_threshold(self, value, step):
        watch = monitor(Threshold.never())
        infos = run(guarded({step: np.array([0, 0, value])}, watch=watch))
        assert [x["alarm"] for x in infos].index(True) == step
        assert acting(infos)[step:] == ["halted"] * (13 - step)
        assert "NaN or infinity" in infos[step]["reason"]
        blind = Guard(Drift({step: value}), watch, lambda before, action, after: np.zeros((1, 3)))
        assert acting(run(blind))[step] == "halted"

    def test_end_to_end_on_a_heavier_cheetah(self):
        rng = np.random.default_rng(0)

        def swing(observation):
            return np.clip(rng.normal(0, 0.5, 6), -1, 1).astype(np.float32)

        env = gym.make("HalfCheetah-v5", max_episode_steps=80)
        episodes = record_episodes(env, swing, 45, "transition", seed=0)
        watch = Monitor(Mahalanobis().fit(torch.cat(episodes[:20])), CUSUM())
        watch.calibrate(episodes[20:], alpha=0.1)
        guard = Guard(env, watch, "transition")

        def alarms(n):
            count = 0
            for seed in range(n):
                guard.reset(seed=100 + seed)
                ended = False
                while not ended:
                    *_, ended, info = guard.step(swing(None))
                count += info["guard"]["acting"] == "halted"
            return count

        assert alarms(8) <= 3  # of 8 at 0.1: more than 3 once in 200 times
        env.unwrapped.model.body_mass[:] *= 2
        assert alarms(8) >= 7


class TestAsk:
    def test_hands_over_the_clip_that_led_up_to_it(self):
        clips: list[Clips] = []
        rules = AlarmResponse(
            on_alarm="ask", ask=lambda clip: clips.append(clip) or True, context=3
        )
        guard = guarded({5: 99.0}, rules=rules)
        assert acting(run(guard)) == ["agent"] * 13
        (clip,) = clips
        assert clip.observations.shape == (1, 3, 3)
        assert clip.actions.shape == (1, 3, 2)
        assert float(clip.observations[0, 2].min()) > 90 > float(clip.observations[0, 1].max())
        assert (clip.actions.numpy() == ACTION).all()

    def test_going_on_begins_the_statistic_anew(self):
        watch = monitor(Threshold(60.0), CUSUM(3.0))
        rules = AlarmResponse(on_alarm="ask", ask=lambda clip: True)
        infos = run(guarded({5: 99.0}, rules=rules, watch=watch))
        assert infos[5]["alarm"]
        assert infos[6]["statistic"] < 5
        assert [i for i, info in enumerate(infos) if info["reason"]] == [5]

    def test_no_halts(self):
        infos = run(guarded({5: 99.0}, rules=AlarmResponse(on_alarm="ask", ask=lambda clip: False)))
        assert acting(infos)[5:] == ["halted"] * 8
        assert "the answer was to halt" in infos[-1]["reason"]

    @pytest.mark.parametrize(("while_asking", "who"), [("wait", "waiting"), ("go on", "agent")])
    def test_answers_may_come_later(self, while_asking, who):
        asked = []
        rules = AlarmResponse(on_alarm="ask", ask=asked.append, while_asking=while_asking)
        guard = guarded({2: 99.0, 3: 99.0, 8: 99.0}, rules=rules)
        with pytest.raises(InvalidInput, match="waits for an answer"):
            guard.answer(True)
        assert acting(run(guard, 4))[2:] == [who] * 3
        assert len(asked) == 1
        guard.answer(True)
        infos = [guard.step(ACTION)[4]["guard"] for _ in range(4)]
        assert acting(infos) == ["agent"] * 3 + [who]
        guard.answer(False)
        assert guard.step(ACTION)[4]["guard"]["acting"] == "halted"
        waited = np.stack(guard.env.done)[2:4]
        assert (waited == (0 if who == "waiting" else ACTION)).all()


class TestFallback:
    def test_hands_over_and_back_with_hysteresis(self):
        fallback = np.array([0.25, 0.25], np.float32)
        # Strange at 3; at 5 too strange to be calm, though below the threshold.
        strange = {3: 99.0, 5: np.array([0, 0, 6.0])}
        rules = AlarmResponse(
            on_alarm="fallback", fallback=lambda seen: fallback, hand_back_steps=3
        )
        guard = guarded(strange, rules=rules, watch=monitor(Threshold(10.0)))
        infos = run(guard)
        assert 5 < infos[5]["statistic"] < 10
        assert acting(infos) == ["agent"] * 3 + ["fallback"] * 5 + ["agent"] * 5
        taken = np.stack(guard.env.done)
        assert (taken[3:8] == fallback).all()
        assert (taken[:3] == ACTION).all()
        assert (taken[8:] == ACTION).all()

    def test_is_asked_with_the_observation(self):
        seen = []
        rules = AlarmResponse(on_alarm="fallback", fallback=lambda x: seen.append(x) or ACTION)
        guard = guarded({3: 99.0}, rules=rules)
        guard.reset(seed=0)
        observations = [guard.step(ACTION)[0] for _ in range(5)]
        np.testing.assert_array_equal(seen, observations[2:4])


def test_callback_gets_the_event_and_may_halt():
    events = []
    on = AlarmResponse(on_alarm=events.append)
    infos = run(guarded({3: 99.0, 6: 99.0}, rules=on))
    assert acting(infos) == ["agent"] * 13
    assert [i for i, info in enumerate(infos) if info["reason"]] == [3, 6]
    assert [event.step for event in events] == [3, 6]
    assert "observation[" in events[0].reason
    assert (
        acting(run(guarded({3: 99.0}, rules=AlarmResponse(on_alarm=lambda event: "halt"))))[3]
        == "halted"
    )


def test_events_are_lines_of_json(tmp_path):
    log = EventLog(tmp_path / "deep" / "log.jsonl")
    fallback = AlarmResponse(on_alarm="fallback", fallback=act, hand_back_steps=2, log=log)
    run(guarded({3: 99.0}, rules=fallback))
    guard = guarded({3: NAN}, rules=AlarmResponse(log=log))
    run(guard)
    run(guard)
    events = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [x["kind"] for x in events] == ["fallback", "hand back", "halt", "halt"]
    assert [(x["episode"], x["step"]) for x in events] == [(0, 3), (0, 5), (0, 3), (1, 3)]
    assert events[0]["statistic"] > events[0]["threshold"] == 8.0
    assert events[2]["score"] is None
    assert events == log.read()
    assert EventLog(tmp_path / "none").read() == []


def test_guards_by_a_predictors_hidden_layer():
    clips = Clips(torch.randn(4, 9, 3), torch.randn(4, 9, 2))
    said = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    see = hidden(fit(LaplaceHead(hidden=(8, 4)), said, epochs=1))
    seen = record_episodes(Drift(), act, 40, see, seed=0)
    watch = Monitor(Mahalanobis().fit(torch.cat(seen[:15])), Spike())
    watch.calibrate(seen[15:], 0.1, standardise=0)
    who = acting(run(Guard(Drift({6: 99.0}), watch, see)))
    assert who[6:] == ["halted"] * 7


def test_refuses_rules_that_cannot_work():
    for rules, what in (
        ({"on_alarm": "panic"}, "on_alarm"),
        ({"on_alarm": "ask"}, "ask: expected a function"),
        ({"on_alarm": "fallback"}, "fallback: expected a function"),
        ({"while_asking": "sleep"}, "while_asking"),
        ({"hand_back": 0}, "hand_back"),
        ({"context": 0}, "context"),
    ):
        with pytest.raises(InvalidInput, match=what):
            AlarmResponse(**rules)
    with pytest.raises(InvalidInput, match="safe_action: expected an action in"):
        guarded(rules=AlarmResponse(safe_action=[7.0, 0.0]))
    with pytest.raises(InvalidInput, match=r"safe_action.*got None"):
        Guard(gym.make("CartPole-v1"), monitor())
    odd = Drift()
    odd.observation_space = spaces.Dict({})
    with pytest.raises(InvalidInput, match="observations that are arrays"):
        Guard(odd, monitor())


@pytest.mark.filterwarnings("ignore:.*WARN")  # of unbounded spaces, and of being a wrapper
def test_passes_gymnasiums_own_checks():
    check_env(guarded(), skip_render_check=True)


def test_two_guards_of_one_monitor_keep_apart():
    watch = monitor(Threshold(1e9), CUSUM(0.0))
    one, two = guarded(watch=watch), guarded(watch=watch)
    alone = [x["statistic"] for x in run(guarded(watch=watch))]
    one.reset(seed=1)
    two.reset(seed=2)
    found = []
    for _ in range(HORIZON):
        found.append(one.step(ACTION)[4]["guard"]["statistic"])
        two.step(ACTION)
    assert found == alone[1:]
