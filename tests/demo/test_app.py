"""The page's functions, and the page in headless Chromium, whose downloads must keep the known pixels."""

import base64
import io
import re
import shutil
import socket
import sys
import threading
import time
import zipfile
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from live import Stopped, watch
from PIL import Image

from conftest import opinionated, random_values, tiny_model
from models.hub import zoo
from util.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import app
import app_logic as logic
import app_server
import httpx

NAMES = ("face", "<b>heart</b>", "hand", "cat")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000  # ms


@pytest.fixture(scope="module")
def model():
    model = opinionated(tiny_model("guided"))
    model.class_names = NAMES
    return model


def image(seed: int = 0, side: int = 8) -> Image.Image:
    return Image.fromarray(random_values(1, side, seed)[0].permute(1, 2, 0).numpy())


def layer(side: int, rows: slice, columns: slice) -> np.ndarray:
    painted = np.zeros((side, side, 4), np.uint8)
    painted[rows, columns] = (255, 45, 149, 255)
    return painted


def test_the_mask_of_what_is_painted_and_of_a_box():
    mask = logic.region(
        False, (), [layer(80, slice(20, 40), slice(10, 43)), layer(80, slice(0, 3), slice(0, 80))], 8
    )
    expected = np.zeros((8, 8), bool)
    expected[2:4, 1:4] = True  # of column 4 only 3 of 10 are painted, which is less than a third
    assert (mask == expected).all()
    assert logic.region(True, (1, 2, 3, 4), [], 8).sum() == 12
    for arguments in ((False, (), []), (True, (1, None, 3, 4), []), (True, (7, 7, 3, 3), [])):
        with pytest.raises(UserError):
            logic.region(*arguments, 8)


def test_uploads_keep_pixels_unless_they_must_be_scaled(tmp_path):
    for side in (5, 8, 30):
        image(side=side).save(tmp_path / f"{side}.png")
    small, exact, large = (logic.upload(tmp_path / f"{side}.png", 8)[0] for side in (5, 8, 30))
    assert (np.asarray(small.image) == np.asarray(image(side=5))).all()
    assert (np.asarray(exact.image) == np.asarray(image())).all()
    assert large.image.size == (8, 8)
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    clear, said = logic.upload(tmp_path / "clear.png", 8)
    assert (clear.image.getpixel((0, 0)), said) == ((255, 255, 255), "transparent pixels lie over white")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        logic.upload(tmp_path / "bad.png", 8)


def test_downloads_are_png_files_with_exactly_the_pixels(tmp_path):
    one = logic.save_download([image()], tmp_path)
    assert Image.open(one).format == "PNG"
    assert (np.asarray(Image.open(one)) == np.asarray(image())).all()
    with zipfile.ZipFile(logic.save_download([image(0), image(1)], tmp_path)) as archive:
        second = Image.open(io.BytesIO(archive.read("0001.png")))
    assert (np.asarray(second) == np.asarray(image(1))).all()


