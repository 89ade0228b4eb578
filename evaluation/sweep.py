"""--sweep: small runs over sampling settings, all from the same noise, scored, in one table and one plot."""

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from evaluation import metrics
from util.errors import UserError
from util.files import atomic_write
from util.meters import printable

NAMES = ("cfg", "temperature", "filter_threshold")


def cells(given: Sequence[str]) -> list[dict[str, float]]:
    """("cfg=1,2", "temperature=1,1.05") -> every combination, the first name slowest. Raises UserError for anything else."""
    swept = {}
    for text in given:
        name, _, values = text.partition("=")
        if name not in NAMES or name in swept:
            raise UserError(
                f"--sweep {text}: give each of {', '.join(NAMES)} at most once, as in cfg=1,2,4 temperature=1,1.05"
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


def name_of(cell: dict[str, float]) -> str:
    return ",".join(f"{name}={value:.12g}" for name, value in cell.items())


def best_of(scores: Sequence[dict]) -> tuple[int, str]:
    """The number of the best row, and the score that says so: FID where there is a reference, else IS."""
    by, sign = ("fid", 1) if scores[0]["fid"] is not None else ("inception_score", -1)
    return min(range(len(scores)), key=lambda i: sign * scores[i][by]), by


def run(job) -> None:
    """Draws and scores OUT/sweep/<settings>/generated for each cell of job.args.sweep; sweep.json and sweep.png beside them.

    An image depends on its number, the seed and the settings alone, so that all cells have the same noise.
    """
    args, folder, settings, rows = job.args, job.output_dir / "sweep", cells(job.args.sweep), []
    for cell in settings:
        own = copy.copy(job)
        own.args, own.settings = argparse.Namespace(**{**vars(args), **cell}), replace(job.settings, **cell)
        own.output_dir = folder / name_of(cell)
        rows.append({**cell, **own.generate(job.model, own.output_dir / "generated")})
    if not job.world.is_main:
        return
    best, by = best_of(rows)
    result = {
        "best": name_of(settings[best]),
        "by": by,
        "num_images": args.num_images,
        "seed": args.seed,
        "rows": rows,
    }
    try:
        with atomic_write(folder / "sweep.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        plot(rows, settings, best, by, folder / "sweep.png")
    except OSError as error:
        raise UserError(
            f"{folder}: the sweep's table and plot could not be written ({error.strerror or error})"
        ) from error
    print(
        printable(
            metrics.table([(name_of(cell), row) for cell, row in zip(settings, rows, strict=True)], best)
        )
    )
    print(f"* best {by} of {args.num_images} images each; in {folder}: sweep.json, sweep.png")
    if by == "inception_score":
        print(
            "IS knows nothing of real images and rewards too much guidance: give --fid_stats to choose by FID"
        )


def plot(rows: Sequence[dict], settings: Sequence[dict], best: int, by: str, path: Path) -> None:
    """The deciding score and IS over the first setting, a line for each combination of the others."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display

    first, *others = settings[0]
    shown = list(dict.fromkeys((by, "inception_score")))
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for rest in dict.fromkeys(tuple(cell[name] for name in others) for cell in settings):
            line = [i for i, cell in enumerate(settings) if tuple(cell[name] for name in others) == rest]
            line.sort(key=lambda i: settings[i][first])
            label = ", ".join(f"{name} {value:g}" for name, value in zip(others, rest, strict=True))
            axes.plot(
                [settings[i][first] for i in line],
                [rows[i][score] for i in line],
                marker="o",
                label=label or None,
            )
        axes.plot(settings[best][first], rows[best][score], "*", markersize=16, color="black", label="best")
        axes.set(xlabel=first, ylabel={"fid": "FID", "inception_score": "IS"}[score])
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
