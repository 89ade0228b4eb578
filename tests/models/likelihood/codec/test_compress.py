"""Lossless compression: images come back exactly, and take as many bits as their likelihood says."""

import resource
import subprocess
import sys
import zlib
from dataclasses import replace

import constriction
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU_AND_CUDA, GRID_MODELS, ROOT, grid_model, opinionated, tiny_model
from models.fractalgen import FractalGen
from models.likelihood.codec.archive import MAGIC, START, Archive, join
from models.likelihood.codec.compress import environment, max_rows
from models.likelihood.codec.passes import Passes
from util.errors import UserError

QUIET = dict(progress_bar=False)
MODELS = {**GRID_MODELS, "one level": ("ar", [(2, 8), (1, 1)], 1, 65_536, "ordinal")}


@pytest.fixture(params=MODELS)
def model(request) -> FractalGen:
    return grid_model(*MODELS[request.param])


def arrays_of(model, n: int, shape=None) -> np.ndarray:
    """n arrays (n, *S, C) of random values."""
    shape = (n, *(model.image_shape if shape is None else shape), model.alphabet.channels)
    return (
        np.random.default_rng(0).integers(0, model.alphabet.num_values, shape).astype(model.alphabet.stored)
    )


def restored(model, data, *args, **options) -> np.ndarray:
    """The arrays of archives, all of one shape."""
    return np.stack(model.decompress(data, *args, output_type="np", **options, **QUIET))


def stream_bits(data: bytes) -> list[int]:
    """The bits of each image's values."""
    return [stream.bits for stream in Archive.from_bytes(data).streams]


def test_arrays_of_any_size_come_back_exactly(model):
    for change in (0, 1, -1):
        arrays = arrays_of(model, 3, [side + change for side in model.image_shape])
        out = model.compress(arrays, [0, 1, 2], batch_size=max(2, 8 * abs(change)), **QUIET)
        found = restored(model, join(out))
        assert found.dtype == arrays.dtype
        assert (found == arrays).all()
        assert (restored(model, join(out), [2, 0, 2]) == arrays[[2, 0, 2]]).all()
        assert (restored(model, out[1:2]) == arrays[1:2]).all()


def test_an_array_takes_the_bits_of_its_likelihood(model):
    for options in ({}, {"num_inference_steps": 1}, {"seed": 5}):
        arrays = arrays_of(model, 4)
        out = model.compress(arrays, [0, 1, 2, 3], **options, **QUIET)
        bits = -model.log_likelihood(arrays, [0, 1, 2, 3], num_orders=1, **options, **QUIET).bits
        assert (restored(model, out) == arrays).all()
        lost = np.array(stream_bits(join(out))) - bits.numpy()
        assert (lost < 1.01 + 0.001 * bits.numpy()).all()  # whole bits
        assert (lost > -1 - 0.03 * bits.numpy()).all()  # the coder gives each value at least 2^-24


@pytest.mark.parametrize("kind", ["ar", "mar", "guided"])
def test_guiding_pixels_and_neighbours_come_back(kind):
    model = opinionated(tiny_model(kind))
    for sides in ((8, 8), (11, 19), (5, 8)):
        images = arrays_of(model, 3, sides)
        out = model.compress([Image.fromarray(image) for image in images], batch_size=4, **QUIET)
        for image, found in zip(images, model.decompress(out, **QUIET), strict=True):
            assert (np.asarray(found) == image).all()


