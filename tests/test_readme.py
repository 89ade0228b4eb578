"""Every command and snippet of the README is one that works: flags and names exist, files are where it says."""

import argparse
import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import main_fractalgen
from models import fractalgen
from models.hub import zoo
from models.hub.classes import find_class
from util.dist import World

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


def commands() -> list[str]:
    """One line each, without comments, launchers before main_fractalgen.py, and trailing words that stand for more."""
    inline = re.findall(r"`(python [^`]+)`", README)
    lines = "\n".join([*blocks("bash"), *inline]).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


OURS = sorted(
    {line for line in commands() if re.search(r"main_fractalgen\.py|python demo/|-m (models|util)\.", line)}
)
OTHERS = (
    r"^(make (demo|test)|curl|ADM=|trap|export|wait|pip install|pytest|python -m pytest|python tests/bench)"
)


def test_there_is_no_other_kind_of_command():
    assert len(OURS) > 20
    assert [line for line in commands() if line not in OURS and not re.match(OTHERS, line)] == []


@pytest.mark.parametrize("command", [line for line in OURS if "main_fractalgen.py" in line])
def test_flags_of_the_main_command_resolve(command):
    flags = shlex.split(command.split("main_fractalgen.py")[1].removesuffix("&").removesuffix("..."))
    parser = main_fractalgen.get_args_parser(
        "", tuple(fractalgen.PRESETS), main_fractalgen.SCHEDULES, ("cosine", "constant")
    )
    args = parser.parse_args([*flags, "--device", "cpu"])
    main_fractalgen.resolve(args, World())
    assert len(args.num_iter_list) == len(fractalgen.PRESETS[args.model].steps)


class Parsed(Exception):
    """Raised with what a command's parser made of its words, in place of the work."""


@pytest.mark.parametrize("command", [line for line in OURS if "main_fractalgen.py" not in line])
def test_other_commands_are_understood_and_know_the_classes_they_name(command, monkeypatch):
    words = shlex.split(command)
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    at = next(i for i, word in enumerate(words) if word.startswith(("models.", "util.", "demo/")))
    module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None, namespace=None):
        raise Parsed(parse(parser, arguments, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[at:])
    with pytest.raises(Parsed) as parsed:
        module.main()
    args = vars(parsed.value.args[0])
    if args.get("model") == str(zoo.BUNDLED):
        model = json.loads((zoo.BUNDLED / "config.json").read_text())
        for said in (
            [args["label"]] if args.get("label") else args["classes"] if words[at] == "demo/sample.py" else []
        ):
            find_class(said, model["class_names"], model["class_num"])


def test_snippets_are_python_and_name_what_exists():
    for block in blocks("python"):
        ast.parse(block)
        for module, names in re.findall(r"^from (\S+) import ([^#\n]+)", block, re.MULTILINE):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()) or importlib.import_module(
                    f"{module}.{name.strip()}"
                )
        for method in re.findall(r"\bmodel\.(\w+)\(", block):
            assert hasattr(fractalgen.FractalGen, method)


def test_files_that_it_names_are_there():
    assert [
        path for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README) if not (ROOT / path).exists()
    ] == []
    listing = next(block for block in blocks("") if "main_fractalgen.py" in block)
    listed = re.findall(r"^(\S+\.(?:py|ipynb))", listing, re.MULTILINE)
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_every_module_has_its_line():
    listing = next(block for block in blocks("") if "main_fractalgen.py" in block)
    modules = [path for folder in (".", "models", "util", "demo") for path in (ROOT / folder).glob("*.py")]
    begun = {line.split()[0] for line in listing.splitlines() if line}
    assert [
        path for path in modules if path.stem != "__init__" and str(path.relative_to(ROOT)) not in begun
    ] == []
