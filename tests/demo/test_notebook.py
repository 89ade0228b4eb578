"""The notebook runs offline, only calls the library, and is stored with its outputs."""

import ast
import os
import re
from pathlib import Path

import pytest

from models.hub import zoo

nbformat = pytest.importorskip("nbformat", reason="pip install nbformat nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbformat nbclient ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "demo" / "run_fractalgen.ipynb"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell) -> list[str]:
    """Returns the types of a cell's outputs: PNG, GIF, or text."""
    return [kind for output in cell.outputs for kind in output.get("data", {"text": ""})]


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs_offline_and_known_pixels_stay(stored, monkeypatch):
    if missing := set(zoo.BUNDLED) - set(zoo.names()):
        pytest.skip(f"this checkout lacks the bundled models {', '.join(missing)}")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name, value in dict(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.from_dict(stored)
    for cell in code_cells(notebook):
        cell.outputs = []
    published = 'print(zoo.load_or_bundled("fractalmar_in64")[1])'  # where there is no GPU
    notebook.cells.append(nbformat.v4.new_code_cell(published))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    text = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert "the known pixels are the same: True" in text
    assert "This is fashion_ar. 10 classes: " in text
    assert f"This is the bundled model {zoo.DEFAULT}, since: fractalmar_in64 wants a GPU" in text
    shown = [kind for cell in code_cells(notebook) for kind in kinds(cell)]
    assert shown.count("image/png") == 7  # canvas, emoji, edits, likelihood, three of the inside
    assert shown.count("image/gif") == 1


def test_readme_and_notebook_follow_the_address_of_the_repository(stored):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Repository = "(.*?)"', project, re.MULTILINE)
    (said,) = re.findall(
        r'^REPOSITORY = "(.*?)"', "\n".join(cell.source for cell in stored.cells), re.MULTILINE
    )
    assert said == address
    opens = address.replace("https://github.com", "https://colab.research.google.com/github")
    link = f"{opens}/blob/main/demo/run_fractalgen.ipynb"
    for text in (stored.cells[0].source, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert link in text
        assert text.count("colab.research.google.com/github/") == 1


def test_it_is_stored_with_outputs_of_all_cells_in_order_and_is_small(stored):
    assert NOTEBOOK.stat().st_size < 2e6
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells[1:])
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert {"image/png", "image/gif"} <= {kind for cell in cells for kind in kinds(cell)}


def test_it_calls_the_library_and_has_no_logic_of_its_own(stored):
    logic = ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Lambda, ast.Try
    for cell in code_cells(stored)[1:]:
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, logic)], cell.source
