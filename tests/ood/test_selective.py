import numpy as np
import pytest
import torch

from ood import confident_errors, select
from rewardmodels import InvalidInput


def predictions(n=400, seed=0):
    draw = torch.Generator().manual_seed(seed)
    probability = torch.rand(n, generator=draw).mul(40).round() / 40
    preference = torch.bernoulli(probability * 0.8 + 0.1, generator=draw)
    preference[::17] = 0.5
    return probability, preference


def test_counts_are_those_of_a_loop():
    p, preference = predictions()
    found = select(p, preference, min_confidence=0.94)
    kept = wrong = decided = errors = errors_kept = 0
    for i in range(400):
        confidence = max(float(p[i]), 1 - float(p[i]))
        keep = confidence >= 0.94
        assert bool(found.kept[i]) == keep
        if preference[i] == 0.5:
            continue
        decided += 1
        kept += keep
        miss = (p[i] > 0.5) != (preference[i] > 0.5)
        wrong += keep and miss
        errors += confidence > 0.9 and miss
        errors_kept += confidence > 0.9 and miss and keep
    assert found.coverage == pytest.approx(kept / decided)
    assert found.risk == pytest.approx(wrong / kept)
    assert (found.confident_errors, found.confident_errors_kept) == (errors, errors_kept)
    assert 0 < errors_kept < errors == int(confident_errors(p, preference).sum())


def test_swapping_the_two_clips_changes_nothing():
    p, preference = predictions()
    one = select(p, preference, min_confidence=0.7)
    other = select(1 - p, 1 - preference, min_confidence=0.7)
    assert one[1:] == pytest.approx(other[1:])


def test_a_probability_of_one_half_is_half_wrong():
    assert select(torch.full((2,), 0.5), torch.tensor([0.0, 1.0])).risk == 0.5


def test_nothing_kept():
    found = select(torch.tensor([0.6]), torch.tensor([1.0]), min_confidence=0.9)
    assert found.coverage == 0
    assert np.isnan(found.risk)


def test_refuses():
    p, preference = predictions()
    for call in (
        lambda: select(p, preference[:3]),
        lambda: select(p + 1, preference),
        lambda: select(p, preference, min_confidence=0.4),
        lambda: select(p, torch.full_like(p, 0.5)),
        lambda: confident_errors(p, preference * float("nan")),
    ):
        with pytest.raises(InvalidInput):
            call()
