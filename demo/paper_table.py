"""The table of demo/paper.py: what each claim of the paper is held against, and the verdicts."""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import json
from dataclasses import dataclass

import numpy as np
import paper_work as work
from common import ROOT

from util.errors import UserError

RESULTS, PAGE = ROOT / "docs" / "results" / "paper", ROOT / "docs" / "paper.md"
MARKS = "<!-- python demo/paper.py --table writes from here -->", "<!-- to here -->"
CLAIMS = {
    "a": "three levels cost less and predict better than two",
    "b": "AR predicts a little better, MAR draws better",
    "c": "a guiding pixel helps a MAR level",
    "d": "outputs of the four neighbours as conditions make patches fit",
    "e": "guidance that grows with the progress of level 0 beats constant guidance",
    "f": "more steps draw better images",
    "g": "from level to level, compute falls",
    "h": "attention matrices have 4,000 times fewer entries than one sequence of pixels",
    "i": "class edits follow the new class",
}


@dataclass(frozen=True)
class Line:
    """A line of the table: what several models got, side by side.

    row    a letter of CLAIMS
    text   what is measured, and of which models, in the order of `cells`; `paper`: the paper's figures
    cells  for each model names of results and what is read from them; the lowest of several names counts.
           "{seed}" in a name stands for each seed
    claim  "falls" or "rises": what the claim says of the first and the last cell; None: nothing
    """

    row: str
    text: str
    paper: str
    cells: tuple[tuple[tuple[str, ...], str], ...]
    claim: str | None = None
    digits: int = 3

    @property
    def names(self) -> list[str]:
        return [name.format(seed=seed) for names, _ in self.cells for name in names for seed in work.SEEDS]

    def values(self) -> list[list[float]] | None:
        """For each cell a number for each seed; None while a result is missing."""
        if not all(map(is_done, self.names)):
            return None
        return [
            [min(read(name.format(seed=seed))[key] for name in names) for seed in work.SEEDS]
            for names, key in self.cells
        ]


def cells(key: str, *names: str) -> tuple:
    """One cell for each of `names`, which may be several with blanks between; all read `key`."""
    return tuple((tuple(several.split()), key) for several in names)


def lines() -> list[Line]:
    """The lines of the table. Which way each claim goes was written down before anything was measured."""
    train = lambda model, steps: f"train-{model}-{steps}-{{seed}}"  # noqa: E731
    draw = lambda model, scale=1, schedule="linear", steps=work.STEPS[-1]: (  # noqa: E731
        f"draw-{model}-{scale:g}-{schedule}-{steps}-{{seed}}"
    )
    bits, found = "bits_per_dim", []
    for kind, paper in (("ar", "3.34, 3.14"), ("mar", "3.36, 3.15")):
        name, two, three = kind.upper(), f"{kind}2", f"{kind}3"
        minutes = cells(f"minutes_{two}", "pace-{seed}") + cells(f"minutes_{three}", "pace-{seed}")
        found += [
            Line("a", f"{name}, bits/dim after {work.FEW} steps: 2, 3 levels", paper,
                 cells(bits, train(two, work.FEW), train(three, work.FEW)), "falls"),
            Line("a", f"{name}, bits/dim: 2 levels, {work.FEW} steps; 3 levels, {work.MANY}", "",
                 cells(bits, train(two, work.FEW), train(three, work.MANY)), "falls"),
            Line("a", "minutes of so many steps", "", minutes, None, 1),
        ]  # fmt: skip
    mar, guided, one = (train(model, work.MANY) for model in ("mar3", "mar3_guided", "mar3_one"))
    at_two = draw("ar3", 2), draw("mar3", 2)
    linear, constant = (
        [draw("ar3"), *(draw("ar3", scale, schedule) for scale in work.SCALES)]
        for schedule in ("linear", "constant")
    )
    fewer = [draw("mar3", steps=steps) for steps in work.STEPS]
    scales = ", ".join(f"{scale:g}" for scale in (1, *work.SCALES))
    large = "fractalmar_large_in256"
    counted = lambda *keys: tuple((("count",), key) for key in keys)  # noqa: E731
    gflops = lambda name, number: counted(*(f"gflops_{name}_{i}" for i in range(number)))  # noqa: E731
    ratios = lambda name: counted(f"fewer_{name}", f"fewer_{name}_all")  # noqa: E731
    return [
        Line("a", "GFLOPs an image: 2, 3 levels", "5,516, 438",
             counted("gflops_ar2", "gflops_ar3"), "falls", 2),
        *found,
        Line("b", "bits/dim: MAR (a bound), AR", "3.15, 3.14",
             cells(bits, mar, train("ar3", work.MANY)), "falls"),
        Line("b", "FD: AR, MAR", "", cells("fd", draw("ar3"), draw("mar3")), "falls", 1),
        Line("b", "FD, guidance 2 (the paper's: FID): AR, MAR", "5.30, 2.72",
             cells("fd", *at_two), "falls", 1),
        Line("b", "read as asked, guidance 2: AR, MAR", "", cells("read_as_asked", *at_two), "rises"),
        Line("b", "seconds an image: AR, MAR", "",
             cells("image_ar3", "pace-{seed}") + cells("image_mar3", "pace-{seed}")),
        Line("c", "bits/dim: without, with", "", cells(bits, mar, guided)),
        Line("c", "bits/dim of the head, guiding pixels left out: without, with", "",
             cells("bits_per_dim_cell", mar, guided), "falls"),
        Line("c", "FD: without, with", "", cells("fd", draw("mar3"), draw("mar3_guided")), "falls", 1),
        Line("c", "seam: without, with", "", cells("seam", draw("mar3"), draw("mar3_guided")), "falls"),
        Line("d", "seam: 1, 5 conditions", "", cells("seam", draw("mar3_one"), draw("mar3")), "falls"),
        Line("d", "seam of real images", "", cells("seam", "real")),
        Line("d", "bits/dim: 1, 5 conditions", "", cells(bits, one, mar), "falls"),
        Line("d", "FD: 1, 5 conditions", "", cells("fd", draw("mar3_one"), draw("mar3")), "falls", 1),
        Line("e", f"FD, AR, linear: scale {scales}", "", cells("fd", *linear), None, 1),
        Line("e", "the same, constant", "", cells("fd", *constant), None, 1),
        Line("e", "lowest FD: constant, linear", "",
             cells("fd", " ".join(constant), " ".join(linear)), "falls", 1),
        Line("f", f"FD, MAR: {', '.join(map(str, work.STEPS))} steps", "", cells("fd", *fewer), "falls", 1),
        Line("f", "read as asked: the same", "", cells("read_as_asked", *fewer), "rises", 2),
        Line("f", "FD of real images", "", cells("fd", "real"), None, 1),
        Line("g", "GFLOPs, `fractalmar_in64`", "215, 208, 15", gflops("fractalmar_in64", 3), "falls", 0),
        Line("g", f"GFLOPs, `{large}`", "215, 208, 419, 22", gflops(large, 4), "falls", 0),
        Line("g", "GFLOPs, AR of 28 px", "", gflops("ar3", 3), "falls"),
        Line("h", "millions of entries, 256 px: one sequence, largest level", "4,295, 1.05",
             counted(f"entries_{large}_flat", f"entries_{large}"), "falls", 2),
        Line("h", "times fewer, 256 px: largest level, all levels together", "4,096", ratios(large), None, 0),
        Line("h", "the same, 28 px", "", ratios("ar3"), None, 0),
        *(Line("i", f"{kind}, another class, read as: old, new", "",
               cells("another_read_as_before", name) + cells("another_read_as_asked", name), "rises", 2)
          for kind, name in (("AR", "edit-ar3-{seed}"), ("MAR", "edit-mar3-{seed}"))),
        Line("i", "repainted as the same class, read as it: AR, MAR", "",
             cells("own_read_as_asked", "edit-ar3-{seed}", "edit-mar3-{seed}"), None, 2),
    ]  # fmt: skip


