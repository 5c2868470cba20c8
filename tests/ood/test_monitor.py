import functools
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.ensemble import IsolationForest

from ood import (
    CUSUM,
    EWMA,
    KNN,
    MEWMA,
    DynamicsEnsemble,
    Joint,
    Mahalanobis,
    Monitor,
    Reading,
    ShiryaevRoberts,
    SklearnDetector,
    Spike,
    StaleThreshold,
    Statistic,
    Threshold,
    agent_fingerprint,
    load_monitor,
    record_episodes,
    save_monitor,
)
from rewardmodels import InvalidInput, NotFitted
from rewardmodels.errors import UnreadableFile
from rewardmodels.saving import content_checksum

NAN = float("nan")


def readings(monitor, episode):
    """Readings `(T,)` of a whole episode."""
    stream = monitor.stream(1)
    steps = [stream.update(frame[None]) for frame in episode]
    return Reading(*(np.concatenate(column) for column in zip(*steps, strict=True)))


def test_readings_are_score_statistic_and_threshold():
    monitor = Monitor(Mahalanobis().fit(torch.randn(500, 3)))
    threshold = monitor.calibrate(list(torch.randn(40, 30, 3)), 0.1)
    episode = torch.randn(50, 3)
    episode[20:] += 3
    reading = readings(monitor, episode)
    z = threshold.standardise(monitor.detector.score(episode).numpy(), np.arange(50))
    np.testing.assert_allclose(reading.statistic, monitor.statistic.run(z[None])[0])
    assert reading.alarm.tolist() == (reading.statistic > threshold.value).tolist()
    assert reading.alarm[40:].all()


def test_one_broken_environment_leaves_the_others():
    monitor = Monitor(Mahalanobis().fit(torch.randn(500, 3)), threshold=Threshold(1e300))
    x = torch.randn(3, 3)
    expected = monitor.detector.score(x)
    x[1, 2] = float("inf")
    reading = monitor.stream(3).update(x)
    assert reading.alarm.tolist() == [False, True, False]
    np.testing.assert_allclose(reading.score[[0, 2]], expected[[0, 2]])
    assert "feature[2]" in monitor.explain(x[1])


def test_blocks_of_a_stream_begin_anew():
    monitor = Monitor(Mahalanobis().fit(torch.randn(500, 1)), threshold=Threshold(99.0, period=4))
    values = readings(monitor, torch.full((9, 1), 3.0)).statistic
    np.testing.assert_array_equal(values[4:8], values[:4])
    assert values[8] == values[0] < values[1]


def test_calibrates_on_a_stream():
    monitor = Monitor(Mahalanobis().fit(torch.randn(500, 2)))
    stream = torch.randn(1300, 2)
    threshold = monitor.calibrate_stream(stream, 0.1, block=50)
    assert (threshold.period, threshold.episodes) == (50, 20)
    assert threshold.fingerprint == monitor.fingerprint
    # The blocks that the threshold is a quantile of exceed it as often as their rank says.
    reading = readings(monitor, stream[6 * 50 :])
    assert reading.alarm.reshape(20, 50).any(1).sum() == 1


def test_refuses_rows_for_other_environments():
    monitor = Monitor(Mahalanobis().fit(torch.randn(500, 3)), threshold=Threshold(99.0))
    with pytest.raises(InvalidInput, match="features"):
        monitor.stream(2).update(torch.randn(3, 3))


def test_record_episodes_plays_the_policy():
    env = gym.make("Pendulum-v1", max_episode_steps=4)
    actions = iter(np.linspace(-1, 1, 8, dtype=np.float32)[:, None])
    one, two = record_episodes(env, lambda observation: next(actions), 2, "transition", seed=3)
    again = gym.make("Pendulum-v1", max_episode_steps=4)
    before, _ = again.reset(seed=3)
    for row, action in zip(one, np.linspace(-1, 1, 8, dtype=np.float32)[:4, None], strict=True):
        after, *_ = again.step(action)
        np.testing.assert_array_equal(row.numpy(), np.concatenate([before, action, after]))
        before = after
    assert not torch.equal(one[0, :3], two[0, :3])
    with pytest.raises(InvalidInput, match="episodes"):
        record_episodes(env, lambda observation: None, 0)


def calibrated(detector, statistic=None) -> Monitor:
    draw = torch.Generator().manual_seed(0)
    monitor = Monitor(detector.fit(torch.randn(300, 3, generator=draw)), statistic)
    monitor.calibrate(list(torch.randn(30, 20, 3, generator=draw)), 0.1)
    return monitor


