"""The layout of the library: who imports whom, and how large files and folders are."""

import ast

import pytest

from conftest import ROOT

PACKAGES = ("models", "evaluation", "util")
TOP_LEVEL = ("engine_fractalgen", "main_fractalgen")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*(ROOT / f"{name}.py" for name in TOP_LEVEL), *(p for d in PACKAGES for p in (ROOT / d).rglob("*.py"))]
}  # fmt: skip
MAX_LINES, MAX_ENGINE_LINES, MAX_ENTRIES, MAX_COLUMNS = 250, 300, 14, 110


def imports(module: str) -> set[str]:
    """The modules of the library that a module imports anywhere: also in functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(named & FILES.keys())
            if named - FILES.keys():  # names of the module itself
                found.add(node.module)
    return found & FILES.keys()


def test_no_module_imports_itself_by_way_of_others():
    graph, done = {module: imports(module) for module in FILES}, set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"an import circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        # the generators, the head and the ground below them
        (
            "models.ar models.mar models.generator models.pixelloss models.layers models.attention models.recompute "
            "models.noise models.patches",
            "models.sampling models.likelihood models.hub models.fractalgen",
        ),
        ("models.sampling", "models.likelihood models.hub models.fractalgen"),
        ("models.likelihood", "models.hub models.fractalgen"),
        ("models", "evaluation engine_fractalgen main_fractalgen"),
        ("evaluation", "engine_fractalgen main_fractalgen"),
        ("util", "models evaluation engine_fractalgen main_fractalgen"),
        ("engine_fractalgen", "main_fractalgen"),
    ],
)
def test_imports_point_downwards(importers, forbidden):
    inside = lambda module, places: any(module == p or module.startswith(f"{p}.") for p in places.split())  # noqa: E731
    importing = [module for module in FILES if inside(module, importers)]
    assert importing
    assert {m: bad for m in importing if (bad := [x for x in imports(m) if inside(x, forbidden)])} == {}


def test_files_are_short():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    limit = lambda module: MAX_ENGINE_LINES if module == "engine_fractalgen" else MAX_LINES  # noqa: E731
    assert {module: n for module, n in lines.items() if n > limit(module)} == {}


def test_lines_are_short():
    places = [*FILES.values(), *(ROOT / "demo").glob("*.py")]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in places
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]
    assert long == []


def test_folders_hold_few_entries():
    folders = {path.parent for path in FILES.values()} - {ROOT}
    entries = {str(f.relative_to(ROOT)): [p for p in f.iterdir() if p.name != "__pycache__"] for f in folders}
    assert {folder: len(found) for folder, found in entries.items() if len(found) > MAX_ENTRIES} == {}


def test_published_names_are_importable_from_where_they_were():
    import engine_fractalgen
    from models import ar, fractalgen, mar, pixelloss
    from util import crop, download

    assert all(hasattr(engine_fractalgen, name) for name in ("train_one_epoch", "compute_nll", "evaluate"))
    assert all(hasattr(fractalgen, name) for name in ("FractalGen", *fractalgen.PRESETS))
    assert all(hasattr(place, name) for place, name in ((ar, "AR"), (mar, "MAR"), (pixelloss, "PixelLoss")))
    assert hasattr(crop, "center_crop_arr")
    published = [name for name in fractalgen.PRESETS if "tiny" not in name]
    assert all(hasattr(download, f"download_pretrained_{name}") for name in published)


def test_the_checks_would_see_a_circle(monkeypatch, tmp_path):
    for name, text in (("a", "def f():\n    import b\n"), ("b", "from a import f\n")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setitem(FILES, name, tmp_path / f"{name}.py")
    with pytest.raises(AssertionError, match="an import circle"):
        test_no_module_imports_itself_by_way_of_others()
