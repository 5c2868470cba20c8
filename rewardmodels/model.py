"""RewardModel: what every predictor is, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput, NotFitted
from rewardmodels.likelihood import check_mistake_rate
from rewardmodels.networks import RunningNorm
from rewardmodels.posterior import ReturnPosterior, SampledPosterior

_FRAMES_AT_ONCE = 1 << 16  # bounds the memory of `posterior`; each frame is seen once either way
_REFERENCE_FRAMES = 1024


@dataclass(frozen=True)
class FrameSpec:
    """Shapes of one frame, known once the first data has been seen.

    Args:
        observation: Shape of an observation, without N and T.
        action: Shape of an action, without N and T.
    """

    observation: tuple[int, ...]
    action: tuple[int, ...]

    @classmethod
    def of(cls, clips: Clips) -> FrameSpec:
        """Returns the shapes of these clips' frames."""
        return cls(tuple(clips.observations.shape[2:]), tuple(clips.actions.shape[2:]))

    @property
    def inputs(self) -> int:
        """Numbers in an observation and an action together."""
        return torch.Size(self.observation).numel() + torch.Size(self.action).numel()


@dataclass(frozen=True)
class PairBatch:
    """A minibatch of Q comparisons.

    Args:
        first: Q clips that were written first.
        second: The Q clips they were compared with.
        preference: `(Q,)`, probability that the second is preferred.
        index: `(Q,)` long, which of all comparisons these are.
    """

    first: Clips
    second: Clips
    preference: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        """Returns the same minibatch on another device."""
        clips, rest = (self.first, self.second), (self.preference, self.index)
        return PairBatch(*(x.to(device) for x in clips), *(x.to(device) for x in rest))


class RewardModel(L.LightningModule, ABC):
    """A belief about rewards, learned from comparisons by `rewardmodels.fit`.

    A subclass says how it is built (`build`), what it minimises (`loss`), what is left to do
    after the last step (`settle`) and what it believes of clips (`believe`). Its constructor
    takes hyper-parameters only, all of them numbers, strings or tuples, and calls
    `save_hyperparameters()`; shapes come with the first data.

    Comparisons leave rewards free up to a constant per frame. Every sample is therefore
    centred on one reference batch, fixed at the first fit and stored with the model: its mean
    reward over the reference is zero, so that what is said of a single frame doesn't hold an
    arbitrary constant. Between clips of different length that constant does count, since a
    return is a sum over real frames.

    Args:
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of AdamW.
        mistake_rate: How often the teacher is taken to answer at random (Christiano et al.
            2017, §2.2.3, use 0.1).
    """

    reference_observations: Tensor
    reference_actions: Tensor

    def __init__(self, *, learning_rate: float, weight_decay: float, mistake_rate: float) -> None:
        super().__init__()
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InvalidInput(f"{name}: expected a number of at least 0, got {value}.")
        check_mistake_rate(mistake_rate)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.mistake_rate = mistake_rate
        self.spec: FrameSpec | None = None
        self.norm: RunningNorm | None = None
        self.fitted = False
        self.register_buffer("reference_observations", None)
        self.register_buffer("reference_actions", None)

    @abstractmethod
    def build(self, inputs: int) -> None:
        """Makes the networks, for frames that are vectors of `inputs` numbers."""

    @abstractmethod
    def loss(self, batch: PairBatch) -> Tensor:
        """Scalar to minimise, in nats per comparison."""

    @abstractmethod
    def settle(self) -> None:
        """Does what is left once the last step is taken: the gauge, an inverse Hessian."""

    @abstractmethod
    def believe(self, clips: Clips) -> ReturnPosterior:
        """The centred belief about checked clips; called without gradients, in eval mode."""

    def initialise(self, clips: Clips) -> None:
        """Takes shapes and the reference batch from the first data; later calls only check.

        Raises:
            InvalidInput: Clips whose frames have other shapes than the first data's.
        """
        if self.spec is not None:
            self.check(clips)
            return
        self.spec = FrameSpec.of(clips)
        frames = clips.mask.flatten().nonzero().squeeze(1)
        evenly = torch.linspace(0, len(frames) - 1, min(len(frames), _REFERENCE_FRAMES)).long()
        chosen = frames[evenly.to(frames.device)]
        self.reference_observations = clips.observations.flatten(0, 1)[chosen].clone()
        self.reference_actions = clips.actions.flatten(0, 1)[chosen].clone()
        self.configure_model()

    def observe(self, clips: Clips) -> None:
        """Adds the real frames of these clips to what inputs are normalised by."""
        assert self.norm is not None
        frames = torch.cat([part[clips.mask].flatten(1).float() for part in _parts(clips)], 1)
        self.norm.update(frames)

    def inputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(B, D)` normalised inputs of B frames."""
        assert self.norm is not None
        return self.norm(torch.cat([observations.flatten(1), actions.flatten(1)], 1).float())

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
        was_training = self.training
        self.eval()
        try:
            return self.believe(clips.to(self.device))
        finally:
            self.train(was_training)

    def frame_posterior(self, observations: Tensor, actions: Tensor) -> ReturnPosterior:
        """The joint belief about the rewards of B single frames, each a clip of length one.

        Args:
            observations: `(B, *obs)`.
            actions: `(B, *act)`.
        """
        return self.posterior(Clips(observations[:, None], actions[:, None]))

    def check(self, clips: Clips) -> None:
        """Raises InvalidInput unless the clips' frames have the shapes learned from."""
        if self.spec != (spec := FrameSpec.of(clips)):
            raise InvalidInput(
                f"clips: expected the frame shapes that were learned from, {self.spec}; got {spec}."
            )

    # What Lightning calls.

    def configure_model(self) -> None:
        """Builds the networks, once shapes are known; Lightning calls it at each fit."""
        if self.spec is not None and self.norm is None:
            self.norm = RunningNorm(self.spec.inputs)
            self.build(self.spec.inputs)

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

    def __init__(self, *, learning_rate: float, weight_decay: float, mistake_rate: float) -> None:
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay, mistake_rate=mistake_rate
        )
        self.register_buffer("gauge", None)

    @abstractmethod
    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(S, B)` rewards of B frames under each function, not yet centred."""

    @torch.no_grad()
    def settle(self) -> None:
        """Centres each function on the reference batch."""
        rewards = self.rewards(self.reference_observations, self.reference_actions)
        self.gauge = rewards.mean(1)

    def believe(self, clips: Clips) -> SampledPosterior:
        """Sums centred rewards over each clip's real frames."""
        at_once = max(1, _FRAMES_AT_ONCE // clips.length)
        some = (clips[i : i + at_once] for i in range(0, len(clips), at_once))
        constant = self.gauge[:, None] * clips.lengths
        return SampledPosterior(torch.cat([self.returns(part) for part in some], 1) - constant)

    def returns(self, clips: Clips) -> Tensor:
        """`(S, N)` returns of each clip under each function, not yet centred."""
        rewards = self.rewards(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
        return rewards.unflatten(1, clips.mask.shape).masked_fill(~clips.mask, 0).sum(2)


def _parts(clips: Clips) -> tuple[Tensor, Tensor]:
    return clips.observations, clips.actions
