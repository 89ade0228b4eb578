"""A web page to generate and edit images, look inside the model, and compute likelihoods.

    pip install -e '.[app]'
    python demo/app.py [--model MODEL]     # then open http://127.0.0.1:7860

A menu on the page changes between MODEL and the bundled models. Only this machine can open the page, unless
--host is given.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
import html
from pathlib import Path

from common import add_model_flags, make_parser

from models.fractalgen import FractalGen
from models.hub.about import describe
from models.hub.zoo import BUNDLED, load, names
from util.errors import UserError
from util.flags import Parser

MAX_PORT = 2**16 - 1
MAX_SESSIONS = 32  # visitors whose images are kept; each reload of the page is a new one
CSS = """
.figures {display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0}
.figures figure {flex: 1 1 220px; max-width: 320px; margin: 0}
.figures.small figure {flex: 1 1 160px; max-width: 200px}
.figures img {width: 100%; image-rendering: pixelated; display: block}
.figures figcaption {font-size: 0.85em; overflow-wrap: anywhere}
#history img, #inside img {image-rendering: pixelated}
.live progress {width: 100%}
.live {min-height: 72px}
.live .wrap {overflow: visible !important}
.live .wrap .progress-text {left: 0; right: auto; transform: none; padding: 0; background: none}
.live .waiting {padding-top: 28px}
.live .pending {opacity: 1 !important}
.live table {border-collapse: collapse}
.live td, .live th {padding: 2px 12px 2px 0; text-align: right}
.live td:first-child, .live th:first-child {text-align: left}
#history .grid-wrap {max-height: none; height: auto; min-height: 0}
#history .grid-container {grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important}
@media (max-width: 480px) {
    .tab-container button {padding: 0 6px !important; font-size: 14px !important}
    .figures figure, .figures.small figure {flex: 1 1 140px; max-width: calc(50% - 6px)}
    .figures figure:only-child {max-width: 100%}
    .live h4 {font-size: 1em}
    #inside img {max-height: 220px; object-fit: contain}
    #thumb {flex: 1 1 100%}
    #history .grid-container {display: flex !important; overflow-x: auto}
    #history .grid-container > * {flex: 0 0 88px}
    #model {font-size: 0.9em}
    .wide {display: none}
}
.nav-holder {display: none}
#models {display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 4px 0}
#models a {padding: 2px 12px; text-decoration: none; border-radius: 16px}
#models a {border: 1px solid var(--border-color-primary)}
#models a[aria-current] {background: var(--button-primary-background-fill); color: white}
#examples-title {margin: -12px 0}
#examples .grid-wrap {max-height: none; height: auto; min-height: 0; padding: 0}
#examples .grid-container {display: flex !important; overflow-x: auto; gap: 4px; padding: 0}
#examples .grid-container > * {flex: 0 0 48px; width: 48px; height: 48px}
#examples img {image-rendering: pixelated}
#thumb figure {max-width: 72px; flex: 0 0 72px}
#thumb .figures {margin: 0; align-items: center}
#editor .toolbar-wrap {left: 0 !important}
"""


def get_parser() -> Parser:
    parser = make_parser("app.py", __doc__)
    add_model_flags(parser, "fashion_ar")  # the best of the bundled ones
    parser.add_argument(
        "--host", default="127.0.0.1", help="with 0.0.0.0, other machines can open the page too"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max_batch", type=int, default=16, help="largest number of images drawn together")
    parser.add_argument(
        "--chunk", type=int, help="patches of a deeper level drawn together; fewer need less memory"
    )
    parser.add_argument("--max_queue", type=int, default=16, help="largest number of requests that wait")
    parser.add_argument("--max_upload", default="8mb", help="size of the largest file that can be uploaded")
    return parser


def load_all(model: str, device: str | None) -> dict[str, FractalGen]:
    """Returns the model that --model names, and all other bundled ones, by the names that the page shows.

    The name of a folder is that of its last part.
    """
    name = Path(model).resolve().name if model not in BUNDLED and Path(model).is_dir() else model
    first = load(model, device)
    models, place = {name: first}, next(first.parameters()).device
    for other in names():
        if other not in models and Path(model).resolve() != BUNDLED[other]:
            models[other] = FractalGen.from_pretrained(BUNDLED[other], map_location=place)
    return models


def build(models: dict[str, FractalGen], max_batch: int, chunk: int | None, visitors):
    """Returns the page, a gradio.Blocks that is not launched yet. `visitors` is an `app_server.Visitors`.

    models  by the names that the page shows. The first one has the address "/", and each other one that of
            its name, such as "/fashion_ar": what a visitor sees follows the model
    """
    import gradio as gr

    with gr.Blocks(title="FractalGen", analytics_enabled=False, delete_cache=(3600, 7200)) as blocks:
        pass
    paths = {name: name if number else "" for number, name in enumerate(models)}
    for name, model in models.items():
        with blocks.route(name, paths[name]) if paths[name] else blocks:
            build_page(model, name, menu(paths, name), max_batch, chunk, visitors)
    return blocks


def menu(paths: dict[str, str], current: str) -> str:
    """Returns HTML of links to the pages of all models, by name; none if there is one model only."""
    links = [
        f'<a href="./{path}"{" aria-current=page" * (name == current)}>{html.escape(name)}</a>'
        for name, path in paths.items()
    ]
    return f"<nav id='models' aria-label='Model'>Model: {' '.join(links)}</nav>" if len(links) > 1 else ""


def build_page(model, name: str, models: str, max_batch: int, chunk: int | None, visitors) -> None:
    """Adds the page of the model `name` to where Gradio's context is. `models` is HTML of the menu."""
    import app_logic
    import gradio as gr
    from app_page import Page, show_errors
    from app_server import delete_upload
    from app_tabs import TABS

    page = Page(model, max_batch, chunk, visitors)
    gr.HTML(
        "<h1>FractalGen</h1>"
        "<p class='wide'>A generative model inside a generative model, down to the pixel.</p>"
        f"{models}<p id='model'>{html.escape(describe(model, name))}</p>",
        padding=False,
    )
    with gr.Row():
        thumbnail = gr.HTML("<i>No image yet: generate or upload one.</i>", elem_id="thumb")
        file = gr.UploadButton(
            "Upload an image", file_types=["image"], size="sm", elem_id="upload", scale=0, min_width=140
        )
        keep = gr.DownloadButton("Save this image", interactive=False, size="sm", scale=0, min_width=140)
    page.show_examples(app_logic.examples(name, model.class_names))
    for title, tab in TABS.items():
        with gr.Tab(title):
            tab(page)
    page.show_history()

    @show_errors
    def upload(path):
        try:
            chosen, change = app_logic.upload(path, page.side)
        finally:
            delete_upload(Path(path))
        gr.Info(f"{chosen.caption}: {change}")
        return chosen

    file.upload(upload, file, page.chosen)
    page.chosen.change(
        lambda chosen: (app_logic.thumbnail(chosen), page.download([chosen.image])),
        page.chosen,
        [thumbnail, keep],
    )


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.one_line_errors():
        launch(args)