def test_settings_out_of_range_are_named(model):
    good = dict(seed=1, guidance=2.0, temperature=1.0, steps=(4, 4), labelled=True)
    assert logic.check_settings(model, **good)["num_inference_steps"] == (4, 4)
    bad = {
        "seed": (None, -1, 0.5, 2**60, float("inf"), float("nan"), "x", [1]),
        "guidance": (0.5, None, float("inf")),
        "temperature": (0, None, float("nan"), "x"),
        "steps": ((4,), (0, 4), (None, 4), (float("inf"), 4)),
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(UserError):
                logic.check_settings(model, **{**good, name: value})
    for number in (0, 17, None, "many", float("inf"), float("nan"), [2]):
        with pytest.raises(UserError, match="the number of images must be a whole number from 1 to 16"):
            logic.check_number(number, 1, 16, "the number of images")
    assert logic.check_number(4.0, 1, 16, "the number of images") == 4
    with pytest.raises(UserError, match="class"):
        logic.to_label([1], 4)
    assert [logic.to_label(value, 4) for value in (-1, None, 3)] == [None, None, 3]


def test_an_image_that_cannot_be_used_is_an_error(model):
    with pytest.raises(UserError, match="no image yet"):
        logic.check_chosen(None, 8)
    with pytest.raises(UserError, match="smaller than 8 x 8: in Edit"):
        logic.check_chosen(logic.Chosen(image(side=5), "an image"), 8)
    settings = logic.check_settings(model, 3, 2.0, 1.0, (5, 4), True)
    with pytest.raises(UserError, match="nothing to repaint"):
        logic.redraw(model, image(), np.zeros((8, 8), bool), 1, 1, settings)


def test_a_lack_of_memory_is_a_message_and_other_errors_are_not_hidden():
    gradio = pytest.importorskip("gradio", reason="pip install -e '.[app]'")
    from app_page import show_errors

    @show_errors
    def fail(error):
        raise error

    for error in (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError(),
    ):
        with pytest.raises(gradio.Error, match="not enough memory"):
            fail(error)
    with pytest.raises(RuntimeError, match="a fault"):
        fail(RuntimeError("a fault"))


def test_a_patch_that_was_drawn_again_is_outlined_beside_what_it_was(model):
    white = Image.new("RGB", (8, 8), "white")
    drawn = [logic.Chosen(white, "again, image 0", index=0), logic.Chosen(white, "again, image 1", index=1)]
    before = logic.Chosen(white, "<b>before</b>")
    shown = logic.before_and_after(before, (4, 2, 1, 1), drawn)
    assert re.findall("<figcaption>(.*?)</figcaption>", shown) == [
        "Before",
        "After, image 0",
        "After, image 1",
    ]
    for data in re.findall('base64,([^"]*)"', shown):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert pixels.shape == (256, 256, 3)
        assert (pixels[64:96, 128:160] == 255).all()  # all of the patch is visible
        edge = pixels[62, 126:162]
        assert (edge == edge[0]).all()
        assert tuple(edge[0]) == (255, 45, 149)
    pixels = [
        base64.b64decode(data)
        for data in re.findall('base64,([^"]*)"', logic.before_and_after(before, None, drawn))
    ]
    assert all((np.asarray(Image.open(io.BytesIO(one))) == 255).all() for one in pixels)


def test_errors_name_files_without_their_folders_and_print_no_traceback(capsys):
    gradio = pytest.importorskip("gradio", reason="pip install -e '.[app]'")
    from app_page import show_errors

    @show_errors
    def fail():
        raise UserError(
            "/tmp/gradio/3f2/my image.png: cannot be read (no '/tmp/gradio/3f2/x.png'); bits/dim 8/16"
        )

    with pytest.raises(gradio.Error) as error:
        fail()
    assert error.value.message == "my image.png: cannot be read (no 'x.png'); bits/dim 8/16"
    assert not error.value.print_exception


def test_a_model_of_grey_images_is_shown_in_rgb_and_gets_its_own_values_back():
    model = opinionated(tiny_model("ar", channels=1, num_values=17))
    settings = logic.check_settings(model, 3, 1.0, 1.0, (16, 16), True)
    *_, (_, (drawn,)) = logic.draw(model, 1, 1, settings)
    assert drawn.mode == "RGB"
    mask = np.zeros((8, 8), bool)
    mask[-1, -1] = True
    *_, (_, (edited,)) = logic.redraw(model, drawn, mask, 1, 1, settings)
    assert (np.asarray(edited) == np.asarray(drawn))[~mask].all()
    chosen = logic.Chosen(drawn, "an image", 1)
    bits = -model.log_likelihood(drawn, 1, progress_bar=False).bits.item()
    assert f"{bits:.1f} bits, {bits / 64:.4f} bits per dimension" in logic.likelihood(model, chosen, 1, 1)
    assert "bright 4.1" in logic.look(model, chosen, (5, 2))


def test_a_model_shares_the_page_with_all_bundled_ones_and_is_not_shown_twice(model, tmp_path, monkeypatch):
    for name in ("b_model", "a_model"):
        model.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / f"{name}_model" for name in ("a", "b", "missing")}
    for module in (zoo, app):
        monkeypatch.setattr(module, "BUNDLED", folders)
    monkeypatch.setattr(zoo, "DEFAULT", "b")
    assert list(app.load_all("b", "cpu")) == ["b", "a"]
    assert list(app.load_all("a", "cpu")) == ["a", "b"]
    assert list(app.load_all(str(tmp_path / "a_model"), "cpu")) == ["a_model", "b"]
    assert app.menu({"a": ""}, "a") == ""
    assert re.findall('href="(.*?)"( aria-current)?', app.menu({"a": "", "b": "b"}, "b")) == [
        ("./", ""),
        ("./b", " aria-current"),
    ]


