"""What holds for every predictor, whatever it is made of."""

from collections.abc import Callable

import pytest
import torch
from jsonargparse import ArgumentParser

from rewardmodels import (
    Clips,
    Comparisons,
    DeepEnsemble,
    Epinet,
    GPHead,
    LaplaceHead,
    MCDropout,
    PairBatch,
    RewardModel,
    fit,
    load,
    save,
)
from rewardmodels import model as model_module
from rewardmodels.checks import CHECKS

MAKERS: dict[str, Callable[[], RewardModel]] = {
    "DeepEnsemble": lambda: DeepEnsemble(members=4, learning_rate=3e-3),
    "randomised priors": lambda: DeepEnsemble(members=4, learning_rate=3e-3, prior_scale=1.0),
    "MCDropout": lambda: MCDropout(learning_rate=3e-3),
    "LaplaceHead": lambda: LaplaceHead(learning_rate=3e-3),
    "Epinet": lambda: Epinet(learning_rate=3e-3),
    "GPHead": lambda: GPHead(learning_rate=3e-3),
}
PAIRS = torch.arange(60).view(30, 2)


def world(n: int = 60, seed: int = 0) -> tuple[Clips, torch.Tensor]:
    """Clips of six frames whose reward is linear in what is seen and done, and their returns."""
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(n, 6, 3, generator=draw)
    actions = torch.randn(n, 6, 2, generator=draw)
    rewards = observations @ torch.tensor([1.0, -1.0, 0.0]) + actions @ torch.tensor([0.0, 1.0])
    return Clips(observations + 5, actions, rewards=rewards), rewards.sum(1)


def answers(n: int, seed: int = 0) -> Comparisons:
    """What an unerring teacher says of n pairs."""
    clips, returns = world(2 * n, seed)
    pairs = torch.arange(2 * n).view(n, 2)
    return Comparisons(clips, pairs, (returns[pairs[:, 1]] > returns[pairs[:, 0]]).float())


@pytest.fixture(scope="module", params=list(MAKERS))
def maker(request) -> Callable[[], RewardModel]:
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def model(maker) -> RewardModel:
    return fit(maker(), answers(300), epochs=40)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", [DeepEnsemble, Epinet, GPHead, LaplaceHead, MCDropout])
def test_keeps_its_promises(cls, check):
    check(cls)


def test_learns_a_linear_reward(model):
    fresh = answers(1000, seed=7)
    belief = model.posterior(fresh.clips)
    right = (belief.preference(fresh.pairs) > 0.5) == (fresh.preference > 0.5)
    # What a coin says is right 0.5 +- 0.05 of the time.
    assert right.float().mean() > 0.88
    assert model.fit_report.held_out_accuracy > 0.8


def test_errs_where_it_is_unsure(model):
    fresh = answers(1000, seed=8)
    mean, variance = model.posterior(fresh.clips).difference(fresh.pairs)
    wrong = (mean > 0) != (fresh.preference > 0.5)
    sure = mean.abs() / variance.sqrt()
    assert 2 * sure[wrong].median() < sure[~wrong].median()


def test_far_from_the_data_differences_are_less_sure(model):
    clips, _ = world(seed=3)
    far = Clips((clips.observations - 5) * 10 + 5, clips.actions * 10)
    near = model.posterior(clips).difference(PAIRS).variance
    assert model.posterior(far).difference(PAIRS).variance.median() > 10 * near.median()


def test_a_clip_does_not_differ_from_itself(model):
    clips, _ = world(n=8)
    copied = model.posterior(Clips.cat([clips, clips]))
    assert float(copied.variance.min()) > 0
    itself = copied.difference(torch.stack([torch.arange(8), torch.arange(8) + 8], 1))
    scale = float(copied.variance.max())
    torch.testing.assert_close(itself.variance, torch.zeros(8), atol=1e-8 * scale, rtol=0)
    torch.testing.assert_close(itself.mean, torch.zeros(8), atol=1e-4, rtol=0)


def test_a_clip_is_the_sum_of_its_frames_jointly(model):
    clips, _ = world(n=4)
    frames = model.frame_posterior(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
    summing = torch.eye(4).repeat_interleave(6, 1)
    came = model.posterior(clips)
    torch.testing.assert_close(came.mean, summing @ frames.mean, atol=1e-4, rtol=1e-3)
    expected = summing @ frames.covariance @ summing.T
    torch.testing.assert_close(came.covariance, expected, atol=1e-4, rtol=1e-3)


def test_draws_have_the_moments_that_are_said(model):
    belief = model.posterior(world(n=6)[0])
    draws = belief.rsample(100_000, torch.Generator().manual_seed(0))
    # Five standard errors of a variance of a normal; those of few rows vary less.
    torch.testing.assert_close(draws.var(0), belief.variance, rtol=5 * (2 / 1e5) ** 0.5, atol=0)
    scale = belief.variance.max()
    torch.testing.assert_close(torch.cov(draws.T), belief.covariance, atol=0.02 * scale, rtol=0)


def test_every_sample_is_worth_nothing_on_the_reference(model):
    belief = model.frame_posterior(model.reference_observations, model.reference_actions)
    draws = belief.rsample(100, torch.Generator().manual_seed(0))
    assert float(draws.std(1).min()) > 0.1
    torch.testing.assert_close(draws.mean(1), torch.zeros(100), atol=1e-4, rtol=0)


def test_settling_again_changes_nothing(model):
    clips, _ = world()
    before = model.posterior(clips)
    model.after_epoch()
    after = model.posterior(clips)
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.variance, before.variance)


