"""Questions of a fitted model for people: kept with the model, shown by `rewardmodels label`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from active import FeedbackStore
from rewardmodels import Clips, Comparisons, UnreadableFile
from rewardmodels.saving import write_text_atomically

_STORE, _SHOWN = "answers.sqlite", "shown.json"


def put_questions(run: Path, clips: Clips, pairs: Tensor, texts: Sequence[str]) -> None:
    """Store pairs of items to be compared, and what people see of each item.

    Args:
        run: Directory of the fit.
        clips: N items.
        pairs: `(Q, 2)` indices of items.
        texts: Of the N items.
    """
    shown = read_shown(run)
    with closing(FeedbackStore(run / _STORE)) as store:
        round = 1 + max((query.round for query in store.queries()), default=0)
        queries = store.add_queries(clips, pairs, round=round)
        for query, pair in zip(queries, pairs.tolist(), strict=True):
            shown |= dict(zip(store.shown(query), (texts[item] for item in pair), strict=True))
    write_text_atomically(run / _SHOWN, json.dumps(shown))


def read_shown(run: Path) -> dict[int, str]:
    """Text of each item by its id in the store; empty if nothing was asked.

    Raises:
        UnreadableFile: A damaged file.
    """
    try:
        found = json.loads((run / _SHOWN).read_text(encoding="utf-8"))
        return {int(clip): str(text) for clip, text in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise UnreadableFile(f"{run / _SHOWN}: expected texts by id, got {error}.") from error


def answers(run: Path) -> Comparisons | None:
    """Comparisons that people gave of the items of a fit, ratings among them; None without any."""
    if not (run / _STORE).is_file():
        return None
    with closing(FeedbackStore(run / _STORE)) as store:
        given = store.feedback()
    ratings = None if given.ratings is None else given.ratings.comparisons()
    parts = [part for part in (given.comparisons, ratings) if part]
    return Comparisons.cat(parts) if parts else None


def describe(record: Mapping[str, object], template: str | None) -> str:
    r"""Text of an item: the template with its columns' values, or all of them by name.

    Example:
        >>> describe({"price": 3.5, "title": "Two nights"}, "{title} for {price}")
        'Two nights for 3.5'
        >>> describe({"price": 3.5, "title": "Two nights"}, None)
        'price: 3.5\ntitle: Two nights'
    """
    record = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in record.items()
    }
    if template is not None:
        return template.format_map(record)
    return "\n".join(f"{name}: {value}" for name, value in record.items())
