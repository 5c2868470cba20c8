import numpy as np
import pytest

from ood import CUSUM, EWMA, MEWMA, Spike
from rewardmodels import InvalidInput


def spike(scores):
    return list(scores)


def ewma(scores):
    return [sum(0.2 * 0.8 ** (t - i) * scores[i] for i in range(t + 1)) for t in range(len(scores))]


def cusum(scores):
    # The largest sum that ends here, of what exceeds the drift; nothing at all is 0.
    tails = [[sum(z - 0.3 for z in scores[i : t + 1]) for i in range(t + 1)]
             for t in range(len(scores))]  # fmt: skip
    return [max(0.0, *sums) for sums in tails]


@pytest.mark.parametrize(
    ("statistic", "naive"), [(Spike(), spike), (EWMA(0.2), ewma), (CUSUM(0.3), cusum)]
)
class TestStatistics:
    def test_is_the_closed_form(self, statistic, naive):
        scores = np.random.default_rng(0).normal(0.3, 1, (3, 40))
        expected = [naive(row) for row in scores]
        np.testing.assert_allclose(statistic.run(scores), expected, atol=1e-12)

    def test_step_by_step_is_the_same_and_environments_are_apart(self, statistic, naive):
        scores = np.random.default_rng(0).normal(0.3, 1, (3, 40))
        statistic.start(3)
        for t in range(20):
            statistic.update(scores[:, t])
        statistic.reset(np.array([False, True, False]))
        values = np.stack([statistic.update(scores[:, t]) for t in range(20, 40)], 1)
        for row, first in ((0, 0), (1, 20), (2, 0)):
            expected = naive(scores[row, first:])[20 - first :]
            np.testing.assert_allclose(values[row], expected, atol=1e-12)

    def test_infinity_stays_to_be_seen(self, statistic, naive):
        statistic.start(2)
        assert statistic.update([np.inf, 0.0])[0] == np.inf
        assert np.isfinite(statistic.update([0.0, 0.0])[1])


def test_ewmas_variance():
    scores = np.random.default_rng(0).standard_normal((20_000, 80))
    assert EWMA(0.25).run(scores)[:, -1].var() == pytest.approx(0.25 / 1.75, rel=0.04)


def test_refuses():
    for make in (lambda: EWMA(0.0), lambda: EWMA(1.5), lambda: CUSUM(-1), lambda: CUSUM(np.inf)):
        with pytest.raises(InvalidInput):
            make()
    with pytest.raises(InvalidInput, match="at least one environment"):
        Spike().start(0)


class TestMEWMA:
    def naive(self, scores):
        clipped = np.clip(scores, -2, 2)
        means = [
            sum(0.2 * 0.8 ** (t - i) * clipped[i] for i in range(t + 1)) for t in range(len(scores))
        ]
        return [np.linalg.norm(mean) / np.sqrt(3) for mean in means]

    def test_is_the_closed_form_along_and_step_by_step(self):
        statistic = MEWMA(0.2, clip=2)
        scores = np.random.default_rng(0).normal(0.3, 1.5, (4, 30, 3))
        expected = [self.naive(row) for row in scores]
        np.testing.assert_allclose(statistic.run(scores), expected, atol=1e-12)
        statistic.start(4)
        for t in range(10):
            np.testing.assert_allclose(statistic.update(scores[:, t]), np.array(expected)[:, t])
        statistic.reset(np.array([False, True, False, False]))
        value = [statistic.update(scores[:, t]) for t in range(10, 20)][-1]
        assert value[1] == pytest.approx(self.naive(scores[1, 10:])[9])
        assert value[2] == pytest.approx(expected[2][19])

    def test_infinity_stays_to_be_seen(self):
        statistic = MEWMA()
        statistic.start(2)
        assert statistic.update([[np.inf, 0.0], [0.0, 0.0]])[0] == np.inf
        assert statistic.update(np.zeros((2, 2)))[0] == np.inf
        assert statistic.value[1].tolist() == [0.0, 0.0]

    def test_a_lasting_bias_stands_out_where_size_drowns_it(self):
        draw = np.random.default_rng(0)
        usual, pulled = draw.standard_normal((2, 50, 200, 10))
        pulled = pulled + 0.5
        signed = [MEWMA().run(x)[:, -1] for x in (usual, pulled)]
        assert signed[1].min() > signed[0].max()
        by_size = [EWMA().run(np.square(x).mean(2))[:, -1] for x in (usual, pulled)]
        assert by_size[1].min() < by_size[0].max()

    def test_refuses(self):
        for make in (lambda: MEWMA(0.0), lambda: MEWMA(clip=0), lambda: MEWMA(clip=float("nan"))):
            with pytest.raises(InvalidInput):
                make()
