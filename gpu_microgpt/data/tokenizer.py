"""Characters to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

_MAX_IDS = 1 << 16  # corpora are kept as uint16
_KIND = "characters"


class CharTokenizer:
    """Ids 0.. are the given characters in code point order; BOS, the last id, starts and ends a
    document."""

    characters: str  # distinct, sorted

    def __init__(self, text: str) -> None:
        """Collect the distinct characters of a text. DataError when they are too many."""
        self.characters = "".join(sorted(set(text)))
        if self.vocab_size > _MAX_IDS:
            raise DataError(
                f"vocabulary: got {len(self.characters):,} distinct characters and BOS, wanted at "
                f"most {_MAX_IDS:,} ids (tokens are 16-bit): use a text with fewer"
            )
        # the last one is no code point: what is above all ours is compared with it
        self._codes = np.append(_code_points(self.characters), np.uint32(0xFFFFFFFF))

    @property
    def vocab_size(self) -> int:
        """Characters and BOS."""
        return len(self.characters) + 1

    @property
    def bos(self) -> int:
        """The id of BOS."""
        return len(self.characters)

    def encode(self, text: str, source: str = "text") -> np.ndarray:
        """Ids of the characters, (len(text),) int32. DataError names unknown ones; `source` says
        there where the text came from."""
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes)
        known = self._codes[ids] == codes
        if not known.all():
            unknown = sorted({text[at] for at in np.flatnonzero(~known)})
            named = ", ".join(f"{c!a} (U+{ord(c):04X})" for c in unknown[:5])
            more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
            raise DataError(
                f"{source}: got characters outside the vocabulary: {named}{more}; "
                f"wanted only {_abridged(self.characters)}"
            )
        return ids.astype(np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of (N,) ids; BOS is no character and gives none. ValueError for no id of ours."""
        wanted = np.asarray(ids, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.vocab_size:
            raise ValueError(f"decode: wants ids in [0, {self.vocab_size})")
        return "".join(self.characters[i] for i in wanted.tolist() if i != self.bos)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {"kind": _KIND, "characters": self.characters}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CharTokenizer:
        """The tokenizer that `to_dict` described. DataError for anything else."""
        characters = values.get("characters")
        if values.get("kind") != _KIND or not isinstance(characters, str):
            raise DataError(
                f"tokenizer: got {dict(values)!r:.80}, wanted kind {_KIND!r} and its characters"
            )
        return cls(characters)


def _code_points(text: str) -> np.ndarray:
    """(len(text),) uint32, lone surrogates (undecodable bytes of a command line) included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _abridged(characters: str) -> str:
    return ascii(characters if len(characters) <= 100 else characters[:97] + "...")