def test_the_real_images_of_a_bundled_model_have_its_size_and_know_their_class():
    names = ("Bag", "coat", "ankle boot")
    found = logic.examples("fashion_mar", names)
    assert [one.label for one in found[:4]] == [0, 1, 2, None]
    assert [one.caption for one in found[:2]] == ["bag, a real image", "coat, a real image"]
    assert len(found) == 10
    assert {one.image.size for one in found} == {(28, 28)}
    assert logic.examples("my_model", names) == []


def test_an_ar_model_has_no_order_to_draw_again_and_none_to_assume():
    model = opinionated(tiny_model("ar"))
    assert logic.levels_to_redraw(model) == [("all that level 1 decides: pixels", 1)]
    assert logic.ASSUMED_ORDER not in logic.look(model, logic.Chosen(image(), "an image", 1), (5, 2))


def test_new_random_numbers_for_one_level_keep_those_of_the_others(model):
    settings = logic.check_settings(model, 3, 2.0, 1.0, (5, 4), True)
    *_, (_, first) = logic.draw(model, 1, 3, settings)
    chosen = logic.Chosen(first[2], "an image", 1, 2, settings, generated=True)
    same = logic.with_new_random_numbers(model, chosen, 1, 3)
    *_, (_, again) = logic.draw(model, 1, 1, same, chosen.index)
    assert (np.asarray(again[0]) == np.asarray(first[2])).all()
    other = logic.with_new_random_numbers(model, chosen, 1, 4)
    assert other["seed"] == [3, 4]
    *_, (_, (changed,)) = logic.draw(model, 1, 1, other, chosen.index)
    assert (np.asarray(changed) != np.asarray(first[2])).any()
    chosen = logic.Chosen(changed, "an image", 1, 2, other, generated=True)
    twice = logic.with_new_random_numbers(model, chosen, 0, 9)
    assert twice["seed"] == [9, 4]
    assert [level for _, level in logic.levels_to_redraw(model)] == [0, 1]


def test_likelihood_and_posterior_are_the_models_own(model):
    chosen = logic.Chosen(image(), "an image")
    bits = -model.log_likelihood(chosen.image, 1, num_orders=2, progress_bar=False).bits.item()
    shown = logic.likelihood(model, chosen, 1, 2)
    assert f"{bits:.1f} bits, {bits / 192:.4f} bits per dimension" in shown
    assert "&lt;b&gt;heart" in shown
    assert "<b>heart" not in shown
    shares = logic.posterior(model, chosen, [0, 2], 2, most=4)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["hand (2)"] == pytest.approx(
        model.classify(chosen.image, [0, 2], num_orders=2, progress_bar=False)[0, 1].item()
    )
    with pytest.raises(UserError, match="2 to 4 classes"):
        logic.posterior(model, chosen, [0], 2, most=4)


def test_looking_inside_shows_each_level_and_softmax(model):
    shown = logic.look(model, logic.Chosen(image(), "an image", 1), (5, 2))
    assert shown.count("<img") == 2 + 2 + 2  # levels; softmaxes of guiding pixel and pixel; their maps
    assert logic.ASSUMED_ORDER in shown
    generated = logic.Chosen(
        image(), "an image", 1, 0, logic.check_settings(model, 3, 2.0, 1.0, (5, 4), True), True
    )
    assert logic.ASSUMED_ORDER not in logic.look(model, generated, (5, 2))
    assert logic.patches_to_redraw(model, (5, 2))[1:] == [
        ("the 2 x 2 patch of level 0", (4, 2, 2, 2)),
        ("the pixel", (5, 2, 1, 1)),
    ]


def test_watching_yields_each_step_then_the_result_and_ends_the_work_when_nobody_watches(model):
    settings = logic.check_settings(model, 3, 2.0, 1.0, (5, 4), True)
    events = list(logic.draw(model, 1, 2, settings))
    assert [kind for kind, _ in events[-2:]] == ["step", "result"]
    assert sorted({value[0] for kind, value in events if kind == "step"}) == list(range(5))
    assert len(events) > 2 * 5  # the steps of level 1 too
    own = model.generate([1, 1], **settings, output_type="np")
    assert (np.stack([np.asarray(image) for image in events[-1][1]]) == own).all()

    ended = []

    def work(callback):
        try:
            while True:
                callback(1)
                time.sleep(1e-3)
        except Stopped:
            ended.append(threading.current_thread())
            raise

    with closing(watch(work)) as watched:
        next(watched)
    (event,) = watch(lambda callback: threading.current_thread())  # waits until the work before it has ended
    assert ended == [event[1]]  # one thread does all work
    with pytest.raises(ZeroDivisionError):
        list(watch(lambda callback: 1 / 0))


