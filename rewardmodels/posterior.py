"""Joint posteriors over the returns of N clips: the output of every predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rewardmodels.arrays import ArrayLike, as_pairs, as_tensor
from rewardmodels.errors import InvalidInput, check_positive
from rewardmodels.likelihood import check_random_answer_rate, preference_probability

_CHUNK = 1 << 20  # numbers held at once while many pairs are worked through (4 MiB)

# The logistic function as a sum of normal distribution functions, p Phi(s x), to 2e-9 everywhere:
# Monahan & Stefanski 1989 (in Balakrishnan, Handbook of the Logistic Distribution, table 8.4.1).
_LOGISTIC_WEIGHTS = (
    0.003246343272134, 0.051517477033972, 0.195077912673858, 0.315569823632818,
    0.274149576158423, 0.131076880695470, 0.027912418727972, 0.001449567805354,
)  # fmt: skip
_LOGISTIC_SCALES = (
    1.365340806296348, 1.059523971016916, 0.830791313765644, 0.650732166639391,
    0.508135425366489, 0.396313345166341, 0.308904252267995, 0.238212616409306,
)  # fmt: skip


class Difference(NamedTuple):
    """Posterior moments of the return of each pair's second clip minus that of its first.

    Attributes:
        mean: `(Q,)`, reward units.
        variance: `(Q,)`, reward units².
    """

    mean: Tensor
    variance: Tensor


class ReturnPosterior(ABC):
    """Joint posterior over the returns of N clips.

    It is joint because comparisons inform differences only. `SampledPosterior` (ensembles, dropout,
    epinets) and `GaussianPosterior` (Laplace, Gaussian processes) have the same interface.
    """

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Posterior mean `(N,)`, reward units."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Posterior variance `(N,)` of the returns, reward units²."""

    @property
    @abstractmethod
    def covariance(self) -> Tensor:
        """Posterior covariance `(N, N)`, reward units²; formed at each access, and only then."""

    @abstractmethod
    def rsample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `(n, N)` returns; each row is one reward function's returns of all N clips.

        Args:
            n: Number of draws, at least 1.
            generator: Source of randomness, on the CPU whatever the posterior's device.
        """

    @abstractmethod
    def difference(self, pairs: ArrayLike) -> Difference:
        """Mean and variance of second minus first return, for pairs `(Q, 2)` of clip indices.

        Raises:
            InvalidInput: Another shape, numbers that aren't whole, or an index out of range.
        """

    @abstractmethod
    def preference(self, pairs: ArrayLike, *, random_answer_rate: float = 0.0) -> Tensor:
        """Posterior mean probability `(Q,)` that the second clip is preferred.

        Args:
            pairs: `(Q, 2)` indices of clips.
            random_answer_rate: Probability that the teacher answers at random.

        Raises:
            InvalidInput: As for `difference`, or a rate out of range.
        """

    def plus(self, root: Tensor) -> ReturnPosterior:
        """Posterior with independent Gaussian noise added, of covariance root times its transpose.

        Args:
            root: `(N, R)`, reward units.

        Raises:
            NotImplementedError: A kind of posterior that has no such method of its own.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a posterior with `plus`.")

    def scaled(self, factor: float) -> ReturnPosterior:
        """Posterior of the same returns in other units: all are multiplied by the factor."""
        raise NotImplementedError(f"{type(self).__name__}: expected a posterior with `scaled`.")

    def tempered(self, temperature: float) -> ReturnPosterior:
        """Posterior divided by a temperature; below 1, what `plus` added is divided by it twice.

        A temperature below 1 was earned where comparisons are like those learned from. Elsewhere
        it mustn't make preferences surer: with an added variance of the difference above four times
        the squared temperature, none is by more than 0.002.
        """
        return self.scaled(1 / temperature)

    def select(self, clips: Tensor) -> ReturnPosterior:
        """Posterior of some of the clips, by their indices."""
        raise NotImplementedError(f"{type(self).__name__}: expected a posterior with `select`.")


