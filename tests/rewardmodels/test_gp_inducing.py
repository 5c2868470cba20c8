"""Inducing frames: which are chosen, and what becomes of the belief when they change."""

import pytest
import torch

from rewardmodels import (
    Clips,
    Comparisons,
    GPHead,
    fit,
)

from .gp_fits import fitted, some


def test_frames_that_come_twice_count_once():
    model = fitted(some(20), inducing=10)
    # Short, so that each frame is a direction well above the jitter.
    model.rbf.base_kernel.lengthscale = 0.3
    with torch.no_grad():
        once = model.basis()
        model.inducing_observations = model.inducing_observations.repeat(4, 1)
        model.inducing_actions = model.inducing_actions.repeat(4, 1)
        often = model.basis()
    torch.testing.assert_close(often @ often.T, once @ once.T, atol=2e-3, rtol=0)


def test_clips_of_few_distinct_frames_are_learned_from():
    draw = torch.Generator().manual_seed(0)
    frames = torch.randn(5, 2, generator=draw)
    clips = Clips(frames[torch.randint(5, (40, 3), generator=draw)], torch.zeros(40, 3, 1))
    pairs = torch.arange(40).view(20, 2)
    model = fit(GPHead(inducing=30), Comparisons(clips, pairs, torch.ones(20)), epochs=5)
    belief = model.posterior(clips)
    assert belief.mean.isfinite().all()
    assert float(torch.linalg.eigvalsh(belief.covariance)[0]) > -1e-5
    same = Clips(torch.ones(4, 10, 2), torch.ones(4, 10, 1))
    equal = Comparisons(same, torch.tensor([[0, 1], [2, 3]]), torch.full((2,), 0.5))
    assert fit(GPHead(inducing=40), equal, epochs=2).posterior(same).mean.isfinite().all()


@pytest.mark.parametrize(
    ("inducing", "frames", "comparisons"),
    [
        (61, 60, some(10)),
        (60, int(some(10, ragged=True).clips.mask.sum()), some(10, ragged=True)),
        (13, 12, Comparisons(some(10).clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))),
    ],
)
def test_of_too_few_frames_all_are_inducing_and_it_says_so(inducing, frames, comparisons):
    message = f"inducing: expected at most {frames}, .* got {inducing}"
    with pytest.warns(UserWarning, match=message):
        model = fit(GPHead(inducing=inducing), comparisons, epochs=1)
    assert len(model.inducing_observations) == inducing
    assert len(model.inducing_observations.unique(dim=0)) == frames
    # A later fit to more takes more.
    fit(model, Comparisons.cat([comparisons, some(40, seed=1)]), epochs=1)
    assert len(model.inducing_observations.unique(dim=0)) == inducing
    assert fit(GPHead(inducing=frames), comparisons, epochs=1).fitted


def test_inducing_frames_are_real_distinct_frames_of_what_was_compared():
    comparisons = some(20, ragged=True)
    model = fit(GPHead(inducing=40), comparisons, epochs=1)
    real = {
        tuple(frame.tolist()) for frame in comparisons.clips.observations[comparisons.clips.mask]
    }
    chosen = {tuple(frame.tolist()) for frame in model.inducing_observations}
    assert len(chosen) == 40
    assert chosen <= real


def test_new_inducing_frames_believe_what_the_old_did():
    comparisons, new = some(20), some(30, seed=1)
    # All frames, in another order, span what they did before.
    model = fit(GPHead(inducing=120), comparisons, epochs=3)
    before = model.posterior(new.clips).difference(new.pairs)
    old = model.inducing_observations
    model.before_fit(comparisons.clips)
    model.after_epoch()
    after = model.posterior(new.clips).difference(new.pairs)
    assert not torch.equal(model.inducing_observations, old)
    torch.testing.assert_close(after.mean, before.mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(after.variance, before.variance, atol=0.005, rtol=0.02)


def test_spare_inducing_frames_stay_as_the_prior_has_them():
    draw = torch.Generator().manual_seed(0)
    frames = torch.randn(5, 2, generator=draw)
    clips = Clips(frames[torch.randint(5, (40, 3), generator=draw)], torch.zeros(40, 3, 1))
    said = Comparisons(clips, torch.arange(40).view(20, 2), torch.ones(20))
    model = fit(GPHead(inducing=30), said, epochs=5)
    before = model.divergence().item()
    model.before_fit(clips)
    # Twenty-five directions of nothing but jitter would cost nats each, were they not at N(0, 1).
    assert model.divergence().item() == pytest.approx(before, rel=0.05)


def test_a_second_fit_with_more_answers_is_surer_and_looks_at_the_new():
    early = some(30)
    late = some(200, seed=1)
    late = Comparisons(
        Clips(late.clips.observations + 3, late.clips.actions), late.pairs, late.preference
    )
    model = fit(GPHead(inducing=40), early, epochs=5)
    belief = model.posterior(late.clips).difference(late.pairs)
    fit(model, Comparisons.cat([early, late]), epochs=10)
    assert float(model.comparison_count) < 230 * 0.95
    assert bool((model.inducing_observations[:, 0] > 3).any())
    again = model.posterior(late.clips)
    assert again.difference(late.pairs).variance.median() < belief.variance.median()
    right = (again.preference(late.pairs) > 0.5) == (late.preference > 0.5)
    assert float(right.float().mean()) > 0.6
