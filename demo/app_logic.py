"""What the page does apart from its layout: settings, drawing, masks, and HTML. Does not use Gradio."""

import base64
import html
import io
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from charts import bar_chart, enlarge, heat_map, outline
from common import EXAMPLES
from live import watch
from pace import time_left
from PIL import Image
from torch import Tensor

from models.hub.classes import class_title
from models.layers import Block
from models.likelihood.inside import Inside, Place, look_inside
from models.sampling.edit import box_mask
from models.sampling.guidance import Guidance
from models.sampling.options import check_steps
from util.crop import center_crop_arr
from util.errors import UserError
from util.inputs import open_image
from util.pixels import Alphabet

# Colours of boxes: the patch that is followed, and its neighbours.
PATCH, KNOWN_NEIGHBOUR, UNKNOWN_NEIGHBOUR = "#ff2d95", "#13c26b", "#ffb000"
HIDDEN = (150, 140, 190)  # colour of pixels that are not known yet

# The modes of the tab Edit.
REPAINT = "Repaint it"
KEEP = "Keep only it, paint around it (uncrop)"
OTHER_CLASS = "Draw another class there"

ASSUMED_ORDER = (
    "This image was uploaded or edited. The order of patches is one that the model could use to draw it, "
    "not the order in which it was made."
)
SOFTMAXES = "The predicted distributions: softmaxes over values, without guidance, at temperature 1"
MAX_RESULTS = 8  # of an edit


@dataclass(frozen=True, eq=False)
class Chosen:
    """The image that the tabs work on.

    label      its class, or None
    index      its number within the seed, which decides the random numbers that it was drawn with
    settings   the settings that it was drawn with; None if it was uploaded
    generated  whether `model.generate` drew it, so that it is neither uploaded nor edited
    """

    image: Image.Image
    caption: str
    label: int | None = None
    index: int = 0
    settings: dict | None = None
    generated: bool = False


def to_label(value, class_num: int) -> int | None:
    """Returns the label that a class menu's value stands for; -1 stands for no class."""
    return None if value in (None, -1, "-1") else check_number(value, 0, class_num - 1, "the class")


def check_settings(
    model, seed, guidance, temperature, steps: Sequence, labelled: bool, chunk: int | None = None
) -> dict:
    """Returns the settings for `model.generate`. Raises UserError if one is missing or out of range."""
    seed = check_number(seed, 0, 2**53 - 1, "the seed")  # the largest integer that a browser holds exactly
    defaults = model.sampling_defaults
    try:
        steps = tuple(int(number) for number in steps)
        check_steps(steps, len(model.generators))
        scale = float(guidance) if labelled else 1.0
        temperature = float(temperature)
        Guidance.create(scale, defaults.guidance_schedule, temperature, defaults.filter_threshold)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(str(error)) from error
    return dict(
        seed=seed,
        guidance_scale=scale,
        temperature=temperature,
        num_inference_steps=steps,
        chunk=chunk,
        watch_levels=len(model.generators),
        progress_bar=False,
    )


def check_chosen(chosen: Chosen | None, side: int) -> None:
    """Raises UserError unless there is an image of `side` x `side` pixels."""
    if chosen is None:
        raise UserError("there is no image yet: generate one, or upload one")
    if chosen.image.size != (side, side):
        raise UserError(f"this image is smaller than {side} x {side}: in Edit, {KEEP!r} makes it larger")


def is_smaller(chosen: Chosen | None, side: int) -> bool:
    """Returns whether there is an image that fits into `side` x `side` pixels and leaves some free."""
    return chosen is not None and max(chosen.image.size) <= side and min(chosen.image.size) < side


def check_number(value, low: int, high: int, name: str) -> int:
    """Returns the value as an int. Raises UserError unless it is a whole number from `low` to `high`."""
    with suppress(TypeError, ValueError, OverflowError):
        if low <= int(value) == float(value) <= high:
            return int(value)
    raise UserError(f"{name} must be a whole number from {low} to {high}")


def draw(model, label: int | None, number: int, settings: dict, index: int = 0) -> Iterator[tuple]:
    """Draws `number` images of a class, numbered from `index`, and yields events like `watch`."""
    labels = None if label is None else [label] * number
    indices = range(index, index + number)
    return watch(
        lambda step: in_rgb(
            model.generate(labels, num_images=number, indices=indices, callback_on_step_end=step, **settings)
        )
    )


