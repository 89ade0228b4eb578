"""Downloads from a server on this machine that misbehaves in many ways."""

import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import hostile
import pytest
import torch

from models import fractalgen
from util import checkpoint, download
from util.errors import UserError

NAME = "fractalar_in64"
pytestmark = pytest.mark.filterwarnings("ignore:.*pickle protocol")


def weights(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.full((5000,), float(value))}}, buffer)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `content`. The other attributes say how it misbehaves."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.kind = weights(1), '"first"', "application/octet-stream"
        self.knows_ranges = self.knows_if_range = self.says_length = True
        self.cuts: list[int] = []  # the next answers break off after so many bytes
        self.codes: list[int] = []  # the next answers have these statuses
        self.asked: list[str | None] = []  # the Range header of each request so far
        self.on_answer = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/moved"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if self.path == "/moved":  # as Dropbox does
            self.send_response(302)
            self.send_header("Location", "/file")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        span = self.headers["Range"]
        server.asked.append(span)
        server.on_answer()
        if server.codes:
            return self.send_error(server.codes.pop(0))
        begin = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and server.knows_ranges else 0
        if server.knows_if_range and self.headers["If-Range"] != server.tag:
            begin = 0
        if begin >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", server.kind)
        if server.tag:
            self.send_header("ETag", server.tag)
        if begin:
            self.send_header(
                "Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}"
            )
        if server.says_length:
            self.send_header("Content-Length", str(len(server.content) - begin))
        self.end_headers()
        end = begin + server.cuts.pop(0) if server.cuts else None
        self.wfile.write(server.content[begin:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine in place of the addresses of all official weights."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(download, "FILES", dict.fromkeys(download.FILES, server.url))
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def files(tmp_path) -> set[str]:
    return {file.name for file in (tmp_path / "pretrained_models" / NAME).iterdir()} - {
        "checkpoint-last.pth.lock"
    }


def value(path) -> float:
    return checkpoint.load(path)["model"]["w"][-1].item()


@pytest.mark.parametrize("name", download.FILES)
def test_each_published_function_fetches_its_model(name, server):
    assert name in fractalgen.PRESETS
    path = getattr(download, f"download_pretrained_{name}")(overwrite=False)
    assert str(path) == f"pretrained_models/{name}/checkpoint-last.pth"
    assert value(path) == 1


def test_weights_that_are_there_are_kept_unless_overwritten(server, tmp_path):
    download.download(NAME)
    server.content = weights(0)
    assert value(download.download(NAME)) == 1
    assert value(download.download(NAME, overwrite=True)) == 0
    assert files(tmp_path) == {"checkpoint-last.pth"}


def test_a_broken_transfer_goes_on_where_it_broke_off(server, tmp_path):
    server.cuts = [5000, 700]
    assert value(download.download(NAME)) == 1
    assert server.asked == [None, "bytes=5000-", "bytes=5700-"]
    assert files(tmp_path) == {"checkpoint-last.pth"}


def test_a_later_call_goes_on_with_what_is_kept(server, tmp_path):
    server.cuts, server.codes = [5000], []
    server.on_answer = lambda: server.codes.extend([503] if len(server.asked) > 1 else [])
    with pytest.raises(
        UserError, match=r"503.*; 5000 bytes are kept and the next call goes on .* fetch it by other means as"
    ):
        download.download(NAME)
    assert len(server.asked) == download.MAX_TRIES
    assert files(tmp_path) == {"checkpoint-last.pth.part", "checkpoint-last.pth.part.etag"}
    server.on_answer = lambda: None
    assert value(download.download(NAME)) == 1
    assert server.asked[-1] == "bytes=5000-"


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_two_versions_are_never_mixed(server, knows_if_range, tmp_path):
    """The file changes after half of it has come. Some servers ignore If-Range and send the rest of the new file."""
    server.cuts, server.knows_if_range = [5000], knows_if_range

    def change():
        if len(server.asked) == 2:
            server.content, server.tag = weights(2), '"second"'

    server.on_answer = change
    path = download.download(NAME)
    assert path.read_bytes() == weights(2)
    assert files(tmp_path) == {"checkpoint-last.pth"}


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_strong_tag_it_starts_again(server, tag):
    server.tag, server.cuts, server.knows_if_range = tag, [5000], False
    assert download.download(NAME).read_bytes() == weights(1)
    assert server.asked == [None, None]


def test_a_server_without_ranges_sends_it_all_again(server):
    server.knows_ranges, server.cuts = False, [5000, 100]
    assert download.download(NAME).read_bytes() == weights(1)
    assert server.asked == [None, "bytes=5000-", "bytes=100-"]


def test_a_part_longer_than_the_file_starts_again(server, tmp_path):
    part = tmp_path / "pretrained_models" / NAME / "checkpoint-last.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(10**6))
    download._version(part).write_text(server.tag)
    assert download.download(NAME).read_bytes() == weights(1)
    assert server.asked == ["bytes=1000000-", None]


def test_a_length_that_is_never_reached_is_an_error(server, tmp_path):
    server.knows_ranges, server.cuts = False, [5000] * 9
    with pytest.raises(UserError, match=rf"broke off after 5000 of {len(server.content)} bytes"):
        download.download(NAME)
    assert "checkpoint-last.pth" not in files(tmp_path)


def test_a_web_page_does_not_cost_what_is_kept(server, tmp_path):
    server.cuts = [5000]
    server.on_answer = lambda: setattr(
        server, "kind", "text/html" if len(server.asked) == 2 else "application/zip"
    )
    assert value(download.download(NAME)) == 1
    assert server.asked == [None, "bytes=5000-", "bytes=5000-"]


@pytest.mark.parametrize("says_length", [True, False])
@pytest.mark.parametrize("content", [b"busy", weights(1)[:-100]], ids=["a page", "cut short"])
def test_what_is_no_checkpoint_never_gets_the_name_and_is_not_kept(server, content, says_length, tmp_path):
    server.content, server.says_length = content, says_length
    with pytest.raises(UserError, match="what came is no checkpoint and is not kept") as error:
        download.download(NAME)
    assert str(error.value).isprintable()
    assert files(tmp_path) == set()


@pytest.mark.parametrize("kind", hostile.RUNS_CODE)
def test_a_hostile_file_is_refused_and_not_kept(kind, server, tmp_path):
    hostile.RUNS_CODE[kind](tmp_path / "hostile", tmp_path / "canary")
    server.content = (tmp_path / "hostile").read_bytes()
    with pytest.raises(UserError, match=r"^http://127.*what came is no checkpoint and is not kept"):
        download.download(NAME)
    assert files(tmp_path) == set()
    assert not (tmp_path / "canary").exists()


def test_a_server_that_refuses_is_asked_once(server):
    server.codes = [404]
    with pytest.raises(
        UserError,
        match=r"cannot be fetched \(HTTP Error 404.*\); fetch it by other means as pretrained_models",
    ):
        download.download(NAME)
    assert len(server.asked) == 1


def test_processes_that_all_want_it_fetch_it_once(server):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(download.download, [NAME] * 4))) == 1
    assert len(server.asked) == 1


def test_a_model_without_official_weights_is_an_error():
    with pytest.raises(UserError, match="no official weights for 'x'; there are some for fractalar_in64"):
        download.download("x")
