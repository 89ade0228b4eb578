"""A page to generate, edit, look inside and read likelihoods, for any model.

    pip install -e '.[app]'
    python demo/app.py [--model demo/emoji_model]     # then open http://127.0.0.1:7860

--model is a folder that save_pretrained wrote, an id on the Hugging Face hub, or a published model's name, whose weights
are fetched. Only this machine can open the page unless --host says otherwise.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "demo"):
    sys.path.insert(0, str(folder))

from models.hub import zoo  # noqa: E402  needs the path above when the package is not installed
from util.errors import UserError  # noqa: E402
from util.flags import Parser  # noqa: E402

CSS = """
.figures {display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0}
.figures figure {flex: 1 1 220px; max-width: 320px; margin: 0}
.figures.small figure {flex: 1 1 96px; max-width: 160px}
.figures img {width: 100%; image-rendering: pixelated; display: block}
.figures figcaption {font-size: 0.85em; overflow-wrap: anywhere}
#history img, #inside img {image-rendering: pixelated}
.live progress {width: 100%}
.live table {border-collapse: collapse}
.live td, .live th {padding: 2px 12px 2px 0; text-align: right}
.live td:first-child, .live th:first-child {text-align: left}
#history .grid-wrap {max-height: none; height: auto; min-height: 0}
#history .grid-container {grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important}
@media (max-width: 480px) {.tab-container button {padding: 0 6px !important; font-size: 14px !important}}
#thumb figure {max-width: 72px; flex: 0 0 72px}
#thumb .figures {margin: 0; align-items: center}
#editor .toolbar-wrap {left: 0 !important}
"""


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("demo/app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(zoo.BUNDLED), help="default: the bundled model, demo/emoji_model"
    )
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines can open the page too")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max_batch", type=int, default=16, help="most images drawn together")
    parser.add_argument(
        "--chunk", type=int, help="at most so many patches of a deeper level together, for less memory"
    )
    parser.add_argument("--max_queue", type=int, default=16, help="most requests that wait")
    parser.add_argument("--max_upload", default="8mb", help="largest file")
    return parser


def build(model, max_batch: int, chunk: int | None = None):
    """The page, a gradio.Blocks, not launched."""
    import app_logic
    import gradio as gr
    from app_page import Page, spoken
    from app_tabs import TABS

    with gr.Blocks(title="FractalGen", analytics_enabled=False, delete_cache=(3600, 7200)) as blocks:
        page = Page(model, max_batch, chunk)
        gr.Markdown("# FractalGen\nA generative model inside a generative model, down to the pixel.")
        with gr.Row():
            thumb = gr.HTML("<i>No image yet: generate or upload one.</i>", elem_id="thumb")
            file = gr.UploadButton(
                "Upload an image", file_types=["image"], size="sm", elem_id="upload", scale=0, min_width=160
            )
            keep = gr.DownloadButton("Save this one", interactive=False, size="sm", scale=0, min_width=160)
        for name, tab in TABS.items():
            with gr.Tab(name):
                tab(page)
        page.show_history()

        @spoken
        def uploaded(path):
            one, done = app_logic.upload(path, page.side)
            gr.Info(f"{one.caption}: {done}")
            return one

        file.upload(uploaded, file, page.chosen)
        page.chosen.change(
            lambda one: (app_logic.thumbnail(one), page.download([one.image])), page.chosen, [thumb, keep]
        )
    return blocks


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.one_line_errors():
        launch(args)


def launch(args: argparse.Namespace, wait: bool = True):
    """Serves the page; returns its gradio.Blocks where it is not to `wait`."""
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install -e '.[app]'") from error
    if min(args.max_batch, args.max_queue, args.chunk or 1) < 1:
        raise UserError("--max_batch, --max_queue and --chunk must be at least 1")
    blocks = build(zoo.load(args.model, args.device), args.max_batch, args.chunk)
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )  # none from the network
    blocks.queue(max_size=args.max_queue, default_concurrency_limit=4)
    try:
        blocks.launch(
            server_name=args.host, server_port=args.port, max_file_size=args.max_upload, theme=theme, css=CSS,
            prevent_thread_lock=not wait, footer_links=[], ssr_mode=False, share=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{args.host}:{args.port}: the page cannot be served ({error})") from error
    return blocks


if __name__ == "__main__":
    main()
