"""The official weights, fetched into pretrained_models/<name>/checkpoint-last.pth."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import torch

from util.checkpoint import NAME
from util.errors import UserError

FILES = {  # model: its file's identifier and key
    "fractalar_in64": ("n25tbij7aqkwo1ypqhz72", "2czevgex3ocg2ae8zde3xpb3f"),
    "fractalmar_in64": ("lh7fmv48pusujd6m4kcdn", "huihey61ok32h28o3tbbq6ek9"),
    "fractalmar_base_in256": ("zrdm7853ih4tcv98wmzhe", "htq9yuzovet7d6ioa64s1xxd0"),
    "fractalmar_large_in256": ("y1k05xx7ry8521ckxkqgt", "wolq4krdq7z7eyjnaw5ndhq6k"),
    "fractalmar_huge_in256": ("t2rru8xr6wm23yvxskpww", "dn9ss9zw4zsnckf6bat9hss6h"),
}
URLS = {name: f"https://www.dropbox.com/scl/fi/{file}/{NAME}?rlkey={key}&dl=1" for name, (file, key) in FILES.items()}


def download(name: str, overwrite: bool = False, folder: str | Path = "pretrained_models") -> Path:
    """Fetches the weights of model `name`, unless they are there; returns the file's path.

    The file gets its name only when it is whole. Raises UserError where it cannot be had or is no checkpoint.
    """
    if name not in URLS:
        raise UserError(f"no official weights for {name!r}; there are some for {', '.join(URLS)}")
    path = Path(folder) / name / NAME
    if path.exists() and not overwrite:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = path.with_name(NAME + ".arriving")
    try:
        torch.hub.download_url_to_file(URLS[name], str(arriving))
        if not zipfile.is_zipfile(arriving):
            raise UserError(f"{URLS[name]}: what came is no checkpoint (cut short, or a web page); try again later")
        arriving.replace(path)
    except (URLError, OSError) as error:
        raise UserError(f"{URLS[name]}: cannot be fetched ({error}); fetch it by other means as {path}") from error
    finally:
        arriving.unlink(missing_ok=True)
    return path


def _named(name: str) -> Callable[..., Path]:
    def fetch(overwrite: bool = False) -> Path:
        return download(name, overwrite)

    fetch.__name__, fetch.__doc__ = f"download_pretrained_{name}", f"download({name!r}, overwrite)."
    return fetch


download_pretrained_fractalar_in64 = _named("fractalar_in64")
download_pretrained_fractalmar_in64 = _named("fractalmar_in64")
download_pretrained_fractalmar_base_in256 = _named("fractalmar_base_in256")
download_pretrained_fractalmar_large_in256 = _named("fractalmar_large_in256")
download_pretrained_fractalmar_huge_in256 = _named("fractalmar_huge_in256")
