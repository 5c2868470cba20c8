import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from scipy.stats import binomtest

from ood import CUSUM, EWMA, Spike, Threshold, calibrate, calibrate_stream
from ood.conformal import conformal_rank, episode_maxima, episodes_needed
from rewardmodels import InvalidInput

STATISTICS = {"spike": Spike(), "ewma": EWMA(0.1), "cusum": CUSUM(0.5)}


def ar1(rng: np.random.Generator, n: int, steps: int, rho: float = 0.95) -> np.ndarray:
    """Strongly correlated, skewed, with a mean and a spread that change within an episode."""
    noise = rng.standard_normal((n, steps))
    noise[:, 0] /= np.sqrt(1 - rho**2)
    z = lfilter([1], [1, -rho], noise) * np.sqrt(1 - rho**2)
    time = np.linspace(0, 1, steps)
    return np.exp(0.7 * z) * (1 + time) + 5 * time


def false_alarms(statistic, alpha, n, apart, *, rounds, ragged=False, seed=0) -> int:
    """New episodes with an alarm, one for each calibration, so that they are independent."""
    rng, count = np.random.default_rng(seed), 0
    for _ in range(rounds):
        scores = ar1(rng, n + apart + 1, 60)
        lengths = rng.integers(20, 61, len(scores)) if ragged else np.full(len(scores), 60)
        episodes = [torch.from_numpy(row[:t]) for row, t in zip(scores, lengths, strict=True)]
        share = apart / (n + apart)
        threshold = calibrate(episodes[:-1], statistic, alpha, standardise=share)
        assert threshold.episodes == n
        new = episode_maxima([episodes[-1].numpy()], statistic, threshold)
        count += int(new[0] > threshold.value)
    return count


def quantile(values: torch.Tensor, alpha: float) -> float:
    """The threshold by episodes of one step each."""
    return calibrate(list(values[:, None]), Spike(), alpha, standardise=0).value


class TestPromise:
    @pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
    @pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
    def test_false_alarms_are_as_promised(self, statistic, ragged):
        # With 19 maxima the rate is exactly 0.1, so either way off would show.
        rounds = 600
        count = false_alarms(statistic, 0.1, 19, 6, rounds=rounds, ragged=ragged)
        assert binomtest(count, rounds, 0.1).pvalue > 1e-3, count / rounds

    def test_fewest_episodes_that_can_promise(self):
        count = false_alarms(CUSUM(), 0.2, 4, 3, rounds=600)
        assert binomtest(count, 600, 0.2).pvalue > 1e-3, count / 600

    def test_rate_given_one_calibration_is_beta(self):
        rng, rates = np.random.default_rng(0), []
        new = np.sort(rng.standard_normal(50_000))
        for _ in range(1000):
            q = quantile(torch.from_numpy(rng.standard_normal(99)), 0.1)
            rates.append(1 - np.searchsorted(new, q) / len(new))
        bound = Threshold(0.0, alpha=0.1, maxima=np.zeros(99)).false_alarm_quantile(0.9)
        assert binomtest(int((np.array(rates) <= bound).sum()), 1000, 0.9).pvalue > 1e-3

    def test_false_alarms_in_blocks_of_a_stream_are_as_promised(self):
        rng, alarms, blocks = np.random.default_rng(0), 0, 0
        for _ in range(150):
            noise = rng.standard_normal(40 * 100 + 100)
            stream = lfilter([1], [1, -0.8], noise)[100:]
            threshold = calibrate_stream(
                torch.from_numpy(stream[:2500]), CUSUM(), 0.1, block=100, standardise=0.24
            )
            new = stream[3000:].reshape(-1, 100)
            alarms += int((episode_maxima(list(new), CUSUM(), threshold) > threshold.value).sum())
            blocks += len(new)
        assert threshold.episodes == 19
        # Blocks that share a calibration aren't independent: 150 of them are, at least.
        rate = alarms / blocks
        assert 0.1 - 3 * np.sqrt(0.09 / 150) < rate < 0.1 + 3 * np.sqrt(0.09 / 150)


class TestQuantile:
    def test_is_the_rank(self):
        for n, alpha in [(9, 0.1), (19, 0.05), (19, 0.1), (20, 0.1), (99, 0.01), (30, 0.3)]:
            values = torch.randperm(n).double()
            rank = next(
                k for k in range(1, n + 2) if k * 1000 >= round((1 - alpha) * 1000) * (n + 1)
            )
            assert quantile(values, alpha) == rank - 1
            assert conformal_rank(n, alpha) == rank

    def test_too_few_episodes_are_refused_with_the_number_needed(self):
        assert [episodes_needed(alpha) for alpha in (0.5, 0.1, 0.05, 0.03, 0.01)] == [
            1, 9, 19, 33, 99,
        ]  # fmt: skip
        with pytest.raises(InvalidInput, match="99"):
            quantile(torch.randn(98), 0.01)
        with pytest.raises(InvalidInput, match="75 of 100"):
            calibrate(list(torch.randn(100, 5)), Spike(), 0.01)
        for alpha in (0.0, 1.0, float("nan")):
            with pytest.raises(InvalidInput, match="alpha"):
                episodes_needed(alpha)


