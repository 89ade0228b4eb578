"""Fetches the official weights into pretrained_models/<name>/checkpoint-last.pth."""

import re
import ssl
import time
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from util import checkpoint
from util.errors import UserError, one_line
from util.files import atomic_write

MAX_TRIES = 5  # attempts in a row that bring no new byte
PAUSE = 2.0  # seconds between two attempts
TIMEOUT = 60.0  # seconds until a silent server is given up
CHUNK = 1 << 20  # bytes


def _dropbox(file: str, key: str) -> str:
    return f"https://www.dropbox.com/scl/fi/{file}/{checkpoint.NAME}?rlkey={key}&dl=1"


FILES = {  # no sizes or hashes are published for these
    "fractalar_in64": _dropbox("n25tbij7aqkwo1ypqhz72", "2czevgex3ocg2ae8zde3xpb3f"),
    "fractalmar_in64": _dropbox("lh7fmv48pusujd6m4kcdn", "huihey61ok32h28o3tbbq6ek9"),
    "fractalmar_base_in256": _dropbox("zrdm7853ih4tcv98wmzhe", "htq9yuzovet7d6ioa64s1xxd0"),
    "fractalmar_large_in256": _dropbox("y1k05xx7ry8521ckxkqgt", "wolq4krdq7z7eyjnaw5ndhq6k"),
    "fractalmar_huge_in256": _dropbox("t2rru8xr6wm23yvxskpww", "dn9ss9zw4zsnckf6bat9hss6h"),
}


def download(name: str, overwrite: bool = False) -> Path:
    """Fetches the official weights of model `name`, unless they are already there. Returns the file's path.

    The file gets its name only when it is complete and loads as a checkpoint. If a transfer breaks off, the
    part is kept and the next call continues from there. Raises UserError if the file cannot be fetched or is
    not a checkpoint.
    """
    if name not in FILES:
        raise UserError(f"no official weights for {name!r}; there are some for {', '.join(FILES)}")
    path, url = Path("pretrained_models") / name / checkpoint.NAME, FILES[name]
    if path.exists() and not overwrite:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{checkpoint.NAME}.lock")):  # all processes of a job may call this at once
        if path.exists() and not overwrite:
            return path  # another process has fetched it in the meantime
        part = path.with_name(f"{checkpoint.NAME}.part")
        try:
            fetch(url, part)
        except (HTTPException, OSError) as error:
            kept = ""
            if _version(part).exists():
                kept = f"{_size(part)} bytes are kept and the next call goes on from there; or "
            raise UserError(
                f"{url}: cannot be fetched ({one_line(error)}); {kept}fetch it by other means as {path}"
            ) from error
        try:
            checkpoint.load(part, mmap=True)
        except UserError as error:
            _forget(part)
            raise UserError(f"{url}: what came is no checkpoint and is not kept; {error}") from error
        with atomic_write(path) as temporary:
            part.replace(temporary)
        _forget(part)
    return path


def fetch(url: str, part: Path) -> None:
    """Downloads `url` to the file `part`, continuing from what is there of the same version.

    Raises OSError or HTTPException if the server refuses, or if MAX_TRIES attempts in a row brought nothing
    new.
    """
    tries, most = 0, _size(part)
    while True:
        try:
            return _receive(url, part)
        except (URLError, ConnectionError, TimeoutError, HTTPException, ssl.SSLError) as error:
            code = getattr(error, "code", 500)  # an HTTPError's status
            if code == 416:  # the part does not fit the file that the server has now
                _forget(part)
            elif code < 500 and code not in (408, 429):
                raise
            tries = 1 if _size(part) > most else tries + 1
            most = max(most, _size(part))
            if tries == MAX_TRIES:
                raise
            time.sleep(PAUSE)


def _receive(url: str, part: Path) -> None:
    """Makes one request, from the end of `part` on.

    A file beside `part` keeps the version (ETag) it belongs to, so that two versions are never mixed.
    """
    version = _version(part)
    have, tag = (_size(part), version.read_text()) if version.exists() else (0, "")
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html":
            raise HTTPException("a web page came instead of the file")
        if response.status == 206:
            span = re.fullmatch(rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or response.headers.get("ETag", tag) != tag:
                _forget(part)
                raise HTTPException("asked for the rest of the file, another part came")
            total = int(span[1])
        else:  # the whole file: first request, another version, or a server that cannot send parts
            _forget(part)
            have, tag = 0, response.headers.get("ETag", "")
            if tag.startswith('"'):  # a weak tag, W/"…", does not guarantee the same bytes
                version.write_text(tag)
            total = response.length
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise ConnectionError(f"broke off after {_size(part)} of {total} bytes")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _version(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version(part).unlink(missing_ok=True)


# The published names. Each takes `overwrite`.
download_pretrained_fractalar_in64 = partial(download, "fractalar_in64")
download_pretrained_fractalmar_in64 = partial(download, "fractalmar_in64")
download_pretrained_fractalmar_base_in256 = partial(download, "fractalmar_base_in256")
download_pretrained_fractalmar_large_in256 = partial(download, "fractalmar_large_in256")
download_pretrained_fractalmar_huge_in256 = partial(download, "fractalmar_huge_in256")
