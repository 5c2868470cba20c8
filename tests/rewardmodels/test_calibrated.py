"""Recalibration of known faults, and coverage over many draws."""

import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from rewardmodels import (
    Clips,
    Comparisons,
    DeepEnsemble,
    FitOptions,
    GaussianPosterior,
    InvalidInput,
    NotFitted,
    ReturnPosterior,
    SampledPosterior,
    fit,
)
from rewardmodels.calibrated import ActivelyChosenWarning, Calibrated, FewComparisonsWarning
from rewardmodels.calibration import expected_calibration_error, log_loss


class Fake:
    """Believes of each clip what stands in its only observation, times `scale`."""

    def __init__(self, scale: float = 1.0, spread: float = 0.0, kind: str = "sampled"):
        self.scale, self.spread, self.kind = scale, spread, kind

    def posterior(self, clips: Clips) -> ReturnPosterior:
        mean = clips.observations.double().flatten(1)[:, 0]
        if self.kind == "gaussian":
            # Clips of even and of odd index are independent.
            root = self.spread * torch.eye(2, dtype=torch.double)[torch.arange(len(mean)) % 2]
            return GaussianPosterior(self.scale * mean, self.scale * root)
        wiggle = self.spread * torch.stack([(7 * mean).sin(), -(7 * mean).sin()])
        return SampledPosterior(self.scale * (mean + wiggle))


def clips_of(returns: torch.Tensor) -> Clips:
    return Clips(returns[:, None, None], torch.zeros(len(returns), 1, 1))


def asked(n: int, seed: int = 0, kind: str = "right") -> Comparisons:
    """n random pairs of clips, answered as Bradley and Terry say."""
    draw = torch.Generator().manual_seed(seed)
    returns = 1.5 * torch.randn(2 * n, generator=draw, dtype=torch.double)
    pairs = torch.arange(2 * n).view(n, 2)
    difference = returns[pairs[:, 1]] - returns[pairs[:, 0]]
    if kind == "bent":  # no temperature makes up for this
        difference = 3 * difference.sign() * (difference.abs() > 1.5)
    said = torch.bernoulli(torch.sigmoid(difference), generator=draw)
    return Comparisons(clips_of(returns), pairs, said)


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
@pytest.mark.parametrize(("kind", "spread"), [("sampled", 0.0), ("gaussian", 0.5)])
def test_temperature_recovers_a_known_fault(scale, kind, spread):
    draw = torch.Generator().manual_seed(3)
    n = 8000
    mean = 1.5 * torch.randn(2 * n, generator=draw, dtype=torch.double)
    # The truth is a draw of the belief before it was scaled.
    returns = mean + spread * torch.randn(2 * n, generator=draw, dtype=torch.double)
    pairs = torch.arange(2 * n).view(n, 2)
    p = torch.sigmoid(returns[pairs[:, 1]] - returns[pairs[:, 0]])
    said = Comparisons(clips_of(mean), pairs, torch.bernoulli(p, generator=draw))
    found = Calibrated(Fake(scale, spread, kind)).calibrate(said, random=True)
    # The information about log T is about 0.4 per answer: 5 deviations are 0.09.
    assert found.temperature / scale == pytest.approx(1, abs=0.09)


def test_temperature_is_the_most_probable():
    said = asked(500)
    found = Calibrated(Fake(3.0, 0.4)).calibrate(said, random=True)
    base = Fake(3.0, 0.4).posterior(said.clips).samples
    mu = said.preference.numpy()

    def loss(log_t: float) -> float:
        d = (base[:, said.pairs[:, 1]] - base[:, said.pairs[:, 0]]).numpy() / math.exp(log_t)
        p = (1 / (1 + np.exp(-d))).mean(0)
        log_p = np.sum(mu * np.log(p) + (1 - mu) * np.log1p(-p))
        return -log_p - scipy.stats.norm.logpdf(log_t, scale=0.3)

    expected = scipy.optimize.minimize_scalar(
        loss, bounds=(-0.5, 4), method="bounded", options={"xatol": 1e-6}
    ).x
    assert math.log(found.temperature) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["sampled", "gaussian"])
