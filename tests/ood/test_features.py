import gymnasium as gym
import numpy as np
import pytest
import torch

from ood import Mahalanobis, Monitor, Threshold, record_episodes
from ood.features import FEATURES, feature_names, find_features, hidden, of_clips, of_trajectories
from ood.monitor import scores_along
from rewardmodels import Clips, Comparisons, DeepEnsemble, LaplaceHead, fit
from rewardmodels.errors import InvalidInput, UnknownName

BEFORE, ACTION, AFTER = np.full((2, 3), 1.0), np.full((2, 2), 2.0), np.full((2, 3), 3.0)


def test_rows_and_names():
    expected = {
        "observation": "aaa",
        "observation_action": "aaaxx",
        "transition": "bbbxxaaa",
    }
    value = {"a": 3.0, "x": 2.0, "b": 1.0}
    begins = {"a": "observation[", "x": "action[", "b": "observation before["}
    for name, kinds in expected.items():
        seen = FEATURES[name](BEFORE, ACTION, AFTER)
        assert seen.tolist() == [[value[kind] for kind in kinds]] * 2
        called = feature_names(name, 3, 2)
        assert all(c.startswith(begins[k]) for c, k in zip(called, kinds, strict=True))
        assert len(set(called)) == len(kinds)
    discrete = FEATURES["observation_action"](BEFORE, np.array([0, 1]), AFTER)
    assert discrete[:, 3].tolist() == [0, 1]
    assert feature_names(lambda before, action, after: after, 3, 2) is None
    with pytest.raises(UnknownName, match="Did you mean 'observation'"):
        find_features("observatoin")


def test_of_trajectories_is_what_a_guard_sees():
    draw = torch.randn(2, 6, 3), torch.randn(2, 6, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    rows = of_trajectories(Clips(*draw, mask), "transition")
    assert [len(x) for x in rows] == [5, 3]
    expected = torch.cat([draw[0][1, 1], draw[1][1, 2], draw[0][1, 2]])
    torch.testing.assert_close(rows[1][1], expected)
    with pytest.raises(InvalidInput, match="two frames"):
        of_trajectories(Clips(draw[0][:, :1], draw[1][:, :1]), "transition")


def test_of_clips_is_mean_and_deviation_of_real_frames():
    x = torch.randn(3, 7, 2)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    found = of_clips(x.masked_fill(~mask[..., None], float("nan")), mask)
    for i, n in enumerate((7, 4, 1)):
        expected = torch.cat([x[i, :n].mean(0), x[i, :n].std(0, correction=0)])
        torch.testing.assert_close(found[i], expected)
    with pytest.raises(InvalidInput):
        of_clips(x, mask[:2])


def test_hidden_is_the_last_layer():
    clips = Clips(torch.randn(4, 5, 3), torch.randn(4, 5, 2))
    said = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    model = fit(LaplaceHead(hidden=(8, 4)), said, epochs=1)
    after, action = AFTER.astype(np.float32), ACTION.astype(np.float32)
    inputs = model.inputs(torch.from_numpy(after), torch.from_numpy(action))
    for layer in model.network.body.layers:
        inputs = torch.nn.functional.silu(layer(inputs))
    see = hidden(model)
    np.testing.assert_allclose(see(BEFORE, action, after), inputs.detach().numpy(), rtol=1e-5)
    fit(model, said, epochs=2)
    np.testing.assert_allclose(see(BEFORE, action, after), inputs.detach().numpy(), rtol=1e-5)
    for wrong in (LaplaceHead(), fit(DeepEnsemble(members=2), said, epochs=1)):
        with pytest.raises(InvalidInput, match=r"network\.features"):
            hidden(wrong)


def test_record_keeps_what_was_played():
    env = gym.make("Pendulum-v1", max_episode_steps=4)
    actions = iter(np.linspace(-1, 1, 8, dtype=np.float32)[:, None])
    one, two = record_episodes(env, lambda seen: next(actions), 2, "transition", seed=3)
    again = gym.make("Pendulum-v1", max_episode_steps=4)
    before, _ = again.reset(seed=3)
    for row, action in zip(one, np.linspace(-1, 1, 8, dtype=np.float32)[:4, None], strict=True):
        after, *_ = again.step(action)
        np.testing.assert_array_equal(row.numpy(), np.concatenate([before, action, after]))
        before = after
    assert not torch.equal(one[0, :3], two[0, :3])
    with pytest.raises(InvalidInput):
        record_episodes(env, lambda seen: None, 0)


class TestMonitor:
    def test_along_an_episode(self):
        monitor = Monitor(Mahalanobis().fit(torch.randn(500, 3)))
        threshold = monitor.calibrate(list(torch.randn(40, 30, 3)), 0.1)
        episode = torch.randn(50, 3)
        episode[20:] += 3
        reading = scores_along(monitor, episode)
        z = threshold.standardise(monitor.detector.score(episode).numpy(), np.arange(50))
        np.testing.assert_allclose(reading.statistic, monitor.statistic.run(z[None])[0])
        assert reading.alarm.tolist() == (reading.statistic > threshold.value).tolist()
        assert reading.alarm[40:].all()

    def test_one_broken_environment_leaves_the_others(self):
        monitor = Monitor(Mahalanobis().fit(torch.randn(500, 3)), threshold=Threshold.never())
        x = torch.randn(3, 3)
        expected = monitor.detector.score(x)
        x[1, 2] = float("inf")
        reading = monitor.stream(3).update(x)
        assert reading.alarm.tolist() == [False, True, False]
        np.testing.assert_allclose(reading.score[[0, 2]], expected[[0, 2]])
        assert monitor.explain(x[1]) == "NaN or infinity in feature[2]"

    def test_blocks_of_a_stream_begin_anew(self):
        monitor = Monitor(Mahalanobis().fit(torch.randn(500, 1)))
        monitor.threshold = Threshold(99.0, 0.1, period=4)
        stream = monitor.stream(1)
        values = [float(stream.update([[3.0]]).statistic[0]) for _ in range(9)]
        assert values[4:8] == values[:4]
        assert values[8] == values[0] < values[1]

    def test_calibrates_on_a_stream(self):
        monitor = Monitor(Mahalanobis().fit(torch.randn(500, 2)))
        stream = torch.randn(1300, 2)
        threshold = monitor.calibrate_stream(stream, 0.1, block=50)
        assert (threshold.period, threshold.episodes) == (50, 20)
        assert threshold.fingerprint == monitor.fingerprint
        # The blocks that the threshold is a quantile of exceed it as often as their rank says.
        reading = scores_along(monitor, stream[6 * 50 :])
        assert reading.alarm.reshape(20, 50).any(1).sum() == 1

    def test_refuses_rows_for_other_environments(self):
        monitor = Monitor(Mahalanobis().fit(torch.randn(500, 3)), threshold=Threshold(99.0))
        with pytest.raises(InvalidInput, match=r"each of the 2 environments, got \(3, 3\)"):
            monitor.stream(2).update(torch.randn(3, 3))
