"""Conformance checks of detectors: what a guard needs of every one, whoever wrote it.

With pytest, each check is a test of its own:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_detector(check):
        check(MyDetector)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ood.detectors import OODDetector
from ood.monitor import DETECTORS, Monitor, load_monitor, save_monitor
from rewardmodels.checks import CheckFailed, expect_error, expect_within, run_checks
from rewardmodels.errors import InvalidInput, NotFitted

MakeDetector = Callable[[], OODDetector]
Check = Callable[[MakeDetector], None]

OBSERVATION = 2
FEATURES = 2 * OBSERVATION + 1
CLOSE = 1e-5


def frames(n: int = 400, seed: int = 0) -> Tensor:
    """Transitions `(n, 5)` of two numbers and one action, in two clusters far from zero.

    They are correlated and of different scales, as those of a robot are.
    """
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 4, generator=draw, dtype=torch.double)
    cluster = 6.0 * (torch.arange(n) % 2).double()
    before = torch.stack([3 + noise[:, 0] + cluster, 3 + 0.5 * noise[:, 0] + noise[:, 1]], 1)
    change = torch.stack([5 * noise[:, 2], 0.9 * noise[:, 1] + noise[:, 3]], 1)
    return torch.cat([before, noise[:, 2:3], before + change], 1)


def check_score_depends_on_its_frame_alone(make_detector: MakeDetector) -> None:
    """A batch, its permutation, single frames and single precision give the same numbers."""
    detector, new = make_detector().fit(frames()), frames(30, seed=1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for name in ("score", "residuals"):
        method = getattr(detector, name)
        values = method(new)
        dimensions = 1 if name == "score" else 2
        _expect(
            values.ndim == dimensions and len(values) == 30,
            f"{name}: expected {dimensions} dimensions with 30 first, got {tuple(values.shape)}.",
        )
        cause = "statistics of the batch, such as its mean, enter the score"
        _expect_close(f"{name} of permuted frames", method(new[order]), values[order], cause)
        single = torch.cat([method(row[None]) for row in new])
        _expect_close(f"{name} of single frames", single, values, cause)
        cause = "arithmetic in single precision on features that weren't standardised"
        _expect_close(f"{name} of float32", method(new.float()), values, cause, 1e-3)


def check_distant_frames_score_higher(make_detector: MakeDetector) -> None:
    """A frame far from all training frames scores above them, and one beyond float32 no lower."""
    detector = make_detector().fit(frames())
    distant = frames(1, seed=2) + torch.tensor([40.0, -20.0, 8.0, 40.0, 40.0])
    score, usual = float(detector.score(distant)), float(detector.score(frames()).quantile(0.98))
    _expect(
        score > usual,
        f"score of a distant frame: expected more than {usual:.4g}, as most training frames have, "
        f"got {score:.4g}. Usual cause: a likelihood in place of its negative.",
    )
    extreme = float(detector.score(torch.full((1, FEATURES), 1e30)))
    _expect(extreme >= score, f"frame of 1e30: expected at least {score:.4g}, got {extreme:.4g}.")


def check_explanation_names_the_feature(make_detector: MakeDetector) -> None:
    """An explanation has a share of at least 0 for each feature, largest for one that is far."""
    detector, new = make_detector().fit(frames()), frames(7, seed=1)
    new[:, -1] += 100
    shares = detector.explain(new)
    expected = f"explain: expected shape {tuple(new.shape)} and numbers of at least 0, got"
    _expect(
        shares.shape == new.shape and bool((shares >= 0).all()),
        f"{expected} {tuple(shares.shape)} from {float(shares.min()):.4g}.",
    )
    largest = shares.argmax(1).tolist()
    _expect(set(largest) == {FEATURES - 1}, f"explain: expected the last feature, got {largest}.")


def check_fit_is_reproducible(make_detector: MakeDetector) -> None:
    """Two fits to the same frames agree, other frames differ, and no global generator moves."""
    before = torch.get_rng_state()
    one, two = make_detector().fit(frames()), make_detector().fit(frames())
    _expect(
        torch.equal(before, torch.get_rng_state()),
        "fit: expected torch's global generator untouched. Usual cause: no isolated_randomness.",
    )
    _expect(
        one.fingerprint == two.fingerprint,
        "fingerprint: expected the same after two fits to the same frames. Usual cause: random "
        "numbers without a seed.",
    )
    changed = frames()
    changed[-1, 0] += 1e-3
    _expect(
        one.fingerprint != make_detector().fit(changed).fingerprint,
        "fingerprint: expected another after a fit to other frames. Usual cause: `learned` is "
        "incomplete.",
    )


def check_refuses_what_it_cannot_score(make_detector: MakeDetector) -> None:
    """NotFitted before the first fit; InvalidInput for NaN, infinity and other shapes."""
    cause = "`fit`, `check_frames` or `restore` overridden, without the checks of OODDetector's"
    refuses, detector = partial(expect_error, cause=cause), make_detector()
    refuses(NotFitted, "score before fit", lambda: detector.score(frames()))
    refuses(NotFitted, "fingerprint before fit", lambda: detector.fingerprint)
    for value in (float("nan"), float("inf")):
        broken = frames()
        broken[7, 0] = value
        refuses(InvalidInput, f"fit to {value}", partial(detector.fit, broken))
        fitted = make_detector().fit(frames())
        refuses(InvalidInput, f"score of {value}", partial(fitted.score, broken))
    refuses(InvalidInput, "fit to shape (5,)", lambda: detector.fit(torch.zeros(5)))
    detector.fit(frames())
    refuses(InvalidInput, "score of another width", lambda: detector.score(frames()[:, :-1]))
    if detector.saveable:
        refuses(InvalidInput, "restore of no arrays", lambda: make_detector().restore({}))


def check_state_restores_scores(make_detector: MakeDetector) -> None:
    """Settings and state are all there is: a restored detector has the same scores.

    A detector of `ood.DETECTORS` is also saved to a file and loaded. One that isn't `saveable` is
    exempt.
    """
    detector, new = make_detector().fit(frames()), frames(9, seed=1)
    if not detector.saveable:
        return
    if DETECTORS.get(type(detector).__name__) is type(detector):
        with tempfile.TemporaryDirectory() as folder:
            save_monitor(Monitor(detector), Path(folder) / "monitor")
            restored = load_monitor(Path(folder) / "monitor").detector
    else:
        restored = make_detector().restore({k: np.array(v) for k, v in detector.state.items()})
    cause = "an attribute that `fit_frames` sets and `learned` doesn't name"
    _expect(
        restored.fingerprint == detector.fingerprint,
        f"restore: expected the same fingerprint. Usual cause: {cause}.",
    )
    for name in ("score", "residuals"):
        one, two = getattr(restored, name)(new), getattr(detector, name)(new)
        _expect_close(f"{name} after restore", one, two, cause, 0.0)


CHECKS: tuple[Check, ...] = (
    check_score_depends_on_its_frame_alone,
    check_distant_frames_score_higher,
    check_explanation_names_the_feature,
    check_fit_is_reproducible,
    check_refuses_what_it_cannot_score,
    check_state_restores_scores,
)


def check_detector(make_detector: MakeDetector) -> None:
    """Run every check of `CHECKS` on a detector.

    Args:
        make_detector: Makes a new detector that isn't fitted, of `frames`: 5 features, of which the
            first two and the last two are the observations before and after an action.

    Raises:
        CheckFailed: With all checks that failed.
    """
    run_checks(CHECKS, make_detector)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


def _expect_close(
    what: str, values: Tensor, expected: Tensor, cause: str, tolerance: float = CLOSE
) -> None:
    expect_within(what, values, expected, tolerance * (1 + expected.abs()), cause)
