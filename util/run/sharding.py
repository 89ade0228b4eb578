"""Sharded runs by torch's own engine: FSDP2 divides a model among processes, DCP writes and reads its parts.

A checkpoint of such a run is checkpoint-<step>.pth, as a single process writes it, but with the path of each
tensor in its place, and the folder checkpoint-<step>.shards of torch.distributed.checkpoint (DCP). The file
is written last, with the SHA-256 of those in the folder. Any number of processes can read the tensors.

Reading runs no code of the files. DCP's list of tensors is a pickle: only the classes of such a list are
admitted, and not the one that lets DCP unpickle other things than tensors. Tensors it reads safely.
"""

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, async_save, load, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.utils import _ReaderView
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from util.dist import host_group
from util.errors import UserError, one_line, reading
from util.files import check_archive, sha256, sidecar, to_disk, write_sidecar
from util.run import weights

LIST = ".metadata"
TREES = ("model", "model_ema", "optimizer")  # the entries of a checkpoint whose tensors are in the folder
DTYPES = {("torch", str(dtype)[6:]): dtype for dtype in weights.DTYPES}
ADMITTED = DTYPES | {(one.__module__, one.__qualname__): one for one in (
    metadata.Metadata, metadata.TensorStorageMetadata, metadata.TensorProperties, metadata.MetadataIndex,
    metadata.ChunkStorageMetadata, metadata._MEM_FORMAT_ENCODING, _StorageInfo, torch.Size,
    torch.serialization._get_layout,
)}  # fmt: skip
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # none is changed in place


def _walk(tree: dict, change: Callable[[str, object], object], path: str = "") -> dict:
    """A copy of nested dicts, with change(path, value) in place of each value."""
    step = lambda key, x: _walk(x, change, f"{key}/") if isinstance(x, dict) else change(key, x)  # noqa: E731
    return {key: step(f"{path}{key}", value) for key, value in tree.items()}


class _Writer(FileSystemWriter):
    """Writes the SHA-256 of each file too. At the end the first process calls `commit` with all of them."""

    def __init__(self, folder: Path, commit: Callable[[dict[str, str]], None]):
        super().__init__(folder, per_thread_copy_ahead=0)
        self.commit = commit

    def storage_meta(self) -> None:
        """Leaves out where the folder is, so that it can be moved."""

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.value()}:
            write_sidecar(self.path / name, sha256(self.path / name))
        return written

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        with suppress(OSError):  # some systems cannot do this for a folder
            to_disk(self.path)
        names = {result.storage_data.relative_path for of_process in results for result in of_process}
        hashes = {name: sidecar(self.path / name).read_text().split()[0] for name in sorted(names)}
        self.commit({LIST: sha256(self.path / LIST), **hashes})


class Saver:
    """Writes checkpoints while training goes on, one at a time. All processes must call it alike."""

    def __init__(self):
        self.on_gpu, self.group = torch.cuda.is_available(), host_group()  # for another thread
        self.stager = DefaultStager(StagingOptions(self.on_gpu, False, True, self.on_gpu))  # keeps its copy
        self.future = self.copied = None

    def wait_for_copy(self, *_) -> None:
        """Must be called before the tensors of the last checkpoint change."""
        copied, self.copied = self.copied, None
        if copied is not None and (error := copied.exception()) is not None:
            raise UserError(f"a checkpoint could not be copied to this host ({one_line(error)})") from error

    def start(self, content: dict, folder: Path, commit: Callable[[dict], None]) -> None:
        """Begins to copy and to write the tensors of a checkpoint, after the end of the one before.

        At the end the first process, in another thread, calls `commit` with what is left of the checkpoint.
        """
        tensors = {}

        def take(path: str, value):
            if isinstance(value, Tensor) and value.dim() and value.numel():
                tensors[path] = value
                return path
            return copy.deepcopy(value)  # such as AdamW's number of steps, which goes on

        rest = {**content, **_walk({key: content[key] for key in TREES if key in content}, take)}
        writer = _Writer(folder, lambda files: commit({**rest, "shards": files}))
        if self.on_gpu:
            torch.cuda.synchronize()  # the copy is made in a stream of its own
        saving = async_save(
            tensors, storage_writer=writer, process_group=self.group, async_stager=self.stager,
            no_dist=self.group is None,
        )  # fmt: skip
        self.copied, self.future = saving.staging_completion, saving.upload_completion

    def wait(self) -> BaseException | None:
        """Waits for the end of writing. Returns, on all processes, what failed on one of them, or None."""
        self.wait_for_copy()  # where that failed, the others do not hear of it until this process ends
        future, self.future = self.future, None
        error = future.exception() if future is not None else None
        return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


