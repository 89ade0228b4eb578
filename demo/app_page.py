"""What the page's tabs share: settings, the chosen image, live drawing, and errors as messages."""

import inspect
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import app_logic as logic
import gradio as gr
from app_logic import Chosen
from app_server import Visitors
from common import image_size
from pace import Pace, drawing_work
from PIL import Image

from models.hub.about import unlike_training
from models.hub.classes import class_title
from models.sampling.generate import is_out_of_memory
from util.errors import one_line

ONE_AT_A_TIME = dict(concurrency_id="model", concurrency_limit=1)  # for events that use the model
MAX_HISTORY, MAX_DOWNLOADS = 24, 64  # images that are kept
PAUSE = 0.15  # seconds between two views of a growing canvas
FOLDERS = re.compile(r"(?<![\w./])/(?:[^/\s:]+/)+")  # of an absolute path
NEW_SEED = "Math.floor(1e6 * Math.random())"  # JavaScript
# On a narrow screen the result is below what is pressed, out of sight.
SCROLL = """() => {
    const result = document.getElementById("%s"), top = result.getBoundingClientRect().top;
    if (top < 0 || top > 0.6 * innerHeight)
        setTimeout(() => result.scrollIntoView({behavior: "smooth"}), 100);
    return [];
}"""
# Gradio's own words stand above it, such as "queue: 1/2 | 3.0/9.1s".
WAITING = '<p class="waiting">Waiting for the model: place in the queue, seconds waited / expected.</p>'


def show_errors(function: Callable) -> Callable:
    """Wraps a handler of the page so that users' errors and a lack of memory become messages on it.

    The messages name files without their folders, and the terminal shows nothing of them.
    """

    kinds = (ValueError, RuntimeError, MemoryError)

    def to_message(error: Exception) -> Exception:
        if isinstance(error, ValueError):
            text = one_line(error) if len(str(error)) > 400 else str(error)
            return gr.Error(FOLDERS.sub("", text), title="That does not work", print_exception=False)
        if is_out_of_memory(error):
            text = "not enough memory for that: fewer images may fit, or a smaller --chunk"
            return gr.Error(text, title="Too much", print_exception=False)
        return error

    @wraps(function)
    def generator(*arguments):
        try:
            yield from function(*arguments)
        except kinds as error:
            raise to_message(error) from None

    @wraps(function)
    def plain(*arguments):
        try:
            return function(*arguments)
        except kinds as error:
            raise to_message(error) from None

    return generator if inspect.isgeneratorfunction(function) else plain


class Settings(NamedTuple):
    """Components: seed; whether to keep it for the next press; all that `Page.options` takes, seed first."""

    seed: gr.Number
    kept: gr.Checkbox
    values: list


def thumbnails(name: str, **options) -> gr.Gallery:
    """Returns a gallery of small images to click on, whose `elem_id` is `name`."""
    return gr.Gallery(
        format="png",
        columns=8,
        height=None,
        interactive=False,
        show_label=False,
        allow_preview=False,
        buttons=[],
        elem_id=name,
        **options,
    )