def redraw(model, image, mask: np.ndarray, label: int | None, number: int, settings: dict) -> Iterator[tuple]:
    """Repaints an image where `mask` (side, side) is True, `number` times, and yields events like `watch`."""
    if not mask.any():
        raise UserError("nothing to repaint: the whole image is kept")
    return watch(
        lambda step: in_rgb(
            model.edit(image, mask, label, num_results=number, callback_on_step_end=step, **settings)
        )
    )


def extend(model, image, position, label: int | None, number: int, settings: dict) -> Iterator[tuple]:
    """Paints around a small image at `position` (x, y), `number` times, and yields events like `watch`."""
    return watch(
        lambda step: in_rgb(
            model.uncrop(image, position, label, num_results=number, callback_on_step_end=step, **settings)
        )
    )


def in_rgb(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Returns images as the page shows them. A model that draws grey ones gets their values back."""
    return [image.convert("RGB") for image in images]


def by_blocks(model, work: Callable) -> Iterator[tuple]:
    """Calls work() and yields events like `watch`: each block of the model that computes is a step."""

    def run(step: Callable):
        with ExitStack() as hooks:
            for block in model.modules():
                if isinstance(block, Block):
                    hooks.enter_context(block.register_forward_pre_hook(lambda *_: step()))
            return work()

    return watch(run)


def painted(layers: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Returns which pixels of an image are painted, bool (side, side).

    layers  RGBA arrays of the editor, in which a pixel of the image is a square of many pixels; it counts as
            painted if at least a third of its square is
    """
    mask = np.zeros((side, side), bool)
    for layer in layers:
        alpha = Image.fromarray((layer[..., 3] > 0).astype(np.float32))
        mask |= np.asarray(alpha.resize((side, side), Image.Resampling.BOX)) >= 1 / 3
    return mask


def region(by_box: bool, box: Sequence, layers: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Returns the mask, bool (side, side), of the box (x, y, width, height) or of what is painted.

    Raises UserError if the box is not within the image, or if nothing is painted.
    """
    if by_box:
        names = ("x", "y", "width", "height")
        box = [
            check_number(value, 0, side, f"the box's {name}") for name, value in zip(names, box, strict=True)
        ]
        return box_mask(side, box).numpy()
    mask = painted(layers, side)
    if not mask.any():
        raise UserError("nothing is painted: paint over the image with the brush, or choose the box")
    return mask


def upload(path: str | Path, side: int) -> tuple[Chosen, str]:
    """Reads an image file for the tabs to work on, and says in words how it was changed.

    A large image is cropped and scaled. A small one stays as it is, for uncropping.
    """
    image, line = open_image(path)
    name, done = Path(path).name, line.removeprefix(f"{path}: ")
    if image.size == (side, side):
        return Chosen(image, name), done or "its pixels are as in the file"
    done = f"{done}; " if done else ""
    if max(image.size) <= side:
        caption = f"{name}, {image.width} x {image.height}"
        return Chosen(image, caption), f"{done}it is smaller than {side} x {side}: you can uncrop it"
    return Chosen(center_crop_arr(image, side), name), f"{done}it was cropped and scaled to {side} x {side}"


def examples(name: str, class_names: Sequence[str] | None) -> list[Chosen]:
    """Returns the images demo/examples/DATA/CLASS.png of a bundled model's data, in the order of its classes.

    name  of the model, which begins with that of its data: fashion_ar
    """
    labels = {text.casefold(): label for label, text in enumerate(class_names or ())}
    found = []
    for path in sorted((EXAMPLES / name.partition("_")[0]).glob("*.png")):
        label = labels.get(path.stem.casefold())
        found.append(Chosen(open_image(path)[0], f"{path.stem}, a real image", label))
    return sorted(found, key=lambda one: len(labels) if one.label is None else one.label)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_download(images: Sequence[Image.Image], folder: Path) -> str:
    """Writes one image as a PNG file, or several as a zip of PNG files, into `folder`. Returns its path."""
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
    """Returns HTML of an image; the browser enlarges its pixels as squares."""
    data = base64.b64encode(png(image)).decode()
    text = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text or "image"}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def figures(parts: Sequence[str], small: bool = False) -> str:
    return f'<div class="figures{" small" * small}">{"".join(parts)}</div>'


def thumbnail(chosen: Chosen) -> str:
    """Returns HTML that shows the image that the tabs work on."""
    text = f"<span>The tabs work on: <b>{html.escape(chosen.caption)}</b></span>"
    return figures([figure(chosen.image), text])


def canvas(alphabet: Alphabet, began: float, step: int, num_steps: int, images: Tensor) -> str:
    """Returns HTML of the growing canvas, normalised images (B, C, H, W), and of the time that is left.

    began  when the drawing began, by time.monotonic()
    """
    shown = figures([figure(image) for image in alphabet.to_pil(images)], small=len(images) > 2)
    progress = f'<progress max="{num_steps}" value="{step + 1}"></progress>'
    left = time_left(time.monotonic() - began, (step + 1) / num_steps)
    return f"{progress} step {step + 1} of {num_steps}{left}{shown}"


def results(drawn: Sequence[Chosen]) -> str:
    """Returns HTML of images that were drawn."""
    return figures([figure(one.image, one.caption) for one in drawn], small=len(drawn) > 2)


def before_and_after(before: Chosen, box: tuple[int, ...] | None, drawn: Sequence[Chosen]) -> str:
    """Returns HTML of an image and of what was drawn in its place.

    box  (x, y, width, height) that was drawn again, and that is outlined; None: it is not a patch
    """

    def shown(one: Chosen, title: str) -> str:
        image = enlarge(one.image) if box is None else outline(one.image, [(box, PATCH)], around=True)
        return figure(image, title)

    after = [shown(one, f"After, image {one.index}") for one in drawn]
    return f"<p>{html.escape(drawn[0].caption)}</p>" + figures([shown(before, "Before"), *after], small=True)


def with_new_random_numbers(model, chosen: Chosen, level: int, seed: int) -> dict:
    """Returns a generated image's settings, but with random numbers of `seed` for one level."""
    before = chosen.settings["seed"]
    seeds = [before] * len(model.generators) if isinstance(before, int) else list(before)
    seeds[level] = seed
    return {**chosen.settings, "seed": seeds}


def softmax_names(model) -> list[str]:
    """Returns, for each level above the pixel, the name of what the softmax below it predicts."""
    return [f"guiding pixels of level {level}" for level in range(1, len(model.generators))] + ["pixels"]


def levels_to_redraw(model) -> list[tuple[str, int]]:
    """Returns the levels that can get new random numbers: a description and the level's number.

    A level without any is left out: an AR level, whose order is fixed, with no softmax below it.
    """
    found = []
    generators = list(model.generators)
    for level, name in enumerate(softmax_names(model)):
        decided = [] if generators[level].exact_likelihood else ["order of patches"]
        if all(below.spec.guiding_pixel for below in generators[level + 1 : level + 2]):
            decided.append(name)
        if decided:
            found.append((f"all that level {level} decides: {', '.join(decided)}", level))
    return found


def patches_to_redraw(model, pixel: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the patch of each level that holds `pixel`: a description and its box, as `box_mask`."""
    patches = [("the whole image", (0, 0, *model.image_shape))]
    for level, generator in enumerate(model.generators):
        side = generator.spec.patch_size[0]
        name = f"the {side} x {side} patch of level {level}" if side > 1 else "the pixel"
        patches.append((name, (pixel[0] // side * side, pixel[1] // side * side, side, side)))
    return patches


def look(model, chosen: Chosen, pixel: Sequence[int]) -> str:
    """Returns HTML that shows what each level knew when it decided the patch that holds `pixel`."""
    settings = chosen.settings or {}
    inside = look_inside(
        model,
        chosen.image,
        pixel,
        chosen.label,
        index=chosen.index,
        seed=settings.get("seed", 0),
        num_inference_steps=settings.get("num_inference_steps"),
    )
    steps = [place_figure(chosen.image, level, place) for level, place in enumerate(inside.places)]
    fixed = all(generator.exact_likelihood for generator in model.generators)
    order = "" if chosen.generated or fixed else f"<p>{ASSUMED_ORDER}</p>"
    softmaxes = figures(softmax_figures(model, inside) + entropy_figures(model, inside))
    return f"{order}{figures(steps)}<h4>{SOFTMAXES}</h4>{softmaxes}"


def place_figure(image: Image.Image, level: int, place: Place) -> str:
    """Returns HTML of what a level sees, with boxes around its patch and the patch's neighbours."""
    x, y, side, _ = place.image
    seen = np.array(image)[y : y + side, x : x + side]
    seen[~place.known.numpy()] = HIDDEN
    boxes = []
    for box in place.neighbours:
        if box is not None:
            known = bool(place.known[box[1] - y, box[0] - x])
            colour = KNOWN_NEIGHBOUR if known else UNKNOWN_NEIGHBOUR
            boxes.append(((box[0] - x, box[1] - y, *box[2:]), colour))
    boxes.append(((place.patch[0] - x, place.patch[1] - y, *place.patch[2:]), PATCH))
    caption = f"Level {level} ({place.kind}), {side} px: step {place.step + 1} of {place.num_steps}"
    return figure(outline(Image.fromarray(seen), boxes), caption)


def softmax_figures(model, inside: Inside) -> list[str]:
    """Returns HTML of a bar chart for each level below which there is a softmax."""
    found = []
    for name, place in zip(softmax_names(model), inside.places, strict=True):
        if place.probs is not None:
            name = name.replace("pixels", "pixel")
            bits = ", ".join(
                f"{channel} {value:.2f}".strip()
                for channel, value in zip(channel_titles(model), place.entropy.tolist(), strict=True)
            )
            caption = f"Softmaxes of the {name}; entropy in bits: {bits}"
            chart = bar_chart(place.probs, place.values.tolist(), height=192 // len(place.probs))
            found.append(figure(chart, caption))
    return found


def channel_titles(model) -> list[str]:
    """Returns the names of the channels as people see them; a single one needs none."""
    names = model.alphabet.channel_names
    return [name.upper() * (len(names) > 1) for name in names]


def entropy_figures(model, inside: Inside) -> list[str]:
    """Returns HTML of a map of the whole image's entropy for each level below which there is a softmax."""
    found = []
    for level, (name, place) in enumerate(zip(softmax_names(model), inside.places, strict=True)):
        if place.entropy is not None:
            bits, most = inside.entropy[level].mean(0), math.log2(model.alphabet.num_values)
            scale = f"black 0, bright {most:.2g}"
            caption = f"Entropy of the {name}, mean {bits.mean():.2f} bits per channel ({scale})"
            found.append(figure(enlarge(heat_map(bits, high=most)), caption))
    return found


def likelihood(model, chosen: Chosen, label: int | None, num_orders: int) -> str:
    """Returns HTML of an image's bits: in total, as a map of its pixels, and as a table of the softmaxes."""
    options = dict(num_orders=num_orders, progress_bar=False)
    pixels = -model.log_likelihood(chosen.image, label, "pixel", **options).bits[0]
    by_level, errors = model.log_likelihood(chosen.image, label, "level", **options)
    total, dims = -by_level.sum().item(), model.num_dims
    rows = [
        f"<tr><td>{name}</td><td>{-bits:.1f}</td><td>{-bits / dims:.4f}</td><td>{error:.1f}</td></tr>"
        for name, bits, error in zip(
            softmax_names(model), by_level[0].tolist(), errors[0].tolist(), strict=True
        )
        if bits
    ]
    titles = "<tr><th>softmaxes of the</th><th>bits</th><th>bits/dim</th><th>± bits</th></tr>"
    class_name = "no class" if label is None else html.escape(class_title(label, model.class_names))
    head = f"<h4>{total:.1f} bits, {total / dims:.4f} bits per dimension, given {class_name}</h4>"
    heat = figure(enlarge(heat_map(pixels)), f"Bits of each pixel, black 0, brightest {pixels.max():.1f}")
    image = figure(enlarge(chosen.image), chosen.caption)
    return f"{head}{figures([image, heat])}<table>{titles}{''.join(rows)}</table>"


def posterior(model, chosen: Chosen, classes: Sequence, num_orders: int, most: int) -> dict[str, float]:
    """Returns class name -> p(class | image). Raises UserError unless there are 2 to `most` classes."""
    labels = [int(label) for label in classes]
    if not 2 <= len(labels) <= most:
        raise UserError(f"choose 2 to {most} classes to compare")
    shares = model.classify(chosen.image, labels, num_orders=num_orders, progress_bar=False)[0].tolist()
    return {
        f"{class_title(label, model.class_names)} ({label})": share
        for label, share in zip(labels, shares, strict=True)
    }
