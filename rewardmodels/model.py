"""RewardModel: what every predictor is, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, NotFitted
from rewardmodels.frames import FrameInputs, FrameSpec
from rewardmodels.likelihood import check_random_answer_rate
from rewardmodels.networks import CNN, MLP, Activation, FrameNetwork, MakeNetwork, network_maker
from rewardmodels.posterior import ReturnPosterior, SampledPosterior
from rewardmodels.scoring import Fold, FrameScorer

# Bounds the memory of `posterior`, and keeps it within a processor's cache; each frame is seen
# once either way.
_FRAMES_AT_ONCE = 1 << 13
_NUMBERS_AT_ONCE = 1 << 23  # observations that are images are seen fewer at a time
_FUNCTIONS_AT_ONCE = 8  # with that many frames; more functions see fewer frames at a time
_REFERENCE_FRAMES = 1024

RewardOf = Literal["observation_action", "observation"]


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        epochs: Passes over the training answers that the kept weights have had in this fit.
        train_log_loss: Mean loss of the last of them, nats per answer.
        held_out_log_loss: That of what is believed of the answers kept back, of every kind; NaN
            without any.
        held_out_accuracy: Share of decided (not tied) held-out answers that were predicted;
            NaN without any.
        held_out: How many answers were kept back.
    """

    epochs: int
    train_log_loss: float
    held_out_log_loss: float
    held_out_accuracy: float
    held_out: int


@dataclass(frozen=True)
class PairBatch:
    """A minibatch of Q comparisons.

    Args:
        first: Q clips that were written first.
        second: The Q clips they were compared with.
        preference: `(Q,)`, probability that the second is preferred.
        index: `(Q,)` long, the place of each among all answers of its kind: comparisons, marks or
            ratings.
    """

    first: Clips
    second: Clips
    preference: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        """Returns the same minibatch on another device."""
        return PairBatch(
            self.first.to(device),
            self.second.to(device),
            self.preference.to(device),
            self.index.to(device),
        )


