"""--sweep: draws and scores images for combinations of sampling settings; one table and one plot."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from evaluation import metrics
from evaluation.features import SPACES
from util.errors import UserError, reading
from util.files import atomic_write, write_json
from util.run.meters import printable

NAMES = ("cfg", "temperature", "filter_threshold")
Cell = dict[str, float]  # one combination of settings, by name


def cells(texts: Sequence[str]) -> list[Cell]:
    """("cfg=1,2", "temperature=1,1.05") -> all combinations; the first name changes slowest.

    Raises UserError for any other text.
    """
    swept = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in NAMES or name in swept:
            raise UserError(
                f"--sweep {text}: give each of {', '.join(NAMES)} at most once, "
                "as in cfg=1,2,4 temperature=1,1.05"
            )
        try:
            swept[name] = [float(value) for value in values.split(",")]
        except ValueError as error:
            raise UserError(
                f"--sweep {text}: {name} takes numbers with commas between them, as in {name}=1,1.05"
            ) from error
        if len(set(swept[name])) < len(swept[name]) or not all(map(math.isfinite, swept[name])):
            raise UserError(f"--sweep {text}: {name} takes finite numbers, each once")
    return [dict(zip(swept, values, strict=True)) for values in product(*swept.values())] if swept else []


def name_of(cell: Cell) -> str:
    return ",".join(f"{name}={value:.12g}" for name, value in cell.items())


def run(
    draw_and_score: Callable[[Cell, Path], dict],
    *,
    cells: Sequence[Cell],
    folder: Path,
    num_images: int,
    seed: int,
    is_main: bool,
) -> None:
    """Draws and scores the images of each cell, prints a table and writes `folder`/sweep.json and sweep.png.

    draw_and_score    (cell, folder for its images) -> scores as of `metrics.compute`; every process calls it
    num_images, seed  of each cell, for sweep.json; one seed gives all cells the same random numbers
    is_main           whether this process writes and prints
    """
    scores = [draw_and_score(cell, folder / name_of(cell)) for cell in cells]
    if not is_main:
        return
    distances = [space.distance for space in SPACES.values()]
    by = next((name for name in distances if scores[0].get(name) is not None), "inception_score")
    best = (min if by in distances else max)(range(len(scores)), key=lambda i: scores[i][by])
    rows = [{**cell, **found} for cell, found in zip(cells, scores, strict=True)]
    names = [name_of(cell) for cell in cells]
    result = {"best": names[best], "by": by, "num_images": num_images, "seed": seed, "rows": rows}
    write_json(folder / "sweep.json", result)
    plot(rows, list(cells[0]), best, by, folder / "sweep.png")
    print(printable(metrics.table(list(zip(names, rows, strict=True)), best)))
    print(f"* best {by} of {num_images} images each; in {folder}: sweep.json, sweep.png")
    if by == "inception_score":
        print(
            "IS knows nothing of real images and rewards too much guidance: give --fid_stats to choose by FID"
        )


def plot(rows: Sequence[dict], names: Sequence[str], best: int, by: str, path: Path) -> None:
    """Plots the score `by`, and IS where it is known, against the first of the settings `names`.

    The others make a line for each of their combinations.
    """
    from matplotlib.figure import Figure  # pyplot would keep the figure and look for a display

    first, *others = names
    lines = defaultdict(list)
    for row in sorted(rows, key=lambda row: row[first]):
        lines[name_of({name: row[name] for name in others})].append(row)
    titles = {**{space.distance: space.title for space in SPACES.values()}, "inception_score": "IS"}
    shown = [name for name in dict.fromkeys((by, "inception_score")) if name in rows[0]]
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for label, line in lines.items():
            x, y = [row[first] for row in line], [row[score] for row in line]
            axes.plot(x, y, marker="o", label=label or None)
        axes.plot(rows[best][first], rows[best][score], "*", markersize=16, color="black", label="best")
        axes.set(xlabel=first, ylabel=titles[score])
        axes.legend()
    with reading(path, "cannot be written"), atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
