"""Sparse variational Gaussian process over frames, on distance-preserving features."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from gpytorch.kernels import LinearKernel, RFFKernel, ScaleKernel
from gpytorch.utils.quadrature import GaussHermiteQuadrature1D
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError, NotPSDError
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.utils.parametrize import cached

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import FitDiverged, check_positive, require
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, RewardModel, clip_chunks
from rewardmodels.networks import ResidualFeatures, feature_count
from rewardmodels.posterior import GaussianPosterior

_JITTER = 1e-4  # of the mean diagonal: single precision loses definiteness below about 1e-5
# Before any comparison, returns of two of the first clips differ by two reward units (sd), for
# preferences that are rather clear, as those of people are. Training moves it.
_PRIOR_VARIANCE = 4.0
_LEAST_VARIANCE = 1e-12  # reward units²; a square root of zero has no gradient
_FASTER = 10.0  # steps of the process itself, against those of the network
_CANDIDATES = 1 << 13  # frames among which inducing ones are chosen
_LBFGS_STEPS = 200  # at most
_FEW = 512  # frames or clips that a starting value is taken from


class GPHead(RewardModel):
    r"""A Gaussian process over frames, whose variance grows away from the training data.

    The reward is $r \sim GP(0, k)$, as in preference learning by Chu & Ghahramani (2005), with

    $$k(x, x') = s^2 \exp\left(-\frac{|\phi(x) - \phi(x')|^2}{2 \ell^2}\right)
    + v\, \phi(x)^\top \phi(x')$$

    on features $\phi$ that keep distances (`ResidualFeatures`; Liu et al. 2020,
    arXiv:2006.10108). Without the linear term nothing would be learned beyond the data, and
    differences between clips far from it, whose frames have little in common, could vary less than
    those near it. The first term is GPyTorch's `RFFKernel`, taken as the kernel itself: by random
    Fourier features (Rahimi & Recht 2007) $k(x, x') = \psi(x)^\top \psi(x')$, with F numbers and
    H more, those of $\phi$, for the linear term. So a clip is $\Psi = \sum_t \psi(x_t)$, a
    comparison $z = \Psi_b - \Psi_a$, and all below is exact for k, in time linear in frames.

    The sparse variational posterior (Hensman et al. 2015) has M inducing frames, rows $\psi$ of
    $\Psi_Z$: with $K = \Psi_Z \Psi_Z^\top = L L^\top$, $B = \Psi_Z^\top L^{-\top}$ and whitened
    $q(u) = N(m, S)$, a difference of returns, which is a linear functional of the process
    (Lázaro-Gredilla & Figueiras-Vidal 2009), is $N(\mu, \sigma^2)$ with

    $$\mu = z^\top B m, \quad \sigma^2 = |z|^2 - |B^\top z|^2 + z^\top B S B^\top z.$$

    Training minimises, per comparison, $-E_{N(\mu, \sigma^2)}[\log p(\text{preference})]$, by
    Gauss–Hermite quadrature, plus $KL(q \| N(0, I)) / Q$. Features, $s^2$, $\ell$, $v$, m and S
    are trained together; once the best weights are back, m and S are brought to their optimum.

    Inducing frames are real frames of the compared clips, spread by k-means++, held as inputs and
    mapped anew at each step. Each fit chooses them anew from all the clips it is given, and
    projects the posterior onto the new ones; $\phi$ and k go on from where they were. K gets 1e-4
    of its mean diagonal, as if inducing frames were observed with that noise, which leaves all of
    the above exact; where that isn't enough, linear_operator's `psd_safe_cholesky` adds more and
    warns.

    Args:
        inducing: M. With fewer frames to choose from all are inducing, some of them more than
            once, which changes nothing; a later fit with more frames takes more.
        random_features: F, half of them cosines and half sines of random frequencies, which are
            drawn once and saved with the model.
        options: As for `RewardModel`. `hidden` are the widths of $\phi$'s residual blocks, none
            for a kernel on the normalised inputs themselves; a network of your own, or that of
            images, is $\phi$ in their place, and needn't keep distances. `learning_rate` is
            $\phi$'s, ten times as much that of the process; `weight_decay` is for $\phi$ alone.
    """

    network: nn.Module
    inducing_observations: Tensor
    inducing_actions: Tensor
    comparison_count: Tensor
    centre: Tensor
    weights: Tensor
    root: Tensor

    def __init__(self, inducing: int = 64, random_features: int = 512, **options: Any) -> None:
        super().__init__(**options)
        check_positive(inducing=inducing, random_features=random_features)
        valid = random_features % 2 == 0
        expected = "an even number of at least 2, as each frequency has a cosine and a sine"
        require("random_features", valid, expected, random_features)
        self.inducing, self.random_features = inducing, random_features
        self.register_buffer("inducing_observations", None)
        self.register_buffer("inducing_actions", None)

    def build(self, inputs: int) -> None:
        """Make the features, the kernel and the posterior, which equals the prior yet."""
        assert self.spec is not None
        if self.make_network is None and not self.spec.image:
            self.network = ResidualFeatures(inputs, self.hidden)
        else:
            self.network = self.frame_body(inputs)
        width = feature_count(self.network, inputs)
        self.rbf = ScaleKernel(RFFKernel(self.random_features // 2, num_dims=width))
        self.linear = LinearKernel()
        self.quadrature = GaussHermiteQuadrature1D()
        size = self.random_features + width
        self.variational_mean = nn.Parameter(torch.zeros(self.inducing))
        self.variational_root = nn.Parameter(torch.eye(self.inducing))
        self.register_buffer("comparison_count", torch.ones(()))
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("weights", torch.zeros(size))
        self.register_buffer("root", torch.zeros(size, size + self.inducing))

    @torch.no_grad()
    def before_fit(self, clips: Clips) -> None:
        """Update the normalisation, and choose inducing frames; warn if there are too few."""
        super().before_fit(clips)
        observations, actions = clips.observations[clips.mask], clips.actions[clips.mask]
        n = min(len(observations), max(_CANDIDATES, self.inducing))
        some = torch.linspace(0, len(observations) - 1, n, dtype=torch.double).long()
        observations, actions = observations[some], actions[some]
        frames = self.inputs(observations, actions).cpu().numpy()
        seed = int(torch.randint(2**31, ()))
        distinct = min(self.inducing, n)
        chosen = torch.from_numpy(kmeans_plusplus(frames, distinct, random_state=seed)[1])
        if distinct < self.inducing:
            warnings.warn(
                f"inducing: expected at most {n}, the number of frames to choose from, got "
                f"{self.inducing}. All are taken, some of them again, which only costs time; "
                "take fewer, or compare more or longer clips.",
                stacklevel=3,  # past no_grad
            )
            chosen = chosen[torch.arange(self.inducing) % distinct]
        self.inducing_observations = observations[chosen]
        self.inducing_actions = actions[chosen]
        if self.fitted:
            self._project()
        else:
            self._initialise_kernel(clips[:_FEW])

    def features(self, clips: Clips) -> Tensor:
        r"""Kernel features summed over each clip's real frames: $\Psi$, `(N, F + H)`."""
        frames = self.clip_inputs(clips)
        real = clips.mask[:, None].to(frames)
        # Summed before they are scaled and joined: half the time.
        return torch.cat(
            [
                scale * (real @ part.unflatten(0, clips.mask.shape)).squeeze(1)
                for scale, part in self._feature_parts(frames)
            ],
            1,
        )

    def _feature_parts(self, frames: Tensor) -> list[tuple[Tensor, Tensor]]:
        r"""Cosines, sines and $\phi$ of frames, each with its scale: RFFKernel's own features."""
        phi, rff = self.network(frames), self.rbf.base_kernel
        phases = phi @ (rff.randn_weights / rff.lengthscale.mT)
        scale = (self.rbf.outputscale / rff.num_samples).sqrt()
        return [(scale, phases.cos()), (scale, phases.sin()), (self.linear.variance[0].sqrt(), phi)]

    def frame_features(self, inputs: Tensor) -> Tensor:
        r"""Kernel features of B frames: $\psi$, `(B, F + H)`; $\psi \psi^\top$ is the kernel."""
        return torch.cat([scale * part for scale, part in self._feature_parts(inputs)], 1)

    def basis(self) -> Tensor:
        r"""Projection $B$, `(F + H, M)`, onto the whitened inducing variables.

        Raises:
            FitDiverged: The inducing frames' covariance isn't finite, or not definite even with
                more added to its diagonal.
        """
        inputs = self.inputs(self.inducing_observations, self.inducing_actions)
        inducing = self.frame_features(inputs)
        root = _cholesky(inducing @ inducing.T)
        return torch.linalg.solve_triangular(root, inducing, upper=False).T

    def loss(self, batch: PairBatch) -> Tensor:
        """Minus the evidence lower bound, divided by the number of comparisons."""
        # One estimate of the spectral norms for the whole step.
        with cached():
            z = self.features(batch.second) - self.features(batch.first)
            basis = self.basis()
        return self.bound(z @ basis, z.square().sum(1), batch.preference)

    def bound(self, projected: Tensor, prior_var: Tensor, preference: Tensor) -> Tensor:
        r"""Minus the evidence lower bound of Q comparisons, divided by their number.

        Args:
            projected: `(Q, M)`, $B^\top z$.
            prior_var: `(Q,)`, $|z|^2$, reward units².
            preference: `(Q,)`, probability that the second is preferred.

        Returns:
            A scalar, in nats per comparison.
        """
        root = self.variational_root.tril()
        variance = prior_var + (projected @ root).square().sum(1) - projected.square().sum(1)
        # Rounding may take a variance of nothing, as of two equal clips, below zero.
        spread = variance.clamp_min(_LEAST_VARIANCE).sqrt()
        # Unchecked, so that a NaN shows in the loss, where `fit` looks for it.
        difference = Normal(projected @ self.variational_mean, spread, validate_args=False)
        expected = self.quadrature(
            lambda values: negative_log_likelihood(
                values, preference, random_answer_rate=self.random_answer_rate
            ),
            difference,
        )
        return expected.mean() + self.divergence() / self.comparison_count

    def divergence(self) -> Tensor:
        r"""$KL(N(m, S) \| N(0, I))$, in nats."""
        root = self.variational_root.tril()
        squares = root.square().sum() + self.variational_mean.square().sum()
        return (squares - self.inducing) / 2 - root.diagonal().abs().log().sum()

    def on_train_start(self) -> None:
        """Count the comparisons that the divergence is divided by."""
        self.comparison_count.fill_(len(self.trainer.train_dataloader.dataset))  # type: ignore[union-attr]

    @torch.no_grad()
    def after_epoch(self) -> None:
        r"""Compute the posterior over the weights of $\psi$, and centre on the reference batch.

        Its mean is $B m$ and its covariance $I - B B^\top + B S B^\top$. With $G = B^\top B$,
        kept below the identity by the addition to the diagonal, $I - B (I + (I - G)^{1/2})^{-1}
        B^\top$ is the symmetric root of $I - B B^\top$.
        """
        reference = self.inputs(self.reference_observations, self.reference_actions)
        self.centre.copy_(self.frame_features(reference).mean(0))
        basis = self.basis()
        self.weights.copy_(basis @ self.variational_mean)
        values, vectors = torch.linalg.eigh(basis.T @ basis)
        turned = basis @ vectors
        residual = -(turned / (1 + (1 - values).clamp_min(0).sqrt())) @ turned.T
        residual.diagonal().add_(1)
        self.root.copy_(torch.cat([residual, basis @ self.variational_root.tril()], 1))

    @torch.no_grad()
    def after_fit(self, comparisons: Comparisons) -> None:
        """Optimise m and S at the features and the kernel that were kept.

        Features of all comparisons are computed once, so that L-BFGS takes less than an epoch; the
        bound is concave without random answers (Challis & Barber 2013).
        """
        comparisons = comparisons.compact()
        clips, device = comparisons.clips.to(self.device), self.device
        features = torch.cat([self.features(part) for part in clip_chunks(clips, functions=32)])
        first, second = comparisons.pairs.to(device).T
        z, preference = features[second] - features[first], comparisons.preference.to(device)
        projected, prior_var = z @ self.basis(), z.square().sum(1)
        variational = [self.variational_mean, self.variational_root]
        optimizer = torch.optim.LBFGS(
            variational, max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            bound = self.bound(projected, prior_var, preference)
            bound.backward()
            return bound

        with torch.enable_grad():
            optimizer.step(closure)
        self.after_epoch()

    def compute_posterior(self, clips: Clips) -> GaussianPosterior:
        """Gaussian posterior of rank F + H + M at most."""
        features = torch.cat([self.features(part) for part in clip_chunks(clips, functions=32)])
        centred = features - self.centre * clips.lengths[:, None]
        return GaussianPosterior(centred @ self.weights, centred @ self.root)

    def frame_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and standard deviation of single frames, by a covariance of lower rank.

        The covariance of the weights of $\psi$ is $I - \sum_i e_i v_i v_i^\top$ with no more
        terms than inducing frames: a tenth of the root's arithmetic, in double precision, which
        the difference needs.
        """
        root = self.root.double()
        known = torch.eye(len(root)).to(root) - root @ root.T
        values, vectors = torch.linalg.eigh(known)
        some = values.abs().topk(self.inducing).indices
        psi = self.frame_features(inputs) - self.centre
        mean, psi = psi @ self.weights, psi.double()
        variance = psi.square().sum(1) - (psi @ vectors[:, some]).square() @ values[some]
        return mean, variance.clamp_min(0).sqrt().float()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with a larger step and no weight decay for the process."""
        network = set(self.network.parameters())
        process = [parameter for parameter in self.parameters() if parameter not in network]
        return torch.optim.AdamW(
            [
                {"params": list(self.network.parameters()), "weight_decay": self.weight_decay},
                {"params": process, "lr": _FASTER * self.learning_rate, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
        )

    def _initialise_kernel(self, clips: Clips) -> None:
        """Set the lengthscale and both variances from the first data."""
        reference = self.inputs(self.reference_observations, self.reference_actions)
        apart = float(torch.pdist(self.network(reference[:_FEW])).median())
        self.rbf.base_kernel.lengthscale = max(apart, _JITTER)
        self.rbf.outputscale = self.linear.variance = 1.0
        centre = self.frame_features(reference).mean(0)
        centred = self.features(clips) - centre * clips.lengths[:, None]
        rbf, linear = centred.tensor_split([self.random_features], 1)
        # Each term gives half; two clips differ by twice what one does.
        self.rbf.outputscale, self.linear.variance = (
            _PRIOR_VARIANCE / 4 / max(float(part.square().sum(1).mean()), _JITTER)
            for part in (rbf, linear)
        )

    def _project(self) -> None:
        """Project the variational posterior onto new inducing frames."""
        basis = self.basis()
        mean, root = basis.T @ self.weights, basis.T @ self.root
        # The addition to the diagonal is independent noise of the new ones.
        noise = torch.eye(self.inducing).to(basis) - basis.T @ basis
        self.variational_mean.copy_(mean)
        self.variational_root.copy_(_cholesky(root @ root.T + noise))


def _cholesky(matrix: Tensor) -> Tensor:
    jitter = _JITTER * matrix.diagonal().mean()
    try:
        root: Tensor = psd_safe_cholesky(matrix + jitter * torch.eye(len(matrix)).to(matrix))
    except (NanError, NotPSDError) as error:
        raise FitDiverged(
            "GPHead: expected a positive definite covariance of the inducing frames, got one that "
            f"isn't ({error}). The model is back at the best epoch, or as before this fit; lower "
            "the learning rate, take fewer inducing frames, or look for extreme inputs."
        ) from error
    return root
