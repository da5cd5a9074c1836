"""What a part has found so far, in a file that outlives it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Results:
    """Written anew, in one piece, with every item. `seconds`: what the part may take."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.folder = path.parent  # for other files of the suite
        self._path, self._end = path, time.monotonic() + seconds
        self.items: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds until the part is ended."""
        return self._end - time.monotonic()

    def put(self, name: str, value: Any) -> None:
        """Note an item; a later one of the same name takes its place."""
        self.items[name] = value
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.items), "utf-8")
        os.replace(partial, self._path)

    def add(self, name: str, value: Any) -> None:
        """Note an item of a list."""
        self.put(name, [*self.items.get(name, []), value])

    def fail(self, line: str) -> None:
        """Something is wrong; the part goes on and ends as failed."""
        print(f"FAILED: {line}", flush=True)
        self.add("failures", line)

    def skip(self, line: str) -> None:
        """Something was left out, for a reason that is no fault."""
        print(f"skipped: {line}", flush=True)
        self.add("skipped", line)

    @property
    def failed(self) -> bool:
        return bool(self.items.get("failures"))
