import numpy as np
import pytest
import torch
from torch import distributions as D
from torch.nn import functional as F

from ood import DynamicsEnsemble, Mahalanobis, RandomNetworkDistillation
from ood.checks import frames
from rewardmodels import InvalidInput


def linear_system(n: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    before, action = torch.randn(2, n, 2, generator=draw, dtype=torch.double)
    noise = torch.randn(n, 2, generator=draw, dtype=torch.double)
    return scale * torch.cat([before, action[:, :1], before + action + 0.3 * noise], 1)


def small(**settings) -> DynamicsEnsemble:
    return DynamicsEnsemble(2, **{"members": 3, "hidden": (16, 8), "steps": 60, **settings})


def member_predictions(detector, x):
    """Change, and each member's means and standard deviations of it, by the formulas."""
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
    return state, change, torch.stack(mean), torch.stack(std)


def test_score_is_the_mixtures_log_density():
    detector, new = small().fit(linear_system(300)), linear_system(10, seed=1)
    _, change, mean, std = member_predictions(detector, new)
    members = D.Independent(D.Normal(mean.transpose(0, 1), std.transpose(0, 1)), 1)
    mixture = D.MixtureSameFamily(D.Categorical(torch.ones(10, 3)), members)
    expected = -mixture.log_prob(change) / 2
    torch.testing.assert_close(detector.score(new), expected, rtol=1e-4, atol=1e-4)
    detector.score_by = "error"
    error = (change - mean).abs().mean(2).amin(0)
    torch.testing.assert_close(detector.score(new), error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("members", [1, 3])
def test_residuals_are_the_whitened_errors_and_their_size(members, scale):
    detector, new = small(members=members).fit(linear_system(300)), linear_system(20, 1, scale)
    state, change, mean, std = member_predictions(detector, new)
    variance = std.square().mean(0) + mean.var(0, correction=0)
    errors = (change - mean.mean(0)) / variance.sqrt()
    white = (errors - state["missed"]) @ state["missed_whitening"]
    size = ((white.square() + 0.01).log().mean(1) - state["size"][0]) / state["size"][1]
    expected = torch.cat([white, size[:, None]], 1)
    torch.testing.assert_close(detector.residuals(new), expected, rtol=1e-4, atol=1e-4)


def test_residuals_of_training_frames_are_standardised_and_errors_uncorrelated():
    x = linear_system(400)
    residuals = small().fit(x).residuals(x)
    torch.testing.assert_close(residuals.mean(0), 0 * residuals[0], atol=0.01, rtol=0)
    torch.testing.assert_close(residuals.var(0), 1 + 0 * residuals[0], atol=0.02, rtol=0)
    torch.testing.assert_close(residuals[:, :2].T.cov(), torch.eye(2).double(), atol=0.02, rtol=0)


def test_a_second_fit_leaves_nothing_of_the_first():
    x, other = linear_system(100, 2), linear_system(300, 1, 3.0)
    again = small().fit(linear_system(300))
    first, state = again.residuals(x), again.state
    assert torch.equal(again.fit(other).residuals(x), small().fit(other).residuals(x))
    assert torch.equal(again.restore(state).residuals(x), first)


def test_frames_beyond_single_precision_are_infinitely_anomalous():
    x = linear_system(300)
    x[0, 0] = 1e200
    residuals = small().fit(linear_system(300)).residuals(x[:2])
    assert torch.isinf(residuals[0]).any()
    assert torch.isfinite(residuals[1]).all()


def test_learns_the_noise_of_a_linear_system():
    # The second number moves by an action that isn't seen: its change has variance 1 + 0.09.
    detector = DynamicsEnsemble(2, members=2, hidden=(32,), steps=600).fit(linear_system(5000))
    scale = torch.from_numpy(detector.change_scale)
    entropy = [D.Normal(0.0, std).entropy() for std in (0.3, 1.09**0.5)]
    expected = float(torch.stack(entropy).mean() - scale.log().mean())
    mean = float(detector.score(linear_system(2000, seed=1)).mean())
    assert mean == pytest.approx(expected, abs=0.05)


def test_finds_changed_dynamics_where_no_frame_is_anomalous_alone():
    x, new = linear_system(3000), linear_system(500, seed=1)
    turned = new.clone()
    turned[:, 3] = new[:, 0] - (new[:, 3] - new[:, 0])
    dynamics = DynamicsEnsemble(2, members=2, hidden=(32,), steps=400).fit(x)
    assert dynamics.score(turned).median() > dynamics.score(new).quantile(0.9)
    frame = Mahalanobis().fit(x[:, 3:])
    assert abs(frame.score(turned[:, 3:]).median() - frame.score(new[:, 3:]).median()) < 0.3
    assert (dynamics.explain(turned)[:, :3] == 0).all()
    assert (dynamics.explain(turned).mean(0).argmax()) == 3


def test_distillation_errs_outside_the_training_frames():
    x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x[:, 0] = x[:, 0] * 0.4 + (x[:, 0] > 0.5) * 0.6  # a gap in the middle
    detector = RandomNetworkDistillation(hidden=(64,), steps=1500).fit(x)
    outside = torch.tensor([[2.5, 0.5], [0.5, -1.5]])
    assert detector.score(outside).min() > detector.score(x).quantile(0.99)


def test_refuses():
    for call in (
        lambda: DynamicsEnsemble(3).fit(frames()),
        lambda: DynamicsEnsemble(3, score_by="luck"),
        lambda: DynamicsEnsemble(0),
        lambda: DynamicsEnsemble(3, hidden=(8, 0)),
        lambda: RandomNetworkDistillation(outputs=0),
    ):
        with pytest.raises(InvalidInput):
            call()
