"""What the page's tabs share: settings, the chosen image, live drawing, errors as messages."""

import inspect
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from uuid import uuid4

import app_logic as logic
import gradio as gr
from app_logic import Chosen

from models.hub.classes import class_title
from models.sampling.generate import is_out_of_memory
from util.errors import one_line

HEAVY = dict(concurrency_id="model", concurrency_limit=1)  # one drawing at a time
HISTORY, KEPT, PAUSE = 24, 64, 0.15  # images, downloads; seconds between two canvases


def spoken(function: Callable) -> Callable:
    """Errors of users, and of too little memory, as messages on the page."""

    kinds = (ValueError, RuntimeError, MemoryError)

    def say(error: Exception) -> Exception:
        if isinstance(error, ValueError):
            return gr.Error(
                one_line(error) if len(str(error)) > 400 else str(error), title="That does not work"
            )
        if is_out_of_memory(error):
            return gr.Error(
                "not enough memory for that: fewer images may fit, or a smaller --chunk", title="Too much"
            )
        return error

    @wraps(function)
    def streaming(*arguments):
        try:
            yield from function(*arguments)
        except kinds as error:
            raise say(error) from None

    @wraps(function)
    def plain(*arguments):
        try:
            return function(*arguments)
        except kinds as error:
            raise say(error) from None

    return streaming if inspect.isgeneratorfunction(function) else plain


class Page:
    """What the tabs share: the model, and the chosen image that they work on."""

    def __init__(self, model, max_batch: int, chunk: int | None):
        """To be called inside gradio.Blocks."""
        self.model, self.max_batch, self.chunk, self.side = model, max_batch, chunk, model.img_size_list[0]
        self.chosen, self.history, self.session = gr.State(), gr.State([]), gr.State(lambda: uuid4().hex)
        self.pressed = gr.State(0.0)  # when
        self.stopped: dict[
            str, float
        ] = {}  # sessions, when; Gradio's own cancelling leaves the thread at work
        self.gallery = gr.Gallery(
            format="png", columns=8, height=None, interactive=False, show_label=False, allow_preview=False, render=False,
            buttons=[], elem_id="history",
        )  # fmt: skip
        names = [(class_title(label, model.class_names), label) for label in range(model.class_num)]
        self.classes = [("(no class)", -1), *names]
        self.asked = [self.history, self.session, self.pressed]
        self.folder, self.downloads = tempfile.TemporaryDirectory(prefix="fractalgen-"), 0

    def class_menu(self, label: str, value: int) -> gr.Dropdown:
        return gr.Dropdown(
            self.classes, value=min(value, self.model.class_num - 1), label=label, filterable=True
        )

    def label(self, said) -> int | None:
        return logic.to_label(said, self.model.class_num)

    def title(self, label: int | None) -> str:
        return "no class" if label is None else class_title(label, self.model.class_names)

    def pixel(self, x, y) -> tuple[int, int]:
        return tuple(
            logic.check_number(value, 0, self.side - 1, f"the pixel's {name}")
            for value, name in ((x, "x"), (y, "y"))
        )

    def settings(self) -> list:
        """Components of the settings: seed, guidance, temperature, steps of each level."""
        defaults = self.model.sampling_defaults
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        guidance = gr.Slider(
            1, max(10.0, 2 * defaults.guidance_scale), defaults.guidance_scale, step=0.1, label="Guidance"
        )
        with gr.Accordion("Temperature, steps per level", open=False):
            gr.Markdown(
                "A higher temperature is sharper; an AR level takes one step a patch whatever it says."
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
        return logic.check_settings(
            self.model, seed, guidance, temperature, steps, label is not None, self.chunk
        )

    def when_pressed(self, button: gr.Button, draw: Callable, inputs: list, outputs: list) -> None:
        """draw(*inputs, *asked) once the model is free; Stop ends what was asked for before it, also while it waits."""
        asked = button.click(time.monotonic, None, self.pressed, queue=False, show_progress="hidden")
        asked.then(draw, [*inputs, *self.asked], outputs, **HEAVY, show_progress="hidden")

    def stream(
        self,
        drawing,
        caption: str,
        label: int | None,
        settings: dict,
        asked,
        index: int = 0,
        generated: bool = False,
    ):
        """Events of `logic.watch` -> values of (live, gallery, download, history), live ones while it grows."""
        history, session, pressed = asked
        shown = -1.0
        for kind, told in drawing:
            if self.stopped.get(session, 0.0) > pressed:
                drawing.close()
                yield "<p>Stopped.</p>", gr.skip(), gr.skip(), gr.skip()
                return
            if kind == "step" and time.monotonic() - shown >= PAUSE:
                shown = time.monotonic()
                yield logic.canvas(*told), gr.skip(), gr.skip(), gr.skip()
        drawn = [
            Chosen(
                image,
                f"{caption}, seed {settings['seed']}, image {number}",
                label,
                number,
                settings,
                generated,
            )
            for number, image in enumerate(told, index)
        ]
        shown = logic.figures([logic.figure(one.image, one.caption) for one in drawn], small=len(told) > 2)
        history = [*drawn, *history][:HISTORY]
        yield shown, [one.image for one in history], self.download(told), history

    def download(self, images: list) -> gr.DownloadButton:
        self.downloads = (self.downloads + 1) % KEPT
        path = logic.save_download(images, Path(self.folder.name) / str(self.downloads))
        return gr.DownloadButton(value=path, interactive=True)

    def result(self) -> list:
        """Where drawings appear: the canvas, the download, the history."""
        live = gr.HTML(elem_classes="live")
        return [live, self.gallery, gr.DownloadButton("Download PNG", interactive=False), self.history]

    def stop_button(self) -> None:
        def stop(session: str) -> None:
            self.stopped[session] = time.monotonic()

        gr.Button("Stop").click(stop, self.session, None, queue=False)

    def show_history(self) -> None:
        """The gallery of what was drawn, newest first; a click chooses."""
        with gr.Column():
            gr.Markdown("**History.** Click on an image to work on it.")
            self.gallery.render()

        def choose(history: list, event: gr.SelectData) -> Chosen:
            return history[event.index]

        self.gallery.select(choose, self.history, self.chosen)
