"""The page's four tabs: components, and what happens when they are used. What is done is in app_logic.py."""

import app_logic as logic
import gradio as gr
from app_page import HEAVY, Page, spoken
from PIL import Image

COMPARED = 20  # classes at most


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
            result = page.result()

    @spoken
    def generate(said, number, seed, guidance, temperature, *rest):
        steps, asked = rest[:-3], rest[-3:]
        label = page.label(said)
        options = page.options(seed, guidance, temperature, steps, label)
        number = logic.check_number(number, 1, page.max_batch, "the number of images")
        drawing = logic.draw(page.model, label, number, options)
        for shown in page.stream(drawing, page.title(label), label, options, asked, generated=True):
            history = shown[-1]
            yield *shown, history[0] if isinstance(history, list) else gr.skip()

    page.when_pressed(run, generate, [menu, number, *settings], [*result, page.chosen])


def build_edit(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            editor = gr.ImageEditor(
                label="Paint here", format="png", type="numpy", sources=(), transforms=(), layers=False, canvas_size=(512, 512),
                brush=gr.Brush(default_size=48, colors=["#ff2d95"], color_mode="fixed"), buttons=[], elem_id="editor",
            )  # fmt: skip
            mode = gr.Radio(
                [logic.REPAINT, logic.KEEP, logic.OTHER_CLASS],
                value=logic.REPAINT,
                label="What is painted or boxed",
            )
            by_box = gr.Checkbox(False, label="A box instead of the brush")
            quarter = page.side // 4
            with gr.Row(visible=False) as row:
                numbers = (("x", quarter), ("y", quarter), ("width", 2 * quarter), ("height", 2 * quarter))
                box = [gr.Number(value, label=name, precision=0, min_width=60) for name, value in numbers]
            by_box.change(lambda on: gr.Row(visible=on), by_box, row)
        with gr.Column(scale=1):
            menu = page.class_menu("Class to draw", 0)
            number = gr.Slider(
                1, min(logic.MAX_RESULTS, page.max_batch), min(4, page.max_batch), step=1, label="Results"
            )
            settings = page.settings()
            with gr.Row():
                run = gr.Button("Edit", variant="primary")
                page.stop_button()
        with gr.Column(scale=2):
            result = page.result()
    page.chosen.change(lambda one: logic.enlarge(one.image, 512) if one else None, page.chosen, editor)
    page.chosen.change(lambda one: -1 if one is None or one.label is None else one.label, page.chosen, menu)

    @spoken
    def edit(
        one, drawing, mode, by_box, x, y, width, height, said, number, seed, guidance, temperature, *rest
    ):
        steps, asked = rest[:-3], rest[-3:]
        smaller = one is not None and max(one.image.size) <= page.side and min(one.image.size) < page.side
        if not (mode == logic.KEEP and smaller):
            logic.check_chosen(one, page.side)
        label = page.label(said)
        if mode == logic.OTHER_CLASS and label == one.label:
            raise logic.UserError("choose another class than the image's in 'Class to draw'")
        options = page.options(seed, guidance, temperature, steps, label)
        number = logic.check_number(
            number, 1, min(logic.MAX_RESULTS, page.max_batch), "the number of results"
        )
        if smaller:
            position = (x, y) if by_box else [(page.side - length) // 2 for length in one.image.size]
            position = [logic.check_number(value, 0, page.side, "the box's x and y") for value in position]
            drawing = logic.extend(page.model, one.image, position, label, number, options)
        else:
            layers = drawing["layers"] if drawing else []
            mask = logic.region(by_box, (x, y, width, height), layers, page.side)
            mask = ~mask if mode == logic.KEEP else mask
            drawing = logic.redraw(page.model, one.image, mask, label, number, options)
        yield from page.stream(drawing, f"edit, {page.title(label)}", label, options, asked)

    page.when_pressed(run, edit, [page.chosen, editor, mode, by_box, *box, menu, number, *settings], result)


def build_inside(page: Page) -> None:
    gr.Markdown(
        "Click on the image, or give a pixel: each level's patch that holds it is followed down. Pink: the patch that is "
        "decided in this step. Its outputs go down as conditions, and so do its neighbours': green ones were known then, "
        "orange ones not. Violet: not known yet."
    )
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
            patch = gr.Radio(label="Draw again, and keep the rest", choices=[], visible=False)
            seed = gr.Number(1, label="Seed", precision=0, minimum=0)
            again = gr.Button("Draw it again", interactive=False)
        with gr.Column(scale=3):
            shown = gr.HTML(elem_classes="live")
    with gr.Accordion("Drawn again", open=True):
        result = page.result()
    page.chosen.change(lambda one: logic.enlarge(one.image, 512) if one else None, page.chosen, image)

    @spoken
    def look(one, x, y):
        logic.check_chosen(one, page.side)
        at = page.pixel(x, y)
        _, parts = logic.look(page.model, one, at)
        patches, levels = logic.choices_of_patches(page.model, at), logic.choices_of_levels(page.model)
        names = [name for name, _ in patches + levels * one.generated]
        return parts, gr.Radio(choices=names, value=names[1], visible=True), gr.Button(interactive=True)

    def clicked(event: gr.SelectData):
        zoom = logic.enlarge(Image.new("1", (page.side, page.side)), 512).width // page.side
        return [min(page.side - 1, int(place) // zoom) for place in event.index]

    @spoken
    def draw_again(one, x, y, name, seed, *asked):
        logic.check_chosen(one, page.side)
        defaults = page.model.sampling_defaults
        settings = one.settings or vars(defaults)
        options = page.options(
            seed,
            settings["guidance_scale"],
            settings["temperature"],
            settings["num_inference_steps"],
            one.label,
        )
        level = dict(logic.choices_of_levels(page.model)).get(name)
        if level is not None and one.generated:
            options = logic.with_new_dice(page.model, one, level, options["seed"])
            drawing = logic.draw(page.model, one.label, 1, options, one.index)
            yield from page.stream(drawing, name, one.label, options, asked, one.index, generated=True)
            return
        box = dict(logic.choices_of_patches(page.model, page.pixel(x, y))).get(name)
        if box is None:
            raise logic.UserError("look inside this image first, then choose what to draw again")
        mask = logic.box_mask(page.side, (*box[:2], box[2], box[2])).numpy()
        drawing = logic.redraw(page.model, one.image, mask, one.label, min(4, page.max_batch), options)
        yield from page.stream(drawing, f"again: {name}", one.label, options, asked)

    looked = dict(fn=look, inputs=[page.chosen, *pixel], outputs=[shown, patch, again], **HEAVY)
    run.click(**looked)
    image.select(clicked, None, pixel).success(**looked)
    page.when_pressed(again, draw_again, [page.chosen, *pixel, patch, seed], result)


def build_likelihood(page: Page) -> None:
    gr.Markdown(
        "How many bits each pixel costs the model, unguided, and which class explains the image best, by Bayes' rule."
    )
    few = page.model.class_num <= COMPARED
    with gr.Row():
        with gr.Column(scale=1):
            menu = page.class_menu("KnownPixels the class", -1)
            orders = gr.Slider(1, 8, 2, step=1, label="Orders of patches drawn (MAR)")
            run = gr.Button("Read", variant="primary")
            compared = gr.Dropdown(
                page.classes[1:], value=[label for _, label in page.classes[1:]] if few else [], multiselect=True,
                max_choices=COMPARED, label="Classes to compare", visible=page.model.class_num > 1,
            )  # fmt: skip
            which = gr.Button("Which class?", visible=page.model.class_num > 1)
        with gr.Column(scale=2):
            shown = gr.HTML(elem_classes="live")
            share = gr.Label(label="p(class | image), equal priors", visible=page.model.class_num > 1)
    page.chosen.change(lambda one: -1 if one is None or one.label is None else one.label, page.chosen, menu)

    @spoken
    def read(one, said, orders):
        logic.check_chosen(one, page.side)
        return logic.likelihood(
            page.model, one, page.label(said), logic.check_number(orders, 1, 8, "the number of orders")
        )

    @spoken
    def compare(one, classes, orders):
        logic.check_chosen(one, page.side)
        return logic.posterior(
            page.model, one, classes, logic.check_number(orders, 1, 8, "the number of orders"), COMPARED
        )

    run.click(read, [page.chosen, menu, orders], shown, **HEAVY)
    which.click(compare, [page.chosen, compared, orders], share, **HEAVY)


TABS = {
    "Generate": build_generate,
    "Edit": build_edit,
    "Look inside": build_inside,
    "Likelihood": build_likelihood,
}