class Sharded(Saver):
    """A model whose weights, which all processes have alike on the host, are divided among their devices.

    The weights of one unit at a time are gathered, in `dtype` (None: their own), and freed after their pass.
    A unit is a transformer block, the rest of a level or head (a module with `blocks`), or the rest of the
    model. Gradients are summed in float32. Raises UserError where there is a single process.

    plain  a copy of the model as it was, whose weights are the divided ones
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, device: torch.device):
        if not torch.distributed.is_initialized():
            raise UserError("--shard divides a model among processes: start several, with torchrun")
        super().__init__()
        size, self.plain = torch.distributed.get_world_size(), copy.deepcopy(model)

        def evenly(weight: Tensor) -> Shard | None:
            """Divides along the first axis that gives equal parts; that of positions has length 1."""
            axes = [axis for axis, length in enumerate(weight.shape) if length % size == 0]
            return Shard(axes[0]) if axes else None

        how = {
            "mesh": init_device_mesh(device.type, (size,)),
            "shard_placement_fn": evenly,
            # Inputs keep their dtype, or pixels would be rounded to other values.
            "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
            "ignored_params": {p for p in model.parameters() if p.numel() == 0},  # without classes
        }
        for level in reversed(list(model.modules())):  # the deeper ones first
            for unit in (*level.blocks, level) if hasattr(level, "blocks") else ():
                fully_shard(unit, **how)
        fully_shard(model, **how)
        self.plain.load_state_dict(model.state_dict(), assign=True)
        self.plain.to(device)

    def full_weights(self, model: nn.Module, on_main: bool = False) -> dict[str, Tensor]:
        """All weights of a divided model, on each process or, on the host, `on_main`. All must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=on_main)
        return get_model_state_dict(model, options=options)

    def like(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[str], Tensor | None]:
        """For `fill`: gives the weight whose shape and division the tensor at a path of a checkpoint has."""
        found = {f"{key}/{name}": x for key in TREES[:2] for name, x in model.state_dict().items()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = ("exp_avg", "exp_avg_sq")
        return (found | {f"optimizer/state/{i}/{x}": p for i, p in enumerate(params) for x in moments}).get

    def whole(self, models: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """Yields the names of divided models, and `plain` with all weights of each. All must call it."""
        for name, model in models.items():
            self.plain.load_state_dict(self.full_weights(model), assign=True)
            yield name, self.plain
            self.plain.load_state_dict(model.state_dict(), assign=True)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ADMITTED:
            raise UserError(f"refused, it holds more than a list of tensors ({module}.{name})")
        return ADMITTED[module, name]


class _View(_ReaderView):
    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As of any file; torch's own seeks from the end in the wrong direction."""
        return super().seek(self.len + offset) if whence == os.SEEK_END else super().seek(offset, whence)


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, names: Collection[str]):
        super().__init__(folder)
        with open(folder / LIST, "rb") as file:
            self.list = _Unpickler(file).load()
        for place in self.list.storage_data.values():
            if place.relative_path not in names or place.transform_descriptors:
                raise UserError(f"refused, its list has an odd place, {one_line(place)}")
            with open(folder / place.relative_path, "rb") as file:
                check_archive(_View(file, place.offset, place.length))
        self.list.storage_meta = metadata.StorageMeta()

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        return self.list


def fill(
    content: dict, folder: Path, like: Callable[[str], Tensor | None] | None, optimizer: bool = True
) -> dict:
    """Puts the tensors into a checkpoint: those of `folder` in place of their paths, if it is in parts.

    One in parts has no entry of the optimiser then, unless `optimizer`. For a sharded model `like` is what
    `Sharded.like` returns: only this process's parts are read. Raises UserError where files are missing or
    damaged, which of the processes of such a model the first one checks.
    """
    files, targets = content.pop("shards", {}), {}
    with reading(folder, "cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each process reads by itself
        if (files and LIST not in files) or any(Path(name).name != name for name in files):
            raise UserError("refused, it names other files than its own")
        for name, digest in files.items() if like is None or not torch.distributed.get_rank() else ():
            if not (folder / name).is_file():  # but a device, which has no end
                raise UserError(f"{name}: no such file")
            if sha256(folder / name) != digest:
                raise UserError(f"damaged, {name} has not the SHA-256 that the checkpoint says")
        reader = _Reader(folder, files) if files else None

        def put(path: str, value):
            weight = like(path) if like is not None else None
            if files and isinstance(value, str) and value == path:
                found = reader.list.state_dict_metadata[path]
                value = targets[path] = torch.empty(found.size, dtype=found.properties.dtype)
            if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape:
                if path in targets:
                    value = targets[path] = torch.empty_like(weight)
                else:
                    place = weight.device_mesh, weight.placements
                    value = distribute_tensor(value.to(weight.device), *place, src_data_rank=None)
            return value

        if files and not optimizer:
            content.pop("optimizer", None)
        content |= _walk({key: content[key] for key in TREES if key in content}, put)
        try:
            if targets:
                load(targets, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
    return content
