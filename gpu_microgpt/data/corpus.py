"""Where a text comes from: a known corpus, a file, a URL, or this interpreter's own library."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs

from ..config import DataConfig
from ..errors import DataError
from .download import DownloadError, Remote, download, mismatch, set_aside

Log = Callable[[str], None]

FOLDER_VARIABLE = "GPU_MICROGPT_DATA"  # a folder with names.txt, shakespeare.txt
KNOWN = {
    "names": Remote(
        "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt",
        228_145,
        "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    ),
    "shakespeare": Remote(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
STDLIB = ("stdlib", "stdlib-words")  # need no network
_STDLIB_CHARACTERS = 1_100_000
_WORD = re.compile(r"(?<![A-Za-z])[a-z]{3,15}(?![A-Za-z])")


@dataclass(frozen=True)
class Corpus:
    """A text and where it really comes from."""

    text: str  # line ends are \n
    name: str  # the source used: `requested`, or the fallback
    path: Path
    sha256: str  # of the bytes
    requested: str


def quiet(line: str) -> None:
    """A log that says nothing."""


def load_corpus(data: DataConfig, *, log: Log) -> Corpus:
    """The text of `data.source`.

    A known name is looked for in the folder $GPU_MICROGPT_DATA, then in the cache, then downloaded;
    a URL likewise without the folder; anything else is a file, relative to the working directory.
    Where a download fails, `data.fallback` is used instead after one line to `log`. Raises
    DataError.
    """
    try:
        return _load(data.source, log)
    except DownloadError as failure:
        if data.fallback is None:
            raise
        log(f"WARNING: {failure}. Going on with the fallback corpus {data.fallback!r} instead.")
        return _from_stdlib(data.fallback, data.source)


def prepare(sources: Sequence[str], *, log: Log) -> list[Corpus]:
    """Download and verify ahead of time, one line to `log` for each source. Raises DataError."""
    corpora = []
    for source in sources:
        corpus = _load(source, log)
        log(f"{source}: {len(corpus.text):,} characters, sha256 {corpus.sha256}, {corpus.path}")
        corpora.append(corpus)
    return corpora


def cache_folder() -> Path:
    """Where downloads are kept."""
    return platformdirs.user_cache_path("gpu_microgpt")


def _load(source: str, log: Log) -> Corpus:
    if source in STDLIB:
        return _from_stdlib(source, source)
    path = _locate(source, log)
    content = _read(path)
    return Corpus(_decode(content, path), source, path, hashlib.sha256(content).hexdigest(), source)


def _locate(source: str, log: Log) -> Path:
    """A file on this machine, verified or downloaded where that applies."""
    if source in KNOWN:
        return _given(source) or _cached(KNOWN[source], f"{source}.txt", log)
    if source.startswith(("http://", "https://")):
        stem = Path(urlsplit(source).path).name or "index"
        digest = hashlib.sha256(source.encode()).hexdigest()[:12]
        return _cached(Remote(source), f"{digest}-{stem}", log)
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        names = (*KNOWN, *STDLIB)
        near = difflib.get_close_matches(source, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"data.source: got {source!r}, no such file in {Path.cwd()}; wanted a file, a URL or "
            f"one of {', '.join(names)}{hint}"
        )
    return path


def _given(source: str) -> Path | None:
    """The known file in the user's own folder, if there is one; never altered."""
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise DataError(f"{FOLDER_VARIABLE}: got {named!r}, wanted an existing folder")
    path = folder / f"{source}.txt"
    if not path.exists():
        return None
    wrong = mismatch(_read(path), KNOWN[source])
    if wrong:
        raise DataError(f"{path}: {wrong}; replace it, or use it as it is: data.source={path}")
    return path


def _cached(remote: Remote, name: str, log: Log) -> Path:
    """The file in the cache, downloaded if it is not there or not the expected one."""
    path = cache_folder() / name
    if path.exists():
        wrong = mismatch(_read(path), remote)
        if not wrong:
            return path
        log(f"{path}: {wrong}; kept as {set_aside(path, path)}, downloading again")
    log(f"downloading {remote.url} to {path}")
    download(remote, path, log)
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as failure:
        raise DataError(f"{path}: cannot be read: {failure.strerror}") from None


def _decode(content: bytes, path: Path) -> str:
    """UTF-8 text with \\n line ends and no byte order mark. DataError when empty or not UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise DataError(
            f"{path}: got byte 0x{content[failure.start]:02x} at offset {failure.start:,}, "
            f"wanted UTF-8 text ({failure.reason}): convert the file"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DataError(f"{path}: got an empty file ({len(content):,} bytes), wanted text")
    return text


def _from_stdlib(name: str, requested: str) -> Corpus:
    """`stdlib`: the first 1.1 M characters of the standard library's top-level modules, in order of
    name; `stdlib-words`: the distinct lower-case words of 3 to 15 letters in all of them."""
    folder = Path(sysconfig.get_path("stdlib"))
    if name == "stdlib":
        text = ""
        for module in _modules(folder):
            text += module
            if len(text) >= _STDLIB_CHARACTERS:
                break
        text = text[:_STDLIB_CHARACTERS]
    else:
        words = set(_WORD.findall("\n".join(_modules(folder))))
        text = "\n".join(sorted(words))
    if not text:
        raise DataError(
            f"{name}: got no module sources in {folder}, wanted an interpreter that has them: "
            "give data.source a file"
        )
    return Corpus(text, name, folder, hashlib.sha256(text.encode()).hexdigest(), requested)


def _modules(folder: Path) -> Iterator[str]:
    """Sources of the top-level modules, by name; those in ASCII only, to keep the vocabulary
    small."""
    for path in sorted(folder.glob("*.py")):
        content = _read(path)
        if path.stem in sys.stdlib_module_names and content.isascii():
            yield _decode(content, path) if content else ""