class Page:
    """The state that the tabs share: the model, the chosen image, the history of images.

    chosen, history  Gradio's states of one visitor: the `Chosen` image, and the images drawn so far
    visitors         knows which requests somebody still waits for
    """

    def __init__(self, model, max_batch: int, chunk: int | None, visitors: Visitors):
        """Creates the states. Must be called inside gradio.Blocks."""
        self.model, self.max_batch, self.chunk, self.side = (
            model,
            max_batch,
            chunk,
            image_size(model, square=True)[0],
        )
        self.chosen, self.history = gr.State(), gr.State([])
        self.visitors, self.pace = visitors, Pace()
        self.gallery = thumbnails("history", render=False)
        names = [(class_title(label, model.class_names), label) for label in range(model.class_num)]
        self.classes = [("(no class)", -1), *names]
        self.folder, self.downloads = tempfile.TemporaryDirectory(prefix="fractalgen-"), 0

    def class_menu(self, title: str, value: int) -> gr.Dropdown:
        value = min(value, self.model.class_num - 1)
        return gr.Dropdown(self.classes, value=value, label=title, filterable=True)

    def follow_class(self, menu: gr.Dropdown) -> None:
        """Makes a class menu show the class of each image that is chosen."""

        def label_of(chosen: Chosen | None) -> int:
            return -1 if chosen is None or chosen.label is None else chosen.label

        self.chosen.change(label_of, self.chosen, menu)

    def follow_image(self, component) -> None:
        """Makes a component show each image that is chosen, enlarged."""
        self.chosen.change(
            lambda chosen: logic.enlarge(chosen.image, 512) if chosen else None, self.chosen, component
        )

    def label(self, value) -> int | None:
        """Returns the label that a class menu's value stands for."""
        return logic.to_label(value, self.model.class_num)

    def title(self, label: int | None) -> str:
        return "no class" if label is None else class_title(label, self.model.class_names)

    def pixel(self, x, y) -> tuple[int, int]:
        return tuple(
            logic.check_number(value, 0, self.side - 1, f"the pixel's {name}")
            for value, name in ((x, "x"), (y, "y"))
        )

    def seed(self, value: int) -> tuple[gr.Number, gr.Checkbox]:
        """Adds a seed, a button that changes it, and a box that keeps it after a press."""
        with gr.Row():
            seed = gr.Number(value, label="Seed", precision=0, min_width=80)
            with gr.Column(min_width=120):
                dice = gr.Button("⚄ New seed", size="sm")
                kept = gr.Checkbox(False, label="Keep it", container=False)
        dice.click(None, None, seed, js=f"() => {NEW_SEED}")
        return seed, kept

    def settings(self) -> Settings:
        """Adds the components of the settings: seed, guidance, temperature, and each level's steps."""
        defaults = self.model.sampling_defaults
        seed, kept = self.seed(0)
        guidance = gr.Slider(
            1, max(10.0, 2 * defaults.guidance_scale), defaults.guidance_scale, step=0.1, label="Guidance"
        )
        ar = all(generator.exact_likelihood for generator in self.model.generators)
        with gr.Accordion("Temperature" if ar else "Temperature, steps per level", open=False):
            gr.Markdown(
                "Temperature multiplies the logits: above 1 is sharper, the reverse of other libraries, "
                "which divide by it."
            )
            temperature = gr.Slider(0.5, 2, defaults.temperature, step=0.01, label="Temperature")
            steps = [
                gr.Slider(
                    1,
                    generator.spec.num_patches,
                    number,
                    step=1,
                    label=f"Steps, level {level}",
                    visible=not generator.exact_likelihood,  # an AR level takes one step for each patch
                )
                for level, (generator, number) in enumerate(
                    zip(self.model.generators, defaults.num_inference_steps, strict=True)
                )
            ]
        return Settings(seed, kept, [seed, guidance, temperature, *steps])

    def options(self, seed, guidance, temperature, steps, label: int | None) -> dict:
        """Returns the values of `settings` as options of `model.generate`."""
        return logic.check_settings(
            self.model, seed, guidance, temperature, steps, label is not None, self.chunk
        )

    def on_press(
        self,
        button: gr.Button,
        draw: Callable,
        inputs: list,
        outputs: list,
        seed: gr.Number,
        kept: gr.Checkbox,
    ) -> None:
        """Calls draw(request, history, *inputs) after the button is pressed, as soon as the model is free.

        outputs     begin with a component of `result`, where the place in the queue is shown meanwhile
        seed, kept  those of `seed`: after a drawing there is a new seed, unless it is kept

        A visitor who presses the button again calls off what it was to draw before.
        """
        live = outputs[0]

        def press(request: gr.Request) -> str:
            self.visitors.end(request, draw)
            return WAITING

        scroll = SCROLL % live.elem_id
        pressed = button.click(
            press, None, live, js=scroll, queue=False, show_progress="hidden", api_visibility="private"
        )
        options = dict(show_progress="minimal", show_progress_on=live, **ONE_AT_A_TIME)
        drawn = pressed.then(draw, [self.history, *inputs], outputs, trigger_mode="multiple", **options)
        drawn.success(None, [seed, kept], seed, js=f"(seed, kept) => kept ? seed : {NEW_SEED}")
        drawn.failure(lambda: "", None, live, queue=False, show_progress="hidden", api_visibility="private")

    def compute(self, request: gr.Request, work: Callable, passes: int, one_pass: Callable | None = None):
        """Returns what `work` returns; or gr.skip(), as soon as nobody waits for it any more.

        passes    the number of likelihood passes that it takes, of which `one_pass` does one: where the page
                  does not know yet how long that takes, it does one first, to say how long the work will take
        """
        if passes > 2 and one_pass is not None and not self.pace.knows("pass"):
            self.compute(request, one_pass, 1)
        if announced := self.pace.announce("pass", passes):
            gr.Info(announced)
        began = time.monotonic()
        for kind, value in self.while_wanted(logic.by_blocks(self.model, work), request):
            if kind == "result":
                self.pace.measure("pass", passes, time.monotonic() - began)
                return value
        return gr.skip()

    def warn_if_unlike_training(self, request: gr.Request, image: Image.Image) -> None:
        """Shows a message if an image is plainly unlike the images that the model was trained on."""
        events = logic.by_blocks(self.model, lambda: unlike_training(self.model, image))
        for kind, value in self.while_wanted(events, request):
            if kind == "result" and value:
                gr.Warning(value, title="Unlike the training images", duration=None)

    def while_wanted(self, events: Iterator[tuple], request: gr.Request, button=None) -> Iterator[tuple]:
        """Yields events, but ends them and the work behind them as soon as nobody waits for it any more."""
        while self.visitors.still_waits(request, button):
            event = next(events, None)
            if event is None:
                return
            yield event
        events.close()

    def stream(
        self,
        events: Iterator[tuple],
        caption: str,
        label: int | None,
        settings: dict,
        asked: tuple[gr.Request, list[Chosen], Callable],
        index: int = 0,
        generated: bool = False,
        share: float = 1.0,
        number: int = 1,
        show: Callable[[list[Chosen]], str] = logic.results,
    ) -> Iterator[tuple]:
        """Yields values of the components of `result` while images are drawn, and at the end the images.

        events                              those of `live.watch`
        asked                               the request, the visitor's history, and the `draw` of `on_press`
        label, settings, index, generated   see `Chosen`
        number, share                       how many images are drawn, and how much of each
        show                                returns HTML of the images that were drawn
        """
        request, history, draw = asked
        work = drawing_work(self.model, number, settings, share)
        yield f"<p>{self.pace.announce('drawing', work)}</p>", gr.skip(), gr.skip(), gr.skip()
        kind, shown, began = "step", -1.0, time.monotonic()
        for kind, value in self.while_wanted(events, request, draw):
            if kind == "step" and time.monotonic() - shown >= PAUSE:
                shown = time.monotonic()
                yield logic.canvas(self.model.alphabet, began, *value), gr.skip(), gr.skip(), gr.skip()
        if kind == "step":  # not wanted any more
            yield "<p>Stopped.</p>", gr.skip(), gr.skip(), gr.skip()
            return
        self.pace.measure("drawing", work, time.monotonic() - began)
        images = value
        caption = f"{caption}, seed {settings['seed']}, image"
        drawn = [
            Chosen(image, f"{caption} {number}", label, number, settings, generated)
            for number, image in enumerate(images, index)
        ]
        history = [*drawn, *history][:MAX_HISTORY]
        yield (
            show(drawn),
            [one.image for one in history],
            self.download(images),
            history,
        )

    def download(self, images: list[Image.Image]) -> gr.DownloadButton:
        """Writes the images to a file and returns a button that downloads it."""
        self.downloads = (self.downloads + 1) % MAX_DOWNLOADS
        path = logic.save_download(images, Path(self.folder.name) / str(self.downloads))
        return gr.DownloadButton(value=path, interactive=True)

    def result(self, name: str) -> list:
        """Adds and returns the components that show what is drawn: canvas, gallery, download and history.

        name  of the tab's, which no other tab has
        """
        live = gr.HTML(elem_id=f"live-{name}", elem_classes="live")
        return [live, self.gallery, gr.DownloadButton("Download PNG", interactive=False), self.history]

    def stop_button(self) -> None:
        def stop(request: gr.Request) -> None:
            self.visitors.end(request)

        gr.Button("Stop").click(stop, queue=False)

    def show_examples(self, examples: list[Chosen]) -> None:
        """Adds a row of images that the model has not seen, if there are some. A click on one chooses it."""
        if not examples:
            return

        def choose(event: gr.SelectData) -> Chosen:
            return examples[event.index]

        title = "Or take a real image, which the model was not trained on:"
        gr.HTML(title, padding=False, elem_id="examples-title")
        thumbnails("examples", value=[one.image for one in examples]).select(choose, None, self.chosen)

    def show_history(self) -> None:
        """Adds the gallery of the images that were drawn, the newest first. A click on one chooses it."""
        with gr.Column():
            gr.Markdown("**History.** Click on an image to work on it.")
            self.gallery.render()

        def choose(history: list, event: gr.SelectData) -> Chosen:
            return history[event.index]

        self.gallery.select(choose, self.history, self.chosen)
