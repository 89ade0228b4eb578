"""What stands between the page and the network: the names that the page answers to, the requests that
somebody still waits for, and the uploads that are kept. ASGI middleware around Gradio."""

import asyncio
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse

GRACE = 3.0  # seconds within which who sends a request must begin to listen for the answer
MAX_UPLOADS = 16  # files on disk
MAX_ENDED = 4096  # moments that are remembered
REFUSED = (
    "Refused: the Host header is not an address of this page. Open the page by its address, or start it with "
    "--host NAME.\n"
)
# The streams in which a client gets its answers: of all events of a session, or of one event.
STREAM = re.compile(r".*(?:/queue/data|/call/(?:v2/)?[^/]+/(?P<event>[^/]+))/?")


def accepted_hosts(bound: str) -> Callable[[str], bool]:
    """Returns whether a Host header names the page, which is bound to the name or address `bound`.

    Without this check, a foreign site whose name is made to resolve to this machine (DNS rebinding) could use
    the page by way of a visitor's browser. Ports are not compared, because that of a tunnel may differ. If
    other machines can open the page, it also answers to this machine's own name and to every IP address,
    since rebinding needs a name.
    """
    bound = bound.lower()
    names = {"localhost", bound}
    local = bound == "localhost" or is_loopback(bound)
    if not local:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def accepts(header: str) -> bool:
        with suppress(ValueError):
            name = urlsplit(f"//{header}").hostname or ""
            return name in names or is_loopback(name) or (not local and bool(ip_address(name)))
        return False

    return accepts


def is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ip_address(address).is_loopback
    return False


def refuse_foreign_hosts(app: Callable, bound: str) -> Callable:
    """Wraps an ASGI application that is bound to `bound`, so that it answers to `accepted_hosts` only."""
    accepts = accepted_hosts(bound)

    async def run(scope, receive, send) -> None:
        if scope["type"] == "lifespan" or accepts(Headers(scope=scope).get("host", "")):
            await app(scope, receive, send)
        else:
            await PlainTextResponse(REFUSED, 400)(scope, receive, send)

    return run


class Visitors:
    """Knows which requests somebody still waits for.

    A client of Gradio posts a request to a queue, and then keeps a stream open until the answer has come in
    it. If the page is closed, or the client ends, the stream ends too.
    """

    def __init__(self):
        self.listening: Counter[str] = Counter()  # session -> number of streams that are open
        self.ended: dict[Hashable, float] = {}  # what was called off -> when

    def end(self, request, button: Hashable = None) -> None:
        """Calls off what the visitor has requested so far by a button; None: by any button.

        request  the `gradio.Request` that asks for it
        """
        key = request.session_hash, button
        self.ended.pop(key, None)
        self.ended[key] = time.monotonic()
        while len(self.ended) > MAX_ENDED:
            del self.ended[next(iter(self.ended))]

    def still_waits(self, request, button: Hashable = None) -> bool:
        """Says whether somebody still waits for the answer to a `gradio.Request` made by a button."""
        session, arrived = request.session_hash, request.request.state.arrived
        if any(self.ended.get((session, key), arrived) > arrived for key in (button, None)):
            return False
        return session in self.listening or time.monotonic() - arrived < GRACE

    def watch(self, app: Callable) -> Callable:
        """Wraps Gradio's ASGI application, to learn when requests arrive and when streams end."""

        async def run(scope, receive, send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            request = Request(scope)
            request.state.arrived = time.monotonic()
            if request.method == "GET" and (stream := STREAM.fullmatch(scope["path"])):
                return await self.listen(session_of(request, stream["event"]), app, scope, receive, send)
            await app(scope, receive, send)
            if scope["path"].endswith("/upload"):
                delete_old_uploads(request.app.get_blocks().upload_file_set)

        return run

    async def listen(self, session: str, app: Callable, scope, receive, send) -> None:
        """Runs a stream, and counts it as open until it ends or the client is gone."""

        async def wait_until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        def close(_) -> None:
            self.listening[session] -= 1
            if not self.listening[session]:
                del self.listening[session]

        self.listening[session] += 1
        gone = asyncio.ensure_future(wait_until_gone())
        gone.add_done_callback(close)
        try:
            await app(scope, receive, send)
        finally:
            gone.cancel()


def session_of(request: Request, event: str | None) -> str:
    """Returns the session of a stream. The stream of one event gives its id only, which Gradio looks up."""
    if event is None:
        return request.query_params.get("session_hash", "")
    found = request.app.get_blocks()._queue.event_ids_to_events.get(event)
    return event if found is None else found.session_hash


def delete_old_uploads(paths: set[str]) -> None:
    """Deletes all but the newest MAX_UPLOADS of the uploaded files `paths`, and drops them from the set."""
    times = {}
    for path in map(Path, list(paths)):
        with suppress(OSError):  # it was deleted after use
            times[path] = path.stat().st_mtime
    files = sorted(times, key=times.get)
    for path in files[:-MAX_UPLOADS]:
        delete_upload(path)
    paths.intersection_update(map(str, files[-MAX_UPLOADS:]))


def delete_upload(path: Path) -> None:
    """Deletes an uploaded file, and the folder that was made for it."""
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()
