"""Commands, snippets, links and citations in README.md and docs/ work, and the pages are not too long."""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

import main_fractalgen
from demo import edit, sample
from models.fractalgen import FractalGen
from models.hub import zoo
from models.hub.presets import CHOSEN, find_preset
from models.sampling.guidance import Guidance
from models.sampling.labels import find_class
from models.sampling.options import SamplingOptions
from util.flags import TEMPERATURE

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("models", "evaluation", "util", "demo", "docs", "tests")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
TEXTS = {**PAGES, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
FORMAT_TITLES = (
    "Presets", "Weight names", "Class conditions and levels", "AR levels", "MAR levels", "The RGB head",
    "Sampling", "Training recipe", "Published names and flags", "Reference numbers", "Where the code is",
)  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one page in `language`."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


def commands() -> list[str]:
    """Every command of all pages, in one line each and without comments."""
    found = []
    for page, text in PAGES.items():
        inline = [" ".join(code.split()) for code in re.findall(r"`((?:python|pip|make) [^`]+)`", text)]
        lines = "\n".join([*blocks(page, "bash"), *inline]).replace("\\\n", " ").splitlines()
        found += [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return sorted(set(found))


OURS = [
    line
    for line in commands()
    if re.search(r"main_fractalgen\.py|python (demo|tests)/\w+\.py|-m (models|evaluation|util)\.", line)
]
MAIN = [line for line in OURS if "main_fractalgen.py" in line]
OTHERS = r"(make (demo|test|bench|speedrun|gpu)|source \.venv/bin/activate|pip install|python -m (pytest|pydoc)|curl|ADM=|trap|export|wait)\b"


def test_every_command_is_ours_or_a_known_program_of_others():
    assert len(OURS) > 30
    assert [line for line in commands() if line not in OURS and not re.match(OTHERS, line)] == []


@pytest.mark.parametrize("command", MAIN)
def test_flags_of_the_main_command_resolve(command, monkeypatch, capsys):
    """`--dry_run` parses the flags, fills in defaults and builds the model without its weights."""
    flags = shlex.split(command.split("main_fractalgen.py")[1].removesuffix("&"))
    report = {"training_gib_in_float32": {"largest peak": math.inf}}  # so no step is measured
    monkeypatch.setattr(main_fractalgen, "cost_report", lambda *args, **kwargs: report)
    main_fractalgen.main([*flags, "--device", "cpu", "--dry_run"])
    settings = json.loads(capsys.readouterr().out)["settings"]
    preset = find_preset(settings["model"], **{name: settings[name] for name in CHOSEN})
    assert settings["num_iter_list"] == list(preset.steps)  # also where the flag is given


class Parsed(Exception):
    """Raised with the parsed arguments of a command, instead of the command's work."""


@pytest.mark.parametrize("command", [line for line in OURS if line not in MAIN])
def test_flags_of_other_commands_parse_and_their_classes_exist(command, monkeypatch):
    words = shlex.split(command)
    at = next(
        i for i, word in enumerate(words) if re.match(r"(models|evaluation|util)\.|(demo|tests)/", word)
    )
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    if words[at].endswith(".py"):
        assert (ROOT / words[at]).exists()
        module = importlib.import_module(Path(words[at]).stem)
    else:
        module = importlib.import_module(words[at])
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None, namespace=None):
        raise Parsed(parse(parser, arguments, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[at:])
    with pytest.raises(Parsed) as parsed:
        module.main()
    args = vars(parsed.value.args[0])
    if args.get("model") in zoo.names():
        config = json.loads((zoo.BUNDLED[args["model"]] / "config.json").read_text())
        names = args["classes"] if words[at] == "demo/sample.py" else [args.get("label")]
        for name in filter(None, names or ()):
            find_class(name, config["class_names"], config["class_num"])


@pytest.mark.parametrize("page", PAGES)
def test_snippets_compile_and_what_they_name_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")
        for name in re.findall(r"\bmodel\.(\w+)\(", block):
            assert hasattr(FractalGen, name) or name in ("class_emb",), name


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """With a smaller untrained model in the place of the bundled one, which takes a minute."""
    model = FractalGen(
        (32, 4, 1), (16, 16, 16), (1, 1, 1), (2, 2, 2), ("mar", "mar", "ar"), class_num=2, num_conds=5
    ).eval()
    model.class_names = ("face", "heart")
    monkeypatch.setattr(zoo, "load", lambda name: model)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md", "python")
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "face.png").exists()
    assert len(names["edited"]) == 4
    assert names["bits"].shape == (1, 32, 32)


def test_one_sentence_says_what_the_temperature_does_wherever_it_is_explained():
    """It is the reverse of other libraries."""
    texts = [SamplingOptions.__doc__, Guidance.__doc__, FractalGen.sample.__doc__]
    texts += [sample.get_parser().format_help(), edit.get_parser().format_help()]
    texts += [main_fractalgen.get_args_parser("", (), (), ()).format_help()]
    texts += [PAGES["docs/sampling.md"], PAGES["docs/format.md"], PAGES["docs/evaluation.md"]]
    texts += [(ROOT / "demo" / "emoji_model" / "README.md").read_text(encoding="utf-8")]
    for text in texts:
        assert TEMPERATURE in " ".join(text.split())


def headings(text: str) -> list[str]:
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", outside, re.MULTILINE)


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_links_images_and_anchors_exist(page):
    here, broken = ROOT / page, []
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        file = here.parent / path if path else here
        found = file.exists()
        if found and fragment:
            found = fragment in map(anchor, headings(file.read_text(encoding="utf-8")))
        if not found:
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page):
    pattern = rf"`((?:{'|'.join(FOLDERS)})/[\w./]+\.\w+)`"
    assert [path for path in re.findall(pattern, TEXTS[page]) if not (ROOT / path).exists()] == []


