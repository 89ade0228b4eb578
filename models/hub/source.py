"""What a folder, a file or an id has of a model: its config and its weights, whoever wrote them."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from torch import Tensor

from models.hub.about import About
from models.hub.classes import imagenet_names
from models.hub.presets import CHOSEN, PRESETS, Preset, find_preset
from models.sampling.options import SamplingOptions
from util import checkpoint, download
from util.errors import UserError, one_line, reading
from util.run.folder import SETTINGS

# the fields of SamplingOptions that config.json holds as "sampling_defaults"
SAVED_OPTIONS = (
    "num_inference_steps", "guidance_scale", "guidance_schedule", "temperature", "filter_threshold"
)  # fmt: skip
PUBLISHED = About(
    "ImageNet (1.28 million photographs)",
    "Draws the 1,000 classes of ImageNet; it takes a class, not a text.",
)
WRITTEN = f"save_pretrained writes {CONFIG_NAME} and {checkpoint.SAFETENSORS_NAME}"
# what a run's settings have of the constructor's arguments, besides those that the name decides
TRAINED_WITH = ("class_num", "label_drop_prob", "attn_dropout", "proj_dropout", "r_weight")


@dataclass(frozen=True)
class Source:
    """A model's weights and, where it is known, the config that `FractalGen.config` describes.

    path         the file of weights: safetensors, or a checkpoint
    config_path  where `config` was read
    """

    path: Path
    config: dict | None = None
    config_path: Path | None = None

    @property
    def preset(self) -> str | None:
        """The name in PRESETS of the config's architecture, perhaps adapted to other data, or None."""
        for others in ((), CHOSEN):
            for name, preset in PRESETS.items():
                own = {key: value for key, value in preset.arguments.items() if key not in others}
                if all((self.config or {}).get(key) == value for key, value in own.items()):
                    return name
        return None

    @property
    def class_num(self) -> int | None:
        """The config's number of classes, where it is known. Raises UserError if it is no number."""
        number = (self.config or {}).get("class_num")
        if number is not None and type(number) is not int:
            raise UserError(f"{self.config_path}: class_num {one_line(repr(number))} must be a whole number")
        return number

    def weights(self) -> dict[str, Tensor]:
        """The weights; of a checkpoint with averaged weights, these. Raises UserError."""
        content = checkpoint.load(self.path, mmap=True, optimizer=False)
        return content.get("model_ema") or content["model"]


def find(where: str | Path, **hub) -> Source:
    """Finds a model.

    where  a folder that `save_pretrained` wrote; a run's folder, or a checkpoint in it; any other file of
           weights, or folder with a checkpoint-last.pth, of which no config is known; one of download.FILES,
           which is fetched unless it is there; or else an id on the hub
    hub    arguments of hf_hub_download

    Raises UserError where there is no model.
    """
    path = Path(where)
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return Source(_file(path, checkpoint.SAFETENSORS_NAME, hub), *_config(path / CONFIG_NAME))
    if path.is_dir() or path.is_file():
        weights = checkpoint.locate(path)
        if not weights.is_file():
            raise UserError(f"{path}: holds no model; {WRITTEN}, and training {checkpoint.NAME}")
        for name in (SETTINGS, CONFIG_NAME):
            if weights.with_name(name).is_file():
                return Source(weights, *_config(weights.with_name(name)))
        return Source(weights)
    if str(where) in download.FILES:
        weights = download.download(str(where))
        return Source(
            weights,
            _of_preset(PRESETS[str(where)], class_names=imagenet_names(), about=asdict(PUBLISHED)),
            weights,
        )
    config_path = _file(where, CONFIG_NAME, hub)
    return Source(_file(where, checkpoint.SAFETENSORS_NAME, hub), *_config(config_path))


def saved_options(options: SamplingOptions) -> dict:
    """The sampling settings that config.json holds."""
    return {name: getattr(options, name) for name in SAVED_OPTIONS}


def _of_preset(preset: Preset, **others) -> dict:
    return {**preset.arguments, **others, "sampling_defaults": saved_options(preset.sampling_defaults)}


def _config(path: Path) -> tuple[dict, Path]:
    """Reads a config.json, or makes the config of a run's settings.json. Returns it, and `path`."""
    with reading(path, "damaged"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        if path.name == SETTINGS:
            settings = config["settings"]
            if (name := settings["model"]) not in PRESETS:
                raise ValueError(f"unknown model {name}")
            known = {key: settings[key] for key in TRAINED_WITH}
            own = {key: settings.get(key) for key in CHOSEN}
            config = _of_preset(find_preset(name, **own), **known, class_names=settings.get("class_names"))
    return config, path


def _file(where: str | Path, name: str, hub: dict) -> Path:
    """The file `name` of a folder, or of an id on the hub."""
    if Path(where).is_dir():
        if not (path := Path(where) / name).is_file():
            raise UserError(f"{path}: no such file; {WRITTEN}")
        return path
    if not is_hub_id(str(where)):
        raise UserError(f"{where}: no such folder, and an id on the hub is OWNER/NAME")
    with reading(where, f"no such folder, and the hub gives no {name} of that id"):
        return Path(hf_hub_download(str(where), name, **hub))


def is_hub_id(name: str) -> bool:
    """Whether `name` can be an id of huggingface.co: OWNER/NAME, of letters, digits and "-", "_", "."."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII) is not None
