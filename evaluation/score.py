"""Scores images that are there already, or makes the statistics that others are scored against. Needs no model.

    python -m evaluation.score IMAGES REFERENCE                              FID, IS, KID, precision, recall
    python -m evaluation.score DATA --split train --make_reference OUT.npz --img_size 64

IMAGES: a folder, or an npz with arr_0 (uint8, N x H x W x 3). REFERENCE: ADM's VIRTUAL_imagenet….npz, an npz with mu and
sigma, one that --make_reference wrote, or images; without one there is only the IS. Many processes: torchrun
--nproc_per_node=8 -m evaluation.score … . The result goes to IMAGES/metrics.json.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from evaluation import metrics
from evaluation.features import measure, open_images
from evaluation.inception import Inception
from evaluation.reference import WHERE, make_reference, open_reference
from util import dist
from util.dist import World
from util.errors import UserError
from util.flags import Parser, provenance

MANIFEST = "manifest.json"  # what wrote a folder of images says of itself


class Scorer:
    """The network and the reference, loaded once, so that what is missing is said before hours of drawing."""

    def __init__(
        self, reference: Path | None, inception_weights: str | Path | None, *, size: int | None, device: torch.device,
        world: World, num_workers: int, split: str | None = None,
    ):  # fmt: skip
        if reference is not None and not reference.exists():
            raise UserError(f"{reference}: no such reference; {WHERE}")
        self.size, self.world, self.num_workers = size, world, num_workers
        self.inception = Inception(inception_weights, device)
        self.reference = None
        if reference is not None:
            self.reference = open_reference(
                reference, self.inception, world, size=size, split=split, num_workers=num_workers
            )

    def score(self, images: Path, args: argparse.Namespace) -> dict:
        """Scores and all they depend on, as metrics.json has them; on every process."""
        found = measure(
            open_images(images), self.size, self.inception, self.world, num_workers=self.num_workers
        )
        result = None
        if found is not None:
            scores, settings, notes = metrics.compute(found, self.reference)
            result = {
                "scores": scores,
                "notes": notes,
                "score_settings": settings,
                "generated": {"path": str(images), **found.about},
                "reference": self.reference and self.reference.about,
                "extractor": self.inception.about,
                "generation": read_manifest(images / MANIFEST),
                "run": provenance(args),
            }
        return dist.gather(result)[0]

    def publish(
        self, images: Path, args: argparse.Namespace, folder: Path, path: Path | None = None, step: int = 0
    ) -> dict[str, float | None]:
        """Scores by name; also on the terminal, in `path` (default: metrics.json with the images), and, as those of that
        `step` of training, in `folder`/scores for TensorBoard."""
        result = self.score(images, args)
        if self.world.is_main:
            # In a folder of their own: TensorBoard follows only the newest file of a folder, and would lose the training's.
            metrics.write(result, path or images / "metrics.json", folder / "scores", step)
            metrics.show(str(images), result)
        return result["scores"]


def scorer_of_flags(args: argparse.Namespace, device: torch.device, world: World) -> Scorer | None:
    """What main_fractalgen's flags say, or None where they name no reference."""
    default = Path("fid_stats") / f"adm_in{args.img_size}_stats.npz"  # where the published code looks
    reference = Path(args.fid_stats) if args.fid_stats else default if default.exists() else None
    if reference is None and not args.sweep:
        return None
    return Scorer(
        reference,
        args.inception_weights,
        size=args.img_size,
        device=device,
        world=world,
        num_workers=args.num_workers,
    )


def read_manifest(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON; remove it if these images shall be scored without it"
        ) from error


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Parser]:
    parser = Parser(
        "evaluation.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument(
        "--make_reference", type=Path, metavar="OUT.npz", help="write statistics of the images instead"
    )
    parser.add_argument(
        "--img_size", type=int, help="ADM crop of all images; default: as they are, all of one size"
    )
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        help="REFERENCE, or DATA to make one of, is a data set as --data_path takes",
    )
    parser.add_argument(
        "--inception_weights", metavar="FILE", help="default: fetched once by torch-fidelity's address"
    )
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="default: IMAGES/metrics.json")
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    parser.add_argument("--num_workers", type=int, default=min(10, os.cpu_count()), help="of each process")
    args = parser.parse_args(argv)
    if args.make_reference and (args.reference or args.metrics):
        parser.error("--make_reference takes DATA alone: no REFERENCE, no --metrics")
    if args.make_reference and args.make_reference.suffix != ".npz":
        parser.error(f"--make_reference {args.make_reference}: the name must end in .npz")
    if args.split and not (args.reference or args.make_reference):
        parser.error(
            f"--split {args.split} belongs to REFERENCE or --make_reference; give one of them or leave it out"
        )
    if args.num_workers < 0 or (args.img_size is not None and args.img_size < 1):
        parser.error(f"--num_workers {args.num_workers} must be at least 0, --img_size at least 1")
    return args, parser


def main(argv: list[str] | None = None) -> None:
    args, parser = parse(argv)
    with parser.one_line_errors():
        run(args)
    dist.disconnect()


def run(args: argparse.Namespace) -> None:
    world = dist.from_environment()
    device = dist.pick_device(args.device, world)
    images = args.images
    if not images.exists():
        raise UserError(f"{images}: no such folder of images or npz file")
    dist.connect(world, device)
    if args.make_reference:
        note = make_reference(
            images, args.make_reference, Inception(args.inception_weights, device), world,
            size=args.img_size, split=args.split, num_workers=args.num_workers,
        )  # fmt: skip
        if world.is_main:
            print(
                f"{args.make_reference}: mu and sigma of {note['pictures']} images, features of {note['features']}"
            )
        return
    scorer = Scorer(
        args.reference, args.inception_weights, size=args.img_size, device=device, world=world,
        num_workers=args.num_workers, split=args.split,
    )  # fmt: skip
    path = args.metrics or (
        images / "metrics.json" if images.is_dir() else images.with_suffix(".metrics.json")
    )
    scorer.publish(images, args, path.parent, path)


if __name__ == "__main__":
    main()
