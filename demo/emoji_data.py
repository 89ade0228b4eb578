"""Writes Google's Noto emoji as a folder of 32 x 32 images in nine classes, for --data_path.

python demo/emoji_data.py output/emoji/data        downloads them with npm (71 MB)
python demo/emoji_data.py output/emoji/data --package node_modules/emoji-datasource-google
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import make_parser
from PIL import Image, ImageOps

from util.files import check_writable

PACKAGE = "emoji-datasource-google@16.0.0"  # Noto emoji of 64 px; JSON of their names and categories
SIDE = 32  # pixels
HELD_OUT = 8  # every 8th family of emoji is held out
MIN_TRAINING_IMAGES = 200  # of a class, about; a class with fewer gets moved copies
ANIMALS = (
    "cat-face monkey-face mouse cow tiger rabbit cat horse monkey_face dog pig hamster wolf polar_bear bear "
    "panda_face lion_face unicorn_face fox_face raccoon koala frog chicken moose"
)
BUTTONS = "keycap alphanum av-symbol arrow transport-sign religion zodiac"
FACES = (
    "face-smiling face-tongue face-sleepy face-affection face-glasses face-neutral-skeptical face-concerned "
    "face-unwell face-hand face-hat angry rage triumph"
)
HANDS = "hand-fingers-open hand-fingers-closed hand-fingers-partial hand-single-finger"
# Class -> subcategories or names in the JSON; whether its images may be mirrored; skin tones besides yellow.
CLASSES = {
    "animal": (ANIMALS, True, ""),
    "button": (BUTTONS, False, ""),
    "clock": (" ".join(f"clock{hour}{half}" for hour in range(1, 13) for half in ("", "30")), False, ""),
    "face": (FACES, True, ""),
    "flag": ("country-flag subdivision-flag", False, ""),
    "fruit": ("food-fruit food-vegetable", True, ""),
    "hand": (HANDS, False, "1F3FB 1F3FC 1F3FD 1F3FE 1F3FF"),
    "heart": ("heart", True, ""),
    "person": ("person person-gesture person-role", False, "1F3FC 1F3FE"),
}
COPY = re.compile(r"-mirrored$|[+-][01][+-][01]$")  # matches the end of the name of a moved or mirrored copy
# By how much copies are moved, in pixels of the 64 x 64 images: half a pixel of ours.
SHIFTS = [(0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]


def fetch(folder: Path) -> Path:
    """Downloads the npm package into `folder` and unpacks it. npm checks the registry's SHA-512."""
    name = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    with tarfile.open(folder / name.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def family(emoji: dict) -> str:
    """Returns what an emoji shares with its variants of skin, gender and direction; they go to one split."""
    code = re.sub(r"-200D-27A1|-FE0F|-200D-264[02]|-1F3F[B-F]", "", emoji["unified"])
    return re.sub(r"1F46[89]|1F9D1", "PERSON", code)


def on_white(path: Path, shift: tuple[int, int] = (0, 0)) -> Image.Image:
    """Reads an RGBA image of 64 px; returns it over white, RGB of 32 px, each pixel the mean of four."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    moved = Image.new("RGBA", image.size)
    moved.paste(image, shift)
    white.alpha_composite(moved)
    return white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)


def members(emojis: list[dict], label: str) -> Iterator[tuple[str, str, str]]:
    """Yields (family, name, file) of each emoji of a class and of its variants."""
    wanted, _, tones = CLASSES[label]
    for emoji in emojis:
        if {emoji["subcategory"], emoji["short_name"]} & set(wanted.split()):
            yield family(emoji), emoji["short_name"], emoji["image"]
            for tone in tones.split():
                if variant := emoji.get("skin_variations", {}).get(tone):
                    yield family(emoji), f"{emoji['short_name']}-{tone}", variant["image"]


def write_emoji(folder: Path, package: Path) -> None:
    """Writes folder/{train,val}/CLASS/NAME.png. No image is there twice.

    Whole families are held out. Training images may be mirrored, and in classes with few images there are
    copies that are moved by half a pixel.
    """
    emojis = json.loads((package / "emoji.json").read_text())
    partial = folder.with_name(folder.name + ".tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    for label, (_, mirrored, _) in CLASSES.items():
        found, seen = list(members(emojis, label)), set()
        families = sorted(
            {group for group, _, _ in found}, key=lambda group: hashlib.sha256(group.encode()).digest()
        )
        held_out = set(families[::HELD_OUT])
        train = sum(group not in held_out for group, _, _ in found) * (1 + mirrored)
        shifts = SHIFTS[: max(1, round(MIN_TRAINING_IMAGES / train))]
        for group, name, file in sorted(found, key=lambda member: member[0] not in held_out):
            split = "val" if group in held_out else "train"
            (partial / split / label).mkdir(parents=True, exist_ok=True)
            for x, y in shifts if split == "train" else shifts[:1]:
                image = on_white(package / "img" / "google" / "64" / file, (x, y))
                for suffix, variant in (("", image), ("-mirrored", ImageOps.mirror(image))):
                    if (not suffix or (mirrored and split == "train")) and variant.tobytes() not in seen:
                        seen.add(variant.tobytes())
                        moved = f"{x:+d}{y:+d}" if x or y else ""
                        variant.save(partial / split / label / f"{name}{moved}{suffix}.png")
    partial.rename(folder)


def prepare(folder: Path, package: Path | None = None) -> None:
    """Writes the emoji like `write_emoji`, downloads the package if `package` is None, and prints counts."""
    with tempfile.TemporaryDirectory() as scratch:
        write_emoji(folder, package or fetch(Path(scratch)))
    for split in ("train", "val"):
        counts = {label: len(list((folder / split / label).iterdir())) for label in CLASSES}
        print(
            f"{split}: {sum(counts.values())} images:",
            ", ".join(f"{label} {count}" for label, count in counts.items()),
        )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("emoji_data.py", __doc__)
    parser.add_argument("folder", type=Path, help="folder to make, with train/CLASS and val/CLASS")
    parser.add_argument("--package", type=Path, help=f"folder of {PACKAGE}, if npm has unpacked it already")
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists already; give a new folder")
    with parser.one_line_errors(OSError, subprocess.CalledProcessError):
        check_writable(args.folder, str(args.folder))
        prepare(args.folder, args.package)


if __name__ == "__main__":
    main()
