"""FID and its like, IS, KID, precision and recall by torch-fidelity's functions; their table and files."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.features import INCEPTION, SPACES, Measured, Space
from util.errors import reading
from util.files import write_json

# torch-fidelity's defaults; precision and recall use FID's features, not VGG16's, as in the paper's table.
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
    "save_cpu_ram": True,  # precision and recall in blocks of prc_batch_size
    "rng_seed": 2020,
}
KEYS = {  # our names of the scores -> torch-fidelity's
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
}
COLUMNS = {  # heading -> score, factor, decimal places
    **{f"{space.title} ↓": (space.distance, 1, 2) for space in SPACES.values()},
    "IS ↑": ("inception_score", 1, 2),
    "KID x1000 ↓": ("kid", 1000, 3),
    "Precision ↑": ("precision", 1, 3),
    "Recall ↑": ("recall", 1, 3),
}


def compute(
    generated: Measured, reference: Measured | None, space: Space = INCEPTION
) -> tuple[dict[str, float | None], dict, list[str]]:
    """Returns scores by name (None: not computed), torch-fidelity's settings, and notes for the reader.

    Both sides have features of `space`. IS and KID are defined for Inception's and left out for others.
    """
    from torch_fidelity import defaults
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    settings, notes = adapt_settings(generated, reference, space)
    # torch-fidelity ignores a keyword that it does not know.
    assert settings.keys() <= defaults.DEFAULTS.keys()
    found = {}
    if "isc_splits" in settings:
        found |= isc_features_to_metric(
            generated.logits, settings["isc_splits"], settings["samples_shuffle"], settings["rng_seed"]
        )
    if reference is not None:
        ours, theirs = ({"mu": side.mu, "sigma": side.sigma} for side in (generated, reference))
        found |= fid_statistics_to_metric(ours, theirs, False)
        pair = generated.features, reference.features
        if "kid_subset_size" in settings:
            found |= kid_features_to_metric(*pair, **settings, verbose=False)
        if "prc_neighborhood" in settings:
            found |= prc_features_to_metric(*pair, **settings, verbose=False)
    keys = KEYS
    if space is not INCEPTION:
        keys = {space.distance: KEYS["fid"], **{name: KEYS[name] for name in ("precision", "recall")}}
    return {name: found.get(key) for name, key in keys.items()}, settings, notes


def adapt_settings(
    generated: Measured, reference: Measured | None, space: Space = INCEPTION
) -> tuple[dict, list[str]]:
    """Returns SETTINGS, changed where there are too few images for them, and a note for each change."""
    settings, notes, count = dict(SETTINGS), [], len(generated.features)
    is_inception = space is INCEPTION
    of_images = "KID, precision and recall" if is_inception else "precision and recall"
    # prefixes of the settings of scores that are not computed
    not_computed = () if is_inception else ("isc", "samples", "kid")
    # A split of one image has an IS of 1, whatever it shows.
    if is_inception and count < 2 * settings["isc_splits"]:
        settings["isc_splits"] = 1
        notes.append(f"IS: of all {count} images at once, not the mean of 10 splits, for want of images")
    if reference is None:
        not_computed += ("kid", "prc")
        notes.append(f"{space.title}, {of_images}: not computed, there is no reference")
    elif reference.features is None:
        not_computed += ("kid", "prc")
        path = reference.about["path"]
        notes.append(f"{of_images}: not computed, {path} holds mu and sigma, no images")
    else:
        fewest = min(count, len(reference.features))
        if is_inception and fewest < settings["kid_subset_size"]:
            settings["kid_subset_size"] = fewest
            notes.append(f"KID: of subsets of {fewest} images, not 1000, for want of images")
        if fewest <= settings["prc_neighborhood"]:
            not_computed += ("prc",)
            notes.append(f"precision and recall: not computed, {fewest} images have no third neighbour")
    dim = generated.features.shape[1]
    if reference is not None and min(count, reference.about.get("pictures", count)) <= dim:
        notes.append(
            f"{space.title}: of no more than {dim} images on a side it is far too high and not comparable "
            "with others"
        )
    return {name: x for name, x in settings.items() if not name.startswith(not_computed)}, notes


def table(rows: Sequence[tuple[str, dict]], best: int | None = None) -> str:
    """The paper's table, with a line for each (name, scores). Line number `best` is marked with a star.

    It has the columns of the scores that are named in a row, computed or not.
    """
    named = {name for _, scores in rows for name in scores}
    columns = {title: column for title, column in COLUMNS.items() if column[0] in named}
    cells = [("", *columns)]
    for number, (name, scores) in enumerate(rows):
        star = "* " if number == best else ""
        cells.append((f"{star}{name}", *(_cell(scores, *column) for column in columns.values())))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _cell(scores: dict, name: str, factor: float, digits: int) -> str:
    """A score for the table, with its standard deviation if it has one; "-" if it was not computed."""
    values = [scores.get(key) for key in (name, f"{name}_std")]
    return " ± ".join(f"{factor * value:.{digits}f}" for value in values if value is not None) or "-"


def write(result: dict, path: Path, events: Path, step: int = 0) -> None:
    """Writes `result` to the JSON file `path`, and its scores for TensorBoard to the folder `events`.

    Raises ValueError, and writes nothing, for a number that is not finite.
    """
    from torch.utils.tensorboard import SummaryWriter

    text = json.dumps(result, indent=2, allow_nan=False)
    write_json(path, result)
    with reading(path, "the scores could not be written"), SummaryWriter(str(events)) as writer:
        for name, value in result["scores"].items():
            if value is not None:
                writer.add_scalar(f"score/{name}", value, step)
        writer.add_text("score/settings", f"```\n{text}\n```", step)
