from __future__ import annotations

import hashlib
import http.server
import threading
from dataclasses import dataclass, field

import pytest

from gpu_microgpt.config import DataConfig
from gpu_microgpt.data import corpus, load_corpus, prepare
from gpu_microgpt.data.download import DownloadError, Patience, Remote, download
from gpu_microgpt.errors import DataError

CONTENT = b"emma\nolivia\nava\n" * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(seconds=0.3, attempts=3, rest=0.0)


@dataclass
class Server:
    """A local server that behaves, request after request, as `plan` says; then well."""

    url: str
    plan: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    content: bytes = CONTENT

    def remote(self, sha256=SHA256):
        return Remote(self.url, len(CONTENT), sha256)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    closing = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            act = here.plan.pop(0) if here.plan else "good"
            here.served.append(act)
            if act.isdigit():
                return self.send_error(int(act))
            if act == "silent":
                return closing.wait()
            self.send_response(200)
            if act != "cut, no length":
                self.send_header("Content-Length", str(len(here.content)))
            self.end_headers()
            sent = {"good": len(here.content), "cut late": 70_000}.get(act, 1000)
            self.wfile.write(here.content[:sent])
            if act == "stall":
                self.wfile.flush()
                closing.wait()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        here = Server(f"http://127.0.0.1:{listening.server_port}/names.txt")
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield here
        closing.set()
        listening.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(corpus, "cache_folder", lambda: folder)
    monkeypatch.delenv("GPU_MICROGPT_DATA", raising=False)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_good_file_arrives_whole_and_alone(server, tmp_path):
    target = tmp_path / "new" / "names.txt"
    download(server.remote(), target, pytest.fail, QUICK)
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["names.txt"]


@pytest.mark.parametrize("fault", ["cut", "cut, no length", "stall", "silent", "503", "429"])
def test_a_passing_fault_is_tried_again(server, tmp_path, fault):
    server.plan = [fault, fault]
    lines = []
    download(server.remote(), tmp_path / "names.txt", lines.append, QUICK)
    assert (tmp_path / "names.txt").read_bytes() == CONTENT
    assert names(tmp_path) == ["names.txt"]
    assert server.served == [fault, fault, "good"]
    assert [line.rsplit("; ", 1)[1] for line in lines] == [
        "trying again (2 of 3)",
        "trying again (3 of 3)",
    ]


def test_a_second_attempt_starts_afresh(server, tmp_path):
    server.plan = ["cut late"]

    def log(_):
        server.content = b"a shorter file\n"

    download(Remote(server.url), tmp_path / "names.txt", log, QUICK)
    assert (tmp_path / "names.txt").read_bytes() == server.content == b"a shorter file\n"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cut", "the connection broke off or fell silent|cut off after 1,000 of 80,000"),
        ("stall", "the connection broke off or fell silent"),
        ("cut, no length", "cut off after 1,000 of 80,000 bytes"),
        ("silent", "no answer within 0.3 s"),
        ("503", "the server answered 503 Service Unavailable"),
    ],
)
def test_a_lasting_fault_is_named_and_leaves_nothing(server, tmp_path, fault, said):
    server.plan = [fault] * 3
    with pytest.raises(DownloadError, match=said) as caught:
        download(server.remote(), tmp_path / "names.txt", lambda _: None, QUICK)
    assert str(caught.value).startswith(server.url)
    assert "(attempt 3 of 3)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_missing_file_is_not_asked_for_twice(server, tmp_path):
    server.plan = ["404"]
    with pytest.raises(DownloadError, match="the server answered 404 Not Found: check the address"):
        download(server.remote(), tmp_path / "names.txt", pytest.fail, QUICK)
    assert server.served == ["404"]
    assert names(tmp_path) == []


def test_a_wrong_checksum_is_kept_aside(server, tmp_path):
    target = tmp_path / "names.txt"
    with pytest.raises(DownloadError) as caught:
        download(server.remote("0" * 64), target, pytest.fail, QUICK)
    for part in ("wrong checksum", SHA256, "0" * 64, "80,000 bytes", "names.txt.bad"):
        assert part in str(caught.value)
    assert names(tmp_path) == ["names.txt.bad"]
    assert (tmp_path / "names.txt.bad").read_bytes() == CONTENT


def test_a_failed_download_leaves_the_old_file(server, tmp_path):
    target = tmp_path / "names.txt"
    target.write_bytes(b"old")
    server.plan = ["404"]
    with pytest.raises(DownloadError):
        download(server.remote(), target, pytest.fail, QUICK)
    assert target.read_bytes() == b"old"


