"""What the page does besides laying itself out; nothing here knows Gradio.

Letters: H image side.
"""

import base64
import html
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from charts import bar_chart, enlarge, heat_map, outline
from live import watch
from PIL import Image

from models.hub.classes import class_title
from models.likelihood.inside import Inside, look_inside
from models.sampling.edit import box_mask
from models.sampling.generate import validate_num_iters
from models.sampling.guidance import Guidance
from util.crop import center_crop_arr
from util.errors import UserError
from util.inputs import open_exact
from util.pixels import to_pil

PATCH, KNOWN, UNKNOWN = (
    "#ff2d95",
    "#13c26b",
    "#ffb000",
)  # the patch that is followed; its neighbours, known and not yet
REPAINT, KEEP, OTHER_CLASS = (
    "Repaint it",
    "Keep only it, paint around it (uncrop)",
    "Draw another class there",
)
HIDDEN = (150, 140, 190)
NO_ORDER = "This image was uploaded or edited: the order of patches is one that the model might take, not how it came about."
SOFTMAXES = "What was it to be? Softmaxes of 256 values, without guidance, at temperature 1"
MAX_RESULTS = 8


@dataclass(frozen=True, eq=False)
class Chosen:
    """The image that the tabs work on; label None: no class. Its order of patches is that of seed and `index`.

    settings  what it was drawn with, None for an upload; generated: it is as `generate` draws it, neither upload nor edit
    """

    image: Image.Image
    caption: str
    label: int | None = None
    index: int = 0
    settings: dict | None = None
    generated: bool = False


def to_label(value, class_num: int) -> int | None:
    """A class menu's value; -1 is no class."""
    return None if value in (None, -1, "-1") else check_number(value, 0, class_num - 1, "the class")


def check_settings(
    model, seed, guidance, temperature, steps: Sequence, labelled: bool, chunk: int | None = None
) -> dict:
    """The settings for `generate`; UserError for one that is missing or out of range."""
    seed = check_number(seed, 0, 2**53 - 1, "the seed")  # what a browser's numbers hold
    defaults = model.sampling_defaults
    try:
        steps = tuple(int(number) for number in steps)
        validate_num_iters(steps, len(model.generators))
        scale = float(guidance) if labelled else 1.0
        temperature = float(temperature)
        Guidance.create(scale, defaults.guidance_schedule, temperature, defaults.filter_threshold)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(str(error)) from error
    return dict(
        seed=seed, guidance_scale=scale, temperature=temperature, num_inference_steps=steps, chunk=chunk,
        watch_levels=len(model.generators), progress_bar=False,
    )  # fmt: skip


def check_chosen(one: Chosen | None, side: int) -> None:
    if one is None:
        raise UserError("there is no image yet: generate one, or upload one")
    if one.image.size != (side, side):
        raise UserError(f"this image is smaller than {side} x {side}: in Edit, {KEEP!r} makes it larger")


def check_number(value, low: int, high: int, what: str) -> int:
    with suppress(TypeError, ValueError, OverflowError):
        if low <= int(value) == float(value) <= high:
            return int(value)
    raise UserError(f"{what} must be a whole number from {low} to {high}")


def draw(model, label: int | None, number: int, settings: dict, index: int = 0) -> Iterator[tuple]:
    """`watch` of `number` images of a class, counted from `index`."""
    labels = None if label is None else [label] * number
    indices = range(index, index + number)
    return watch(
        lambda step: model.generate(
            labels, num_images=number, indices=indices, callback_on_step_end=step, **settings
        )
    )


def redraw(model, image, mask: np.ndarray, label: int | None, number: int, settings: dict) -> Iterator[tuple]:
    """`watch` of `number` edits where `mask` (H, H) is True."""
    if not mask.any():
        raise UserError("nothing to repaint: all of the image is kept")
    return watch(
        lambda step: model.edit(image, mask, label, num_results=number, callback_on_step_end=step, **settings)
    )


def extend(model, image, position, label: int | None, number: int, settings: dict) -> Iterator[tuple]:
    """`watch` of `number` larger images around a small one."""
    return watch(
        lambda step: model.uncrop(
            image, position, label, num_results=number, callback_on_step_end=step, **settings
        )
    )


