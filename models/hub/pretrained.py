"""A model as a folder that others can read: `model.safetensors`, `config.json` and a model card.

`save_pretrained`, `push_to_hub` and the card come from huggingface_hub's mixin. `config` and
`from_pretrained` are our own, because the mixin's loading is not strict, falls back to a pickle and ignores
unknown settings, and its config silently leaves out arguments that are not plain JSON.
"""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import CONFIG_NAME
from torch.overrides import TorchFunctionMode

from models.hub.about import About
from models.hub.source import SAVED_OPTIONS, WRITTEN, find, saved_options
from models.sampling.options import SamplingOptions, check_steps
from util import checkpoint
from util.errors import UserError, one_line, reading
from util.pixels import in_words

CARD = """---
{{ card_data }}
---

# A fractal generative model

Generates images of {{ size }}{{ classes }}; {{ parameters }} parameters. The method is
that of *Fractal Generative Models* ([arXiv 2502.17437]({{ paper_url }})).

```python
from models.fractalgen import FractalGen  # the library fractalgen

model = FractalGen.from_pretrained("this repository's id, or the folder")
model.generate([0], seed=0)[0].save("image.png")
```

`config.json` holds the architecture, sampling settings and, where they are known, the names of the classes
and what the model was trained on.
The library's licence, MIT, says nothing about these weights: theirs is up to whoever trained them.
"""


# what from_pretrained passes on to hf_hub_download
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def recorded(arguments: Mapping) -> dict:
    """A constructor's `locals()` -> its arguments as JSON has them: lists, texts and numbers."""
    plain = {k: value for k, value in arguments.items() if k not in ("self", "__class__", "fractal_level")}
    to_plain = lambda value: value.tolist() if hasattr(value, "tolist") else list(value)  # noqa: E731
    return json.loads(json.dumps(plain, default=to_plain))


class Pretrained(
    PyTorchModelHubMixin,
    library_name="fractalgen",
    tags=["image-generation", "autoregressive", "arxiv:2502.17437"],
    paper_url="https://arxiv.org/abs/2502.17437",
    model_card_template=CARD,
):
    """A base of FractalGen, which sets `arguments` (those of its constructor) and `sampling_defaults`."""

    arguments: dict
    sampling_defaults: SamplingOptions
    class_num: int
    about: About | None = None  # what it was trained on and what it cannot do; None: not known
    _class_names: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name for each class in the order of the labels, or None. Another number raises ValueError."""
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
        """What `config.json` holds: the constructor's arguments, `class_names`, `sampling_defaults`, `about`.

        Where `about` is None its key is left out.
        """
        self.class_names = self.class_names  # checks their number, should class_emb be another one by now
        own = {
            "class_num": self.class_num,
            "class_names": self.class_names,
            "sampling_defaults": saved_options(self.sampling_defaults),
        }
        if self.about is not None:
            own["about"] = asdict(self.about)
        return recorded({**self.arguments, **own})

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.fractal_level:
            raise ValueError(f"this is level {self.fractal_level} of a model; save the whole model")
        self._hub_mixin_config = self.config  # the mixin writes it, in place of the arguments as it saw them
        checkpoint.save_safetensors(save_directory / checkpoint.SAFETENSORS_NAME, self.state_dict())

    def generate_model_card(self, **fields):
        return super().generate_model_card(
            size=in_words(self.image_shape),
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
        **arguments,
    ):
        """The model of a folder that `save_pretrained` or training wrote, or of an id on the Hugging Face
        hub, in eval mode. Of a run's weights and their averages it takes the averages.

        pretrained_model_name_or_path  see `source.find`
        map_location  the device; default: torch's, where the constructor would build it too
        arguments     revision, token, cache_dir, force_download and local_files_only are those of
                      huggingface_hub's download. All others are those of the constructor, where they shall
                      differ from the config's: dropouts, r_weight, …

        Strict. Raises UserError (a ValueError) where config or weights are missing, damaged or of another
        model. A config that describes a larger model than its file of weights holds takes no memory.
        """
        hub = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
        source = find(pretrained_model_name_or_path, **hub)
        if source.config is None:
            raise UserError(
                f"{source.path.with_name(CONFIG_NAME)}: no such file; {WRITTEN}, and training settings.json"
            )
        weights = source.weights()
        shapes = {name: value.shape for name, value in weights.items()}
        with torch.device(torch.get_default_device() if map_location is None else map_location):
            model = cls._of_config(source.config, source.config_path, arguments, shapes)
        checkpoint.load_weights(model, weights, source.path)
        return model.eval()

    @classmethod
    def _of_config(
        cls,
        config: Mapping,
        path: Path,
        arguments: Mapping,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ):
        """Builds the model that the `config` of the file `path` describes, with random weights.

        arguments  of the constructor, in place of the config's
        shapes     of the weights that it will get: with them no larger model takes memory; None: any size
        """
        config = dict(config)
        names, defaults, about = (
            config.pop(name, None) for name in ("class_names", "sampling_defaults", "about")
        )
        known = inspect.signature(cls).parameters.keys() - {"fractal_level"}
        if unknown := [one_line(name) for name in config if name not in known]:
            raise UserError(
                f"{path}: the config of another model, with {', '.join(unknown[:3])}, unknown to FractalGen"
            )
        with reading(path, "describes no model"), ExitStack() as limits:
            settings = {**config, **arguments}
            if shapes is not None:
                limits.enter_context(_SizeLimit(settings, shapes))
            model = cls(**settings)
            model.class_names = names
            model.about = None if about is None else About(**about)
            if defaults is not None:
                if unknown := set(defaults) - set(SAVED_OPTIONS):
                    raise ValueError(f"unknown sampling_defaults {', '.join(unknown)}")
                steps = check_steps(defaults["num_inference_steps"], len(model.generators))
                model.sampling_defaults = SamplingOptions(**{**defaults, "num_inference_steps": steps})
                model.sampling_defaults.guidance(len(model.generators))  # checks them
        return model


class _SizeLimit(TorchFunctionMode):
    """Within this context, building a model that is larger than its file of weights raises ValueError.

    settings  of the model; shapes: of the weights in the file
    """

    def __init__(self, settings: Mapping, shapes: Mapping[str, Sequence[int]]):
        super().__init__()
        self.size = self.left = sum(map(math.prod, shapes.values()))
        # Blocks take time, and conditions a list; a block has several weights.
        limits = {"num_blocks_list": len(shapes), "num_conds": self.size}
        for name, limit in limits.items():
            value = settings.get(name, 0)
            if not (sum(value) if isinstance(value, Sequence) else value) <= limit:
                raise ValueError(f"{name} {value} is too large for a file of {len(shapes)} weights")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.empty:  # which makes every weight
            size = args or (kwargs["size"],)
            self.left -= math.prod(size[0] if isinstance(size[0], Sequence) else size)
            if self.left < 0:
                raise ValueError(f"it has more than the {self.size:,} numbers in the file of its weights")
        return function(*args, **(kwargs or {}))