def test_black_noise_and_what_the_model_finds_impossible():
    model = tiny_model("ar", channels=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "codebook" in name or "mlm" in name:
                weight.normal_(std=100)  # logits of thousands: nearly all probabilities are 0
    images = np.concatenate(
        [arrays_of(model, 2), np.zeros((1, 8, 8, 1), np.uint8), np.full((1, 8, 8, 1), 255, np.uint8)]
    )
    bits = -model.log_likelihood(images, **QUIET).bits
    assert bits.min() > 64 * 1000
    out = model.compress(images, **QUIET)
    assert (restored(model, out) == images).all()
    assert max(stream_bits(join(out))) <= 64 * 24 + 1  # each value costs at most 24 bits


def test_rounding_probabilities_costs_less_than_a_thousandth():
    random = np.random.default_rng(0)
    probs = (
        torch.from_numpy(random.normal(size=(20_000, 256)) * random.uniform(0, 6, (20_000, 1)))
        .softmax(1)
        .float()
        .numpy()
    )
    values = (probs.cumsum(1) < random.random((20_000, 1))).sum(1).clip(max=255).astype(np.int32)
    coder = constriction.stream.stack.AnsCoder(np.array([1], np.uint32))
    header = (
        Archive.from_bytes(tiny_model("ar").compress(arrays_of(tiny_model("ar"), 1), **QUIET)[0])
        .streams[0]
        .header
    )
    coder.encode_reverse(values, Passes(tiny_model("ar"), header).rounded, probs)
    ideal = -np.log2(probs[np.arange(20_000), values].astype(float)).sum()
    assert ideal < coder.num_valid_bits() - 1 < ideal * 1.001


def test_fewer_steps_of_a_mar_level_are_another_stream_and_the_reader_takes_as_many():
    model = opinionated(tiny_model("mar"))
    images = arrays_of(model, 2)
    outs = [model.compress(images, num_inference_steps=steps, **QUIET) for steps in (1, [16, 4], [3, 2])]
    assert len({out[0] for out in outs}) == 3
    assert [Archive.from_bytes(out[0]).streams[0].header.steps for out in outs] == [(1, 1), (16, 4), (3, 2)]
    for out in outs:
        assert (restored(model, out) == images).all()


def test_archives_of_several_calls_and_sizes_are_read_together():
    model = opinionated(tiny_model("guided"))
    first, second = arrays_of(model, 3), 255 - arrays_of(model, 3)
    wide = arrays_of(model, 2, (8, 12))
    parts = [model.compress(one, batch_size=2, **QUIET) for one in (first, second, wide)]
    found = model.decompress(join([join(part) for part in parts]), output_type="np", **QUIET)
    assert all((a == b).all() for a, b in zip(found, [*first, *second, *wide], strict=True))
    mixed = [parts[1][0], parts[2][1], parts[0][0]]
    found = model.decompress(mixed, output_type="np", **QUIET)
    assert all((a == b).all() for a, b in zip(found, [second[0], wide[1], first[0]], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes(dtype):
    model = opinionated(tiny_model("mar")).to(dtype)
    images = arrays_of(model, 2)
    out = model.compress(images, 1, **QUIET)
    assert Archive.from_bytes(out[0]).streams[0].header.dtype == str(dtype).removeprefix("torch.")
    assert (restored(model, out) == images).all()


@CPU_AND_CUDA
def test_images_come_back_on_each_device(device):
    model = opinionated(tiny_model("guided")).to(device)
    images = arrays_of(model, 3)
    assert (restored(model, model.compress(images, [0, 1, 2], **QUIET)) == images).all()


def test_another_process_reads_what_this_one_wrote(tmp_path):
    model = opinionated(tiny_model("guided"))
    model.save_pretrained(tmp_path)
    images = arrays_of(model, 2)
    (tmp_path / "images").write_bytes(join(model.compress(images, 2, **QUIET)))
    program = (
        "import sys, pathlib, numpy\nfrom models.fractalgen import FractalGen\n"
        "folder = pathlib.Path(sys.argv[1])\nmodel = FractalGen.from_pretrained(folder)\n"
        "found = model.decompress((folder / 'images').read_bytes(), output_type='np', progress_bar=False)\n"
        "numpy.save(folder / 'found.npy', numpy.stack(found))"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=True)
    assert (np.load(tmp_path / "found.npy") == images).all()


@pytest.fixture
def small():
    """A model and the archive of three of its images."""
    model = opinionated(grid_model("mar,ar", [(4, 4), (2, 2), (1, 1)], 1, 5, "ordinal"))
    images = arrays_of(model, 3)
    return model, images, join(model.compress(images, [0, 1, 2], batch_size=2, **QUIET))


def with_header(data: bytes, **changes) -> bytes:
    streams = Archive.from_bytes(data).streams
    return Archive([replace(one, header=replace(one.header, **changes)) for one in streams]).to_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 63}, "threads 63, here "),
        ({"device": "a\x1b\nb"}, r"device a\?, here "),
        ({"torch": "2.0.0"}, "torch 2.0.0, here "),
        ({"constriction": "0.1"}, "constriction 0.1, here "),
        ({"dtype": "float64"}, "dtype float64, here float32"),
        ({"device": "cuda, NVIDIA H100"}, "device cuda, NVIDIA H100, here cpu, "),
        ({"model": "0"}, "model 0, here "),
    ],
)
def test_what_may_compute_other_numbers_is_refused_unless_forced(small, changes, message):
    model, images, data = small
    data = with_header(data, **changes)
    with pytest.raises(UserError, match=f"may not decompress to the same values here: {message}"):
        model.decompress(data, **QUIET)
    assert (restored(model, data, force=True) == images).all()  # these changes change no number


