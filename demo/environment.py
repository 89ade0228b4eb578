"""The first import of every demo: finds the library, or says what to do where its packages are missing.

It imports only what Python itself brings, because a demo outside its environment has nothing else.
"""

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # in case the package is not installed

missing = [name for name in ("numpy", "PIL", "torch", "huggingface_hub") if find_spec(name) is None]
if missing:
    print(
        f"{', '.join(missing)}: not installed for {sys.executable}; activate the environment that make demo "
        f"has made, source {ROOT}/.venv/bin/activate, or install here, pip install -e {ROOT}",
        file=sys.stderr,
    )
    sys.exit(2)

import util  # noqa: E402, F401  before torch, see util/threads.py

logging.basicConfig(format="%(message)s")
logging.getLogger("models").setLevel(logging.INFO)  # threads and dtype
