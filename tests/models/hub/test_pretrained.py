"""Models as folders: saved, loaded, refused."""

import inspect
import json
import resource
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch

from conftest import opinionated, tiny_model
from models import fractalgen
from models.fractalgen import FractalGen
from models.hub.convert import fixed_outputs as outputs
from models.sampling.options import SamplingOptions
from util import checkpoint
from util.errors import UserError


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def saved(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def test_a_model_comes_back_to_the_bit(kind, tmp_path):
    model = opinionated(
        tiny_model(kind, r_weight=5.0, attn_dropout=0.2, proj_dropout=0.3, label_drop_prob=0.4)
    )
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "model.safetensors.sha256",
        "README.md",
    }
    loaded = FractalGen.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    assert str(loaded) == str(model)  # dropouts and all
    assert (loaded.arguments["r_weight"], loaded.label_drop_prob) == (5.0, 0.4)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("name", fractalgen.PRESETS)
def test_the_config_rebuilds_every_preset_with_its_settings(name, tmp_path):
    with torch.device("meta"):
        model = fractalgen.build(name, class_num=3, grad_checkpointing=True)
        loaded = FractalGen._of_config(json.loads(json.dumps(model.config)), tmp_path, {})
    shapes = lambda model: {name: value.shape for name, value in model.state_dict().items()}  # noqa: E731
    assert shapes(loaded) == shapes(model)
    assert loaded.sampling_defaults == model.sampling_defaults
    assert loaded.config == model.config


def test_the_config_is_all_that_the_constructor_takes():
    parameters = set(inspect.signature(FractalGen).parameters)
    assert set(tiny_model().config) == parameters - {"fractal_level"} | {"class_names", "sampling_defaults"}


def test_numbers_of_numpy_and_torch_are_kept(tmp_path):
    model = tiny_model(
        class_num=np.int64(3), r_weight=torch.tensor(2.5), embed_dim_list=np.array([32, 16, 16])
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["class_num"], config["r_weight"], config["embed_dim_list"]) == (3, 2.5, [32, 16, 16])
    assert torch.equal(outputs(FractalGen.from_pretrained(tmp_path)), outputs(model))


def test_class_names_and_changed_sampling_settings_are_kept(tmp_path):
    model = tiny_model()
    model.class_names = ["crane", "crane", "鶴", 'a "quoted" name']
    model.sampling_defaults = SamplingOptions((3, 2), guidance_scale=2.0, temperature=1.1)
    model.save_pretrained(tmp_path)
    loaded = FractalGen.from_pretrained(tmp_path)
    assert loaded.class_names == ("crane", "crane", "鶴", 'a "quoted" name')
    assert loaded.sampling_defaults == model.sampling_defaults


@pytest.mark.parametrize("names", [["a"], "abcd", [1, 2, 3, 4]])
def test_class_names_that_cannot_be_right_are_refused(names, saved):
    with pytest.raises(ValueError, match="class_names must be"):
        tiny_model().class_names = names
    edit(saved, class_names=names)
    with pytest.raises(UserError, match=r"config.json: describes no model \(class_names must be"):
        FractalGen.from_pretrained(saved)


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_the_device_is_the_callers(saved):
    assert FractalGen.from_pretrained(saved, map_location="meta").fake_latent.device.type == "meta"
    with torch.device("meta"):
        assert FractalGen.from_pretrained(saved).fake_latent.device.type == "meta"


def test_arguments_may_differ_from_the_config(saved):
    loaded = FractalGen.from_pretrained(saved, r_weight=5.0, attn_dropout=0.0)
    assert (loaded.arguments["r_weight"], loaded.config["attn_dropout"]) == (5.0, 0.0)
    with pytest.raises(UserError, match="weights of another model"):
        FractalGen.from_pretrained(saved, class_num=9)


