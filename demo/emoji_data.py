"""Google's Noto emoji as a folder of 32 x 32 images in nine classes, for --data_path.

python demo/emoji_data.py output/emoji/data        fetches them with npm: 71 MB, once
python demo/emoji_data.py output/emoji/data --package node_modules/emoji-datasource-google
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

PACKAGE = "emoji-datasource-google@16.0.0"  # Noto emoji, 64 px, and a JSON of their names and categories
SIDE, HELD_OUT, AT_LEAST = 32, 8, 200  # pixels; every 8th emoji is held out; training images of a class
# Class -> subcategories or names of the JSON, whether a mirrored image is one of the class, and skin tones besides yellow.
ANIMALS = (
    "cat-face monkey-face mouse cow tiger rabbit cat horse monkey_face dog pig hamster wolf polar_bear bear panda_face "
    "lion_face unicorn_face fox_face raccoon koala frog chicken moose"
)
BUTTONS = "keycap alphanum av-symbol arrow transport-sign religion zodiac"
FACES = (
    "face-smiling face-tongue face-sleepy face-affection face-glasses face-neutral-skeptical face-concerned face-unwell "
    "face-hand face-hat angry rage triumph"
)
HANDS = "hand-fingers-open hand-fingers-closed hand-fingers-partial hand-single-finger"
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
COPY = re.compile(r"-mirrored$|[+-][01][+-][01]$")  # how the name of a moved or mirrored copy ends
SHIFTS = [
    (0, 0),
    (1, 0),
    (0, 1),
    (-1, 0),
    (0, -1),
    (1, 1),
    (-1, -1),
    (1, -1),
    (-1, 1),
]  # of the 64 px: half a pixel here


def fetch(folder: Path) -> Path:
    """The unpacked npm package, in `folder`. npm checks it against the registry's SHA-512."""
    name = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    with tarfile.open(folder / name.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def family(emoji: dict) -> str:
    """What an emoji shares with its variants of skin, gender and direction, all of which go to the same split."""
    code = re.sub(r"-200D-27A1|-FE0F|-200D-264[02]|-1F3F[B-F]", "", emoji["unified"])
    return re.sub(r"1F46[89]|1F9D1", "PERSON", code)


def on_white(path: Path, shift: tuple[int, int] = (0, 0)) -> Image.Image:
    """64 px with transparency -> 32 px RGB over white, each pixel the mean of four."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    moved = Image.new("RGBA", image.size)
    moved.paste(image, shift)
    white.alpha_composite(moved)
    return white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)


def members(emojis: list[dict], label: str) -> Iterator[tuple[str, str, str]]:
    """(family, name, file) of each emoji of a class, and of its variants."""
    wanted, _, tones = CLASSES[label]
    for emoji in emojis:
        if {emoji["subcategory"], emoji["short_name"]} & set(wanted.split()):
            yield family(emoji), emoji["short_name"], emoji["image"]
            for tone in tones.split():
                if variant := emoji.get("skin_variations", {}).get(tone):
                    yield family(emoji), f"{emoji['short_name']}-{tone}", variant["image"]


def write_emoji(folder: Path, package: Path) -> None:
    """folder/{train,val}/CLASS/NAME.png. Whole families are held out, as they are; those of `train` may be mirrored, and in
    classes of few images there are copies of them moved by half a pixel. No image is there twice."""
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
        shifts = SHIFTS[: max(1, round(AT_LEAST / train))]
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
    """write_emoji, the package fetched where it is not given; prints what is there."""
    with tempfile.TemporaryDirectory() as scratch:
        write_emoji(folder, package or fetch(Path(scratch)))
    for split in ("train", "val"):
        counts = {label: len(list((folder / split / label).iterdir())) for label in CLASSES}
        print(
            f"{split}: {sum(counts.values())} images:",
            ", ".join(f"{label} {count}" for label, count in counts.items()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where train/CLASS and val/CLASS shall be written")
    parser.add_argument("--package", type=Path, help=f"the unpacked {PACKAGE}, where npm has it already")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")
    prepare(args.folder, args.package)


if __name__ == "__main__":
    main()
