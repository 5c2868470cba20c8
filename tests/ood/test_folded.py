"""What a dynamics ensemble folds away once a fit: against the formulas as they are written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ood import DynamicsEnsemble
from ood.conformal import Threshold
from ood.sequential import root_mean_square


def transitions(seed, far=1.0):
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(300, 2, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 30.0])
    action = torch.randn(300, 1, generator=draw, dtype=torch.float64)
    after = before * 0.9 + action + 0.1 * torch.randn(300, 2, generator=draw, dtype=torch.float64)
    return far * torch.cat([before, action, after], 1)


def made(seed=0, **settings):
    given = {"members": 3, "hidden": (16, 8), "steps": 60} | settings
    return DynamicsEnsemble(2, **given).fit(transitions(seed))


def as_written(detector, x):
    """Errors over the mixture's deviations, whitened, and the mean log of their squares."""
    state = {name: torch.from_numpy(np.array(v)).double() for name, v in detector.state.items()}
    change = (x[:, 3:] - x[:, :2] - state["change_mean"]) / state["change_scale"]
    mean, std = [], []
    for k in range(detector.members):
        h = (x[:, :3] - state["mean"][:3]) / state["scale"][:3]
        for layer in range(3):
            h = h @ state[f"member_weight{layer}"][k] + state[f"member_bias{layer}"][k]
            h = F.silu(h) if layer < 2 else h
        mean.append(h[:, :2])
        std.append((-5 + F.softplus(1 - F.softplus(1 - h[:, 2:]) + 5)).exp())
    mean, std = torch.stack(mean), torch.stack(std)
    variance = std.square().mean(0) + mean.var(0, correction=0)
    missed = (change - mean.mean(0)) / variance.sqrt()
    white = (missed - state["missed"]) @ state["missed_whitening"]
    size = ((white.square() + 0.01).log().mean(1) - state["size"][0]) / state["size"][1]
    return torch.cat([white, size[:, None]], 1)


@pytest.mark.parametrize("far", [1.0, 100.0])
@pytest.mark.parametrize("members", [1, 3])
def test_signed_numbers_are_what_is_written(members, far):
    detector, x = made(members=members), transitions(1, far)
    torch.testing.assert_close(detector.signed(x), as_written(detector, x), rtol=1e-4, atol=1e-4)
    one = torch.cat([detector.signed(row[None]) for row in x[:20]])
    torch.testing.assert_close(one, as_written(detector, x[:20]), rtol=1e-4, atol=1e-4)


def test_nothing_of_an_earlier_fit_stays():
    x = transitions(2)
    again = made(seed=0)
    again.signed(x)  # folds
    again.fit(transitions(1, far=3.0))
    fresh = DynamicsEnsemble(2, members=3, hidden=(16, 8), steps=60).fit(transitions(1, far=3.0))
    assert torch.equal(again.signed(x), fresh.signed(x))
    again.restore(made(seed=0).state)
    assert torch.equal(again.signed(x), made(seed=0).signed(x))


def test_frames_past_single_precision_are_infinitely_strange():
    x = transitions(0)[:2].clone()
    x[0, 0] = 1e200
    signed = made().signed(x)
    assert torch.isinf(signed[0]).any()
    assert torch.isfinite(signed[1]).all()


@pytest.mark.parametrize("n", [1, 5])
def test_root_mean_square_is_numpys(n):
    x = np.random.default_rng(0).standard_normal((n, 4))
    np.testing.assert_allclose(root_mean_square(x), np.sqrt(np.mean(x**2, 1)), rtol=1e-14)
    assert np.isinf(root_mean_square(np.full((n, 4), 1e200))).all()


@pytest.mark.parametrize("period", [0, 3])
def test_one_stream_is_standardised_as_one_of_many(period):
    draw = np.random.default_rng(0)
    threshold = Threshold(
        1.0, mean=draw.standard_normal((4, 2)), scale=draw.uniform(1, 2, (4, 2)), period=period
    )
    scores = draw.standard_normal((7, 2))
    many = threshold.standardise(scores, np.arange(7))
    for step in range(7):
        at = min(step % period if period else step, 3)
        wanted = (scores[step] - threshold.mean[at]) / threshold.scale[at]
        one = threshold.standardise(scores[step : step + 1], np.array([step]))
        np.testing.assert_allclose(one[0], wanted, rtol=1e-14)
        np.testing.assert_allclose(many[step], wanted, rtol=1e-14)