def test_a_changed_weight_is_another_model_and_settings_of_training_are_not(small):
    model, images, data = small
    other = FractalGen(**{**model.arguments, "proj_dropout": 0.5, "r_weight": 2.0})
    other.load_state_dict(model.state_dict())
    assert (restored(other, data) == images).all()
    with torch.no_grad():
        other.next_fractal.next_fractal.c0_mlm.bias[0, 2] += 1
    with pytest.raises(UserError, match=r"model .*, here "):
        other.decompress(data, **QUIET)
    assert None in other.decompress(data, force=True, **QUIET)  # never other values than were compressed
    heads = FractalGen(**{**model.arguments, "num_heads_list": [4, 2, 2]})
    heads.load_state_dict(model.state_dict())
    assert environment(heads)["model"] != environment(model)["model"]


def test_a_damaged_stream_is_refused_and_when_forced_costs_one_image(small):
    model, images, data = small
    streams = Archive.from_bytes(data).streams
    broken = bytearray(streams[1].data)
    broken[3] ^= 16
    data = Archive([streams[0], replace(streams[1], data=bytes(broken)), streams[2]]).to_bytes()
    with pytest.raises(UserError, match="image 1 of the archive has another CRC-32"):
        model.decompress(data, **QUIET)
    found = model.decompress(data, force=True, output_type="np", **QUIET)
    assert found[1] is None
    assert (np.stack([found[0], found[2]]) == images[[0, 2]]).all()
    assert (restored(model, data, [0, 2]) == images[[0, 2]]).all()


def test_an_image_of_another_size_or_class_than_was_compressed_is_found_out(small):
    model, _, data = small
    with pytest.raises(UserError, match=r"shape \(1, 4\), which the model cannot draw"):
        model.decompress(with_header(data, shape=(1, 4)), **QUIET)
    with pytest.raises(UserError, match=r"shape \(3, 4, 4\), which the model cannot draw"):
        model.decompress(with_header(data, shape=(3, 4, 4)), force=True, **QUIET)
    with pytest.raises(UserError, match="the stream of an image ends before the image"):
        model.decompress(with_header(data, shape=(1, 4000, 4000)), **QUIET)
    with pytest.raises(UserError, match="needs 1025 rows; this model has at most 1024"):
        model.decompress(with_header(data, rows=1025), **QUIET)
    with pytest.raises(UserError, match="steps"):
        model.decompress(with_header(data, steps=(1,)), **QUIET)
    streams = [replace(one, label=4) for one in Archive.from_bytes(data).streams]
    with pytest.raises(UserError, match="the archive has class 4, but the model 4 classes"):
        model.decompress(Archive(streams).to_bytes(), **QUIET)
    large = [replace(one, header=replace(one.header, shape=(1, 2**13, 2**13))) for one in streams] * 6
    with pytest.raises(UserError, match="only must name fewer images"):
        model.decompress(Archive(large).to_bytes(), **QUIET)


