"""The page's four tabs: their components, and what happens when they are used. app_logic.py does the work."""

from functools import partial
from types import SimpleNamespace

import app_logic as logic
import gradio as gr
from app_page import ONE_AT_A_TIME, SCROLL, Page, show_errors
from PIL import Image

from util.errors import UserError

MAX_COMPARED = 20  # classes
MAX_ORDERS = 8
REDRAWN = 3  # images of a patch that is drawn again


def build_generate(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            menu = page.class_menu("Class", 0)
            number = gr.Slider(1, page.max_batch, min(4, page.max_batch), step=1, label="Images")
            settings = page.settings()
            with gr.Row():
                run = gr.Button("Generate", variant="primary")
                page.stop_button()
        with gr.Column(scale=2):
            result = page.result("generate")

    @show_errors
    def generate(request: gr.Request, history, class_value, number, seed, guidance, temperature, *steps):
        label = page.label(class_value)
        options = page.options(seed, guidance, temperature, steps, label)
        number = logic.check_number(number, 1, page.max_batch, "the number of images")
        events = logic.draw(page.model, label, number, options)
        asked = request, history, generate
        stream = page.stream(events, page.title(label), label, options, asked, generated=True, number=number)
        for shown in stream:
            history = shown[-1]
            yield *shown, history[0] if isinstance(history, list) else gr.skip()

    inputs = [menu, number, *settings.values]
    page.on_press(run, generate, inputs, [*result, page.chosen], settings.seed, settings.kept)


def build_edit(page: Page) -> None:
    max_results = min(logic.MAX_RESULTS, page.max_batch)
    with gr.Row():
        with gr.Column(scale=1):
            editor, mode, by_box, box = region_components(page)
        with gr.Column(scale=1):
            menu = page.class_menu("Class to draw", 0)
            number = gr.Slider(1, max_results, min(4, max_results), step=1, label="Results")
            settings = page.settings()
            with gr.Row():
                run = gr.Button("Edit", variant="primary")
                page.stop_button()
        with gr.Column(scale=2):
            result = page.result("edit")
    page.follow_image(editor)
    page.follow_class(menu)

    @show_errors
    def edit(request: gr.Request, history, chosen, drawing, mode, by_box, x, y, width, height, *rest):
        class_value, number, seed, guidance, temperature, *steps = rest
        smaller = logic.is_smaller(chosen, page.side)
        if not (mode == logic.KEEP and smaller):
            logic.check_chosen(chosen, page.side)
        label = page.label(class_value)
        if mode == logic.OTHER_CLASS and label == chosen.label:
            raise UserError("choose another class than the image's in 'Class to draw'")
        options = page.options(seed, guidance, temperature, steps, label)
        number = logic.check_number(number, 1, max_results, "the number of results")
        if smaller:
            position = (x, y) if by_box else [(page.side - length) // 2 for length in chosen.image.size]
            position = [logic.check_number(value, 0, page.side, "the box's x and y") for value in position]
            share = 1 - chosen.image.width * chosen.image.height / page.side**2
            events = logic.extend(page.model, chosen.image, position, label, number, options)
        else:
            layers = drawing["layers"] if drawing else []
            mask = logic.region(by_box, (x, y, width, height), layers, page.side)
            mask, share = (~mask if mode == logic.KEEP else mask), mask.mean()
            if chosen.settings is None:
                page.warn_if_unlike_training(request, chosen.image)
            events = logic.redraw(page.model, chosen.image, mask, label, number, options)
        asked = request, history, edit
        drawn = dict(number=number, share=share)
        yield from page.stream(events, f"edit, {page.title(label)}", label, options, asked, **drawn)

    inputs = [page.chosen, editor, mode, by_box, *box, menu, number, *settings.values]
    page.on_press(run, edit, inputs, result, settings.seed, settings.kept)


def region_components(page: Page) -> tuple[gr.ImageEditor, gr.Radio, gr.Checkbox, list[gr.Number]]:
    """Adds and returns the components that say what to edit: editor, mode, whether to use the box, box."""
    editor = gr.ImageEditor(
        label="Paint here",
        format="png",
        type="numpy",
        sources=(),
        transforms=(),
        layers=False,
        canvas_size=(512, 512),
        brush=gr.Brush(default_size=48, colors=["#ff2d95"], color_mode="fixed"),
        buttons=[],
        elem_id="editor",
    )
    mode = gr.Radio(
        [logic.REPAINT, logic.KEEP, logic.OTHER_CLASS], value=logic.REPAINT, label="What is painted or boxed"
    )
    by_box = gr.Checkbox(False, label="A box instead of the brush")
    quarter = page.side // 4
    with gr.Row(visible=False) as row:
        numbers = (("x", quarter), ("y", quarter), ("width", 2 * quarter), ("height", 2 * quarter))
        box = [gr.Number(value, label=name, precision=0, min_width=60) for name, value in numbers]
    by_box.change(lambda on: gr.Row(visible=on), by_box, row)
    return editor, mode, by_box, box


def build_inside(page: Page) -> None:
    gr.HTML(
        "<details><summary>Click on a pixel to follow the patches that hold it.</summary>Pink: the patch "
        "that is decided; its output and those of its neighbours are the next level's conditions. Green: a "
        "neighbour that was known then. Orange: one that was not. Violet: pixels that are not known yet."
        "</details>",
        padding=False,
    )
    parts = inside_components(page)
    result = page.result("again")
    page.follow_image(parts.image)

    @show_errors
    def look(request: gr.Request, chosen, x, y):
        logic.check_chosen(chosen, page.side)
        pixel = page.pixel(x, y)
        shown = page.compute(request, lambda: logic.look(page.model, chosen, pixel), passes=1)
        choices = [name for name, _ in logic.patches_to_redraw(page.model, pixel)]
        if chosen.generated:
            choices += [name for name, _ in logic.levels_to_redraw(page.model)]
        menu = gr.Dropdown(choices=choices, value=choices[1], visible=True)
        return shown, menu, gr.Button(interactive=True)

    def clicked(event: gr.SelectData):
        zoom = logic.enlarge(Image.new("1", (page.side, page.side)), 512).width // page.side
        return [min(page.side - 1, int(position) // zoom) for position in event.index]

    @show_errors
    def draw_again(request: gr.Request, history, chosen, x, y, name, seed):
        asked = request, history, draw_again
        logic.check_chosen(chosen, page.side)
        settings = chosen.settings or vars(page.model.sampling_defaults)
        kept = [settings[name] for name in ("guidance_scale", "temperature", "num_inference_steps")]
        options = page.options(seed, *kept, chosen.label)
        level = dict(logic.levels_to_redraw(page.model)).get(name)
        if level is not None and chosen.generated:
            yield from draw_level_again(page, chosen, level, name, options, asked)
        else:
            box = dict(logic.patches_to_redraw(page.model, page.pixel(x, y))).get(name)
            yield from draw_patch_again(page, chosen, box, name, options, asked)

    looked = dict(
        fn=look,
        inputs=[page.chosen, *parts.pixel],
        outputs=[parts.shown, parts.choice, parts.again],
        **ONE_AT_A_TIME,
    )
    parts.run.click(**looked).success(None, js=SCROLL % "places")
    parts.image.select(clicked, None, parts.pixel).success(**looked).success(None, js=SCROLL % "places")
    inputs = [page.chosen, *parts.pixel, parts.choice, parts.seed]
    page.on_press(parts.again, draw_again, inputs, result, parts.seed, parts.kept)


def inside_components(page: Page) -> SimpleNamespace:
    """Adds the components to look inside and to choose what to draw again, and returns them by name."""
    with gr.Row():
        with gr.Column(scale=1):
            image = gr.Image(
                label="The chosen image", format="png", interactive=False, buttons=[], elem_id="inside"
            )
            with gr.Row():
                pixel = [
                    gr.Number(page.side // 2, label=name, precision=0, min_width=60) for name in ("x", "y")
                ]
            run = gr.Button("Look inside", variant="primary")
            choice = gr.Dropdown(
                label="Draw this again, and keep the rest", choices=[], filterable=False, visible=False
            )
            seed, kept = page.seed(1)
            again = gr.Button("Draw it again", interactive=False)
        with gr.Column(scale=3):
            shown = gr.HTML(elem_id="places", elem_classes="live")
    return SimpleNamespace(
        image=image, pixel=pixel, run=run, choice=choice, seed=seed, kept=kept, again=again, shown=shown
    )


def draw_level_again(page: Page, chosen, level: int, name: str, options: dict, asked):
    """Draws a generated image with new random numbers for one level, and yields like `Page.stream`."""
    options = logic.with_new_random_numbers(page.model, chosen, level, options["seed"])
    events = logic.draw(page.model, chosen.label, 1, options, chosen.index)
    show = partial(logic.before_and_after, chosen, None)
    yield from page.stream(
        events, name, chosen.label, options, asked, chosen.index, generated=True, show=show
    )


def draw_patch_again(page: Page, chosen, box, name: str, options: dict, asked):
    """Repaints the patch `box` (x, y, width, height) of an image, and yields like `Page.stream`."""
    if box is None:
        raise UserError("look inside this image first, then choose what to draw again")
    mask = logic.box_mask(page.side, box).numpy()
    drawn = dict(number=min(REDRAWN, page.max_batch), share=mask.mean())
    events = logic.redraw(page.model, chosen.image, mask, chosen.label, drawn["number"], options)
    show = partial(logic.before_and_after, chosen, None if mask.all() else box)
    yield from page.stream(events, f"again: {name}", chosen.label, options, asked, **drawn, show=show)


def build_likelihood(page: Page) -> None:
    gr.Markdown(
        "How many bits each pixel costs the model, without guidance, and which class explains the image "
        "best, by Bayes' rule."
    )
    has_classes = page.model.class_num > 1
    with gr.Row():
        with gr.Column(scale=1):
            menu = page.class_menu("Class that the model is given", -1)
            ar = all(generator.exact_likelihood for generator in page.model.generators)
            orders = gr.Slider(
                1, MAX_ORDERS, 1 if ar else 2, step=1, label="Random orders of patches", visible=not ar
            )
            run = gr.Button("Compute the likelihood", variant="primary")
            all_labels = [label for _, label in page.classes[1:]]
            compared = gr.Dropdown(
                page.classes[1:],
                value=all_labels if len(all_labels) <= MAX_COMPARED else [],
                multiselect=True,
                max_choices=MAX_COMPARED,
                label="Classes to compare",
                visible=has_classes,
            )
            which = gr.Button("Which class?", visible=has_classes)
        with gr.Column(scale=2):
            shown = gr.HTML(elem_id="bits", elem_classes="live")
            share = gr.Label(label="p(class | image), equal priors", visible=has_classes)
    page.follow_class(menu)

    def one_pass(chosen):
        return lambda: page.model.log_likelihood(chosen.image, num_orders=1, progress_bar=False)

    @show_errors
    def likelihood(request: gr.Request, chosen, class_value, orders):
        logic.check_chosen(chosen, page.side)
        label = page.label(class_value)
        orders = logic.check_number(orders, 1, MAX_ORDERS, "the number of orders")
        work = lambda: logic.likelihood(page.model, chosen, label, orders)  # noqa: E731
        return page.compute(request, work, 2 * orders, one_pass(chosen))

    @show_errors
    def posterior(request: gr.Request, chosen, classes, orders):
        logic.check_chosen(chosen, page.side)
        orders = logic.check_number(orders, 1, MAX_ORDERS, "the number of orders")
        work = lambda: logic.posterior(page.model, chosen, classes, orders, MAX_COMPARED)  # noqa: E731
        return page.compute(request, work, max(1, len(classes)) * orders, one_pass(chosen))

    asked = run.click(likelihood, [page.chosen, menu, orders], shown, **ONE_AT_A_TIME)
    asked.success(None, js=SCROLL % "bits")
    which.click(posterior, [page.chosen, compared, orders], share, **ONE_AT_A_TIME)


TABS = {
    "Generate": build_generate,
    "Edit": build_edit,
    "Look inside": build_inside,
    "Likelihood": build_likelihood,
}