def test_the_posterior_is_the_models_divided_by_the_temperature(kind):
    said = asked(200)
    fake = Fake(3.0, 0.4, kind)
    found = Calibrated(fake).calibrate(said, random=True)
    base, belief = fake.posterior(said.clips), found.posterior(said.clips)
    t, pairs = found.temperature, said.pairs
    assert t > 1.5
    torch.testing.assert_close(belief.mean, base.mean / t)
    torch.testing.assert_close(belief.variance, base.variance / t**2)
    torch.testing.assert_close(belief.covariance, base.covariance / t**2)
    torch.testing.assert_close(belief.difference(pairs).mean, base.difference(pairs).mean / t)
    expected = base.difference(pairs).variance / t**2
    torch.testing.assert_close(belief.difference(pairs).variance, expected)
    one, other = (x.rsample(5, torch.Generator().manual_seed(0)) for x in (belief, base))
    torch.testing.assert_close(one, other / t)
    draws = belief.rsample(40000, torch.Generator().manual_seed(0))[:, pairs]
    expected = torch.sigmoid(draws[..., 1] - draws[..., 0]).mean(0)
    torch.testing.assert_close(belief.preference(pairs), expected, atol=0.01, rtol=0)
    frames = found.frame_posterior(said.clips.observations[:, 0], said.clips.actions[:, 0])
    torch.testing.assert_close(frames.mean, belief.mean)


def test_copies_of_a_comparison_count_as_one_by_groups():
    said = asked(100)
    copies, model = said[torch.arange(100).repeat_interleave(7)], Calibrated(Fake(4.0))
    alone = model.calibrate(said, random=True).temperature
    assert model.calibrate(copies, random=True).temperature > 1.1 * alone
    groups = np.repeat(np.arange(100), 7)
    found = model.calibrate(copies, random=True, groups=groups).temperature
    assert found == pytest.approx(alone, rel=1e-3)
    # Groups of independent comparisons change little, and single ones nothing.
    for few, allowed in ((np.arange(100) // 2, 0.15), (np.arange(100), 1e-6)):
        found = model.calibrate(said, random=True, groups=few.tolist()).temperature
        assert found == pytest.approx(alone, rel=allowed)
    with pytest.raises(InvalidInput, match="groups: expected a number for each of 100"):
        model.calibrate(said, random=True, groups=[1, 2])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 0.9, 3.0])
@pytest.mark.parametrize("kind", ["sampled", "gaussian"])
def test_a_temperature_makes_nothing_surer_where_much_was_added(kind, temperature):
    returns = torch.cat([torch.zeros(1), torch.linspace(-20, 20, 81)]).double()
    known = Fake(1.0, 0.3, kind).posterior(clips_of(returns))
    root = torch.zeros(82, 1, dtype=torch.double)
    root[0] = 2.01 * temperature  # its variance is four times the temperature's square
    base = known.plus(root)
    pairs = torch.stack([torch.zeros(81, dtype=torch.long), torch.arange(81) + 1], 1)
    sure, before = ((x.preference(pairs) - 0.5).abs() for x in (base.tempered(temperature), base))
    assert (sure <= before + 0.002).all()
    # Nothing else of it depends on what was added, whatever else is done to it.
    both = base.scaled(2.0).select(torch.arange(1, 82)).tempered(temperature)
    torch.testing.assert_close(both.mean, 2 * known.mean[1:] / temperature)
    torch.testing.assert_close(both.variance, 4 * known.variance[1:] / temperature**2)
    added = base.scaled(2.0).select(torch.arange(1)).tempered(temperature).variance
    expected = 4 * (known.variance[0] + 2.01**2 * temperature**2 / min(1, temperature) ** 2)
    torch.testing.assert_close(added[0] * temperature**2, expected)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_order_is_kept(method):
    said, fresh = asked(400), asked(300, seed=1)
    fake = Fake(5.0)
    belief = Calibrated(fake, method).calibrate(said, random=True).posterior(fresh.clips)
    base = fake.posterior(fresh.clips)
    assert torch.equal(belief.mean.argsort(), base.mean.argsort())
    order = base.preference(fresh.pairs).argsort()
    steps = belief.preference(fresh.pairs)[order].diff()
    assert (steps >= -1e-12).all()
    if method == "temperature":
        assert (steps > 0).all()