def is_done(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["result"]


def verdict(values: list[list[float]], claim: str) -> str:
    """Judges a claim: a difference of means counts where it exceeds the spread over seeds of both sides.

    values  for each model, in the order of the claim, a number for each seed
    """
    sign = {"falls": -1, "rises": 1}[claim]
    means, spreads = [np.mean(cell) for cell in values], [np.ptp(cell) for cell in values]
    moves = lambda a, b, way: way * (means[b] - means[a]) > max(spreads[a], spreads[b])  # noqa: E731
    last = len(values) - 1
    if moves(0, last, sign):
        back = any(moves(i, i + 1, -sign) for i in range(last))
        return "holds, not throughout" if back else "holds"
    return "does not hold" if moves(0, last, -sign) else "no difference"


def shown(values: list[list[float]], digits: int) -> str:
    """The mean of each cell and, of up to two cells, the spread over seeds in brackets where there is one."""
    texts = [f"{np.mean(cell):,.{digits}f}" for cell in values]
    if len(values) <= 2:
        texts = [
            f"{text} ({np.ptp(cell):.{digits}f})" if np.ptp(cell) else text
            for text, cell in zip(texts, values, strict=True)
        ]
    return ", ".join(texts)


def table() -> str:
    """The table in Markdown, and a line that says on what it was measured."""
    rows = ["| | claim, and what was measured | paper | here | verdict |", "|---|---|---|---|---|"]
    for letter, claim in CLAIMS.items():
        rows.append(f"| **{letter}** | **{claim}** | | | |")
        for line in lines():
            if line.row == letter:
                values = line.values()
                here = shown(values, line.digits) if values else ""
                judged = verdict(values, line.claim) if values and line.claim else ""
                rows.append(f"| | {line.text} | {line.paper} | {here} | {judged} |")
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    where = " and ".join(sorted({f"{file['threads']} thread of {file['processor']}" for file in files}))
    hours = sum(file["cpu_seconds"] for file in files) / 3600
    return "\n".join(
        [*rows, "", f"Results: {len(files)}, {hours:.1f} hours of the processor, {where or '-'}."]
    )


def write_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise UserError(f"{PAGE}: lacks the two lines between which the table goes: {', '.join(MARKS)}")
    PAGE.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}", encoding="utf-8")
