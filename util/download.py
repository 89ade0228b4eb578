"""The official weights, fetched into pretrained_models/<name>/checkpoint-last.pth."""

import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from util import checkpoint
from util.checkpoint import NAME
from util.errors import UserError, one_line
from util.files import atomic_write, sha256

TRIES, PAUSE, TIMEOUT = (
    5,
    2.0,
    60.0,
)  # tries without progress; seconds between two, and until a silent server is given up
CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file to fetch. Its size in bytes and its SHA-256, in hex, are checked where they are known."""

    url: str
    size: int | None = None
    sha256: str | None = None


def _dropbox(file: str, key: str) -> Published:
    return Published(f"https://www.dropbox.com/scl/fi/{file}/{NAME}?rlkey={key}&dl=1")


FILES = {  # sizes and hashes have not been published
    "fractalar_in64": _dropbox("n25tbij7aqkwo1ypqhz72", "2czevgex3ocg2ae8zde3xpb3f"),
    "fractalmar_in64": _dropbox("lh7fmv48pusujd6m4kcdn", "huihey61ok32h28o3tbbq6ek9"),
    "fractalmar_base_in256": _dropbox("zrdm7853ih4tcv98wmzhe", "htq9yuzovet7d6ioa64s1xxd0"),
    "fractalmar_large_in256": _dropbox("y1k05xx7ry8521ckxkqgt", "wolq4krdq7z7eyjnaw5ndhq6k"),
    "fractalmar_huge_in256": _dropbox("t2rru8xr6wm23yvxskpww", "dn9ss9zw4zsnckf6bat9hss6h"),
}


def download(name: str, overwrite: bool = False, folder: str | Path = "pretrained_models") -> Path:
    """Fetches the weights of model `name`, unless they are there; returns the file's path.

    The file gets its name only when it is whole and a checkpoint. Of a transfer that broke off the part is kept, and the
    next call goes on from there. Raises UserError where the file cannot be had or is not what it should be.
    """
    if name not in FILES:
        raise UserError(f"no official weights for {name!r}; there are some for {', '.join(FILES)}")
    path, published = Path(folder) / name / NAME, FILES[name]
    if path.exists() and not overwrite:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{NAME}.lock")):  # processes of one job may all call this
        if path.exists() and not overwrite:
            return path  # another one has fetched it meanwhile
        part = path.with_name(f"{NAME}.part")
        try:
            fetch(published.url, part, published.size)
        except (URLError, HTTPException, OSError) as error:
            kept = (
                f"{_size(part)} bytes are kept and the next call goes on from there; or "
                if _version(part).exists()
                else ""
            )
            raise UserError(
                f"{published.url}: cannot be fetched ({one_line(error)}); {kept}fetch it by other means as {path}"
            ) from error
        try:
            _check(part, published)
        except UserError:
            _forget(part)
            raise
        with atomic_write(path) as temporary:
            part.replace(temporary)
        _forget(part)
    return path


def fetch(url: str, part: Path, size: int | None = None) -> None:
    """Brings `part` to the whole of `url` (`size` bytes, if that is known), going on from what is there of the same version.

    Raises OSError or HTTPException when the server refuses, or when TRIES attempts in a row brought nothing; UserError when
    it has a file of another size.
    """
    tries, most = 0, _size(part)
    while True:
        try:
            return _receive(url, part, size)
        except (URLError, ConnectionError, TimeoutError, HTTPException, ssl.SSLError) as error:
            if isinstance(error, HTTPError):
                if error.code == 416:  # what is kept is no beginning of what there is now
                    _forget(part)
                elif error.code < 500 and error.code not in (408, 429):
                    raise
            tries = 1 if _size(part) > most else tries + 1
            most = max(most, _size(part))
            if tries == TRIES:
                raise
            time.sleep(PAUSE)


def _receive(url: str, part: Path, size: int | None) -> None:
    """One request, from where `part` ends. The part's version (ETag) lies beside it, so that no two are ever mixed."""
    version = _version(part)
    have, tag = (_size(part), version.read_text()) if version.exists() else (0, "")
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
    with urlopen(
        Request(url, headers={"Accept-Encoding": "identity", **headers}), timeout=TIMEOUT
    ) as response:
        if response.headers.get_content_type() == "text/html":
            raise HTTPException("a web page came instead of the file")
        if response.status == 206:
            span = re.fullmatch(rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or response.headers.get("ETag", tag) != tag:
                _forget(part)
                raise HTTPException("asked for the rest of the file, another part came")
            total = int(span[1])
        else:  # from the start: the first request, another version, or a server that knows no ranges
            _forget(part)
            have, tag = 0, response.headers.get("ETag", "")
            if tag.startswith('"'):  # a weak one, W/"…", does not stand for the bytes
                version.write_text(tag)
            total = response.length
        if total is not None and size not in (None, total):
            raise UserError(f"{url}: has {total} bytes, the published file has {size}")
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise ConnectionError(f"broke off after {_size(part)} of {total} bytes")


def _check(part: Path, published: Published) -> None:
    """Raises UserError unless the file has its size and hash, where known, and loads as a checkpoint."""
    if published.size not in (None, _size(part)):
        raise UserError(f"{published.url}: {_size(part)} bytes came, the published file has {published.size}")
    if published.sha256 and (found := sha256(part)) != published.sha256:
        raise UserError(f"{published.url}: SHA-256 is {found}, of the published file {published.sha256}")
    try:
        checkpoint.load(part, mmap=True)
    except UserError as error:
        raise UserError(f"{published.url}: what came is no checkpoint and is not kept; {error}") from error


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _version(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version(part).unlink(missing_ok=True)


def _named(name: str) -> Callable[..., Path]:
    def fetch_it(overwrite: bool = False) -> Path:
        return download(name, overwrite)

    fetch_it.__name__, fetch_it.__doc__ = f"download_pretrained_{name}", f"download({name!r}, overwrite)."
    return fetch_it


download_pretrained_fractalar_in64 = _named("fractalar_in64")
download_pretrained_fractalmar_in64 = _named("fractalmar_in64")
download_pretrained_fractalmar_base_in256 = _named("fractalmar_base_in256")
download_pretrained_fractalmar_large_in256 = _named("fractalmar_large_in256")
download_pretrained_fractalmar_huge_in256 = _named("fractalmar_huge_in256")