@pytest.mark.parametrize("spread", [0.0, 0.6])
def test_isotonic_is_antisymmetric_and_never_certain(spread):
    said, fresh = asked(150), asked(300, seed=1)
    found = Calibrated(Fake(5.0, spread), "isotonic").calibrate(said, random=True)
    belief = found.posterior(fresh.clips)
    for mistakes in (0.0, 0.2):
        p = belief.preference(fresh.pairs, random_answer_rate=mistakes)
        swapped = belief.preference(fresh.pairs.flip(1), random_answer_rate=mistakes)
        torch.testing.assert_close(p + swapped, torch.ones_like(p), atol=1e-12, rtol=0)
        assert p.min() >= (1 - mistakes) / 152 + mistakes / 2 - 1e-12
    even = torch.tensor([[0, 0]])
    torch.testing.assert_close(belief.preference(even), torch.tensor([0.5]).double())
    # Whichever clip was written first while calibrating.
    other = Calibrated(Fake(5.0, spread), "isotonic").calibrate(
        Comparisons(said.clips, said.pairs.flip(1), 1 - said.preference), random=True
    )
    assert other.temperature == pytest.approx(found.temperature, rel=1e-6)
    torch.testing.assert_close(
        other.posterior(fresh.clips).preference(fresh.pairs),
        belief.preference(fresh.pairs), atol=1e-4, rtol=0,
    )  # fmt: skip


def test_isotonic_mends_what_a_temperature_cannot():
    said, fresh = asked(4000, kind="bent"), asked(4000, seed=1, kind="bent")
    error, loss = {}, {}
    for method in ("temperature", "isotonic"):
        belief = Calibrated(Fake(), method).calibrate(said, random=True).posterior(fresh.clips)
        p = belief.preference(fresh.pairs)
        error[method] = expected_calibration_error(p, fresh.preference, binning="mass")
        loss[method] = log_loss(p, fresh.preference)
    assert error["temperature"] > 0.05 > 0.03 > error["isotonic"]
    assert loss["isotonic"] < loss["temperature"] - 0.02


def test_a_few_right_comparisons_make_nothing_certain():
    clips, pairs = clips_of(torch.tensor([0.0, 1.0, 0.0, 2.0])), torch.tensor([[0, 1], [2, 3]])
    for method in ("temperature", "isotonic"):
        with pytest.warns(FewComparisonsWarning, match="at least 30 .*got 2"):
            found = Calibrated(Fake(), method).calibrate(
                Comparisons(clips, pairs, torch.ones(2)), random=True
            )
        # Of 0.73 and 0.88 by the model.
        assert (found.posterior(clips).preference(pairs) < 0.96).all()


def test_prediction_sets_cover_as_stated():
    # Over 200 resplits; of a model that is much too sure, and wrong in shape too.
    every, fake, n, fresh = asked(4000, kind="bent"), Fake(6.0, 0.5), 100, 50
    draw = torch.Generator().manual_seed(4)
    covered, larger = ({coverage: [] for coverage in (0.6, 0.9, 0.95)} for _ in range(2))
    for _ in range(200):
        rows = torch.randperm(4000, generator=draw)[: n + fresh]
        found = Calibrated(fake).calibrate(every[rows[:n]], random=True)
        test = every[rows[n:]].compact()
        belief = found.posterior(test.clips)
        for coverage in covered:
            chosen = belief.prediction_set(test.pairs, coverage)
            assert chosen.any(1).all()
            right = chosen[torch.arange(fresh), test.preference.long()]
            covered[coverage].append(right.double().mean())
            larger[coverage].append(chosen.all(1).double().mean())
    # Never less than stated, and where no set had to be filled, at most 1/(n + 1) more.
    for coverage, shares in covered.items():
        mean, error = float(np.mean(shares)), float(np.std(shares)) / math.sqrt(200)
        assert mean > coverage - 4 * error
        if coverage > 0.8:
            assert mean < coverage + 1 / (n + 1) + 4 * error
            assert 0 < np.mean(larger[coverage]) < 1


def test_prediction_set_is_its_definition():
    said = asked(40)
    said.preference[::5] = 0.5
    fake = Fake(2.0)
    belief = Calibrated(fake).calibrate(said, random=True).posterior(said.clips)
    p = fake.posterior(said.clips).preference(said.pairs).tolist()
    scores = sorted(
        1 - (q if mu == 1 else 1 - q)
        for q, mu in zip(p, said.preference.tolist(), strict=True)
        if mu != 0.5
    )
    threshold = scores[math.ceil(33 * 0.8) - 1]  # 32 decided
    expected = [[q <= threshold + 1e-12 or q <= 0.5, 1 - q <= threshold + 1e-12 or q >= 0.5]
                for q in p]  # fmt: skip
    chosen = belief.prediction_set(said.pairs, 0.8)
    assert chosen.tolist() == expected
    assert torch.equal(belief.prediction_set(said.pairs.flip(1), 0.8), chosen.flip(1))


