"""What the page's tabs share: settings, the chosen image, live drawing, and errors as messages."""

import inspect
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import app_logic as logic
import gradio as gr
from app_logic import Chosen
from app_server import Visitors
from PIL import Image

from models.hub.classes import class_title
from models.sampling.generate import is_out_of_memory
from util.errors import one_line

ONE_AT_A_TIME = dict(concurrency_id="model", concurrency_limit=1)  # for events that use the model
MAX_HISTORY, MAX_DOWNLOADS = 24, 64  # images that are kept
PAUSE = 0.15  # seconds between two views of a growing canvas


def show_errors(function: Callable) -> Callable:
    """Wraps a handler of the page so that users' errors and a lack of memory become messages on it."""

    kinds = (ValueError, RuntimeError, MemoryError)

    def to_message(error: Exception) -> Exception:
        if isinstance(error, ValueError):
            text = one_line(error) if len(str(error)) > 400 else str(error)
            return gr.Error(text, title="That does not work")
        if is_out_of_memory(error):
            text = "not enough memory for that: fewer images may fit, or a smaller --chunk"
            return gr.Error(text, title="Too much")
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


class Page:
    """The state that the tabs share: the model, the chosen image, the history of images.

    chosen, history  Gradio's states of one visitor: the `Chosen` image, and the images drawn so far
    visitors         knows which requests somebody still waits for
    """

    def __init__(self, model, max_batch: int, chunk: int | None, visitors: Visitors):
        """Creates the states. Must be called inside gradio.Blocks."""
        self.model, self.max_batch, self.chunk, self.side = model, max_batch, chunk, model.img_size_list[0]
        self.chosen, self.history = gr.State(), gr.State([])
        self.visitors = visitors
        self.gallery = gr.Gallery(
            format="png",
            columns=8,
            height=None,
            interactive=False,
            show_label=False,
            allow_preview=False,
            render=False,
            buttons=[],
            elem_id="history",
        )
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

    def settings(self) -> list:
        """Adds the components of the settings: seed, guidance, temperature, and each level's steps."""
        defaults = self.model.sampling_defaults
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        guidance = gr.Slider(
            1, max(10.0, 2 * defaults.guidance_scale), defaults.guidance_scale, step=0.1, label="Guidance"
        )
        with gr.Accordion("Temperature, steps per level", open=False):
            gr.Markdown(
                "A higher temperature is sharper. "
                "An AR level always takes one step per patch, so its steps have no effect."
            )
            temperature = gr.Slider(0.5, 2, defaults.temperature, step=0.01, label="Temperature")
            steps = [
                gr.Slider(1, generator.spec.num_patches, number, step=1, label=f"Steps, level {level}")
                for level, (generator, number) in enumerate(
                    zip(self.model.generators, defaults.num_inference_steps, strict=True)
                )
            ]
        return [seed, guidance, temperature, *steps]

    def options(self, seed, guidance, temperature, steps, label: int | None) -> dict:
        """Returns the values of `settings` as options of `model.generate`."""
        return logic.check_settings(
            self.model, seed, guidance, temperature, steps, label is not None, self.chunk
        )

    def on_press(self, button: gr.Button, draw: Callable, inputs: list, outputs: list) -> None:
        """Calls draw(request, history, *inputs) after the button is pressed, as soon as the model is free.

        A visitor who presses the button again calls off what it was to draw before.
        """

        def press(request: gr.Request) -> None:
            self.visitors.end(request, draw)

        pressed = button.click(press, queue=False, show_progress="hidden", api_visibility="private")
        options = dict(trigger_mode="multiple", show_progress="hidden", **ONE_AT_A_TIME)
        pressed.then(draw, [self.history, *inputs], outputs, **options)

    def compute(self, request: gr.Request, work: Callable):
        """Returns what `work` returns; or gr.skip(), as soon as nobody waits for it any more."""
        for kind, value in self.while_wanted(logic.by_blocks(self.model, work), request):
            if kind == "result":
                return value
        return gr.skip()

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
    ) -> Iterator[tuple]:
        """Yields values of the components of `result` while images are drawn, and at the end the images.

        events                              those of `live.watch`
        asked                               the request, the visitor's history, and the `draw` of `on_press`
        label, settings, index, generated   see `Chosen`
        """
        request, history, draw = asked
        kind, shown = "step", -1.0
        for kind, value in self.while_wanted(events, request, draw):
            if kind == "step" and time.monotonic() - shown >= PAUSE:
                shown = time.monotonic()
                yield logic.canvas(*value), gr.skip(), gr.skip(), gr.skip()
        if kind == "step":  # not wanted any more
            yield "<p>Stopped.</p>", gr.skip(), gr.skip(), gr.skip()
            return
        images = value
        caption = f"{caption}, seed {settings['seed']}, image"
        drawn = [
            Chosen(image, f"{caption} {number}", label, number, settings, generated)
            for number, image in enumerate(images, index)
        ]
        figures = [logic.figure(one.image, one.caption) for one in drawn]
        history = [*drawn, *history][:MAX_HISTORY]
        yield (
            logic.figures(figures, small=len(images) > 2),
            [one.image for one in history],
            self.download(images),
            history,
        )

    def download(self, images: list[Image.Image]) -> gr.DownloadButton:
        """Writes the images to a file and returns a button that downloads it."""
        self.downloads = (self.downloads + 1) % MAX_DOWNLOADS
        path = logic.save_download(images, Path(self.folder.name) / str(self.downloads))
        return gr.DownloadButton(value=path, interactive=True)

    def result(self) -> list:
        """Adds and returns the components that show what is drawn: canvas, gallery, download and history."""
        live = gr.HTML(elem_classes="live")
        return [live, self.gallery, gr.DownloadButton("Download PNG", interactive=False), self.history]

    def stop_button(self) -> None:
        def stop(request: gr.Request) -> None:
            self.visitors.end(request)

        gr.Button("Stop").click(stop, queue=False)

    def show_history(self) -> None:
        """Adds the gallery of the images that were drawn, the newest first. A click on one chooses it."""
        with gr.Column():
            gr.Markdown("**History.** Click on an image to work on it.")
            self.gallery.render()

        def choose(history: list, event: gr.SelectData) -> Chosen:
            return history[event.index]

        self.gallery.select(choose, self.history, self.chosen)
