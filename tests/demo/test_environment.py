"""A demo outside its environment says how to activate it, in one line and before it needs any package."""

import subprocess
import sys

import pytest

from conftest import ROOT

DEMOS = [path.name for path in sorted((ROOT / "demo").glob("*.py")) if "__main__" in path.read_text()]


def test_all_demos_are_covered():
    assert {
        "app.py",
        "classify.py",
        "digits.py",
        "edit.py",
        "emoji.py",
        "emoji_data.py",
        "likelihood.py",
    } < set(DEMOS)


@pytest.mark.parametrize("demo", DEMOS)
def test_a_demo_outside_the_environment_says_how_to_activate_it(demo):
    # -S leaves the installed packages out, -E the variable PYTHONPATH.
    command = [sys.executable, "-S", "-E", str(ROOT / "demo" / demo), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert (
        f"PIL, torch, huggingface_hub: not installed for {sys.executable}; activate the environment"
        in done.stderr
    )
    assert f"source {ROOT}/.venv/bin/activate" in done.stderr
