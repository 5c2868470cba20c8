"""RewardModel, the base class of all predictors."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from rewardmodels.arrays import ArrayLike
from rewardmodels.clips import Clips, single_frames
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, NotFitted, is_whole, require
from rewardmodels.frames import FrameInputs, FrameSpec
from rewardmodels.likelihood import check_random_answer_rate
from rewardmodels.networks import CNN, MLP, Activation, FrameNetwork, MakeNetwork, network_maker
from rewardmodels.novelty import Novelty, NoveltySetting, learned_amplitudes, learning_sample
from rewardmodels.posterior import ReturnPosterior, SampledPosterior
from rewardmodels.scoring import FrameScorer, to_numpy

# Bounds the memory of `posterior`, and keeps it within a processor's cache; each frame is seen
# once either way.
_FRAMES_AT_ONCE = 1 << 13
_NUMBERS_AT_ONCE = 1 << 23  # observations that are images are seen fewer at a time
_FUNCTIONS_AT_ONCE = 8  # with that many frames; more functions see fewer frames at a time
_REFERENCE_FRAMES = 1024
_LEARNED_AGAIN = 1.5  # times the comparisons that novelty was last learned from

RewardOf = Literal["observation_action", "observation"]


@dataclass(frozen=True)
class FitReport:
    """Result of a fit.

    Attributes:
        epochs: Passes over the training comparisons that the kept weights have had in this fit.
        train_log_loss: Mean loss of the last of them, nats per comparison.
        held_out_log_loss: Mean negative log likelihood of the held-out comparisons under the
            posterior, nats; NaN without any.
        held_out_accuracy: Share of the decided (not tied) held-out comparisons that were
            predicted; NaN without any.
        held_out: Number of held-out comparisons.
    """

    epochs: int
    train_log_loss: float
    held_out_log_loss: float
    held_out_accuracy: float
    held_out: int


@dataclass(frozen=True)
class PairBatch:
    """Minibatch of Q comparisons.

    Args:
        first: First clips of Q pairs.
        second: Second clips.
        preference: `(Q,)`, probability that the second is preferred.
        index: `(Q,)` long, place of each among all feedback of its kind: comparisons, marks or
            ratings.
    """

    first: Clips
    second: Clips
    preference: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        """Return the same minibatch on another device."""
        return PairBatch(
            self.first.to(device),
            self.second.to(device),
            self.preference.to(device),
            self.index.to(device),
        )


class RewardModel(L.LightningModule, ABC):
    """Base class of reward models: a LightningModule with a joint posterior over returns.

    `rewardmodels.fit` trains it. Observations are vectors or, with three axes or more, images
    `(C, H, W)`; actions are vectors, or one whole number each. For the reward of a transition see
    `transitions`; for that of an item with a feature vector, such as an embedded text,
    `Clips.of_items`.

    Comparisons leave rewards free up to a constant per frame. Every function drawn from the
    posterior is therefore centred on one reference batch, fixed at the first fit and saved with the
    model: its mean reward over the reference is zero. Between clips of different length the
    constant does count, since a return is a sum over real frames: it is learned from such
    comparisons, and without any the reference decides what one more frame is worth.

    **To write a predictor**, subclass and write these methods. The constructor takes
    hyper-parameters only (its own, and those below as `**options`); shapes come with the first
    data.

    | method | runs | does |
    |---|---|---|
    | `build(inputs)` | once, at the first fit or `load` | makes the networks |
    | `before_fit(clips)` | first in each fit | updates the normalisation; optional |
    | `loss(batch)` | at each step | returns a scalar to minimise, nats per comparison |
    | `after_epoch()` | after each epoch, and with the kept weights | centres functions |
    | `after_fit(comparisons)` | last, with the kept weights | e.g. inverts a Hessian; optional |
    | `compute_posterior(clips)` | in `posterior` | returns the centred `ReturnPosterior` |
    | `frame_moments(inputs)` | in `frame_scorer` | returns mean and std of frames; optional |

    What is learned must be a parameter or a registered buffer, or `save` misses it. If the
    posterior is a finite set of reward functions, extend `SampledRewardModel`, which needs only
    `build`, `loss` and `rewards`. `rewardmodels.checks.check_reward_model` tests that a predictor
    keeps the library's promises:

        >>> from rewardmodels import SampledRewardModel, negative_log_likelihood
        >>> from rewardmodels.checks import check_reward_model
        >>> class LinearRewards(SampledRewardModel):
        ...     def build(self, inputs):
        ...         self.layer = nn.Linear(inputs, 5)  # five functions
        ...     def rewards(self, inputs):
        ...         return self.layer(inputs).T
        ...     def loss(self, batch):
        ...         difference = self.returns(batch.second) - self.returns(batch.first)
        ...         return negative_log_likelihood(difference, batch.preference).mean()
        >>> check_reward_model(LinearRewards)

    Args:
        hidden: Widths of the hidden layers, none for a reward that is linear in its inputs; those
            behind the convolutions where observations are images.
        network: In their place, your own module from `(B, D)` inputs to `(B, H)` features, or a
            function from D to one; a last layer, linear in the features, follows. Inputs are
            normalised: the observation's numbers (an image's row by row, channel by channel), then
            the action's. A module is copied, never changed.
        activation: Of hidden units: "silu", which predicts comparisons better; or "leaky_relu", as
            in Christiano et al. (2017), on whose rewards the policies of `rewardmodels learn` get
            further.
        reward_of: Inputs of the reward: observation and action, or the observation alone.
        discrete_actions: Number of actions to choose from, where actions are whole numbers; 0 for
            as many as the first clips show.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of AdamW, which takes `learning_rate` times as much of
            each weight at each step: 0.01 does next to nothing in a few hundred steps.
        random_answer_rate: Probability that the teacher answers at random (Christiano et al. 2017,
            §2.2.3, use 0.1).

    Attributes:
        spec: Shapes of a frame; None before the first data.
        fitted: True once it was fitted or loaded.
        fit_report: Result of the latest fit; None before the first, and after `load`.

    Raises:
        InvalidInput: A number out of range.
    """

    reference_observations: Tensor
    reference_actions: Tensor

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (64, 64),
        network: nn.Module | MakeNetwork | None = None,
        activation: Activation = "silu",
        reward_of: RewardOf = "observation_action",
        discrete_actions: int = 0,
        learning_rate: float = 1e-3,
        weight_decay: float = 1.0,
        random_answer_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InvalidInput(f"{name}: expected a number of at least 0, got {value}.")
        valid = isinstance(hidden, Sequence) and all(is_whole(n) and n >= 1 for n in hidden)
        require("hidden", valid, "widths, whole numbers of at least 1", hidden)
        hidden = tuple(hidden)
        if activation not in get_args(Activation):
            raise InvalidInput(
                f"activation: expected one of {', '.join(get_args(Activation))}; got "
                f"{activation!r}."
            )
        if reward_of not in get_args(RewardOf):
            raise InvalidInput(
                f"reward_of: expected one of {', '.join(get_args(RewardOf))}; got {reward_of!r}."
            )
        valid = is_whole(discrete_actions) and discrete_actions >= 0
        require("discrete_actions", valid, "a whole number of at least 0", discrete_actions)
        check_random_answer_rate(random_answer_rate)
        # Of the subclass's constructor, too: Lightning looks at all of them.
        self.save_hyperparameters(ignore="network")
        self.hidden = self.hparams["hidden"] = hidden
        # A function, since a module in an attribute would be trained and saved.
        self.make_network = None if network is None else network_maker(network)
        self.activation: Activation = activation
        self.reward_of, self.discrete_actions = reward_of, discrete_actions
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.random_answer_rate = random_answer_rate
        self.spec: FrameSpec | None = None
        self.frame_inputs: FrameInputs | None = None
        self.novelty: Novelty | None = None
        self.fitted = False
        self.fit_report: FitReport | None = None
        self.register_buffer("reference_observations", None)
        self.register_buffer("reference_actions", None)

    @abstractmethod
    def build(self, inputs: int) -> None:
        """Make the networks, for frames that are vectors of `inputs` numbers."""

    @abstractmethod
    def loss(self, batch: PairBatch) -> Tensor:
        """Scalar to minimise, in nats per comparison."""

    def before_fit(self, clips: Clips) -> None:
        """Add the real frames of these clips to the statistics that inputs are normalised by."""
        assert self.frame_inputs is not None
        for part in clip_chunks(clips):
            self.frame_inputs.update(part.observations[part.mask], part.actions[part.mask])

    @abstractmethod
    def after_epoch(self) -> None:
        """Do what the posterior needs after each epoch, and is quick, such as centring."""

    def after_fit(self, comparisons: Comparisons) -> None:
        """Do what the posterior needs once the best weights are back, such as a Hessian.

        Called once a fit, without gradients, in eval mode and after `after_epoch`.

        Args:
            comparisons: Training comparisons, those made of marks and ratings included; none that
                was held out.
        """

    @abstractmethod
    def compute_posterior(self, clips: Clips) -> ReturnPosterior:
        """Centred posterior of checked clips; called without gradients, in eval mode."""

    def frame_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of single frames' rewards, which `frame_scorer` translates.

        A predictor that inherits it, and changes `compute_posterior`, has to change it too.

        Args:
            inputs: `(B, D)` normalised inputs, as from `inputs`.

        Returns:
            `(B,)` and `(B,)`, centred, in reward units.

        Raises:
            NotImplementedError: This predictor has none; its scorer is right, but slower.
        """
        raise NotImplementedError

    def initialise(self, clips: Clips) -> None:
        """Take shapes and the reference batch from the first data; later calls only check.

        Raises:
            InvalidInput: Clips whose frames have other shapes than the first data's.
        """
        if self.spec is not None:
            self.check(clips)
            return
        spec = FrameSpec.of(clips, self.discrete_actions)
        spec.check_layout()
        spec.check(clips)
        self.spec = spec
        frames = clips.mask.flatten().nonzero().squeeze(1)
        numbers = max(1, clips.observations[0, 0].numel()) if len(clips) else 1
        n = min(len(frames), _REFERENCE_FRAMES, max(1, _NUMBERS_AT_ONCE // numbers))
        # Single precision doesn't tell frames apart past 2^24 of them.
        evenly = torch.linspace(0, len(frames) - 1, n, dtype=torch.double).long()
        chosen = frames[evenly.to(frames.device)]
        self.reference_observations = clips.observations.flatten(0, 1)[chosen].clone()
        self.reference_actions = clips.actions.flatten(0, 1)[chosen].clone()
        self.configure_model()

    def inputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Normalised inputs `(B, D)` of B frames."""
        assert self.frame_inputs is not None
        inputs: Tensor = self.frame_inputs(observations, actions)
        return inputs

    def clip_inputs(self, clips: Clips) -> Tensor:
        """Normalised inputs `(N * T, D)` of all frames of N clips, padding included."""
        return self.inputs(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))

    def frame_body(self, inputs: int) -> nn.Module:
        """Make the module from inputs to features: the caller's network, a CNN or an MLP."""
        assert self.spec is not None
        if self.make_network is not None:
            return self.make_network(inputs)
        if self.spec.image:
            return CNN(self.spec.image, inputs, self.hidden)
        return MLP(inputs, self.hidden, self.activation)

    def frame_network(self, inputs: int) -> FrameNetwork:
        """Make features with a linear layer behind them."""
        return FrameNetwork(self.frame_body(inputs), inputs)

    @torch.no_grad()
    def posterior(self, clips: Clips) -> ReturnPosterior:
        """Joint posterior over the returns of N clips, in reward units.

        Raises:
            NotFitted: The model has not been fitted yet.
            InvalidInput: Clips whose frames have other shapes than the training data's.
        """
        self.check_fitted()
        require("clips", isinstance(clips, Clips), "Clips", type(clips).__name__)
        self.check(clips)
        clips = clips.to(self.device)
        with self._evaluating():
            posterior = self.compute_posterior(clips)
        root = self.novelty_root(clips)
        return posterior.plus(root) if root.any() else posterior

    @torch.no_grad()
    def novelty_root(self, clips: Clips) -> Tensor:
        """Root `(N, R)` of the covariance that `novelty` adds to N returns, in reward units.

        Its rows differ by as much as two clips do by what was never compared.
        """
        assert self.novelty is not None
        if not self.novelty.active:
            return self.novelty.amplitude.new_zeros(len(clips), 1)
        with self._evaluating():
            parts = [self.novelty.root(self.clip_inputs(x), x.mask) for x in clip_chunks(clips)]
        return torch.cat(parts)

    def frame_posterior(self, observations: ArrayLike, actions: ArrayLike) -> ReturnPosterior:
        """Joint posterior over the rewards of B single frames, each a clip of length one.

        Args:
            observations: `(B, *obs)`.
            actions: `(B, *act)`.

        Returns:
            A posterior over B returns, in reward units per frame.

        Raises:
            NotFitted: The model has not been fitted yet.
            InvalidInput: Frames of other shapes than the training data's, or that hold NaN or
                infinity.

        Example:
            >>> from rewardmodels import Comparisons, DeepEnsemble, fit
            >>> clips = Clips(torch.randn(4, 5, 2), torch.randn(4, 5, 1))
            >>> comparisons = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
            >>> model = fit(DeepEnsemble(members=3), comparisons, epochs=1)
            >>> model.frame_posterior(torch.zeros(7, 2), torch.zeros(7, 1)).mean.shape
            torch.Size([7])
        """
        return self.posterior(single_frames(observations, actions))

    def frame_scorer(self) -> FrameScorer:
        """Make a fast snapshot of `frame_posterior`, for one frame at a time.

        A later fit doesn't change it, so make another after each.

        Raises:
            NotFitted: The model has not been fitted yet.
        """
        self.check_fitted()
        assert self.spec is not None
        assert self.frame_inputs is not None
        try:
            with self._evaluating():
                moments = to_numpy(self._novel_moments, self.frame_inputs.size, self.device)
        except NotImplementedError:
            moments = None
        if moments is not None:
            return FrameScorer(self.spec, self.frame_inputs, moments)
        snapshot = copy.deepcopy(self).eval()
        return FrameScorer(self.spec, self.frame_inputs, posterior=snapshot.frame_posterior)

    def _novel_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        assert self.novelty is not None
        mean, std = self.frame_moments(inputs)
        if not self.novelty.active:
            return mean, std
        return mean, (std.square() + self.novelty.variance(inputs)).sqrt()

    @torch.no_grad()
    def extend_novelty(self, clips: Clips) -> None:
        """Add compared frames to the range outside which a frame is novel; called by `fit`.

        Also where a fit is interrupted, since its normalisation is a new one.
        """
        assert self.novelty is not None
        mean, scale = self._pooled_normalisation()
        for part in clip_chunks(clips):
            part = part.to(self.device)
            inputs = self.novelty.pool(self.clip_inputs(part))
            self.novelty.extend(inputs[part.mask.flatten()], mean, scale)

    def _pooled_normalisation(self) -> tuple[Tensor, Tensor]:
        assert self.novelty is not None
        assert self.frame_inputs is not None
        norm = self.frame_inputs.norm
        choices = norm.mean.new_zeros(self.frame_inputs.choices)  # one-hot, not normalised
        mean = self.novelty.pool(torch.cat([norm.mean, choices])[None])[0]
        scale = self.novelty.pool(torch.cat([norm.scale, choices + 1])[None])[0]
        return mean, scale

    @torch.no_grad()
    def update_novelty(self, comparisons: Comparisons, setting: NoveltySetting) -> None:
        """Choose how much novelty adds outside the range of compared frames.

        Learned amplitudes are learned anew once there are half as many comparisons again as at the
        last time, so that refits with a few more cost nothing; their unit, the returns' scale,
        follows each fit. Called by `fit`, with all comparisons, those held out included.

        Args:
            comparisons: Q comparisons.
            setting: As for `fit`.
        """
        assert self.novelty is not None
        novelty, (mean, scale) = self.novelty, self._pooled_normalisation()
        if setting == "off":
            novelty.amplitude = torch.zeros_like(mean)
            return
        some = learning_sample(comparisons)
        clips = some.clips.to(self.device)
        if setting != "learned":
            relative = torch.full_like(mean, float(setting))
        elif len(comparisons) >= _LEARNED_AGAIN * int(novelty.learned_from):
            parts = [novelty.pool(self.clip_inputs(part)) for part in clip_chunks(clips)]
            relative = learned_amplitudes(
                torch.cat(parts).unflatten(0, clips.mask.shape).cpu(),
                some,
                scale.cpu(),
                novelty.constant.cpu(),
                random_answer_rate=self.random_answer_rate,
            ).to(mean)
            novelty.learned, novelty.learned_from = relative, torch.tensor(len(comparisons))
        else:
            relative = novelty.learned
        difference = self.compute_posterior(clips).difference(some.pairs.to(self.device))
        novelty.amplitude = relative * difference.mean.square().mean()

    def check(self, clips: Clips) -> None:
        """Raise InvalidInput unless the clips' frames have the training data's shapes."""
        assert self.spec is not None
        self.spec.check(clips)

    def check_fitted(self) -> None:
        """Raise NotFitted before the first fit."""
        if not self.fitted:
            raise NotFitted(f"{type(self).__name__}: expected a fitted model; call fit first.")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode inside the block."""
        training = self.training
        if training:
            self.eval()
        try:
            yield
        finally:
            if training:
                self.train()

    # What Lightning calls.

    def configure_model(self) -> None:
        """Build the networks, once shapes are known; Lightning calls it at each fit."""
        if self.spec is not None and self.frame_inputs is None:
            frame_inputs = FrameInputs(self.spec, actions=self.reward_of == "observation_action")
            self.build(frame_inputs.size)
            self.frame_inputs = frame_inputs
            self.novelty = Novelty(frame_inputs.size, self.spec.image)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what `build` made."""
        return torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Loss of one minibatch."""
        return self.loss(batch)


class SampledRewardModel(RewardModel):
    """Base class of models whose posterior is S equally likely reward functions.

    These are the members of an ensemble, dropout masks or indices. A subclass writes `build`,
    `loss` and `rewards`.
    """

    gauge: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("gauge", None)

    @abstractmethod
    def rewards(self, inputs: Tensor) -> Tensor:
        """Rewards `(S, B)` of frames with inputs `(B, D)` under each function, not centred."""

    def returns(self, clips: Clips) -> Tensor:
        """Returns `(S, N)` of each clip under each function, not centred."""
        return sum_frames(self.rewards(self.clip_inputs(clips)), clips)

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Centre each function on the reference batch."""
        inputs = self.inputs(self.reference_observations, self.reference_actions)
        self.gauge = self.rewards(inputs).mean(1)

    def compute_posterior(self, clips: Clips) -> SampledPosterior:
        """Centred rewards, summed over each clip's real frames."""
        constant = self.gauge[:, None] * clips.lengths
        chunks = clip_chunks(clips, functions=len(self.gauge))
        return SampledPosterior(torch.cat([self.returns(part) for part in chunks], 1) - constant)

    def frame_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        rewards = self.rewards(inputs) - self.gauge[:, None]
        mean = rewards.mean(0)
        # Deviations are squared, never the rewards themselves, so that functions that hardly
        # differ keep the digits in which they do.
        return mean, (rewards - mean).square().mean(0).sqrt()


def sum_frames(rewards: Tensor, clips: Clips) -> Tensor:
    """Returns `(S, N)` of clips from rewards `(S, N * T)` of all their frames."""
    return rewards.unflatten(1, clips.mask.shape).masked_fill(~clips.mask, 0).sum(2)


def clip_chunks(clips: Clips, *, functions: int = 1) -> Iterator[Clips]:
    """Yield the clips in chunks that fit in cache for so many functions; at least one chunk."""
    numbers = clips[:1].observations[:, :1].numel()
    frames = min(_FRAMES_AT_ONCE, _NUMBERS_AT_ONCE // max(1, numbers))
    at_once = max(1, frames // (clips.length * -(-functions // _FUNCTIONS_AT_ONCE)))
    for start in range(0, max(1, len(clips)), at_once):
        yield clips[start : start + at_once]