def test_every_page_of_docs_can_be_reached_from_the_readme():
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in PAGES["README.md"]] == []


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert len(PAGES["README.md"].split()) <= 1500


@pytest.mark.parametrize("page", TEXTS)
def test_lines_and_table_rows_have_at_most_110_characters(page):
    lines = TEXTS[page].splitlines()
    assert [(number, line) for number, line in enumerate(lines, 1) if len(line) > 110] == []


def test_format_has_its_sections():
    found = headings(PAGES["docs/format.md"])
    assert [title for title in FORMAT_TITLES if title not in found] == []


def test_citations_of_the_format_name_a_section_or_an_equation():
    titles = headings(PAGES["docs/format.md"])
    equations = re.findall(r"\\tag\{(F\d+)\}", PAGES["docs/format.md"])
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.*"))
    wrong = []
    for path in files:
        if path.suffix not in (".py", ".md", ".ipynb", ".toml") or path == Path(__file__).resolve():
            continue
        text = re.sub(r"\s+(?:# )?", " ", path.read_text(encoding="utf-8")).replace('\\"', '"')
        wrong += [
            f"{path}: {title}"
            for title in re.findall(r'docs/format\.md, "([^"]+)"', text)
            if title not in titles
        ]
        wrong += [f"{path}: {name}" for name in re.findall(r"\((F\d+)\)", text) if name not in equations]
    assert wrong == []


def test_the_places_in_the_code_that_format_md_names_exist():
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8").partition("## Where the code is")[2]
    named = set(re.findall(r"`([\w/]+\.py): ([\w.]+)`", text))
    assert len(named) > 40
    for path, name in named:
        found = ROOT / path if (ROOT / path).exists() else ROOT / "models" / path
        module = found.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        place = importlib.import_module(module.removeprefix("demo."))
        for part in name.split("."):
            assert hasattr(place, part), f"{path}: {name}"
            place = getattr(place, part)