def edited(path, change, *, checked=True):
    """Writes the file again with other JSON or tensors, and their checksum or the old one."""
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["ood"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = about.pop("checksum")
    change(about, arrays)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    new = content_checksum(about, tensors) if checked else old
    save_file(tensors, path, {"ood": json.dumps({**about, "checksum": new})})


@pytest.mark.parametrize(
    "statistic", [EWMA(0.3), MEWMA(0.2, 2.5), None], ids=["scores", "residuals", "stream"]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: DynamicsEnsemble(1, 2, (8,), "error", steps=20),
        lambda: Joint([Mahalanobis(), Joint([KNN(2), Mahalanobis()])], [(0, 2), None]),
    ],
    ids=["dynamics", "joint"],
)
def test_a_loaded_monitor_has_the_same_readings(make, statistic, tmp_path):
    if statistic is None:
        draw = torch.Generator().manual_seed(0)
        monitor = Monitor(make().fit(torch.randn(300, 3, generator=draw)), ShiryaevRoberts())
        monitor.calibrate_stream(torch.randn(200, 3, generator=draw), 0.1, block=5)
    else:
        monitor = calibrated(make(), statistic)
    path = tmp_path / "monitor.safetensors"
    save_monitor(monitor, path)
    loaded = load_monitor(path)
    assert loaded.fingerprint == monitor.fingerprint
    new = torch.randn(50, 3) * 3
    for one, two in zip(readings(monitor, new), readings(loaded, new), strict=True):
        np.testing.assert_array_equal(one, two)
    assert loaded.threshold.value == monitor.threshold.value
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_threshold_may_be_missing_or_chosen_by_hand(tmp_path):
    monitor = Monitor(Mahalanobis().fit(torch.randn(9, 2)), CUSUM())
    save_monitor(monitor, tmp_path / "a")
    assert load_monitor(tmp_path / "a").threshold is None
    monitor.threshold = Threshold(0.1)
    save_monitor(monitor, tmp_path / "a")
    assert load_monitor(tmp_path / "a").threshold.value == 0.1