def expected_preference(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Mean of $\sigma(x)$ over $x \sim N(m, v)$, elementwise.

    $\sigma(x) = \sum_i p_i \Phi(s_i x)$ turns the integral of the logistic against a normal into
    $\sum_i p_i \Phi(m / \sqrt{s_i^{-2} + v})$ (Monahan & Stefanski 1989), within 1e-8 for every
    mean and variance, where quadrature fails for large variances.

    Args:
        mean: Reward units; any shape.
        variance: Reward units², of a shape that broadcasts against `mean`.

    Example:
        >>> expected_preference(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 100.0]))
        tensor([0.8808, 0.5780])
    """
    p = torch.zeros(())
    for weight, scale in zip(_LOGISTIC_WEIGHTS, _LOGISTIC_SCALES, strict=True):
        # erfc, since ndtr rounds small probabilities to nothing.
        p = p + weight / 2 * torch.erfc(-mean / (2 * (scale**-2 + variance)).sqrt())
    return p


class SampledPosterior(ReturnPosterior):
    """Posterior of S equally likely reward functions, and Gaussian noise added to each.

    Moments are those of the S rows themselves (population, not the unbiased estimate), so
    that samples, variances and preferences belong to one distribution.

    Args:
        samples: `(S, N)`, reward units.
        root: `(N, R)`, reward units: root of the covariance of the noise, which is independent of
            the row; None for none.

    Example:
        >>> posterior = SampledPosterior(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> posterior.difference(torch.tensor([[0, 1]]))
        Difference(mean=tensor([2.]), variance=tensor([1.]))
    """

    def __init__(self, samples: ArrayLike, root: Tensor | None = None) -> None:
        samples = as_tensor("samples", samples)
        if samples.ndim != 2 or len(samples) == 0:
            raise InvalidInput(
                f"samples: expected shape (S, N) with S >= 1, got {tuple(samples.shape)}."
            )
        self.samples = samples
        self.root = samples.new_zeros(samples.shape[1], 0) if root is None else root

    @property
    def mean(self) -> Tensor:
        return self.samples.mean(0)

    @property
    def variance(self) -> Tensor:
        return _moments(self.samples).variance + self.root.square().sum(1)

    @property
    def covariance(self) -> Tensor:
        centred = self.samples - self.samples.mean(0)
        return centred.T @ centred / len(centred) + self.root @ self.root.T

    def rsample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n rows without replacement, over again once each has been drawn; add noise."""
        check_positive(n=n)
        size = len(self.samples)
        draws = [torch.randperm(size, generator=generator) for _ in range(-(-n // size))]
        rows = self.samples[torch.cat(draws)[:n].to(self.samples.device)]
        return rows + _noise(n, self.root, generator) if self.root.shape[1] else rows

    def difference(self, pairs: ArrayLike) -> Difference:
        parts = []
        for differences, noise_var in self._differences(pairs):
            mean, variance = _moments(differences)
            parts.append(Difference(mean, variance + noise_var))
        return _join(parts)

    def preference(self, pairs: ArrayLike, *, random_answer_rate: float = 0.0) -> Tensor:
        parts = []
        for differences, noise_var in self._differences(pairs):
            p = preference_probability(differences, random_answer_rate=random_answer_rate).mean(0)
            noisy = noise_var > 0
            if noisy.any():
                of_noisy = expected_preference(differences[:, noisy], noise_var[noisy]).mean(0)
                p[noisy] = (1 - random_answer_rate) * of_noisy + random_answer_rate / 2
            parts.append(p)
        return torch.cat(parts)

    def plus(self, root: Tensor) -> SampledPosterior:
        return SampledPosterior(self.samples, torch.cat([self.root, root], 1))

    def scaled(self, factor: float) -> SampledPosterior:
        return SampledPosterior(factor * self.samples, factor * self.root)

    def tempered(self, temperature: float) -> SampledPosterior:
        root = self.root / (temperature * min(1.0, temperature))
        return SampledPosterior(self.samples / temperature, root)

    def select(self, clips: Tensor) -> SampledPosterior:
        return SampledPosterior(self.samples[:, clips], self.root[clips])

    def _differences(self, pairs: ArrayLike) -> Iterator[tuple[Tensor, Tensor]]:
        """Differences `(S, Q)` and the variance `(Q,)` of their noise, some pairs at a time."""
        size, n = self.samples.shape
        for some in _chunks(pairs, n, size + self.root.shape[1]):
            first, second = some.T
            noise = self.root[second] - self.root[first]
            yield self.samples[:, second] - self.samples[:, first], noise.square().sum(1)


class GaussianPosterior(ReturnPosterior):
    r"""Gaussian posterior with covariance $L L^\top$, held as its root L.

    Args:
        mean: `(N,)`, reward units.
        root: `(N, R)`, reward units; R may be far below N (the width of a last layer, say).

    Example:
        >>> posterior = GaussianPosterior(torch.tensor([0.0, 1.0]), torch.tensor([[1.0], [1.0]]))
        >>> posterior.difference(torch.tensor([[0, 1]]))  # shared uncertainty cancels
        Difference(mean=tensor([1.]), variance=tensor([0.]))
    """

    def __init__(self, mean: ArrayLike, root: ArrayLike) -> None:
        mean, root = as_tensor("mean", mean), as_tensor("root", root)
        self.added = 0  # last columns of the root, which `plus` added
        if mean.ndim != 1 or root.ndim != 2 or len(root) != len(mean):
            raise InvalidInput(
                "mean, root: expected shapes (N,) and (N, R), got "
                f"{tuple(mean.shape)} and {tuple(root.shape)}."
            )
        self._mean, self.root = mean, root

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def variance(self) -> Tensor:
        return self.root.square().sum(1)

    @property
    def covariance(self) -> Tensor:
        return self.root @ self.root.T

    def rsample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        check_positive(n=n)
        return self._mean + _noise(n, self.root, generator)

    def difference(self, pairs: ArrayLike) -> Difference:
        parts = []
        for some in _chunks(pairs, *self.root.shape):
            mean = self._mean[some[:, 1]] - self._mean[some[:, 0]]
            root = self.root[some[:, 1]] - self.root[some[:, 0]]
            parts.append(Difference(mean, root.square().sum(1)))
        return _join(parts)

    def preference(self, pairs: ArrayLike, *, random_answer_rate: float = 0.0) -> Tensor:
        check_random_answer_rate(random_answer_rate)
        p = expected_preference(*self.difference(pairs))
        return (1 - random_answer_rate) * p + random_answer_rate / 2

    def plus(self, root: Tensor) -> GaussianPosterior:
        return self._with(self._mean, torch.cat([self.root, root], 1), root.shape[1])

    def scaled(self, factor: float) -> GaussianPosterior:
        return self._with(factor * self._mean, factor * self.root)

    def tempered(self, temperature: float) -> GaussianPosterior:
        root = self.root / temperature
        root[:, root.shape[1] - self.added :] /= min(1.0, temperature)
        return self._with(self._mean / temperature, root)

    def select(self, clips: Tensor) -> GaussianPosterior:
        return self._with(self._mean[clips], self.root[clips])

    def _with(self, mean: Tensor, root: Tensor, more: int = 0) -> GaussianPosterior:
        posterior = GaussianPosterior(mean, root)
        posterior.added = self.added + more
        return posterior


def _moments(samples: Tensor) -> Difference:
    # Tensor.var warns where there is nothing to take the variance of.
    mean = samples.mean(0)
    return Difference(mean, (samples - mean).square().mean(0))


def _noise(n: int, root: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw `(n, N)` from a Gaussian with mean zero and this root of its covariance."""
    noise = torch.randn(n, root.shape[1], generator=generator, dtype=root.dtype)
    return noise.to(root.device) @ root.T


def _chunks(pairs: ArrayLike, n: int, width: int) -> tuple[Tensor, ...]:
    return as_pairs(pairs, n).split(max(1, _CHUNK // max(1, width)))


def _join(parts: list[Difference]) -> Difference:
    return Difference(*(torch.cat(column) for column in zip(*parts, strict=True)))