@pytest.mark.filterwarnings("ignore::rewardmodels.FewComparisonsWarning")
def test_says_how_many_comparisons_a_coverage_needs():
    for n, coverage, needed in ((8, 0.9, 9), (18, 0.95, 19), (98, 0.99, 99)):
        said = asked(n + 1)
        few = Calibrated(Fake()).calibrate(said[:n], random=True).posterior(said.clips)
        with pytest.raises(InvalidInput, match=rf"at least {needed} .* got {n};"):
            few.prediction_set(said.pairs, coverage)
        enough = Calibrated(Fake()).calibrate(said, random=True).posterior(said.clips)
        assert enough.prediction_set(said.pairs, coverage).shape == (n + 1, 2)


def test_warns_of_actively_chosen_comparisons():
    said = asked(30)
    with pytest.warns(ActivelyChosenWarning, match="drawn at random") as caught:
        chosen = Calibrated(Fake()).calibrate(said, random=False)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = Calibrated(Fake()).calibrate(said, random=True)
    assert chosen.temperature == drawn.temperature


def test_ties_count_half_each_way():
    said = asked(20_000)
    tied = Comparisons(said.clips, said.pairs, torch.full((20_000,), 0.5))
    # A teacher who sees no difference: as flat as can be.
    assert Calibrated(Fake()).calibrate(tied, random=True).temperature > 10
    belief = Calibrated(Fake()).calibrate(tied, random=True).posterior(said.clips)
    with pytest.raises(InvalidInput, match="got 0;"):
        belief.prediction_set(said.pairs)


def test_calibrating_again_forgets():
    said, fresh = asked(200), asked(200, seed=1)
    once = Calibrated(Fake(3.0), "isotonic").calibrate(fresh, random=True)
    twice = Calibrated(Fake(3.0), "isotonic").calibrate(said, random=True)
    twice.calibrate(fresh, random=True)
    one, other = (x.posterior(said.clips) for x in (once, twice))
    assert torch.equal(one.preference(said.pairs), other.preference(said.pairs))
    assert torch.equal(one.prediction_set(said.pairs), other.prediction_set(said.pairs))


def test_a_real_model_is_held_and_left_as_it_was():
    draw = torch.Generator().manual_seed(0)
    clips = Clips(torch.randn(200, 4, 2, generator=draw), torch.zeros(200, 4, 1))
    worth = clips.observations[..., 0].sum(1)
    pairs = torch.randint(200, (300, 2), generator=draw)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    p = torch.sigmoid(worth[pairs[:, 1]] - worth[pairs[:, 0]])
    said = Comparisons(clips, pairs, torch.bernoulli(p, generator=draw))
    far = {"epochs": 40, "options": FitOptions(batch_size=16, held_out=0.0)}
    model = fit(DeepEnsemble(3, learning_rate=2e-2, weight_decay=0.0), said[:100], **far)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    belief = Calibrated(model).calibrate(said[100:200], random=True).posterior(clips)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    test = said[200:]
    loss = log_loss(belief.preference(test.pairs), test.preference)
    # Trained far past what 100 answers say.
    assert loss < log_loss(model.posterior(clips).preference(test.pairs), test.preference) - 0.03


def test_refuses():
    said = asked(30)
    with pytest.raises(InvalidInput, match=r"method: .*isotonic; got 'platt'"):
        Calibrated(Fake(), "platt")
    with pytest.raises(InvalidInput, match=r"comparisons: .*got none"):
        Calibrated(Fake()).calibrate(said[:0], random=True)
    with pytest.raises(NotFitted, match="call calibrate first"):
        Calibrated(Fake()).posterior(said.clips)
    with pytest.raises(NotFitted, match="call fit first"):
        Calibrated(DeepEnsemble()).calibrate(said, random=True)
    found = Calibrated(Fake()).calibrate(said, random=True)
    for coverage in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidInput, match=f"coverage: .*{coverage}"):
            found.posterior(said.clips).prediction_set(said.pairs, coverage)
    with pytest.raises(InvalidInput, match="got CalibratedPosterior"):
        Calibrated(found).calibrate(said, random=True)
