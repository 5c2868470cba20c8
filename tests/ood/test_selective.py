import numpy as np
import pytest
import torch

from ood import confidence_for, confident_errors, select
from rewardmodels import InvalidInput


def answers(n=400, seed=0):
    draw = torch.Generator().manual_seed(seed)
    p = torch.rand(n, generator=draw).mul(40).round() / 40
    said = torch.bernoulli(p * 0.8 + 0.1, generator=draw)
    said[::17] = 0.5
    return p, said


def test_counts_are_those_of_a_loop():
    p, said = answers()
    familiar = torch.rand(400) < 0.7
    found = select(p, said, min_confidence=0.75, familiar=familiar)
    given = wrong = decided = bad = bad_given = 0
    for i in range(400):
        sure = max(float(p[i]), 1 - float(p[i]))
        passes = sure >= 0.75 and bool(familiar[i])
        assert bool(found.given[i]) == passes
        if said[i] == 0.5:
            continue
        decided += 1
        given += passes
        miss = (p[i] > 0.5) != (said[i] > 0.5)
        wrong += passes and miss
        bad += sure > 0.9 and miss
        bad_given += sure > 0.9 and miss and passes
    assert found.coverage == pytest.approx(given / decided)
    assert found.risk == pytest.approx(wrong / given)
    assert (found.confident_errors, found.confident_errors_given) == (bad, bad_given)
    assert 0 < bad_given < bad == int(confident_errors(p, said).sum())


def test_swapping_the_two_clips_changes_nothing():
    p, said = answers()
    one, other = select(p, said, min_confidence=0.7), select(1 - p, 1 - said, min_confidence=0.7)
    assert one[1:] == pytest.approx(other[1:])


def test_a_coin_is_half_wrong():
    assert select(torch.full((2,), 0.5), torch.tensor([0.0, 1.0])).risk == 0.5


def test_nothing_given():
    found = select(torch.tensor([0.6]), torch.tensor([1.0]), min_confidence=0.9)
    assert found.coverage == 0
    assert np.isnan(found.risk)


@pytest.mark.parametrize("risk", [0.1, 0.2, 0.3])
def test_confidence_for_a_risk_is_the_least_that_will_do(risk):
    p, said = answers()
    least = confidence_for(risk, p, said)
    assert select(p, said, min_confidence=least).risk <= risk
    grid = torch.unique(torch.maximum(p, 1 - p)).tolist()
    risks = [select(p, said, min_confidence=c).risk for c in grid]
    assert least == pytest.approx(min(c for c, r in zip(grid, risks, strict=True) if r <= risk))


def test_no_confidence_will_do():
    assert confidence_for(0.0, torch.tensor([0.99]), torch.tensor([0.0])) == 1.0


def test_refuses():
    p, said = answers()
    for call in (
        lambda: select(p, said[:3]),
        lambda: select(p + 1, said),
        lambda: select(p, said, min_confidence=0.4),
        lambda: select(p, said, familiar=torch.ones(400)),
        lambda: select(p, torch.full_like(p, 0.5)),
        lambda: confidence_for(2.0, p, said),
        lambda: confident_errors(p, said * float("nan")),
    ):
        with pytest.raises(InvalidInput):
            call()
