"""Who may use the page, what it still computes, and what it keeps: on disk, and in memory over 500 requests."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from conftest import ROOT

pytest.importorskip("gradio", reason="pip install -e '.[app]'")  # which brings Starlette
import app_server as server


@pytest.mark.parametrize(
    ("bound", "accepted", "refused"),
    [
        ("127.0.0.1", "127.0.0.1:7860 localhost LOCALHOST:8000 [::1]:7860", "evil.example 0.0.0.0 10.0.0.5:7860"),
        ("localhost", "127.0.0.1 localhost:7860", "evil.example localhost.evil.example 127.0.0.1.evil.example"),
        ("::1", "[::1]:7860 localhost", "[::2] evil.example [::1"),
        ("0.0.0.0", "10.0.0.5:7860 localhost [fe80::1] {hostname}:7860", "evil.example {hostname}.evil.example"),
        ("page.lan", "page.lan:7860 Page.lan 10.0.0.5", "evil.example page.lan.evil.example"),
    ],
)  # fmt: skip
def test_only_names_and_addresses_of_the_page_are_accepted(bound, accepted, refused):
    accepts = server.accepted_hosts(bound)
    accepted, refused = (text.format(hostname=socket.gethostname()).split() for text in (accepted, refused))
    assert [host for host in accepted if not accepts(host)] == []
    assert [host for host in ["", ":", *refused] if accepts(host)] == []


def test_a_request_is_waited_for_until_its_stream_ends_or_it_is_called_off(monkeypatch):
    now = 100.0
    monkeypatch.setattr(server.time, "monotonic", lambda: now)
    visitors = server.Visitors()

    def request(session: str):
        return SimpleNamespace(
            session_hash=session, request=SimpleNamespace(state=SimpleNamespace(arrived=now))
        )

    first, other = request("a"), request("b")
    assert visitors.still_waits(first, "draw")
    now += server.GRACE + 1
    assert not visitors.still_waits(first, "draw")  # nobody listens yet
    visitors.listening.update("ab")
    assert visitors.still_waits(first, "draw")
    visitors.end(first, "draw")  # the button is pressed again
    assert not visitors.still_waits(first, "draw")
    assert visitors.still_waits(first, "edit")
    assert visitors.still_waits(other, "draw")
    now += 1
    second = request("a")
    assert visitors.still_waits(second, "draw")
    now += 1
    visitors.end(second)  # Stop
    assert not visitors.still_waits(second, "draw")
    for number in range(server.MAX_ENDED + 5):
        visitors.end(request(str(number)))
    assert len(visitors.ended) == server.MAX_ENDED


def test_the_oldest_uploads_are_deleted(tmp_path):
    paths = [tmp_path / str(number) / "image.png" for number in range(server.MAX_UPLOADS + 3)]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    known = {str(path) for path in paths} | {str(tmp_path / "deleted before")}
    server.delete_old_uploads(known)
    assert len(list(tmp_path.iterdir())) == len(known) == server.MAX_UPLOADS
    assert all(Path(path).is_file() for path in known)


def use(address: str, number: int, image: Path) -> None:
    """Uses a page as one visitor does: uploads, looks, edits, draws, and computes likelihoods."""
    from gradio_client import Client, handle_file

    steps, client = (2, 2), Client(address, verbose=False)
    client.predict(handle_file(image), api_name="/upload")
    for turn in range(3):
        seed = 10 * number + turn
        client.predict(seed % 9, 1 + turn, seed, 1.5, 1.7, *steps, api_name="/generate")
        box = (turn, 4, 8, 8 + turn)
        repaint = (None, "Repaint it", True, *box, 1, 1, seed, 1.5, 1.7, *steps)
        client.predict(*repaint, api_name="/edit")
    client.predict(1, 1, api_name="/likelihood")
    client.predict([0, 1], 1, api_name="/posterior")
    client.predict(3, 4, api_name="/look")
    client.close()


REQUESTS = 10  # of `use`


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_the_memory_stays_flat_over_500_requests(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "demo/app.py", "--device", "cpu", "--port", str(port)]
    page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def mebibytes() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{page.pid}/status").read_text())[1]) // 1024

    def wait_for_page() -> None:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)

    image, curve = tmp_path / "image.png", {}
    print("\n| requests | MiB |\n|---|---|")
    try:
        wait_for_page()
        for number in range(500 // REQUESTS):
            Image.effect_noise((64, 64), 50 + number).convert("RGB").save(image)
            use(f"http://127.0.0.1:{port}", number, image)
            done = REQUESTS * (number + 1)
            curve[done] = mebibytes()
            print(f"| {done} | {curve[done]} |", flush=True)
    finally:
        page.terminate()
        page.wait(60)
    assert max(size for n, size in curve.items() if n > 50) < 1.05 * curve[50]
