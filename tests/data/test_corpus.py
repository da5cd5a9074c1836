from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from gpu_microgpt.config import DataConfig
from gpu_microgpt.data import corpus, load_corpus
from gpu_microgpt.errors import DataError


def load(source, log=pytest.fail):
    return load_corpus(DataConfig(source=str(source)), log=log)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The user's own folder, as GPU_MICROGPT_DATA names it."""
    folder = tmp_path / "given"
    folder.mkdir()
    monkeypatch.setenv("GPU_MICROGPT_DATA", str(folder))
    monkeypatch.setattr(corpus, "cache_folder", lambda: tmp_path / "cache")
    return folder


def test_a_file_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("poems").mkdir()
    Path("poems/a.txt").write_bytes("é\nb".encode())
    loaded = load("poems/a.txt")
    assert (loaded.text, loaded.name, loaded.requested) == ("é\nb", "poems/a.txt", "poems/a.txt")
    assert loaded.sha256 == hashlib.sha256("é\nb".encode()).hexdigest()


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert load("~/a.txt").path == tmp_path / "a.txt"


def test_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert load(tmp_path / "a.txt").text == "a\nb\nc\n"


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt: got an empty file \({len(content)} bytes\)"):
        load(tmp_path / "a.txt")


def test_not_utf8_says_where(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1234 + b"\xe9 latin")
    with pytest.raises(DataError, match=r"a\.txt: got byte 0xe9 at offset 1,234, wanted UTF-8"):
        load(tmp_path / "a.txt")


def test_a_missing_file_says_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load("shakespear")
    message = str(caught.value)
    assert f"got 'shakespear', no such file in {tmp_path}" in message
    assert "names, shakespeare, stdlib, stdlib-words" in message
    assert message.endswith("did you mean 'shakespeare'?")
    with pytest.raises(DataError, match=r"stdlib-words$"):
        load("x" * 300)


def test_a_missing_file_does_not_fall_back():
    with pytest.raises(DataError, match="no such file"):
        load_corpus(DataConfig(source="no/such.txt", fallback="stdlib"), log=pytest.fail)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_the_given_folder_comes_first(given, monkeypatch):
    content = b"emma\nava\n"
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(corpus.KNOWN, "names", corpus.Remote("http://127.0.0.1:9/", 9, sha256))
    (given / "names.txt").write_bytes(content)
    loaded = load("names")
    assert (loaded.path, loaded.sha256) == (given / "names.txt", sha256)


def test_a_wrong_file_in_the_given_folder_is_not_used_nor_touched(given):
    (given / "names.txt").write_bytes(b"emma\n")
    with pytest.raises(DataError) as caught:
        load_corpus(DataConfig(source="names", fallback="stdlib"), log=pytest.fail)
    for part in ("wrong checksum: got 5 bytes", "wanted 228,145 bytes", "data.source="):
        assert part in str(caught.value)
    assert [path.name for path in given.iterdir()] == ["names.txt"]


def test_a_given_folder_that_is_none(given, monkeypatch):
    monkeypatch.setenv("GPU_MICROGPT_DATA", str(given / "nowhere"))
    with pytest.raises(DataError, match=r"GPU_MICROGPT_DATA: got '.*nowhere', wanted an existing"):
        load("names")


def test_a_given_folder_without_the_file_goes_on_to_the_cache(given, monkeypatch):
    content = b"emma\nava\n"
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(corpus.KNOWN, "names", corpus.Remote("http://127.0.0.1:9/", 9, sha256))
    corpus.cache_folder().mkdir()
    (corpus.cache_folder() / "names.txt").write_bytes(content)
    assert load("names").path == corpus.cache_folder() / "names.txt"


def test_stdlib_is_source_text():
    loaded = load("stdlib")
    assert len(loaded.text) == 1_100_000
    assert loaded.text.isascii()
    assert "def " in loaded.text
    assert loaded == load("stdlib")
    assert loaded.sha256 == hashlib.sha256(loaded.text.encode()).hexdigest()


def test_stdlib_words_are_sorted_distinct_words():
    words = load("stdlib-words").text.split("\n")
    assert len(words) > 5000
    assert words == sorted(set(words))
    assert all(re.fullmatch("[a-z]{3,15}", word) for word in words)
    assert {"self", "abstract", "zipfile"} <= set(words)


def test_stdlib_takes_ascii_modules_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    files = {"os": "last = 1\n", "abc": "first_of Two\n", "ast": "é\n", "sitecustomize": "mine\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
    assert load("stdlib").text == "first_of Two\nlast = 1\n"
    assert load("stdlib-words").text == "first\nlast"


@pytest.mark.parametrize("source", ["stdlib", "stdlib-words"])
def test_an_interpreter_without_sources(source, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=f"^{source}: got no module sources in "):
        load(source)


@pytest.mark.parametrize(("source", "characters"), [("names", 228_145), ("shakespeare", 1_115_394)])
def test_the_known_files_are_the_known_ones(source, characters):
    if not Path(os.environ.get("GPU_MICROGPT_DATA", ""), f"{source}.txt").is_file():
        pytest.skip(f"GPU_MICROGPT_DATA holds no {source}.txt")
    assert len(load(source).text) == characters