def test_nobody_listening(server, tmp_path):
    unused = "http://127.0.0.1:9/names.txt"
    with pytest.raises(DownloadError, match=f"^{unused}: cannot be reached"):
        download(Remote(unused), tmp_path / "names.txt", lambda _: None, QUICK)


def test_an_impossible_address(tmp_path):
    with pytest.raises(DownloadError, match="http://"):
        download(Remote("http://"), tmp_path / "names.txt", pytest.fail, QUICK)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written"):
        download(server.remote(), tmp_path / "file" / "names.txt", pytest.fail, QUICK)


def test_a_full_disk(server, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpu_microgpt.data.download.os.fsync", full)
    with pytest.raises(DownloadError, match=r"names.txt: cannot be written: No space left"):
        download(server.remote(), tmp_path / "names.txt", pytest.fail, QUICK)
    assert names(tmp_path) == []


def test_a_known_corpus_is_downloaded_once(server, cache, monkeypatch):
    monkeypatch.setitem(corpus.KNOWN, "names", server.remote())
    lines = []
    loaded = load_corpus(DataConfig(source="names"), log=lines.append)
    again = load_corpus(DataConfig(source="names"), log=pytest.fail)
    assert loaded == again
    assert loaded.text.encode() == CONTENT
    assert (loaded.name, loaded.requested, loaded.sha256) == ("names", "names", SHA256)
    assert loaded.path == cache / "names.txt"
    assert lines == [f"downloading {server.url} to {cache / 'names.txt'}"]
    assert server.served == ["good"]


def test_a_damaged_cache_is_kept_aside_and_replaced(server, cache, monkeypatch):
    monkeypatch.setitem(corpus.KNOWN, "names", server.remote())
    cache.mkdir()
    (cache / "names.txt").write_bytes(CONTENT[:-1])
    lines = []
    load_corpus(DataConfig(source="names"), log=lines.append)
    assert names(cache) == ["names.txt", "names.txt.bad"]
    assert (cache / "names.txt.bad").read_bytes() == CONTENT[:-1]
    assert (cache / "names.txt").read_bytes() == CONTENT
    assert "wrong checksum: got 79,999 bytes" in lines[0]


@pytest.mark.parametrize("fault", ["404", "checksum"])
def test_the_fallback_is_one_loud_line(server, cache, monkeypatch, fault):
    server.plan = ["404"] if fault == "404" else []
    monkeypatch.setitem(corpus.KNOWN, "names", server.remote("0" * 64))
    data = DataConfig(source="names", fallback="stdlib-words")
    lines = []
    loaded = load_corpus(data, log=lines.append)
    assert (loaded.name, loaded.requested) == ("stdlib-words", "names")
    warnings = [line for line in lines if "WARNING" in line]
    assert len(warnings) == 1
    assert server.url in warnings[0]
    assert "fallback corpus 'stdlib-words'" in warnings[0]


def test_no_fallback_is_an_error(server, cache, monkeypatch):
    server.plan = ["404"]
    monkeypatch.setitem(corpus.KNOWN, "names", server.remote())
    with pytest.raises(DataError, match="404 Not Found"):
        load_corpus(DataConfig(source="names"), log=lambda _: None)


def test_an_url_is_kept_in_the_cache(server, cache):
    loaded = load_corpus(DataConfig(source=server.url), log=lambda _: None)
    assert loaded.text.encode() == CONTENT
    assert (loaded.name, loaded.sha256) == (server.url, SHA256)
    load_corpus(DataConfig(source=server.url), log=pytest.fail)
    other = load_corpus(DataConfig(source=server.url + "?v=2"), log=lambda _: None)
    assert other.path != loaded.path
    assert server.served == ["good", "good"]


def test_prepare_says_what_it_has(server, cache, monkeypatch):
    monkeypatch.setitem(corpus.KNOWN, "names", server.remote())
    lines = []
    prepared = prepare(["names", "stdlib"], log=lines.append)
    assert [one.name for one in prepared] == ["names", "stdlib"]
    assert f"names: 80,000 characters, sha256 {SHA256}, {cache / 'names.txt'}" in lines


def test_prepare_does_not_fall_back(server, cache, monkeypatch):
    server.plan = ["404"]
    monkeypatch.setitem(corpus.KNOWN, "names", server.remote())
    with pytest.raises(DataError, match="404"):
        prepare(["names"], log=lambda _: None)
