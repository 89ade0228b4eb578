"""The page's four tabs: components, and what happens when they are used. What is done is in app_logic.py."""

import app_logic as logic
import gradio as gr
from app_logic import Chosen
from app_page import HEAVY, Page, spoken
from PIL import Image

from util.classes import class_title

COMPARED = 20  # classes at most


def first(history: list) -> Chosen | None:
    return history[0] if history else None


def build_generate(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            menu = page.class_menu("Class", 0)
            number = gr.Slider(1, page.max_batch, min(4, page.max_batch), step=1, label="Pictures")
            settings = page.settings()
            with gr.Row():
                run = gr.Button("Generate", variant="primary")
                page.stop_button()
        with gr.Column(scale=2):
            result = page.result()

    @spoken
    def generate(said, number, seed, guidance, temperature, *rest):
        *steps, history, session = rest
        label = logic.to_label(said)
        options = logic.check_settings(page.model, seed, guidance, temperature, steps, label is not None)
        number = logic.check_number(number, page.max_batch, "the number of pictures")
        caption = "no class" if label is None else class_title(label, page.model.class_names)
        yield from page.stream(logic.draw(page.model, label, number, options), caption, label, options, history, session)

    event = run.click(generate, [menu, number, *settings, page.history, page.session], result, **HEAVY, show_progress="hidden")
    event.success(first, page.history, page.chosen)


def build_edit(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            editor = gr.ImageEditor(
                label="Paint here", format="png", type="numpy", sources=(), transforms=(), layers=False, canvas_size=(512, 512),
                brush=gr.Brush(default_size=48, colors=["#ff2d95"], color_mode="fixed"), buttons=[], elem_id="editor",
            )  # fmt: skip
            mode = gr.Radio(
                [logic.REPAINT, logic.KEEP, logic.OTHER_CLASS], value=logic.REPAINT, label="What is painted or boxed"
            )
            by_box = gr.Checkbox(False, label="A box instead of the brush")
            quarter = page.side // 4
            with gr.Row(visible=False) as row:
                numbers = (("x", quarter), ("y", quarter), ("width", 2 * quarter), ("height", 2 * quarter))
                box = [gr.Number(value, label=name, precision=0, min_width=60) for name, value in numbers]
            by_box.change(lambda on: gr.Row(visible=on), by_box, row)
        with gr.Column(scale=1):
            menu = page.class_menu("Class to draw", 0)
            number = gr.Slider(1, min(logic.MAX_RESULTS, page.max_batch), min(4, page.max_batch), step=1, label="Results")
            settings = page.settings()
            with gr.Row():
                run = gr.Button("Edit", variant="primary")
                page.stop_button()
        with gr.Column(scale=2):
            result = page.result()
    page.chosen.change(lambda one: logic.enlarge(one.image, 512) if one else None, page.chosen, editor)
    page.chosen.change(lambda one: -1 if one is None or one.label is None else one.label, page.chosen, menu)

    @spoken
    def edit(one, drawing, mode, by_box, x, y, width, height, said, number, seed, guidance, temperature, *rest):
        *steps, history, session = rest
        logic.check_chosen(one)
        label = logic.to_label(said)
        if mode == logic.OTHER_CLASS and label == one.label:
            raise logic.UserError("choose another class than the picture's in 'Class to draw'")
        options = logic.check_settings(page.model, seed, guidance, temperature, steps, label is not None)
        number = logic.check_number(number, min(logic.MAX_RESULTS, page.max_batch), "the number of results")
        if mode == logic.KEEP and max(one.image.size) <= page.side and min(one.image.size) < page.side:
            position = [(page.side - length) // 2 for length in one.image.size]
            drawing = logic.extend(page.model, one.image, position, label, number, options)
        else:
            layers = drawing["layers"] if drawing else []
            mask = logic.region(by_box, (x, y, width, height), layers, page.side)
            mask = ~mask if mode == logic.KEEP else mask
            drawing = logic.redraw(page.model, one.image, mask, label, number, options)
        name = "no class" if label is None else class_title(label, page.model.class_names)
        yield from page.stream(drawing, f"edit, {name}", label, options, history, session)

    inputs = [page.chosen, editor, mode, by_box, *box, menu, number, *settings, page.history, page.session]
    run.click(edit, inputs, result, **HEAVY, show_progress="hidden")


def build_inside(page: Page) -> None:
    gr.Markdown(
        "Click on the picture, or give a pixel: each level's patch that holds it is followed down. Pink: the patch that is "
        "decided in this step. Its outputs go down as conditions, and so do its neighbours': green ones were known then, "
        "orange ones not. Violet: not known yet."
    )
    with gr.Row():
        with gr.Column(scale=1):
            image = gr.Image(label="The chosen picture", format="png", interactive=False, buttons=[], elem_id="inside")
            with gr.Row():
                pixel = [gr.Number(page.side // 2, label=name, precision=0, min_width=60) for name in ("x", "y")]
            run = gr.Button("Look inside", variant="primary")
            patch = gr.Radio(label="Draw again, and keep all the rest", choices=[], visible=False)
            seed = gr.Number(1, label="Seed", precision=0, minimum=0)
            again = gr.Button("Draw it again", interactive=False)
        with gr.Column(scale=3):
            shown = gr.HTML(elem_classes="live")
    with gr.Accordion("Drawn again", open=True):
        result = page.result()
    page.chosen.change(lambda one: logic.enlarge(one.image, 512) if one else None, page.chosen, image)

    @spoken
    def look(one, x, y):
        logic.check_chosen(one)
        if x is None or y is None:
            raise logic.UserError("the pixel needs two numbers, x and y")
        _, parts = logic.look(page.model, one, (int(x), int(y)))
        names = [name for name, _ in logic.choices_of_patches(page.model, (int(x), int(y)))]
        return parts, gr.Radio(choices=names, value=names[1], visible=True), gr.Button(interactive=True)

    def clicked(event: gr.SelectData):
        zoom = logic.enlarge(Image.new("1", (page.side, page.side)), 512).width // page.side
        return [min(page.side - 1, int(place) // zoom) for place in event.index]

    @spoken
    def draw_again(one, x, y, name, seed, history, session):
        box = dict(logic.choices_of_patches(page.model, (int(x), int(y))))[name]
        defaults = page.model.sampling_defaults
        steps = one.steps or defaults.num_inference_steps
        options = logic.check_settings(
            page.model, seed, defaults.guidance_scale, defaults.temperature, steps, one.label is not None
        )
        mask = logic.box_mask(page.side, (*box[:2], box[2], box[2])).numpy()
        drawing = logic.redraw(page.model, one.image, mask, one.label, min(4, page.max_batch), options)
        yield from page.stream(drawing, f"again: {name}", one.label, options, history, session)

    looked = dict(fn=look, inputs=[page.chosen, *pixel], outputs=[shown, patch, again], **HEAVY)
    run.click(**looked)
    image.select(clicked, None, pixel).success(**looked)
    again.click(
        draw_again, [page.chosen, *pixel, patch, seed, page.history, page.session], result, **HEAVY, show_progress="hidden"
    )


def build_likelihood(page: Page) -> None:
    gr.Markdown(
        "How many bits each pixel costs the model, unguided, and which class explains the picture best, by Bayes' rule."
    )
    few = page.model.class_num <= COMPARED
    with gr.Row():
        with gr.Column(scale=1):
            menu = page.class_menu("Given the class", -1)
            orders = gr.Slider(1, 8, 2, step=1, label="Orders of patches drawn (MAR)")
            run = gr.Button("Read", variant="primary")
            compared = gr.Dropdown(
                page.classes[1:], value=[label for _, label in page.classes[1:]] if few else [], multiselect=True,
                max_choices=COMPARED, label="Classes to compare", visible=page.model.class_num > 1,
            )  # fmt: skip
            which = gr.Button("Which class?", visible=page.model.class_num > 1)
        with gr.Column(scale=2):
            shown = gr.HTML(elem_classes="live")
            share = gr.Label(label="p(class | picture), equal priors", visible=page.model.class_num > 1)
    page.chosen.change(lambda one: -1 if one is None or one.label is None else one.label, page.chosen, menu)

    @spoken
    def read(one, said, orders):
        logic.check_chosen(one)
        return logic.likelihood(page.model, one, logic.to_label(said), logic.check_number(orders, 8, "the number of orders"))

    @spoken
    def compare(one, classes, orders):
        logic.check_chosen(one)
        return logic.posterior(page.model, one, classes, logic.check_number(orders, 8, "the number of orders"), COMPARED)

    run.click(read, [page.chosen, menu, orders], shown, **HEAVY)
    which.click(compare, [page.chosen, compared, orders], share, **HEAVY)


TABS = {"Generate": build_generate, "Edit": build_edit, "Look inside": build_inside, "Likelihood": build_likelihood}
