"""Each environment of a vector is guarded as if it were alone."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ood import (
    AlarmResponse,
    Mahalanobis,
    Monitor,
    Threshold,
    VectorGuard,
)
from rewardmodels import InvalidInput

from .drifting import ACTION, HORIZON, NAN, Drift, guarded, monitor, run


class TestVector:
    @pytest.mark.parametrize("mode", list(AutoresetMode))
    def test_each_is_guarded_alone(self, mode):
        strange = [{}, {4: 99.0}, {HORIZON: 99.0}]
        envs = SyncVectorEnv([lambda s=s: Drift(s) for s in strange], autoreset_mode=mode)
        vector = VectorGuard(envs, monitor(), "observation")
        singles = [guarded(s) for s in strange]
        vector.reset(seed=[1, 2, 3])
        expected = [run(guard, seed=i + 1) for i, guard in enumerate(singles)]
        actions = np.tile(ACTION, (3, 1))
        for t in range(1, HORIZON + 1):
            *_, truncated, info = vector.step(actions)
            for i in range(3):
                for key, value in expected[i][t].items():
                    if (key, t, mode) == ("acting", HORIZON, AutoresetMode.SAME_STEP):
                        value = "agent"  # who acts next is of the next episode
                    came = info["guard"][key]
                    assert (came if key == "threshold" else came[i]) == value, (t, i, key)
        assert truncated.all()
        for env, guard in zip(envs.envs, singles, strict=True):
            np.testing.assert_array_equal(env.unwrapped.done or guard.env.done, guard.env.done)
        # The next episode begins with a clean slate.
        if mode == AutoresetMode.DISABLED:
            vector.reset(options={"reset_mask": np.array([True, True, True])})
        elif mode == AutoresetMode.NEXT_STEP:
            *_, info = vector.step(actions)
            assert not info["guard"]["alarm"].any()
            assert np.isnan(info["guard"]["score"]).all()
        *_, info = vector.step(actions)
        assert info["guard"]["acting"] == ["agent"] * 3
        assert vector.keeper.stream.steps.tolist() == [1, 1, 1]
        assert vector.keeper.episode.tolist() == [1, 1, 1]
        for _ in range(3):
            *_, info = vector.step(actions)
        assert info["guard"]["acting"] == ["agent", "halted", "agent"]

    def test_step_that_only_resets_is_nobodys(self):
        events = []
        envs = SyncVectorEnv([lambda: Drift({HORIZON: 99.0})])
        # What changed: by as much at the episode's end as from there to the next one's start.
        changes = lambda before, action, after: after - before  # noqa: E731
        vector = VectorGuard(
            envs, monitor(Threshold(30.0)), changes, AlarmResponse(on_alarm=events.append)
        )
        vector.reset(seed=0)
        for _ in range(HORIZON + 3):
            vector.step(ACTION[None])
        assert [(event.episode, event.step) for event in events] == [(0, HORIZON)]

    def test_broken_start_after_a_reset_in_the_same_step(self):
        envs = SyncVectorEnv([Drift, Drift], autoreset_mode=AutoresetMode.SAME_STEP)
        vector = VectorGuard(envs, monitor(), "observation")
        vector.reset(seed=0)
        for t in range(HORIZON):
            if t == HORIZON - 1:
                envs.envs[1].strange = {0: NAN}
            *_, info = vector.step(np.tile(ACTION, (2, 1)))
        assert info["guard"]["acting"] == ["agent", "halted"]
        assert info["guard"]["alarm"].tolist() == [False, True]
        assert "first observation" in info["guard"]["reason"][1]

    def test_transparent_below_the_threshold(self):
        def make():
            return gym.make_vec("Pendulum-v1", 3, vectorization_mode="sync", max_episode_steps=7)

        watch = Monitor(Mahalanobis().fit(torch.randn(50, 3)), threshold=Threshold.never())
        bare, guard = make(), VectorGuard(make(), watch, "observation")
        np.testing.assert_array_equal(bare.reset(seed=0)[0], guard.reset(seed=0)[0])
        for _ in range(20):
            actions = np.random.default_rng(0).uniform(-2, 2, (3, 1)).astype(np.float32)
            for one, two in zip(bare.step(actions)[:4], guard.step(actions)[:4], strict=True):
                np.testing.assert_array_equal(one, two)

    def test_episodes_of_different_lengths(self):
        envs = SyncVectorEnv([lambda n=n: Drift({2: 99.0}, horizon=n) for n in (3, 5)])
        vector = VectorGuard(envs, monitor(), "observation")
        vector.reset(seed=0)
        who = []
        for _ in range(6):
            *_, info = vector.step(np.tile(ACTION, (2, 1)))
            who.append(info["guard"]["acting"])
        first, second = zip(*who, strict=True)
        # Three steps, one that resets, and two of the next episode; five, and one that resets.
        assert first == ("agent", "halted", "halted", "agent", "agent", "halted")
        assert second == ("agent", "halted", "halted", "halted", "halted", "agent")

    def test_refuses_environments_that_reset_who_knows_how(self):
        envs = SyncVectorEnv([Drift])
        envs.metadata = {}
        with pytest.raises(InvalidInput, match="autoreset_mode"):
            VectorGuard(envs, monitor())
