"""Array-likes: all public entries take lists and NumPy arrays as they take tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rewardmodels import (
    Clips,
    Comparisons,
    GaussianPosterior,
    InvalidInput,
    Marks,
    Ratings,
    SampledPosterior,
    calibration,
    epic_distance,
)
from rewardmodels.arrays import as_integers, as_tensor
from rewardmodels.calibrated import CalibratedPosterior

DRAW = np.random.default_rng(0)
OBSERVATIONS, ACTIONS = DRAW.normal(size=(4, 3, 2)), DRAW.normal(size=(4, 3, 1))
PAIRS, PREFERENCE = np.array([[0, 1], [2, 3], [3, 0]]), np.array([1.0, 0.0, 0.5])
PROBABILITY = np.array([0.9, 0.7, 0.6])
CLIPS = Clips(torch.from_numpy(OBSERVATIONS), torch.from_numpy(ACTIONS))
SAMPLES = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
POSTERIORS = [
    SampledPosterior(SAMPLES),
    GaussianPosterior(SAMPLES[0], SAMPLES.T),
    CalibratedPosterior(SampledPosterior(SAMPLES), 2.0, None, np.linspace(0, 1, 9)),
    CalibratedPosterior(
        SampledPosterior(SAMPLES), 2.0, np.array([[0.0, 1], [0.2, 0.8]]), np.ones(9)
    ),
]
KINDS: dict[str, Callable[[Any], Any]] = {
    "list": lambda x: x.tolist(),
    "array": np.asarray,
    "float32": lambda x: x.astype(bool if x.dtype == bool else np.float32),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "backwards": lambda x: x[::-1].copy()[::-1],
    "Fortran": np.asfortranarray,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}
INTEGERS = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


def results(make: Callable[[Any], Any]) -> list[torch.Tensor]:
    """Everything that takes arrays, given those that `make` makes."""
    o, a, pairs, mu, p = map(make, (OBSERVATIONS, ACTIONS, PAIRS, PREFERENCE, PROBABILITY))
    clips = Clips(o, a, make(np.ones((4, 3), bool)), make(ACTIONS[..., 0]))
    rating, raters = make(PROBABILITY[[0, 1, 2, 0]]), make(PAIRS[[0, 1, 0, 1], 0])
    said = [
        Comparisons(clips, pairs, mu),
        Marks(clips, make(np.array([[0, 1, 1, 1]]))).comparisons(),
        Ratings(clips, make(np.arange(4)), rating, raters).comparisons(),
    ]
    chosen = clips[make(PAIRS[:, 1])].actions
    found: list[Any] = [clips.returns, Clips.of_items(o).observations, chosen]
    for one in said:
        found += [one.pairs, one.preference, one.clips.observations]
    for posterior in POSTERIORS:
        found += [posterior.preference(pairs), *posterior.difference(pairs)]
    found.append(POSTERIORS[2].prediction_set(pairs, 0.5))
    found += [f(p, mu) for f in (calibration.log_loss, calibration.brier_score)]
    found += [calibration.expected_calibration_error(p, mu), calibration.sharpness(p)]
    found += [calibration.joint_log_loss(make(SAMPLES.numpy()), pairs, mu)]
    found += [calibration.rank_correlation(p, mu), calibration.error_detection_auroc(p, p, mu)]
    found += [calibration.risk_coverage(p, p, mu).aurc]
    rewards = (lambda s, a, t: s[:, 0, 0]), (lambda s, a, t: t[:, 0, 0])
    found.append(epic_distance(*rewards, o, a, o, generator=torch.Generator()))
    return [torch.as_tensor(x) for x in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_array_likes_do_as_tensors_do(kind):
    for one, other in zip(results(KINDS[kind]), results(torch.from_numpy), strict=True):
        torch.testing.assert_close(one, other, check_dtype=False, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [*INTEGERS, np.float16, np.float32, np.float64])
def test_indices_are_of_any_type_of_number(dtype):
    assert Comparisons(CLIPS, PAIRS.astype(dtype), PREFERENCE).pairs.tolist() == PAIRS.tolist()
    assert as_integers("which", [np.array(3, dtype)], "(M,)").dtype == torch.int64


@pytest.mark.parametrize("method", ["preference", "difference", "prediction_set"])
@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    "pairs",
    [[[0, 4]], [[-1, 2]], [[0.5, 1.0]], [[0, 1j]], [[np.nan, 1]], [0, 1], [["0", "1"]], None],
)
def test_pairs_that_cannot_be_are_refused(posterior, method, pairs):
    if hasattr(posterior, method):
        with pytest.raises(InvalidInput, match="pairs: expected"):
            getattr(posterior, method)(pairs)


@pytest.mark.parametrize("value", [[0.5, np.nan], [0.5, 1j], ["a", "b"], [0.5, 1.5]])
def test_probabilities_that_cannot_be_are_refused(value):
    for one, other in ((value, [1, 0]), ([0.1, 0.2], value)):
        with pytest.raises(InvalidInput, match="expected"):
            calibration.log_loss(one, other)


def test_memory_is_shared():
    array = np.zeros((4, 3, 2))
    assert np.shares_memory(as_tensor("observations", array).numpy(), array)