def test_a_likelihood_that_nobody_watches_ends_at_the_next_block(model):
    passes = []

    def work():
        for _ in range(1000):
            model.log_likelihood(image(), 1, num_orders=1, progress_bar=False)
            passes.append(1)

    with closing(logic.by_blocks(model, work)) as events:
        next(events)
    list(watch(lambda callback: None))  # waits until the work before it has ended
    assert len(passes) < 10
    assert not any(module._forward_pre_hooks for module in model.modules())
    result = list(logic.by_blocks(model, lambda: model.classify(image(), num_orders=1, progress_bar=False)))[
        -1
    ]
    assert result[0] == "result"


def test_defaults_are_local_and_bounded():
    args = app.get_parser().parse_args([])
    assert (args.host, args.max_batch, args.max_upload) == ("127.0.0.1", 16, "8mb")


@pytest.mark.parametrize(
    "flags", ["--model /nowhere/at/all", "--max_batch 0", "--port 99999999", "--port -1", "--port 0"]
)
def test_errors_are_one_line_that_names_the_flag(capsys, flags):
    with pytest.raises(SystemExit):
        app.main(flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert flags.split()[1 if "model" in flags else 0] in line


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """Serves the page in a thread, and yields its address."""
    pytest.importorskip("gradio", reason="pip install -e '.[app]'")
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = app.launch(
        app.get_parser().parse_args(["--model", str(folder), "--device", "cpu", "--port", str(port)]),
        wait=False,
    )
    yield f"http://127.0.0.1:{port}"
    blocks.close()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as api:
        path = CHROMIUM or api.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        playwright.expect.set_options(timeout=WAIT)
        yield api.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def browser(address, chromium):
    """Yields a window of its own, with the page."""
    with chromium.new_context(viewport={"width": 1200, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        yield page


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("POST", "gradio_api/queue/join"), ("GET", "gradio_api/queue/data")]
)
def test_a_foreign_host_is_refused(address, method, path):
    answer = httpx.request(method, f"{address}/{path}", headers={"Host": "evil.example:7860"})
    assert (answer.status_code, answer.text.splitlines()) == (400, [app_server.REFUSED.strip()])
    assert httpx.get(address, headers={"Host": "localhost:8000"}).status_code == 200


class Endless:
    """Stands for drawings that never end: `logic.draw`, and how many of them have begun and ended."""

    def __init__(self):
        self.begun = self.ended = 0

    def __call__(self, *arguments):
        def work(step):
            self.begun += 1
            try:
                while True:
                    step(0, 9, torch.zeros(1, 3, 8, 8))
                    time.sleep(0.05)
            finally:
                self.ended += 1

        return watch(work)

    def wait(self, begun: int, ended: int) -> None:
        deadline = time.monotonic() + 60
        while (self.begun, self.ended) != (begun, ended) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (self.begun, self.ended) == (begun, ended)


@pytest.fixture
def endless(monkeypatch):
    monkeypatch.setattr(logic, "draw", Endless())
    return logic.draw


def ask(address: str, name: str, *values) -> None:
    """Posts a request as Gradio's clients do; inputs that are not given have the values that the page shows."""
    page = httpx.get(f"{address}/config").json()
    (event,) = (event for event in page["dependencies"] if event["api_name"] == name)
    shown = {part["id"]: part["props"].get("value") for part in page["components"]}
    data = [*values, *(shown[number] for number in event["inputs"][len(values) :])]
    request = dict(data=data, fn_index=event["id"], session_hash="a_client")
    httpx.post(f"{address}/gradio_api/queue/join", json=request).raise_for_status()


@contextmanager
def answers(address: str):
    """Listens to the answers to `ask`; yields their lines."""
    stream = f"{address}/gradio_api/queue/data?session_hash=a_client"
    with httpx.stream("GET", stream, timeout=60) as events:
        yield events.iter_lines()


@pytest.mark.parametrize("listens", [True, False])
def test_a_drawing_ends_if_its_client_leaves_or_never_listens(address, endless, listens, monkeypatch):
    ask(address, "generate")
    if listens:
        with answers(address) as lines:
            next(line for line in lines if "process_generating" in line)
            monkeypatch.setattr(app_server, "GRACE", 0.0)
            time.sleep(0.3)  # some steps
            assert (endless.begun, endless.ended) == (1, 0)
    endless.wait(1, 1)


def test_uploads_are_deleted_after_use_and_those_that_are_never_used_are_few(address):
    paths = []
    for number in range(app_server.MAX_UPLOADS + 2):
        files = {"files": ("image.png", logic.png(image(100 + number)))}
        paths += httpx.post(f"{address}/gradio_api/upload", files=files).json()
    deadline = time.monotonic() + 10  # an upload is answered before old ones are deleted
    while Path(paths[1]).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [Path(path).exists() for path in paths] == [False] * 2 + [True] * app_server.MAX_UPLOADS
    ask(address, "upload", {"path": paths[-1], "meta": {"_type": "gradio.FileData"}})
    with answers(address) as lines:
        assert '"success":true' in next(line for line in lines if "process_completed" in line)
    assert not Path(paths[-1]).exists()


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def download(page) -> list[np.ndarray]:
    """Presses the visible download button, and returns the images (8, 8, 3) of the file."""
    with page.expect_download() as waiting:
        page.locator("button:visible", has_text="Download PNG").click()
    path = Path(waiting.value.path())
    if waiting.value.suggested_filename.endswith(".png"):
        return [np.asarray(Image.open(path))]
    with zipfile.ZipFile(path) as archive:
        assert all(archive.read(name).startswith(b"\x89PNG") for name in archive.namelist())
        return [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in sorted(archive.namelist())]


def settled(browser, canvas) -> dict:
    """Waits until a canvas or image does not move any more, and returns where it lies."""
    seen = []
    while len(seen) < 5 or any(place != seen[-1] for place in seen[-5:]):
        browser.wait_for_timeout(100)
        seen.append(canvas.bounding_box())
        assert len(seen) < 300
    return seen[-1]


def paint_to_the_right(browser) -> None:
    """Paints a stroke on the image to edit, from its middle."""
    place = settled(browser, browser.locator("#editor canvas").first)
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    browser.mouse.move(x, y)
    browser.mouse.down()
    browser.mouse.move(x + 40, y, steps=5)
    browser.mouse.up()


def test_generate_paint_edit_and_download(browser, model):
    from playwright.sync_api import expect

    press(browser, "Generate")
    expect(browser.locator("#thumb img")).to_be_visible()
    drawn = download(browser)
    seed = browser.get_by_label("Seed").locator("visible=true")
    expect(seed).not_to_have_value("0")  # a new one for the next press
    assert (np.stack(drawn) == model.generate([0] * 4, seed=0, output_type="np", progress_bar=False)).all()

    browser.locator("#history button").nth(2).click()
    expect(browser.locator("#thumb")).to_contain_text("image 2")
    with browser.expect_download() as waiting:
        browser.locator("button:visible", has_text="Save this image").click()
    assert (np.asarray(Image.open(waiting.value.path())) == drawn[2]).all()
    browser.get_by_role("tab", name="Edit").click()
    done = browser.locator("button:visible:enabled", has_text="Download PNG")
    refused = browser.get_by_test_id("toast-body")
    for _ in range(5):  # a busy machine may draw a stroke only after the press
        paint_to_the_right(browser)
        press(browser, "Edit")
        expect(done.or_(refused).first).to_be_visible()
        if done.count():
            break
        expect(refused).to_contain_text("nothing is painted")
        refused.get_by_role("button").first.click()
        expect(refused).to_have_count(0)
    edited = np.stack(download(browser))
    changed = (edited != drawn[2]).any((0, 3))
    assert len(edited) == 4
    assert changed[3:5, 3:6].any()
    assert not changed[:, :2].any()  # the stroke goes from the middle to the right
    assert not changed[[0, 1, 6, 7]].any()


def test_upload_uncrop_look_inside_draw_again_and_compute_the_likelihood(browser, model, tmp_path):
    from playwright.sync_api import expect

    known = np.asarray(image(7))
    Image.fromarray(known).save(tmp_path / "known.png")
    browser.locator("#upload input[type=file], input[type=file]").first.set_input_files(
        tmp_path / "known.png"
    )
    expect(browser.locator("#thumb")).to_contain_text("known.png")

    browser.get_by_role("tab", name="Edit").click()
    browser.get_by_label("Keep only it").check()
    browser.get_by_label("A box instead of the brush").check()
    for name, value in zip(("x", "y", "width", "height"), (1, 2, 4, 3), strict=True):
        browser.get_by_label(name, exact=True).locator("visible=true").fill(str(value))
    press(browser, "Edit")
    expect(browser.locator("button:visible", has_text="Download PNG")).to_be_enabled()
    uncropped = np.stack(download(browser))
    box = logic.box_mask(8, (1, 2, 4, 3)).numpy()
    assert (uncropped[:, box] == known[box]).all()
    assert (uncropped[:, ~box] != known[~box]).any(-1).mean() > 0.8

    browser.get_by_role("tab", name="Look inside").click()
    place = settled(browser, browser.locator("#inside img"))
    browser.locator("#inside img").click(position={"x": place["width"] * 0.7, "y": place["height"] * 0.3})
    browser.get_by_label("Draw this again, and keep the rest").click()
    browser.get_by_role("option", name="the pixel", exact=True).click()
    for name, value in (("x", "5"), ("y", "2")):
        expect(browser.get_by_label(name, exact=True).locator("visible=true")).to_have_value(value)
    press(browser, "Draw it again")
    expect(browser.locator("button:visible", has_text="Download PNG")).to_be_enabled()
    again = np.stack(download(browser))
    rest = np.ones((8, 8), bool)
    rest[2, 5] = False
    assert (again[:, rest] == known[rest]).all()
    assert (again[:, 2, 5] != known[2, 5]).any()
    assert browser.locator("#live-again figcaption").all_inner_texts()[:2] == ["Before", "After, image 0"]

    browser.get_by_role("tab", name="Likelihood").click()
    press(browser, "Compute the likelihood")
    bits = -model.log_likelihood(known, num_orders=2, progress_bar=False).bits.item()
    expect(browser.locator("h4:visible", has_text="bits per dimension")).to_contain_text(f"{bits:.1f} bits")
    press(browser, "Which class?")
    expect(browser.locator("[data-testid=label-output-value]")).to_contain_text("(")


def test_a_seed_is_kept_or_diced(browser):
    from playwright.sync_api import expect

    seed = browser.get_by_label("Seed").locator("visible=true")
    press(browser, "⚄ New seed")
    expect(seed).not_to_have_value("0")
    seed.fill("7")
    browser.get_by_label("Keep it").locator("visible=true").check()
    press(browser, "Generate")
    expect(browser.locator("#live-generate figcaption").first).to_contain_text("seed 7, image 0")
    press(browser, "Generate")
    expect(browser.locator("#history button")).to_have_count(8)
    expect(seed).to_have_value("7")


def test_on_a_phone_the_result_comes_into_sight_and_look_inside_fits_three_screens(browser):
    from playwright.sync_api import expect

    browser.set_viewport_size({"width": 390, "height": 844})
    result = browser.locator("#live-generate")
    assert result.bounding_box()["y"] > 800
    press(browser, "Generate")
    expect(result.locator("figure").first).to_be_in_viewport()
    expect(browser.locator("#thumb img")).to_be_visible()
    browser.get_by_role("tab", name="Look inside").click()
    press(browser, "Look inside")
    expect(browser.locator("#places figure").first).to_be_in_viewport()
    press(browser, "Draw it again")
    expect(browser.locator("#live-again figcaption", has_text="After")).to_have_count(3)
    assert browser.evaluate("document.documentElement.scrollHeight") <= 3 * 844


def test_errors_are_messages_and_a_phone_needs_no_sideways_scrolling(browser, tmp_path, capfd):
    from playwright.sync_api import expect

    browser.set_viewport_size({"width": 390, "height": 800})
    (tmp_path / "bad.png").write_bytes(b"no image")
    browser.locator("#upload input[type=file], input[type=file]").first.set_input_files(tmp_path / "bad.png")
    message = "bad.png: cannot be read as an image (cannot identify image file 'bad.png')"
    expect(browser.get_by_test_id("toast-body")).to_contain_text(message)  # no folder of this machine
    for name in ("Edit", "Look inside", "Likelihood", "Generate"):
        browser.get_by_role("tab", name=name).click()
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.get_by_role("tab", name="Likelihood").click()
    press(browser, "Compute the likelihood")
    expect(browser.get_by_test_id("toast-body").last).to_contain_text("there is no image yet")
    browser.get_by_role("tab", name="Generate").click()
    browser.get_by_label("Seed").locator("visible=true").fill("-5")
    press(browser, "Generate")
    expect(browser.get_by_test_id("toast-body").last).to_contain_text("the seed must be a whole number")
    expect(browser.locator("#live-generate")).to_have_text("")
    assert "Traceback" not in browser.content() + "".join(capfd.readouterr())


def test_stop_a_second_press_or_leaving_ends_drawings_and_keeps_the_chosen_image(browser, endless, tmp_path):
    from playwright.sync_api import expect

    image(7).save(tmp_path / "known.png")
    browser.locator("#upload input[type=file], input[type=file]").first.set_input_files(
        tmp_path / "known.png"
    )
    expect(browser.locator("#thumb")).to_contain_text("known.png")
    press(browser, "Generate")
    expect(browser.locator("progress:visible")).to_be_visible()
    press(browser, "Generate")
    endless.wait(begun=2, ended=1)
    other = browser.context.browser.new_page()
    other.goto(browser.url)
    press(other, "Generate")
    place = other.locator("#live-generate").get_by_text("queue: 1/1")
    expect(place).to_be_visible()
    assert place.evaluate(  # nothing hides it, not even its own box
        "text => { const box = text.getBoundingClientRect();"
        " return text === document.elementFromPoint(box.x + 5, box.y + box.height / 2)"
        " || getComputedStyle(text.parentElement).overflow === 'visible' }"
    )
    press(other, "Stop")
    press(browser, "Stop")
    endless.wait(begun=2, ended=2)  # the other page's drawing never begins
    expect(browser.get_by_text("Stopped.")).to_be_visible()
    expect(browser.locator("progress:visible")).to_have_count(0)
    expect(browser.locator("#thumb")).to_contain_text("known.png")
    press(other, "Generate")
    endless.wait(begun=3, ended=2)
    other.close()
    endless.wait(begun=3, ended=3)
    browser.get_by_role("tab", name="Likelihood").click()
    press(browser, "Compute the likelihood")
    expect(browser.locator("h4:visible", has_text="bits per dimension")).to_be_visible()


def test_each_bundled_model_has_a_page_with_its_classes_images_and_settings(browser, model):
    from playwright.sync_api import expect

    if "fashion_ar" not in zoo.names():
        pytest.skip("this checkout lacks demo/fashion_ar_model")
    shown = browser.locator("#models a").all_inner_texts()
    assert shown == ["tiny", *zoo.names()]
    expect(browser.locator("#models a[aria-current]")).to_have_text("tiny")
    expect(browser.locator("#examples")).to_have_count(0)  # real images of a model that is not bundled: none
    browser.locator("#models a", has_text="fashion_ar").click()
    expect(browser.locator("#models a[aria-current]")).to_have_text("fashion_ar")
    browser.get_by_role("button", name="Generate", exact=True).wait_for()
    browser.locator("#examples button").nth(8).click()
    expect(browser.locator("#thumb")).to_contain_text("bag, a real image")
    browser.get_by_role("tab", name="Likelihood").click()
    expect(browser.get_by_label("Class that the model is given")).to_have_value(
        re.compile("bag", re.IGNORECASE)
    )
    expect(browser.get_by_label("Random orders of patches")).to_have_count(0)  # an AR model
    press(browser, "Compute the likelihood")
    bag = zoo.load("fashion_ar", "cpu").log_likelihood(logic.examples("fashion_ar", ["bag"])[0].image, "bag")
    expect(browser.locator("h4:visible")).to_contain_text(f"{-bag.bits.item():.1f} bits")
    browser.locator("#models a", has_text="tiny").click()
    expect(browser.locator("#models a[aria-current]")).to_have_text("tiny")
    press(browser, "Generate")
    expect(browser.locator("#thumb")).to_contain_text("face, seed 0")