class TestStandardising:
    def test_is_by_step_with_a_window(self):
        scores = torch.from_numpy(ar1(np.random.default_rng(0), 40, 30))
        for i in range(5):
            scores[i, 20 + i :] = 0  # cut off below
        episodes = [row[: 20 + i] if i < 5 else row for i, row in enumerate(scores)]
        threshold = calibrate(episodes, Spike(), 0.1, standardise=0.25, window=5)
        for t in (0, 1, 14, 22, 29):
            near = np.concatenate([e.numpy()[max(0, t - 2) : t + 3] for e in episodes[:10]])
            assert threshold.mean[t] == pytest.approx(near.mean())
            assert threshold.scale[t] == pytest.approx(near.std(ddof=1))

    @pytest.mark.parametrize("period", [0, 3])
    @pytest.mark.parametrize("shape", [(), (2,)], ids=["scores", "residuals"])
    def test_uses_the_last_known_step_or_the_step_of_the_block(self, shape, period):
        draw = np.random.default_rng(0)
        mean, scale = draw.standard_normal((4, *shape)), draw.uniform(1, 2, (4, *shape))
        threshold = Threshold(1.0, mean=mean, scale=scale, period=period)
        scores = draw.standard_normal((7, *shape))
        found = threshold.standardise(scores, np.arange(7))
        for step in range(7):
            at = min(step % period if period else step, 3)
            one = threshold.standardise(scores[step : step + 1], np.array([step]))
            for value in (found[step], one[0]):
                np.testing.assert_allclose(value, (scores[step] - mean[at]) / scale[at])

    def test_constant_scores_divide_by_no_zero_or_stay_as_they_are(self):
        as_they_are = calibrate(list(torch.full((9, 4), 7.0)), Spike(), 0.1, standardise=0)
        assert as_they_are.value == 7.0
        threshold = calibrate(list(torch.full((20, 4), 7.0)), Spike(), 0.1)
        assert threshold.value == 0.0
        assert np.isfinite(threshold.scale).all()
        assert (threshold.scale > 0).all()

    def test_order_of_the_other_episodes_has_no_effect(self):
        episodes = [torch.from_numpy(row) for row in ar1(np.random.default_rng(0), 40, 30)]
        one = calibrate(episodes, CUSUM(), 0.1)
        other = calibrate([*episodes[:10], *episodes[:9:-1]], CUSUM(), 0.1)
        assert one.value == other.value

    def test_refuses(self):
        good = list(torch.randn(40, 5))
        for bad in (torch.tensor([1.0, float("nan")]), torch.zeros(0), torch.zeros(2, 2)):
            with pytest.raises(InvalidInput, match="episode 40"):
                calibrate([*good, bad], Spike(), 0.1)
        for kwargs in ({"standardise": 1.0}, {"standardise": -0.1}, {"window": 0}):
            with pytest.raises(InvalidInput):
                calibrate(good, Spike(), 0.1, **kwargs)
        with pytest.raises(InvalidInput, match="block"):
            calibrate_stream(torch.zeros(5), Spike(), 0.1, block=0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value", 1e300), ("value", NAN), ("value", INF), ("value", -INF), ("value", 16.5),
        ("alpha", NAN), ("alpha", -0.1), ("alpha", 1.0), ("alpha", 0.0), ("alpha", 0.3),
        ("alpha", 0.01),
        ("mean", np.full(3, NAN)), ("mean", np.full(3, INF)), ("mean", np.zeros(4)),
        ("mean", np.zeros((0,))), ("mean", np.zeros((3, 1, 1))),
        ("scale", np.full(3, INF)), ("scale", np.array([1, NAN, 1])), ("scale", np.zeros(3)),
        ("scale", -np.ones(3)), ("scale", np.ones((3, 2))),
        ("maxima", np.arange(19.0)[::-1]), ("maxima", np.zeros(0)), ("maxima", np.arange(8.0)),
        ("maxima", np.full(19, NAN)), ("maxima", np.append(np.arange(18.0), INF)),
        ("maxima", np.arange(19.0)[None]),
        ("period", -1), ("period", 0.5), ("period", NAN),
    ],
)  # fmt: skip
def test_a_threshold_that_contradicts_itself_is_refused(name, value):
    fields = dict(
        value=17.0, alpha=0.1, mean=np.zeros(3), scale=np.ones(3), maxima=np.arange(19.0), period=5
    )
    Threshold(**fields)
    with pytest.raises(InvalidInput, match=name if name != "maxima" else None):
        Threshold(**fields | {name: value})