@pytest.mark.parametrize("at_once", [1, 17, 10**6])
def test_a_belief_does_not_depend_on_neighbours_order_or_chunks(model, monkeypatch, at_once):
    clips, _ = world(n=30)
    whole = model.posterior(clips)
    monkeypatch.setattr(model_module, "_FRAMES_AT_ONCE", at_once)
    order = torch.randperm(30)
    mixed = model.posterior(clips[order])
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(mixed.mean, whole.mean[order], **close)
    torch.testing.assert_close(mixed.covariance, whole.covariance[order][:, order], **close)
    for clip in range(3):
        alone = model.posterior(clips[clip])
        torch.testing.assert_close(alone.mean, whole.mean[[clip]], **close)
        torch.testing.assert_close(alone.variance, whole.variance[[clip]], **close)


@pytest.mark.parametrize("padding", [float("nan"), 1e30])
def test_padding_changes_nothing(model, padding):
    clips, _ = world(n=4)

    def padded(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value, torch.full((4, 5, value.shape[2]), padding)], 1)

    mask = torch.arange(11).expand(4, 11) < 6
    longer = Clips(padded(clips.observations), padded(clips.actions), mask)
    one, other = model.posterior(clips), model.posterior(longer)
    torch.testing.assert_close(other.mean, one.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.covariance, one.covariance, atol=1e-4, rtol=1e-4)
    gradients = []
    for some in (clips, longer):
        model.zero_grad()
        torch.manual_seed(5)  # the same masks and indices
        said, index = torch.tensor([1.0, 0.0]), torch.arange(2)
        model.loss(PairBatch(some[:2], some[2:], said, index)).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append([parameter.grad.clone() for parameter in trained])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_asking_changes_nothing_and_answers_the_same_again(model):
    clips, _ = world(n=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    one = model.posterior(clips)
    torch.rand(3)
    torch.set_rng_state(generator)
    other = model.posterior(clips)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.covariance, other.covariance)
    assert not one.mean.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_none_and_one(model):
    clips, _ = world(n=1)
    assert model.posterior(clips).rsample(3).shape == (3, 1)
    assert model.posterior(clips[[]]).rsample(3).shape == (3, 0)


def test_the_seed_decides(maker):
    clips, _ = world(n=10)
    some = [fit(maker(), answers(40), epochs=2, seed=seed).posterior(clips) for seed in (0, 0, 1)]
    assert torch.equal(some[0].mean, some[1].mean)
    assert torch.equal(some[0].covariance, some[1].covariance)
    assert not torch.allclose(some[0].mean, some[2].mean)


def test_round_trip(model, tmp_path):
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    clips, _ = world()
    assert type(again) is type(model)
    one, other = model.posterior(clips), again.posterior(clips)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.variance, other.variance)
    save(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


@pytest.mark.parametrize("name", ["DeepEnsemble", "MCDropout", "LaplaceHead", "Epinet", "GPHead"])
def test_a_command_line_makes_one(name):
    parser = ArgumentParser()
    parser.add_argument("--model", type=RewardModel)
    line = [
        f"--model=rewardmodels.{name}",
        "--model.hidden=[8,4]",
        "--model.random_answer_rate=0.1",
    ]
    made = parser.instantiate(parser.parse_args(line)).model
    assert made.hparams["hidden"] == (8, 4)
    assert made.random_answer_rate == 0.1


@pytest.mark.gpu
def test_a_gpu_believes_the_same(model):
    clips, _ = world()
    here = model.posterior(clips)
    there = model.to("cuda").posterior(clips)
    assert there.mean.is_cuda
    model.to("cpu")
    torch.testing.assert_close(there.mean.cpu(), here.mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(there.covariance.cpu(), here.covariance, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("preference", [0.0, 0.5, 1.0])
def test_answers_that_are_all_equal_leave_a_finite_belief(maker, preference):
    some = answers(30)
    equal = Comparisons(some.clips, some.pairs, torch.full((30,), preference))
    model = fit(maker(), equal, epochs=4)
    mean, variance = model.posterior(some.clips).difference(some.pairs)
    assert mean.isfinite().all()
    assert (variance >= 0).all()
    if preference == 0.5:  # nothing speaks for either
        p = model.posterior(some.clips).preference(some.pairs)
        assert float((p - 0.5).abs().mean()) < 0.25


def test_clips_longer_than_any_in_training_are_sums_like_others(model):
    clips, _ = world(n=6)
    joined = [torch.cat([x[:3], x[3:]], 1) for x in (clips.observations, clips.actions)]
    longer = model.posterior(Clips(*joined)).mean
    apart = model.posterior(clips).mean
    torch.testing.assert_close(longer, apart[:3] + apart[3:], atol=1e-3, rtol=1e-3)
