"""Clips in the feedback store: each kept once, as safetensors, with every number as it came."""

from __future__ import annotations

import hashlib

import safetensors.torch

from active.database import Database, Missing
from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput, UnreadableFile


class ClipTable:
    """The clips of a store, by content.

    Args:
        db: The open store.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def put(self, blob: bytes, twin: int) -> int:
        """The id of a clip, stored now if it isn't yet; to be called in a transaction.

        Two clips of a query may hold the same frames; the second is then kept as a twin, since
        a query of a clip against itself is what every reader refuses.
        """
        db = self._db.connection
        key = (hashlib.sha256(blob).digest(), twin)
        sql = "INSERT INTO clips (sha256, twin, data) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        db.execute(sql, (*key, blob))
        sql = "SELECT id FROM clips WHERE sha256 = ? AND twin = ?"
        return int(db.execute(sql, key).fetchone()[0])

    def load(self, clip: int) -> Clips:
        """One clip, as it was stored.

        Raises:
            Missing: There is none of that id.
            UnreadableFile: Its bytes have changed.
        """
        with self._db.reading() as db:
            sql = "SELECT sha256, data FROM clips WHERE id = ?"
            found = db.execute(sql, (clip,)).fetchone()
        if found is None:
            raise Missing(f"ids: expected clips in {self._db.path}, got {clip}, which isn't.")
        digest, blob = found
        if hashlib.sha256(blob).digest() != digest:
            raise UnreadableFile(
                f"{self._db.path}: expected clip {clip} as it was stored, got other bytes (its "
                "checksum differs); restore the file from a copy."
            )
        return Clips(**{name: v[None] for name, v in safetensors.torch.load(blob).items()})

    def check_frames(self, clips: Clips) -> None:
        """Refuses frames of another shape now, and not after people have answered."""
        with self._db.reading() as db:
            known = db.execute("SELECT min(id) FROM clips").fetchone()[0]
        stored = None if known is None else self.load(known)
        for name in () if stored is None else ("observations", "actions", "states"):
            old, new = getattr(stored, name), getattr(clips, name)
            if old is not None and new is not None and old.shape[2:] != new.shape[2:]:
                raise InvalidInput(
                    f"clips.{name}: expected frames of shape {tuple(old.shape[2:])} like those "
                    f"in {self._db.path}, got {tuple(new.shape[2:])}; use another file for another "
                    "task."
                )


def pack(clips: Clips, index: int) -> bytes:
    """One clip as safetensors, cut after its last real frame: padding is nobody's data."""
    end = int(clips.mask[index].nonzero().max()) + 1
    named = {
        name: getattr(clips, name)
        for name in ("observations", "actions", "mask", "rewards", "states")
    }
    return safetensors.torch.save(
        {
            name: value[index, :end].detach().cpu().contiguous().clone()
            for name, value in named.items()
            if value is not None
        }
    )