def painted(layers: Sequence[np.ndarray], side: int) -> np.ndarray:
    """An editor's layers, RGBA arrays -> (side, side) bool, True where at least a third of a pixel's square is painted."""
    mask = np.zeros((side, side), bool)
    for layer in layers:
        alpha = Image.fromarray((layer[..., 3] > 0).astype(np.float32))
        mask |= np.asarray(alpha.resize((side, side), Image.Resampling.BOX)) >= 1 / 3
    return mask


def region(by_box: bool, box: Sequence, layers: Sequence[np.ndarray], side: int) -> np.ndarray:
    """(side, side) bool: the box (x, y, width, height), or what is painted. UserError where that is nothing."""
    if by_box:
        names = ("x", "y", "width", "height")
        return box_mask(
            side,
            [
                check_number(value, 0, side, f"the box's {name}")
                for name, value in zip(names, box, strict=True)
            ],
        ).numpy()
    mask = painted(layers, side)
    if not mask.any():
        raise UserError("nothing is painted: paint over the image with the brush, or choose the box")
    return mask


def upload(path: str | Path, side: int) -> tuple[Chosen, str]:
    """An image file -> what the tabs work on, and what was done to it. A smaller image stays as it is, for uncropping."""
    image, name = open_exact(path), Path(path).name
    if image.size == (side, side):
        return Chosen(image, name), "its pixels are as in the file"
    if max(image.size) <= side:
        return Chosen(
            image, f"{name}, {image.width} x {image.height}"
        ), f"smaller than {side} x {side}: for uncropping"
    return Chosen(center_crop_arr(image, side), name), f"cropped and scaled to {side} x {side}"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_download(images: Sequence[Image.Image], folder: Path) -> str:
    """One image -> a PNG file in `folder`; several -> a zip of them. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(images) == 1:
        path = folder / "image.png"
        path.write_bytes(png(images[0]))
        return str(path)
    with zipfile.ZipFile(path := folder / "images.zip", "w") as archive:
        for number, image in enumerate(images):
            archive.writestr(f"{number:04d}.png", png(image))
    return str(path)


def figure(image: Image.Image, caption: str = "") -> str:
    """HTML of an image; its pixels are enlarged by the browser, as squares."""
    data = base64.b64encode(png(image)).decode()
    said = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{said or "image"}"><figcaption>{said}</figcaption></figure>'


def thumbnail(chosen: Chosen) -> str:
    """HTML of what the tabs work on."""
    return figures(
        [figure(chosen.image), f"<span>The tabs work on: <b>{html.escape(chosen.caption)}</b></span>"]
    )


def figures(parts: Sequence[str], small: bool = False) -> str:
    return f'<div class="figures{" small" * small}">{"".join(parts)}</div>'


def canvas(step: int, num_steps: int, images) -> str:
    """HTML of the growing canvas."""
    shown = figures([figure(image) for image in to_pil(images)], small=len(images) > 2)
    return f'<progress max="{num_steps}" value="{step + 1}"></progress> step {step + 1} of {num_steps}{shown}'


def with_new_dice(model, chosen: Chosen, level: int, seed: int) -> dict:
    """The settings of a generated image, `level`'s dice being `seed`'s: what was drawn before its first choice stays."""
    before = chosen.settings["seed"]
    seeds = [before] * len(model.generators) if isinstance(before, int) else list(before)
    seeds[level] = seed
    return {**chosen.settings, "seed": seeds}


def choices_of_levels(model) -> list[tuple[str, int]]:
    """Words, and the level whose choices are drawn anew."""
    below = [f"guiding pixels of level {level}" for level in range(1, len(model.generators))] + ["pixels"]
    return [
        (f"level {level}: order of patches, {what}; the other levels' dice stay", level)
        for level, what in enumerate(below)
    ]


def choices_of_patches(model, pixel: Sequence[int]) -> list[tuple[str, tuple[int, int, int]]]:
    """The patch of each level that holds `pixel`, down to it: words, and the box (x, y, side)."""
    found = [("the whole image", (0, 0, model.img_size_list[0]))]
    for level, side in enumerate(model.img_size_list[1:]):
        name = f"the {side} x {side} patch of level {level}" if side > 1 else "the pixel"
        found.append((name, (pixel[0] // side * side, pixel[1] // side * side, side)))
    return found


def look(model, chosen: Chosen, pixel: Sequence[int]) -> tuple[Inside, str]:
    """What each level knew when it decided the patch that holds `pixel`, and HTML that shows it."""
    inside = look_inside(
        model, chosen.image, pixel, chosen.label, index=chosen.index, seed=chosen.settings["seed"] if chosen.settings else 0,
        num_inference_steps=chosen.settings and chosen.settings["num_inference_steps"],
    )  # fmt: skip
    parts, bars = [], []
    for level, place in enumerate(inside.places):
        x, y, side = place.image
        seen = np.array(chosen.image)[y : y + side, x : x + side]
        seen[~place.known.numpy()] = HIDDEN
        boxes = []
        for at in filter(None, place.neighbours):
            known = bool(place.known[at[1] - y, at[0] - x])
            boxes.append(((at[0] - x, at[1] - y, at[2]), KNOWN if known else UNKNOWN))
        boxes.append(((place.patch[0] - x, place.patch[1] - y, place.patch[2]), PATCH))
        caption = f"Level {level} ({place.kind}), {side} px: step {place.step + 1} of {place.num_steps}"
        parts.append(figure(outline(Image.fromarray(seen), boxes), caption))
        if place.probs is not None:
            what = (
                "the pixel" if level + 1 == len(inside.places) else f"the guiding pixel of level {level + 1}"
            )
            bits = ", ".join(
                f"{name} {value:.2f}" for name, value in zip("RGB", place.entropy.tolist(), strict=True)
            )
            bars.append(
                figure(
                    bar_chart(place.probs, place.levels.tolist()),
                    f"Softmaxes of {what}; entropy in bits: {bits}",
                )
            )
    maps = entropy_maps(inside)
    order = "" if chosen.generated else f"<p>{NO_ORDER}</p>"
    return inside, order + figures(parts) + f"<h4>{SOFTMAXES}</h4>" + figures(bars + maps)


def entropy_maps(inside: Inside) -> list[str]:
    found = []
    for level, place in enumerate(inside.places):
        if place.entropy is not None:
            bits, last = inside.entropy[level].mean(0), level + 1 == len(inside.places)
            what = "of the pixels" if last else f"of the guiding pixels of level {level + 1}"
            shown = heat_map(bits, high=8.0)
            found.append(
                figure(
                    enlarge(shown),
                    f"Entropy {what}, mean {bits.mean():.2f} bits a channel (black 0, bright 8)",
                )
            )
    return found


def likelihood(model, chosen: Chosen, label: int | None, num_orders: int) -> str:
    """HTML of an image's heat map and bits."""
    common = dict(num_orders=num_orders, progress_bar=False)
    pixels = -model.log_likelihood(chosen.image, label, "pixel", **common).bits[0]
    by_level, errors = model.log_likelihood(chosen.image, label, "level", **common)
    total, sub_pixels = -by_level.sum().item(), 3 * pixels.numel()
    names = [f"guiding pixels of level {level}" for level in range(1, len(model.generators))] + ["pixels"]
    rows = [
        f"<tr><td>{name}</td><td>{-bits:.1f}</td><td>{-bits / sub_pixels:.4f}</td><td>{error:.1f}</td></tr>"
        for name, bits, error in zip(names, by_level[0].tolist(), errors[0].tolist(), strict=True)
        if bits
    ]
    table = (
        "<table><tr><th>softmaxes of the</th><th>bits</th><th>bits/dim</th><th>± bits</th></tr>"
        + "".join(rows)
        + "</table>"
    )
    given = "no class" if label is None else html.escape(class_title(label, model.class_names))
    head = f"<h4>{total:.1f} bits, {total / sub_pixels:.4f} bits per dimension, given {given}</h4>"
    heat = figure(enlarge(heat_map(pixels)), f"Bits of each pixel, black 0, brightest {pixels.max():.1f}")
    return head + figures([figure(enlarge(chosen.image), chosen.caption), heat]) + table


def posterior(model, chosen: Chosen, classes: Sequence, num_orders: int, most: int) -> dict[str, float]:
    """Names of the classes -> p(class | image). UserError unless there are 2 to `most`."""
    labels = [int(label) for label in classes]
    if not 2 <= len(labels) <= most:
        raise UserError(f"choose 2 to {most} classes to compare")
    common = dict(num_orders=num_orders, progress_bar=False)
    found = model.classify(chosen.image, labels, **common)[0].tolist()
    return {
        f"{class_title(label, model.class_names)} ({label})": share
        for label, share in zip(labels, found, strict=True)
    }