def launch(args: argparse.Namespace, wait: bool = True):
    """Serves the page. Returns its gradio.Blocks, at once unless `wait`."""
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install -e '.[app]'") from error
    from app_server import Visitors, refuse_foreign_hosts

    if not 1 <= args.port <= MAX_PORT:
        raise UserError(f"--port {args.port} must be a number from 1 to {MAX_PORT}")
    if min(args.max_batch, args.max_queue, args.chunk or 1) < 1:
        raise UserError("--max_batch, --max_queue and --chunk must be at least 1")
    host, visitors = args.host.strip("[]"), Visitors()
    blocks = build(load_all(args.model, args.device), args.max_batch, args.chunk, visitors)
    # Fonts of the browser, so that none is fetched from the network.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.queue(max_size=args.max_queue, default_concurrency_limit=4)
    try:
        blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=args.port,
            max_file_size=args.max_upload,
            theme=theme,
            css=CSS,
            prevent_thread_lock=not wait,
            footer_links=[],
            ssr_mode=False,
            share=False,
            state_session_capacity=MAX_SESSIONS,
            app_kwargs=dict(middleware=[Middleware(refuse_foreign_hosts, host), Middleware(visitors.watch)]),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{args.host}:{args.port}: the page cannot be served ({error})") from error
    return blocks


if __name__ == "__main__":
    main()
