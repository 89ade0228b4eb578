"""FID, IS, KID, precision and recall of measured images by torch-fidelity's public functions, and where they are written."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.features import Measured
from evaluation.reference import Reference
from util.errors import UserError
from util.files import atomic_write
from util.meters import printable

# torch-fidelity's own defaults, except that precision and recall use the features of FID (there: VGG16), as the paper's table.
SETTINGS = {
    "isc_splits": 10,
    "samples_shuffle": True,
    "kid_subsets": 100,
    "kid_subset_size": 1000,
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
    "prc_neighborhood": 3,
    "prc_batch_size": 10000,
    "save_cpu_ram": True,  # blocks of prc_batch_size
    "rng_seed": 2020,
}
COLUMNS = ("FID ↓", "IS ↑", "KID x1000 ↓", "Precision ↑", "Recall ↑")


def compute(
    generated: Measured, reference: Reference | None
) -> tuple[dict[str, float | None], dict, list[str]]:
    """Scores by name (None: cannot be computed), the settings they have, and what a reader of them should know."""
    from torch_fidelity import defaults
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    settings, notes = adapted(generated, reference)
    assert settings.keys() <= defaults.DEFAULTS.keys()  # it ignores a keyword that it does not know
    scores = dict.fromkeys(
        ("fid", "inception_score", "inception_score_std", "kid", "kid_std", "precision", "recall")
    )
    found = isc_features_to_metric(
        generated.logits, settings["isc_splits"], settings["samples_shuffle"], settings["rng_seed"]
    )
    scores |= {
        "inception_score": found["inception_score_mean"],
        "inception_score_std": found["inception_score_std"],
    }
    if reference is None:
        return scores, settings, notes
    ours, theirs = ({"mu": side.mu, "sigma": side.sigma} for side in (generated, reference))
    scores["fid"] = fid_statistics_to_metric(ours, theirs, False)["frechet_inception_distance"]
    if settings.get("kid_subset_size"):
        pair = generated.features, reference.features  # in this order: input1 = generated, input2 = real
        found = kid_features_to_metric(*pair, **settings, verbose=False)
        scores |= {
            "kid": found["kernel_inception_distance_mean"],
            "kid_std": found["kernel_inception_distance_std"],
        }
        if settings.get("prc_neighborhood"):
            found = prc_features_to_metric(*pair, **settings, verbose=False)
            scores |= {name: found[name] for name in ("precision", "recall")}
    return scores, settings, notes


def adapted(generated: Measured, reference: Reference | None) -> tuple[dict, list[str]]:
    """SETTINGS as far as there are images for them, and what was changed or cannot be computed, and why."""
    settings, notes, count = dict(SETTINGS), [], len(generated.features)
    if count < 2 * settings["isc_splits"]:  # a split of one image has an IS of 1, whatever it shows
        settings["isc_splits"] = 1
        notes.append(f"IS: of all {count} images, not the mean of 10 splits, for want of images")
    if reference is None or reference.features is None:
        why = (
            "there is no reference"
            if reference is None
            else f"{reference.about['path']} holds mu and sigma, no images"
        )
        notes.append(f"{'FID, ' if reference is None else ''}KID, precision and recall: not computed, {why}")
        settings = {name: value for name, value in settings.items() if not name.startswith(("kid", "prc"))}
    else:
        fewest = min(count, len(reference.features))
        if fewest < settings["kid_subset_size"]:
            settings["kid_subset_size"] = fewest
            notes.append(
                f"KID: of subsets of {fewest} images, not {SETTINGS['kid_subset_size']}, for want of images"
            )
        if fewest <= settings["prc_neighborhood"]:
            settings = {name: value for name, value in settings.items() if not name.startswith("prc")}
            notes.append(f"precision and recall: not computed, {fewest} images have no third neighbour")
    dim = generated.features.shape[1]
    if reference is not None and min(count, reference.about.get("pictures", count)) <= dim:
        notes.append(
            f"FID: of no more than {dim} images on a side it is far too high and not comparable with others"
        )
    return settings, notes


def table(rows: Sequence[tuple[str, dict]], best: int | None = None) -> str:
    """The paper's table: a line for each (name, scores), the `best` marked."""
    cells = [("", *COLUMNS)]
    for number, (name, scores) in enumerate(rows):
        shown = [
            _number(scores["fid"], 2),
            _number(scores["inception_score"], 2, scores["inception_score_std"]),
            _number(scores["kid"], 3, scores["kid_std"], scale=1000),
            _number(scores["precision"], 3),
            _number(scores["recall"], 3),
        ]
        cells.append((f"{'* ' if number == best else ''}{name}", *shown))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _number(value: float | None, digits: int, spread: float | None = None, scale: float = 1) -> str:
    if value is None:
        return "-"
    return f"{value * scale:.{digits}f}" + (f" ± {spread * scale:.{digits}f}" if spread is not None else "")


def show(name: str, result: dict) -> None:
    """Prints the table of one result and its notes."""
    for line in [*table([(name, result["scores"])]).splitlines(), *result["notes"]]:
        print(printable(line))


def write(result: dict, path: Path, events: Path, step: int = 0) -> None:
    """`result` to the JSON file `path`, its scores and settings to TensorBoard's files in the folder `events`."""
    from torch.utils.tensorboard import SummaryWriter

    text = json.dumps(result, indent=2, default=str, allow_nan=False)
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        with SummaryWriter(str(events)) as writer:
            for name, value in result["scores"].items():
                if value is not None:
                    writer.add_scalar(f"score/{name}", value, step)
            writer.add_text("score/settings", f"```\n{text}\n```", step)
    except OSError as error:
        raise UserError(f"{path}: the scores could not be written ({error.strerror or error})") from error