def test_refuses_what_a_file_cannot_hold(tmp_path):
    class Mine(Statistic):
        def next_value(self, value, scores):
            return scores

    class Yours(Mahalanobis):
        pass

    trees = calibrated(SklearnDetector(IsolationForest(n_estimators=5, random_state=0)))
    stale = calibrated(Mahalanobis())
    stale.detector.fit(torch.randn(50, 3))
    for monitor, error in (
        (trees, InvalidInput),
        (calibrated(Joint([KNN(), trees.detector])), InvalidInput),
        (calibrated(Yours()), InvalidInput),
        (calibrated(Mahalanobis(), Mine()), InvalidInput),
        (Monitor(Mahalanobis()), NotFitted),
        (stale, RuntimeError),
    ):
        with pytest.raises(error):
            save_monitor(monitor, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def moved(about, arrays):
    arrays["detector.mean"] = arrays["detector.mean"] + 1


def threshold(**fields):
    return lambda about, arrays: about["threshold"].update(fields)


def filled(name, number):
    return lambda about, arrays: arrays[name].fill(number)


CHANGES = {
    "high threshold": threshold(value=1e300),
    "no threshold": threshold(value=NAN),
    "infinite threshold": threshold(value=math.inf),
    "other promise": threshold(alpha=0.01),
    "no promise": threshold(alpha=0.0),
    "other fingerprint": threshold(fingerprint="another"),
    "infinite scale": filled("threshold.scale", math.inf),
    "no scale": filled("threshold.scale", NAN),
    "infinite mean": filled("threshold.mean", math.inf),
    "high maxima": filled("threshold.maxima", 1e300),
    "no maxima": lambda about, arrays: arrays.update({"threshold.maxima": np.zeros(0)}),
    "infinite detector": filled("detector.scale", math.inf),
    "no detector": filled("detector.whitening", NAN),
    "no fingerprints": lambda about, arrays: about.update(fingerprint=""),
    "older": lambda about, arrays: about.update(format=1),
    "statistic": lambda about, arrays: about.update(statistic=["CUSUM", {"drift": 9.0}]),
    "tensor": moved,
    "shape": lambda about, arrays: arrays.update({"detector.whitening": np.zeros((2, 2))}),
    "missing": lambda about, arrays: arrays.pop("detector.whitening"),
    "unregistered": lambda about, arrays: about["detector"].update({"class": "os.system"}),
    "newer": lambda about, arrays: about.update(format=99),
    "settings": lambda about, arrays: about["detector"].update(settings={"k": 3}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_refuses_files_that_are_not_what_was_saved(change, tmp_path):
    save_monitor(calibrated(Mahalanobis(), Spike()), tmp_path / "monitor")
    edited(tmp_path / "monitor", change)
    with pytest.raises(UnreadableFile):
        load_monitor(tmp_path / "monitor")


def leaves(about, place=()):
    """Places of all single values in nested JSON."""
    if not isinstance(about, dict | list):
        return [place]
    items = about.items() if isinstance(about, dict) else enumerate(about)
    return [leaf for key, value in items for leaf in leaves(value, (*place, key))]


def test_every_field_and_every_array_is_covered_by_the_checksum(tmp_path):
    path = tmp_path / "monitor"
    save_monitor(calibrated(Joint([Mahalanobis(), KNN(2)], [(0, 2), None])), path, agent="me")
    whole = path.read_bytes()
    with safe_open(path, "np") as file:
        about, names = json.loads(file.metadata()["ood"]), list(file.keys())
    del about["checksum"]

    def change(about, arrays, place):
        if isinstance(place, str):
            arrays[place].flat[-1] += 1e-3
            return
        for key in place[:-1]:
            about = about[key]
        old = about[place[-1]]
        about[place[-1]] = old + "x" if isinstance(old, str) else (old or 0) + 1e-9

    for places in (leaves(about), names):
        assert len(places) > 8
        for place in places:
            path.write_bytes(whole)
            load_monitor(path, agent="me")
            edited(path, functools.partial(change, place=place), checked=False)
            with pytest.raises(UnreadableFile):
                load_monitor(path, agent="me")


@pytest.mark.parametrize("number", [NAN, math.inf])
@pytest.mark.parametrize(
    ("make", "array"),
    [
        (lambda: KNN(2), lambda detector: detector.kept),
        (lambda: KNN(2), lambda detector: detector.scale),
        (lambda: Joint([Mahalanobis(), KNN(2)]), lambda joint: joint.spread),
        (lambda: Joint([Mahalanobis(), KNN(2)]), lambda joint: joint.detectors[1].half_norms),
        (
            lambda: DynamicsEnsemble(1, 2, (8,), "error", steps=20),
            lambda detector: detector.change_scale,
        ),
    ],
)
def test_what_isnt_finite_in_a_detector_is_refused_before_it_watches(make, array, number, tmp_path):
    monitor = calibrated(make())
    array(monitor.detector).flat[-1] = number
    monitor.threshold = Threshold(1.0)  # by hand, for any detector
    with pytest.raises(InvalidInput, match="finite"):
        monitor.stream(1)
    with pytest.raises(InvalidInput, match="finite"):
        save_monitor(monitor, tmp_path / "a")


def test_refuses_an_uncalibrated_monitor_that_was_changed_and_files_of_nothing(tmp_path):
    path = tmp_path / "monitor"
    with pytest.raises(FileNotFoundError):
        load_monitor(path)
    save_monitor(Monitor(Mahalanobis().fit(torch.randn(9, 2))), path)
    edited(path, moved)
    with pytest.raises(UnreadableFile):
        load_monitor(path)
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(UnreadableFile):
        load_monitor(path)


def test_a_monitor_belongs_to_its_agent(tmp_path):
    for name, content in (("one", b"policy"), ("two", b"policy, trained further")):
        (tmp_path / name).write_bytes(content)
    one, two = (agent_fingerprint(tmp_path / name) for name in ("one", "two"))
    assert agent_fingerprint(tmp_path / "one", tmp_path / "two") != agent_fingerprint(
        tmp_path / "two", tmp_path / "one"
    )
    monitor, path = calibrated(Mahalanobis()), tmp_path / "monitor"
    save_monitor(monitor, path, agent=one)
    assert load_monitor(path, agent=one).fingerprint == monitor.fingerprint
    assert load_monitor(path).fingerprint == monitor.fingerprint
    with pytest.raises(StaleThreshold):
        load_monitor(path, agent=two)
    save_monitor(monitor, path)
    with pytest.raises(StaleThreshold):
        load_monitor(path, agent=one)
