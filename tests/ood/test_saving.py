import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.ensemble import IsolationForest

from ood import (
    CUSUM,
    EWMA,
    KNN,
    MEWMA,
    DynamicsEnsemble,
    Joint,
    Mahalanobis,
    MixtureDensity,
    Monitor,
    RandomNetworkDistillation,
    RelativeMahalanobis,
    SklearnDetector,
    Spike,
    StaleThreshold,
    Statistic,
    Threshold,
    agent_fingerprint,
    load_monitor,
    save_monitor,
)
from rewardmodels import InvalidInput, NotFitted
from rewardmodels.errors import UnreadableFile

DETECTORS = {
    "Mahalanobis": Mahalanobis,
    "RelativeMahalanobis": lambda: RelativeMahalanobis(groups=2),
    "KNN": lambda: KNN(k=2, frames=100),
    "MixtureDensity": lambda: MixtureDensity(2),
    "RandomNetworkDistillation": lambda: RandomNetworkDistillation((8,), 4, steps=20),
    "DynamicsEnsemble": lambda: DynamicsEnsemble(1, 2, (8,), "error", steps=20),
    "Joint": lambda: Joint([Mahalanobis(), Joint([KNN(2), Mahalanobis()], combine="mean")],
                           [(0, 2), None]),
}  # fmt: skip


def calibrated(detector, statistic=None) -> Monitor:
    draw = torch.Generator().manual_seed(0)
    monitor = Monitor(detector.fit(torch.randn(300, 3, generator=draw)), statistic)
    monitor.calibrate(list(torch.randn(30, 20, 3, generator=draw)), 0.1)
    return monitor


def edited(path, change):
    """Writes the file again with other JSON or tensors."""
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["ood"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, arrays)
    save_file(arrays, path, {"ood": json.dumps(about)})


@pytest.mark.parametrize("statistic", [EWMA(0.3), MEWMA(0.2, 2.5)], ids=["scores", "signed"])
@pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)
def test_comes_back_the_same(make, statistic, tmp_path):
    monitor, path = calibrated(make(), statistic), tmp_path / "monitor.safetensors"
    save_monitor(monitor, path)
    loaded = load_monitor(path)
    assert loaded.fingerprint == monitor.fingerprint
    new = torch.randn(50, 3) * 3
    assert torch.equal(loaded.detector.score(new), monitor.detector.score(new))
    streams = [monitor.stream(1), loaded.stream(1)]
    for row in new:
        one, two = (stream.update(row[None]) for stream in streams)
        assert one.statistic == two.statistic
        assert one.alarm == two.alarm
    assert loaded.threshold.value == monitor.threshold.value
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_threshold_may_be_missing_or_infinite(tmp_path):
    monitor = Monitor(Mahalanobis().fit(torch.randn(9, 2)), CUSUM())
    save_monitor(monitor, tmp_path / "a")
    assert load_monitor(tmp_path / "a").threshold is None
    monitor.threshold = Threshold.never()
    save_monitor(monitor, tmp_path / "a")
    assert load_monitor(tmp_path / "a").threshold.value == float("inf")


def test_refuses_what_a_file_cannot_hold(tmp_path):
    class Mine(Statistic):
        def _next(self, value, scores):
            return scores

    class Yours(Mahalanobis):
        pass

    trees = calibrated(SklearnDetector(IsolationForest(n_estimators=5, random_state=0)))
    stale = calibrated(Mahalanobis())
    stale.detector.fit(torch.randn(50, 3))
    for monitor, error, what in (
        (trees, InvalidInput, "a SklearnDetector"),
        (calibrated(Joint([KNN(), trees.detector])), InvalidInput, "file can hold"),
        (calibrated(Yours()), InvalidInput, "a Yours"),
        (calibrated(Mahalanobis(), Mine()), InvalidInput, "Mine"),
        (Monitor(Mahalanobis()), NotFitted, "call fit"),
        (stale, RuntimeError, "calibrate again"),
    ):
        with pytest.raises(error, match=what):
            save_monitor(monitor, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_refuses_files_that_are_not_what_was_saved(tmp_path):
    path = tmp_path / "monitor"
    with pytest.raises(FileNotFoundError):
        load_monitor(path)

    def statistic(about, arrays):
        about["statistic"] = ["CUSUM", {"drift": 9.0}]

    def tensor(about, arrays):
        arrays["detector.mean"] = arrays["detector.mean"] + 1

    def shape(about, arrays):
        arrays["detector.whitening"] = np.zeros((2, 2))

    def missing(about, arrays):
        del arrays["detector.whitening"]

    def stranger(about, arrays):
        about["detector"]["class"] = "os.system"

    def newer(about, arrays):
        about["format"] = 99

    def settings(about, arrays):
        about["detector"]["settings"] = {"k": 3}

    for change in (statistic, tensor, shape, missing, stranger, newer, settings):
        save_monitor(calibrated(Mahalanobis(), Spike()), path)
        edited(path, change)
        with pytest.raises(UnreadableFile, match="expected"):
            load_monitor(path)
    save_monitor(Monitor(Mahalanobis().fit(torch.randn(9, 2))), path)
    edited(path, tensor)
    with pytest.raises(UnreadableFile, match="changed since"):
        load_monitor(path)
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(UnreadableFile):
        load_monitor(path)


def test_belongs_to_its_agent(tmp_path):
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
    with pytest.raises(StaleThreshold, match="of another agent, or of this one before more"):
        load_monitor(path, agent=two)
    save_monitor(monitor, path)
    with pytest.raises(StaleThreshold):
        load_monitor(path, agent=one)
