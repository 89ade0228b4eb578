"""A model as a folder that others can read: `model.safetensors`, `config.json`, and a model card.

`save_pretrained`, `push_to_hub` and the card are huggingface_hub's mixin. Its own loading is not strict, falls back to a
pickle, ignores settings that it does not know, and its config leaves out arguments that are no plain JSON without a word:
so `config` and `from_pretrained` are ours.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HFValidationError

from models.sampling.generate import SamplingDefaults, validate_num_iters
from models.sampling.guidance import Guidance
from util import checkpoint
from util.errors import UserError, one_line

CARD = """---
{{ card_data }}
---

# A fractal generative model

Draws images of {{ side }} x {{ side }} pixels{{ classes }}; {{ parameters }} parameters. The method is that of
*Fractal Generative Models* ([arXiv 2502.17437]({{ paper_url }})).

```python
from models.fractalgen import FractalGen  # the library fractalgen

model = FractalGen.from_pretrained("this repository's id, or the folder")
model.generate([0], seed=0)[0].save("image.png")
```

`config.json` holds the architecture, the names of the classes where they are known, and the settings to sample with.
The library's licence, MIT, says nothing about these weights: theirs is up to whoever trained them.
"""


def recorded(arguments: Mapping) -> dict:
    """A constructor's `locals()` -> its arguments as JSON holds them: lists for tuples and arrays, Python's numbers."""
    plain = {
        name: value for name, value in arguments.items() if name not in ("self", "__class__", "fractal_level")
    }
    return json.loads(
        json.dumps(plain, default=lambda value: value.tolist() if hasattr(value, "tolist") else list(value))
    )


class Pretrained(
    PyTorchModelHubMixin,
    library_name="fractalgen",
    tags=["image-generation", "autoregressive", "arxiv:2502.17437"],
    paper_url="https://arxiv.org/abs/2502.17437",
    model_card_template=CARD,
):
    """For FractalGen, which sets `arguments` (its constructor's) and `sampling_defaults`."""

    arguments: dict
    sampling_defaults: SamplingDefaults
    class_num: int
    _class_names: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name for each class, in the order of the labels, or None. Setting another number raises ValueError."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        if names is not None:
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ValueError("class_names must be a list of texts")
            if len(names) != self.class_num:
                raise ValueError(
                    f"class_names must be {self.class_num} names, one for each class, got {len(names)}"
                )
            names = tuple(names)
        self._class_names = names

    @property
    def config(self) -> dict:
        """What `config.json` holds: the constructor's arguments, `class_names` and `sampling_defaults`."""
        later = {"class_names": self.class_names, "sampling_defaults": asdict(self.sampling_defaults)}
        return recorded({**self.arguments, **later})

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.fractal_level:
            raise ValueError(f"this is level {self.fractal_level} of a model; save the whole model")
        self._hub_mixin_config = self.config  # the mixin writes it, in place of the arguments as it saw them
        checkpoint.save_safetensors(save_directory / checkpoint.SAFETENSORS_NAME, self.state_dict())

    def generate_model_card(self, **fields):
        return super().generate_model_card(
            side=self.img_size_list[0],
            classes=f" of {self.class_num} classes" if self.class_num > 1 else "",
            parameters=f"{sum(parameter.numel() for parameter in self.parameters()):,}",
            **fields,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **arguments,
    ):
        """The model of a folder that `save_pretrained` wrote, or of an id on the Hugging Face hub: float32, in eval mode.

        map_location     the device; default: torch's, where the constructor would build it too
        revision …       what huggingface_hub's download takes
        arguments        of the constructor, where they shall differ from the config's: dropouts, r_weight, …

        Strict. Raises UserError (a ValueError) where config or weights are missing, damaged or of another model.
        """
        hub = dict(
            revision=revision, token=token, cache_dir=cache_dir,
            force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip
        config_path, path = (
            _file(pretrained_model_name_or_path, name, hub)
            for name in (CONFIG_NAME, checkpoint.SAFETENSORS_NAME)
        )
        with torch.device(torch.get_default_device() if map_location is None else map_location):
            model = cls._of_config(config_path, arguments)
        checkpoint.load_weights(model, checkpoint.load_safetensors(path), path)
        return model.eval()

    @classmethod
    def _of_config(cls, path: Path, arguments: Mapping):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({one_line(error)})") from error
        names, defaults = config.pop("class_names", None), config.pop("sampling_defaults", None)
        known = inspect.signature(cls).parameters.keys() - {"fractal_level"}
        if unknown := [one_line(name) for name in config if name not in known]:
            raise UserError(
                f"{path}: the config of another model, with {', '.join(unknown[:3])}, which FractalGen has not"
            )
        try:
            model = cls(**{**config, **arguments})
            model.class_names = names
            if defaults is not None:
                settings = SamplingDefaults(
                    **{**defaults, "num_inference_steps": tuple(defaults["num_inference_steps"])}
                )
                validate_num_iters(settings.num_inference_steps, len(model.generators))
                Guidance.create(
                    settings.guidance_scale,
                    settings.guidance_schedule,
                    settings.temperature,
                    settings.filter_threshold,
                )
                model.sampling_defaults = settings
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise UserError(f"{path}: describes no model ({one_line(error)})") from error
        return model


def _file(where: str | Path, name: str, hub: dict) -> Path:
    """The file `name` of a folder, or of an id on the hub."""
    if Path(where).is_dir():
        if not (path := Path(where) / name).is_file():
            raise UserError(
                f"{path}: no such file; save_pretrained writes {CONFIG_NAME} and {checkpoint.SAFETENSORS_NAME}"
            )
        return path
    try:
        return Path(hf_hub_download(str(where), name, **hub))
    except (HFValidationError, OSError) as error:
        raise UserError(
            f"{where}: no such folder, and the hub gives no {name} of that id ({one_line(error)})"
        ) from error