BAD_CONFIGS = {
    "damaged": (lambda folder: (folder / "config.json").write_text('{"img_size_list": ['), r"damaged \(Expecting value"),
    "not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"damaged \('utf-8' codec"),
    "no object": (lambda folder: (folder / "config.json").write_text("[1]"), r"damaged \(it is no JSON object"),
    "very deep": (lambda folder: (folder / "config.json").write_text("[" * 10**5), r"damaged \("),
    "another model's": (partial(edit, model_type="bert"), "the config of another model, with model_type"),
    "not the whole model": (partial(edit, fractal_level=1), "the config of another model, with fractal_level"),
    "no architecture": (lambda folder: (folder / "config.json").write_text("{}"), r"describes no model \(.*img_size_list"),
    "impossible sizes": (partial(edit, img_size_list=[8, 3, 1]), r"describes no model \(level 0: image side 8"),
    "sizes no list": (partial(edit, img_size_list=8), r"describes no model \("),
    "negative classes": (partial(edit, class_num=-1), r"describes no model \("),
    "settings unknown": (partial(edit, sampling_defaults={"num_inference_steps": [1, 1], "x": 1}), r"describes no model \(unknown sampling_defaults x"),
    "settings of other levels": (partial(edit, sampling_defaults={"num_inference_steps": [1]}), "config.json: num_inference_steps 1 must be 2 numbers"),
    "settings impossible": (
        partial(edit, sampling_defaults={"num_inference_steps": [1, 1], "guidance_schedule": "x"}), "config.json: guidance_schedule 'x' must be"),
    "settings no numbers": (
        partial(edit, sampling_defaults={"num_inference_steps": [1, 1], "temperature": "x"}), "config.json: temperature 'x' must be"),
    "settings no object": (partial(edit, sampling_defaults=[1]), r"describes no model \("),
    "about no object": (partial(edit, about="emoji"), r"describes no model \("),
    "about unknown": (partial(edit, about={"data": "x", "limits": "y", "z": 1}), r"describes no model \(.*'z'"),
    "about incomplete": (partial(edit, about={"data": "x"}), r"describes no model \(.*'limits'"),
    "about no text": (partial(edit, about={"data": ["x"], "limits": "y"}), r"describes no model \(about: data must be"),
    "about that moves the cursor": (
        partial(edit, about={"data": "x", "limits": "\x1b[2J"}), r"describes no model \(about: limits must be"),
    "about too long": (partial(edit, about={"data": "x" * 301, "limits": "y"}), r"describes no model \(about: data must be"),
    "about no numbers": (
        partial(edit, about={"data": "x", "limits": "y", "bits_per_dim": "3", "bits_per_dim_std": 1}),
        r"describes no model \(about: bits_per_dim and"),
    "about one number": (
        partial(edit, about={"data": "x", "limits": "y", "bits_per_dim": 3}), r"describes no model \(about: bits_per_dim and"),
    "about not finite": (
        partial(edit, about={"data": "x", "limits": "y", "bits_per_dim": float("nan"), "bits_per_dim_std": 1}),
        r"describes no model \(about: bits_per_dim and"),
    "names that move the cursor": (partial(edit, **{"\x1b[2J\n": 1}), r"another model, with \?\[2J,"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_config_that_is_no_good_is_named_in_one_line(kind, saved):
    spoil, message = BAD_CONFIGS[kind]
    spoil(saved)
    with pytest.raises(UserError, match=message) as error:
        FractalGen.from_pretrained(saved)
    assert str(error.value).startswith(f"{saved / 'config.json'}: ")
    assert str(error.value).isprintable()


HUGE = {
    "num_blocks_list": ([10**9, 1, 1], [1, 1, 10**9], [float("inf"), 1, 1]),
    "embed_dim_list": ([2**35, 16, 16], [32, 2**62, 16], [32, 16, 2**40]),
    "img_size_list": ([2**20, 2, 1], [2**40, 2**39, 1]),
    "class_num": (10**12, 10**30),
    "num_conds": (10**9,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in HUGE for value in HUGE[field]])
def test_a_config_that_asks_for_more_than_its_weights_hold_takes_no_memory(field, value, kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    edit(tmp_path, **{field: value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"config.json: describes no model \("):
        FractalGen.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused_by_name(dtype, saved):
    weights = checkpoint.load_safetensors(saved / checkpoint.SAFETENSORS_NAME)
    checkpoint.save_safetensors(
        saved / checkpoint.SAFETENSORS_NAME, {**weights, "fake_latent": weights["fake_latent"].to(dtype)}
    )
    with pytest.raises(
        UserError, match=rf"model.safetensors: weight fake_latent is {dtype}; weights are floats"
    ):
        FractalGen.from_pretrained(saved)


def test_weights_that_are_no_good_are_named(saved):
    other = tiny_model(class_num=9)
    checkpoint.save_safetensors(saved / checkpoint.SAFETENSORS_NAME, other.state_dict())
    with pytest.raises(
        UserError, match=r"model.safetensors: weights of another model: 1 of another shape \(class_emb.weight"
    ):
        FractalGen.from_pretrained(saved)
    with (saved / checkpoint.SAFETENSORS_NAME).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"model.safetensors: damaged, its SHA-256"):
        FractalGen.from_pretrained(saved)
    (saved / f"{checkpoint.SAFETENSORS_NAME}.sha256").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read, it is damaged"):
        FractalGen.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named_and_no_pickle_is_taken_instead(name, saved):
    torch.save(tiny_model().state_dict(), saved / "pytorch_model.bin")
    (saved / name).unlink()
    with pytest.raises(
        UserError, match=rf"{name}: no such file; save_pretrained writes config.json and model.safetensors"
    ):
        FractalGen.from_pretrained(saved)


def test_an_inner_level_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="this is level 1 of a model; save the whole model"):
        tiny_model().next_fractal.save_pretrained(tmp_path)


def test_a_model_in_bfloat16_is_saved_as_it_is_and_loaded_in_float32(tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert {
        value.dtype for value in checkpoint.load_safetensors(tmp_path / checkpoint.SAFETENSORS_NAME).values()
    } == {torch.bfloat16}
    assert torch.equal(outputs(FractalGen.from_pretrained(tmp_path)), outputs(model.float()))


def test_the_card_says_what_it_is(saved):
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.library_name == "fractalgen"
    assert card.data.license is None  # of the weights nobody told us
    assert "8 x 8 pixels of 4 classes" in card.text
    assert "from_pretrained" in card.text


class Hub(SimpleHTTPRequestHandler):
    """As much of the hub as a download asks for: OWNER/NAME/resolve/REVISION/FILE."""

    def translate_path(self, path):
        return (
            f"{self.directory}/{path.split('/')[-1]}"
            if path.startswith("/us/tiny/resolve/main/")
            else "/nowhere"
        )

    def end_headers(self):
        self.send_header("ETag", f'"{"a" * 40 if "config" in self.path else "b" * 40}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        super().end_headers()

    def log_message(self, *_):
        pass


def test_a_hub_id_is_fetched_kept_and_loaded(saved, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(saved)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        fetched = FractalGen.from_pretrained("us/tiny", cache_dir=cache)
        with pytest.raises(
            UserError, match=r"us/other: no such folder, and the hub gives no config.json of that id \("
        ):
            FractalGen.from_pretrained("us/other", cache_dir=cache)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert torch.equal(outputs(fetched), outputs(tiny_model()))
    kept = FractalGen.from_pretrained("us/tiny", cache_dir=cache, local_files_only=True)
    assert torch.equal(outputs(kept), outputs(fetched))


def test_what_is_neither_folder_nor_id_is_named():
    for name in ("/no/such/folder", "fractalmar_in65", "./a/b", "a/b/c", "~/a"):  # without a network
        with pytest.raises(UserError, match="no such folder, and an id on the hub is OWNER/NAME"):
            FractalGen.from_pretrained(name)


def test_the_number_of_classes_is_that_of_the_weights(tmp_path):
    model = tiny_model()
    model.class_names = ["ant", "bee", "cat", "dog"]
    with pytest.raises(AttributeError, match="class_num"):
        model.class_num = 2
    model.class_emb = torch.nn.Embedding(2, 32)
    with pytest.raises(ValueError, match="class_names must be 2 names, one for each class, got 4"):
        model.save_pretrained(tmp_path)
    model.class_names = ["ant", "bee"]
    model.save_pretrained(tmp_path)
    assert FractalGen.from_pretrained(tmp_path).class_num == 2