class RewardModel(L.LightningModule, ABC):
    """A belief about rewards, learned from comparisons and their like by `rewardmodels.fit`.

    A subclass writes `build`, `loss`, `after_epoch`, `compute_posterior` and, where it needs to,
    `before_fit` and `after_fit`. Its constructor takes hyper-parameters only, its own and, as
    `**options`, those below; shapes come with the first data.

    Observations are vectors or, with three axes or more, images `(C, H, W)`; actions are vectors,
    or one whole number each. For the reward of a transition see `transitions`; for that of an item
    with a feature vector, such as an embedded text, `Clips.of_items`.

    Comparisons leave rewards free up to a constant per frame. Every sample is therefore
    centred on one reference batch, fixed at the first fit and stored with the model: its mean
    reward over the reference is zero, so that what is said of a single frame doesn't hold an
    arbitrary constant. Between clips of different length that constant does count, since a
    return is a sum over real frames: it is learned from such comparisons, and the reference
    decides what a frame more is worth where there are none.

    Args:
        hidden: Widths of the hidden layers, none for a reward that is linear in its inputs; those
            behind the convolutions where observations are images.
        network: In their place, a module of your own from `(B, D)` inputs to `(B, H)` features, or
            a function from D to one; a last layer, linear in the features, follows. Inputs are
            normalised, the observation's numbers first (an image's row by row, channel by
            channel), then the action's. A module is copied, never changed.
        activation: Of hidden units: "silu", which is right more often about what it has not seen;
            or "leaky_relu", as Christiano et al. (2017) have, on whose rewards the policies of
            `rewardmodels learn` get further.
        reward_of: Whether a reward is one of the observation and the action, or of the observation
            alone.
        discrete_actions: How many there are to choose from, where actions are whole numbers; 0 for
            as many as the first clips show.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of AdamW, which takes `learning_rate` times as much of
            each weight at each step: 0.01 does next to nothing in a few hundred steps.
        random_answer_rate: How often the teacher is taken to answer at random (Christiano et al.
            2017, §2.2.3, use 0.1).

    Attributes:
        spec: Shapes of a frame; None before the first data.
        fitted: Whether it may be asked.
        fit_report: How the latest fit went; None before the first, and after `load`.

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
        hidden = tuple(hidden)
        if any(width < 1 for width in hidden):
            raise InvalidInput(f"hidden: expected widths of at least 1, got {hidden}.")
        if activation not in get_args(Activation):
            raise InvalidInput(
                f"activation: expected one of {', '.join(get_args(Activation))}; got "
                f"{activation!r}."
            )
        if reward_of not in get_args(RewardOf):
            raise InvalidInput(
                f"reward_of: expected one of {', '.join(get_args(RewardOf))}; got {reward_of!r}."
            )
        if discrete_actions < 0:
            raise InvalidInput(
                f"discrete_actions: expected a number of at least 0, got {discrete_actions}."
            )
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
        self.fitted = False
        self.fit_report: FitReport | None = None
        self.register_buffer("reference_observations", None)
        self.register_buffer("reference_actions", None)

    @abstractmethod
    def build(self, inputs: int) -> None:
        """Makes the networks, for frames that are vectors of `inputs` numbers."""

    @abstractmethod
    def loss(self, batch: PairBatch) -> Tensor:
        """Scalar to minimise, in nats per comparison."""

    @abstractmethod
    def after_epoch(self) -> None:
        """Does what a belief needs after each epoch, and is quick: the gauge."""

    def after_fit(self, comparisons: Comparisons) -> None:
        """Does what is left once the best weights are back: an inverse Hessian, say.

        Called once a fit, without gradients, in eval mode and after `after_epoch`.

        Args:
            comparisons: Those that were trained on, and what marks and ratings came to; none that
                were kept back.
        """

    @abstractmethod
    def compute_posterior(self, clips: Clips) -> ReturnPosterior:
        """The centred belief about checked clips; called without gradients, in eval mode."""

    def fold(self) -> Fold | None:
        """The belief about single frames as a function of arrays, for `frame_scorer`.

        A predictor that has none is right without it, if slower. One that inherits it, and
        changes what is believed, has to give its own, or None.

        Returns:
            A function from normalised inputs `(B, D)`, as `inputs` makes them, to means and
            standard deviations `(B,)` in reward units, the gauge included; of copies, so that a
            later fit doesn't change it. None where there is no such function.
        """
        return None

    def initialise(self, clips: Clips) -> None:
        """Takes shapes and the reference batch from the first data; later calls only check.

        Raises:
            InvalidInput: Clips whose frames have other shapes than the first data's.
        """
        if self.spec is not None:
            self.check(clips)
            return
        spec = FrameSpec.of(clips, self.discrete_actions)
        spec.check(clips)
        self.spec = spec
        frames = clips.mask.flatten().nonzero().squeeze(1)
        n = min(len(frames), _REFERENCE_FRAMES)
        # Single precision doesn't tell frames apart past 2^24 of them.
        evenly = torch.linspace(0, len(frames) - 1, n, dtype=torch.double).long()
        chosen = frames[evenly.to(frames.device)]
        self.reference_observations = clips.observations.flatten(0, 1)[chosen].clone()
        self.reference_actions = clips.actions.flatten(0, 1)[chosen].clone()
        self.configure_model()

    def before_fit(self, clips: Clips) -> None:
        """Adds the real frames of these clips to what inputs are normalised by."""
        assert self.frame_inputs is not None
        for part in in_parts(clips):
            self.frame_inputs.update(part.observations[part.mask], part.actions[part.mask])

    def inputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(B, D)` normalised inputs of B frames."""
        assert self.frame_inputs is not None
        inputs: Tensor = self.frame_inputs(observations, actions)
        return inputs

    def frame_body(self, inputs: int) -> nn.Module:
        """Makes what turns inputs into features: the caller's network, a CNN or an MLP."""
        assert self.spec is not None
        if self.make_network is not None:
            return self.make_network(inputs)
        if self.spec.image:
            return CNN(self.spec.image, inputs, self.hidden)
        return MLP(inputs, self.hidden, self.activation)

    def frame_network(self, inputs: int) -> FrameNetwork:
        """Makes features with a linear layer behind them."""
        return FrameNetwork(self.frame_body(inputs), inputs)

    @torch.no_grad()
    def posterior(self, clips: Clips) -> ReturnPosterior:
        """The joint belief about the returns of N clips, in reward units.

        Raises:
            NotFitted: The model has not been fitted yet.
            InvalidInput: Clips whose frames have other shapes than those learned from.
        """
        if not self.fitted:
            raise NotFitted(f"{type(self).__name__}: expected a fitted model; call fit first.")
        self.check(clips)
        clips = clips.to(self.device)
        if not self.training:
            return self.compute_posterior(clips)
        self.eval()
        try:
            return self.compute_posterior(clips)
        finally:
            self.train()

    def frame_posterior(self, observations: Tensor, actions: Tensor) -> ReturnPosterior:
        """The joint belief about the rewards of B single frames, each a clip of length one.

        Args:
            observations: `(B, *obs)`.
            actions: `(B, *act)`.

        Returns:
            A belief over B returns, in reward units per frame.

        Raises:
            NotFitted: The model has not been fitted yet.
            InvalidInput: Frames of other shapes than those learned from, or that hold NaN or
                infinity.

        Example:
            >>> from rewardmodels import Comparisons, DeepEnsemble, fit
            >>> clips = Clips(torch.randn(4, 5, 2), torch.randn(4, 5, 1))
            >>> said = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
            >>> model = fit(DeepEnsemble(members=3), said, epochs=1)
            >>> model.frame_posterior(torch.zeros(7, 2), torch.zeros(7, 1)).mean.shape
            torch.Size([7])
        """
        return self.posterior(Clips(observations[:, None], actions[:, None]))

    def frame_scorer(self) -> FrameScorer:
        """Makes what answers for one frame at a time as `frame_posterior` does, only sooner.

        It keeps what is believed now: a later fit doesn't change it, so make another after each.

        Raises:
            NotFitted: The model has not been fitted yet.
        """
        if not self.fitted:
            raise NotFitted(f"{type(self).__name__}: expected a fitted model; call fit first.")
        return FrameScorer(self)

    def check(self, clips: Clips) -> None:
        """Raises InvalidInput unless the clips' frames have the shapes learned from."""
        assert self.spec is not None
        self.spec.check(clips)

    # What Lightning calls.

    def configure_model(self) -> None:
        """Builds the networks, once shapes are known; Lightning calls it at each fit."""
        if self.spec is not None and self.frame_inputs is None:
            frame_inputs = FrameInputs(self.spec, actions=self.reward_of == "observation_action")
            self.build(frame_inputs.size)
            self.frame_inputs = frame_inputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what `build` made."""
        return torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """One minibatch."""
        return self.loss(batch)


class SampledRewardModel(RewardModel):
    """A model whose belief is a finite set of functions: members, masks or indices.

    A subclass gives `rewards`; the belief follows.
    """

    gauge: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("gauge", None)

    @abstractmethod
    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(S, B)` rewards of B frames under each function, not yet centred."""

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Centres each function on the reference batch."""
        rewards = self.rewards(self.reference_observations, self.reference_actions)
        self.gauge = rewards.mean(1)

    def compute_posterior(self, clips: Clips) -> SampledPosterior:
        """Sums centred rewards over each clip's real frames."""
        constant = self.gauge[:, None] * clips.lengths
        some = in_parts(clips, functions=len(self.gauge))
        return SampledPosterior(torch.cat([self.returns(part) for part in some], 1) - constant)

    def returns(self, clips: Clips) -> Tensor:
        """`(S, N)` returns of each clip under each function, not yet centred."""
        rewards = self.rewards(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
        return rewards.unflatten(1, clips.mask.shape).masked_fill(~clips.mask, 0).sum(2)


def in_parts(clips: Clips, *, functions: int = 1) -> Iterator[Clips]:
    """Yields the clips in parts that so many functions can be asked about at once; at least one."""
    numbers = clips.observations[0:1, 0:1].numel()
    frames = min(_FRAMES_AT_ONCE, _NUMBERS_AT_ONCE // max(1, numbers))
    at_once = max(1, frames // (clips.length * -(-functions // _FUNCTIONS_AT_ONCE)))
    for start in range(0, max(1, len(clips)), at_once):
        yield clips[start : start + at_once]