def test_arguments_out_of_range(small, monkeypatch):
    model, images, data = small
    for options, message in (
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"num_inference_steps": [1]}, "num_inference_steps"),
        ({"class_labels": 9}, "9 is no class"),
        ({"images": images + 5}, "integers 0 to 4"),
        ({"images": images[0, 0, 0]}, "it must have 1 channels"),
    ):
        with pytest.raises(UserError, match=message):
            model.compress(**{"images": images, **options}, **QUIET)
    with pytest.raises(UserError, match="only 3 must be from 0 to 2"):
        model.decompress(data, [3], **QUIET)
    with pytest.raises(UserError, match="'jpg' must be one of pil, np, pt"):
        model.decompress(data, output_type="jpg", **QUIET)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match="pip install constriction"):
        model.compress(images, **QUIET)


def test_what_would_not_come_back_exactly_is_refused():
    grey, rgb = tiny_model("ar", channels=1, num_values=17), tiny_model("ar")
    noise = Image.fromarray(arrays_of(rgb, 1)[0])
    for model, image, message in (
        (rgb, np.zeros((8, 8, 3), np.float32), "float32 values, which may be rounded"),
        (grey, noise, "image 0 is not of 1 channels with 17 values each: it has other colours"),
        (grey, [Image.new("L", (8, 8)), noise.convert("L")], "image 1 is not of 1 channels with 17 values"),
        (rgb, Image.fromarray(np.dstack([noise, noise.convert("L")])), "transparent pixels"),
    ):
        with pytest.raises(UserError, match=message):
            model.compress(image, **QUIET)
    palette = noise.quantize(16)
    (found,) = rgb.decompress(rgb.compress([palette, noise], **QUIET)[0], **QUIET)
    assert (np.asarray(found) == np.asarray(palette.convert("RGB"))).all()
    far = tiny_model("ar", mean=[1e5] * 3, std=[0.25] * 3)
    with pytest.raises(UserError, match="cannot tell its values apart"):
        far.compress(np.asarray(noise), **QUIET)
    with pytest.raises(UserError, match="have more than 67,108,864 values"):
        rgb.compress(np.zeros((4800, 4800, 3), np.uint8), **QUIET)


def test_neither_autocast_nor_training_mode_nor_threads_matter(small):
    model, images, data = small
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        (header,) = {
            stream.header
            for out in model.compress(images, **QUIET)
            for stream in Archive.from_bytes(out).streams
        }
    assert header.dtype == "bfloat16"
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        out = model.compress(images, **QUIET)
        assert (restored(model, data) == images).all()
        assert (restored(model, out) == images).all()
    finally:
        torch.set_num_threads(before)
    assert model.training


def test_kernels_that_the_environment_chooses_are_part_of_the_device(monkeypatch):
    model = tiny_model("ar")
    before = environment(model)["device"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert environment(model)["device"] == f"{before}, ONEDNN_MAX_CPU_ISA=AVX2"


def test_what_the_library_keeps_in_memory_is_bounded():
    assert max_rows(tiny_model("ar")) == 1024
    assert max_rows(tiny_model("ar", img_size_list=[256, 2, 1])) == 2


def test_two_thousand_damaged_and_hostile_files(small):
    model, images, data = small
    random = np.random.default_rng(0)
    before, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number in range(2000):
        changed = bytearray(data)
        for _ in range(random.integers(1, 4)):
            place = random.integers(0, len(changed))
            kind = random.integers(0, 5)
            if kind == 0:
                changed[place] ^= 1 << random.integers(0, 8)
            elif kind == 1:
                changed[place] = random.integers(0, 256)
            elif kind == 2:
                del changed[place : place + random.integers(1, 9)]
            elif kind == 3:
                changed[place:place] = random.bytes(random.integers(1, 9))
            else:
                del changed[place:]
            changed = changed or bytearray(b"F")
        if number % 2 and len(changed) >= START.size:  # a forger makes the checksum fit
            crc = zlib.crc32(changed[START.size :])
            changed[len(MAGIC) : len(MAGIC) + 4] = crc.to_bytes(4, "little")
        found, message = [], ""
        try:
            found = model.decompress(bytes(changed), force=number % 4 > 1, output_type="np", **QUIET)
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        assert all(image is None or any((image == one).all() for one in images) for image in found)
        read += sum(image is not None for image in found)
    assert read > 100  # some had no damage that mattered, or only to one image
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB
