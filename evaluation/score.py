"""Scores existing images, or writes the statistics of images that others are scored against. Needs no model.

    python -m evaluation.score IMAGES REFERENCE                              FID, IS, KID, precision, recall
    python -m evaluation.score DATA --split train --make_reference OUT.npz --img_size 64

IMAGES is a folder, or an npz file with arr_0 (uint8, N x H x W x 3). REFERENCE is ADM's
VIRTUAL_imagenet….npz, an npz file with mu and sigma, one that --make_reference wrote, or images; without a
reference only IS is computed. The result goes to IMAGES/metrics.json.
On several processes: torchrun --nproc_per_node=8 -m evaluation.score … .
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation import metrics
from evaluation.efficientnet import EfficientNetLite0
from evaluation.features import INCEPTION, SPACES, Measured, Measurer, open_images
from evaluation.gallery import MANIFEST
from evaluation.inception import Inception
from evaluation.reference import make_reference, open_npz, open_reference, where_from
from util import dist
from util.dist import World
from util.errors import UserError, reading
from util.files import check_writable
from util.flags import Parser, provenance
from util.run.meters import printable


@dataclass(frozen=True)
class Scorer:
    """Scores folders or npz files of images.

    reference  None where there is none, then only IS is computed; it may be None on all but the first process
    """

    measurer: Measurer
    reference: Measured | None

    def publish(
        self, images: Path, path: Path, events: Path, run: dict, step: int = 0
    ) -> dict[str, float | None]:
        """Scores `images`, prints and writes the result, and returns the scores by name on every process.

        path    JSON file for the scores and all that they depend on
        events  a folder of its own for TensorBoard, which reads only the newest file of a folder: beside the
                training's log, the scores would hide its curves
        run     settings, versions and commit of this run (util.flags.provenance)
        step    of the training, for TensorBoard
        """
        found = self.measurer.measure(images)
        scores = None
        if found is not None:
            scores, settings, notes = metrics.compute(found, self.reference, self.measurer.space)
            result = {
                "scores": scores,
                "notes": notes,
                "score_settings": settings,
                "generated": found.about,
                "reference": None if self.reference is None else self.reference.about,
                "extractor": self.measurer.network.about,
                "generation": read_manifest(images / MANIFEST),
                "run": run,
            }
            metrics.write(result, path, events, step)
            print(printable("\n".join([metrics.table([(str(images), scores)]), *notes])))
        return dist.gather(scores)[0]


def scorer_of_flags(args: argparse.Namespace, device: torch.device, world: World) -> Scorer | None:
    """Loads the scorer that main_fractalgen's flags ask for; None if they name no reference and no sweep.

    Raises UserError where a file is missing: now, and not after hours of drawing.
    """
    space = SPACES[args.features]
    if space is not INCEPTION and not args.fid_stats:
        advice = where_from(args.img_size, space)
        raise UserError(f"--features {space.name} needs a reference for --fid_stats; {advice}")
    default = Path("fid_stats") / f"adm_in{args.img_size}_stats.npz"  # where the published code looks
    path = Path(args.fid_stats) if args.fid_stats else default
    if args.fid_stats and not path.exists():
        raise UserError(f"{path}: no such reference; {where_from(args.img_size, space)}")
    if not path.exists() and not args.sweep:
        return None
    if path.is_file():
        # a file that is none must not first cost a download of the network
        open_npz(path, args.img_size, space)
    measurer = load_measurer(args, device, world)
    return Scorer(measurer, open_reference(path, measurer) if path.exists() else None)


def load_measurer(args: argparse.Namespace, device: torch.device, world: World) -> Measurer:
    """Loads the network of --features. Raises UserError where it cannot be had."""
    space = SPACES[args.features]
    if space is INCEPTION:
        network = Inception(args.inception_weights, device)
    elif args.inception_weights:
        raise UserError(f"--inception_weights is not for --features {space.name}; leave one of them out")
    else:
        network = EfficientNetLite0(device)
    return Measurer(network, world, args.img_size, args.num_workers, space)


def read_manifest(path: Path) -> dict | None:
    """What the program that wrote a folder of images says of them; None where it says nothing."""
    if not path.is_file():
        return None
    with reading(path, "cannot be read as JSON", "; remove it if these images shall be scored without it"):
        return json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "evaluation.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images")
    add("reference", nargs="?")
    add("--make_reference", metavar="OUT.npz", help="write statistics of the images instead of scores")
    add("--img_size", type=int, help="ADM crop of all images; default: no crop, all images have one size")
    add(
        "--split",
        choices=("train", "val"),
        help="REFERENCE, or DATA to make one of, is a data set as for --data_path; use this split",
    )
    add("--features", choices=tuple(SPACES), default=INCEPTION.name, help="network of the scores")
    add("--inception_weights", metavar="FILE", help="default: torch-fidelity's weights, downloaded once")
    add("--metrics", metavar="FILE", help="where the result goes; default: IMAGES/metrics.json")
    add("--device", help="default: the accelerator that torch finds, else cpu")
    add("--num_workers", type=int, default=min(10, os.cpu_count()), help="data workers of each process")
    args = parser.parse_args(argv)
    if args.make_reference and (args.reference or args.metrics):
        parser.error("--make_reference takes DATA alone: no REFERENCE, no --metrics")
    if args.make_reference and not args.make_reference.endswith(".npz"):
        parser.error(f"--make_reference {args.make_reference}: the name must end in .npz")
    if args.split and not (args.reference or args.make_reference):
        parser.error(
            f"--split {args.split} belongs to REFERENCE or --make_reference; give one of them or leave it out"
        )
    space = SPACES[args.features]
    if space is not INCEPTION and not (args.reference or args.make_reference):
        parser.error(f"--features {space.name} gives no Inception score; give REFERENCE or --make_reference")
    if args.num_workers < 0 or (args.img_size is not None and args.img_size < 1):
        parser.error(f"--num_workers {args.num_workers} must be at least 0, --img_size at least 1")
    if not Path(args.images).exists():
        parser.error(f"{args.images}: no such folder of images or npz file")
    if args.reference and not Path(args.reference).exists():
        parser.error(f"{args.reference}: no such reference; {where_from(args.img_size, space)}")
    with parser.one_line_errors():
        run(args)
    dist.disconnect()


def run(args: argparse.Namespace) -> None:
    world = dist.from_environment()
    device = dist.pick_device(args.device, world)
    images = Path(args.images)
    beside = images / "metrics.json" if images.is_dir() else images.with_suffix(".metrics.json")
    path = Path(args.make_reference or args.metrics or beside)
    check_writable(path, str(path))  # what is wrong is said before a network is downloaded and run
    if images.is_file() and not (args.make_reference and args.split):
        open_images(images)
    if args.reference and Path(args.reference).is_file():
        open_npz(Path(args.reference), args.img_size, SPACES[args.features])
    dist.connect(world, device)
    measurer = load_measurer(args, device, world)
    if args.make_reference:
        note = make_reference(images, path, measurer, args.split)
        if note is not None:
            count, kept = note["pictures"], note["features"]
            print(f"{args.make_reference}: mu and sigma of {count} images, features of {kept}")
        return
    reference = open_reference(Path(args.reference), measurer, args.split) if args.reference else None
    Scorer(measurer, reference).publish(images, path, path.parent / "scores", provenance(args))


if __name__ == "__main__":
    main()
