"""Writes hostile files: some run code if they are loaded without checks, others have odd contents.

`RUNS_CODE[kind](path, canary)` writes a file that creates the file `canary` if torch.load reads it without
`weights_only`. `ODD[kind](path, canary)` writes one that makes such a call fail, or return no usable weights.
"""

import argparse
import copy
import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch


class Call:
    """An object whose pickle calls `function(*args)` when it is loaded."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class MadeByNew:
    """Creates the canary file in `__new__`, which the opcodes NEWOBJ and NEWOBJ_EX call."""

    def __new__(cls, canary):
        Path(canary).touch()
        return super().__new__(cls)


class MadeByState:
    """Creates the canary file in `__setstate__`, which the opcode BUILD calls."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __setstate__(self, state):
        Path(state["canary"]).touch()


def code(canary: Path) -> str:
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


def shell(canary: Path) -> str:
    return f"touch '{canary}'"


def zipped(path: Path, pickled: bytes, **members: bytes) -> None:
    """Writes a pickle in the zip format of torch.save."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **members}.items():
            file.writestr(f"archive/{name}", data)


def saved(
    make, path: Path, canary: Path, *, key: str = "model", legacy: bool = False, protocol: int = 2
) -> None:
    """Writes a checkpoint that holds the object `make(canary)` under `key`, with torch.save."""
    content = {"model": {}, "args": argparse.Namespace(), key: make(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)


def opcodes(make, path: Path, canary: Path) -> None:
    """Writes the pickle `make(canary)`, whose opcodes were written by hand."""
    zipped(path, make(canary))


def text(value) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(str(value))) + str(value).encode()


def call(canary: Path, where: bytes = b"os\nsystem") -> bytes:
    return b"c" + where + b"\n" + text(shell(canary)) + pickle.TUPLE1 + pickle.REDUCE


def state_of_namespace(canary: Path) -> bytes:
    """A pickle of a Namespace whose state is computed by a call."""
    return b"\x80\x02cargparse\nNamespace\n)\x81}" + text("lr") + call(canary) + b"sb."


def persistent(canary: Path) -> bytes:
    """A pickle with the persistent id of a storage whose type is the result of a call."""
    return b"\x80\x02(" + text("storage") + call(canary) + text("0") + text("cpu") + b"K\x01tQ."


def of_class(canary: Path, new: bytes) -> bytes:
    return b"\x80\x04c" + f"{__name__}\nMadeByNew\n".encode() + new + b"."


def numpy_objects(canary: Path) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = Call(os.system, shell(canary))
    return array


def from_type(canary: Path) -> Call:
    return Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (shell(canary),), {})


def legacy_bytes(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Call(os.system, shell(canary)), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def plain_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Call(os.system, shell(canary)), protocol=2))


def in_tar(path: Path, canary: Path) -> None:
    """Writes the oldest format of torch.save, a tar file."""
    payload = pickle.dumps(Call(os.system, shell(canary)), protocol=2)
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            file.addfile(info, io.BytesIO(payload))


def torchscript(path: Path, canary: Path) -> None:
    """Writes a file with `constants.pkl`, so that torch.load calls torch.jit.load, which compiles its code."""
    zipped(
        path,
        pickle.dumps(Call(os.system, shell(canary)), protocol=2),
        **{"constants.pkl": b"\x80\x02).", "code/x.py": b""},
    )


def memory(path: Path, canary: Path) -> None:
    """Writes a file that allocates 4 EiB with a function that is allowed."""
    zipped(path, b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + (2**62).to_bytes(8, "little") + b"\x85R.")


def outside_its_storage(path: Path, canary: Path) -> None:
    """Writes a tensor of 2**40 numbers whose storage has only one."""
    storage = torch.ones(1)._typed_storage()
    rebuild = Call(torch._utils._rebuild_tensor_v2, storage, 0, (2**40,), (1,), False, OrderedDict())
    torch.save({"model": {"w": rebuild}}, path)


def without_data(path: Path, canary: Path) -> None:
    torch.save({"model": {"w": torch.empty(3, device="meta")}}, path)


def methods_hidden(canary: Path) -> bytes:
    """A pickle of an OrderedDict that holds a number instead of weights.

    Its attributes hide the methods `items` and `values`, so that these seem to find nothing.
    """
    ordered = b"ccollections\nOrderedDict\n"
    hidden = b"}" + text("items") + ordered + b"s" + text("values") + ordered + b"s"
    return b"\x80\x02}" + text("model") + ordered + b")R" + text("w") + b"K\x03s" + hidden + b"bs."


def names_that_move_the_cursor(path: Path, canary: Path) -> None:
    torch.save({"model": {"\x1b[2J\nall is well": torch.ones(1)}}, path)


def deflated(path: Path, canary: Path) -> None:
    """Writes 64 MiB of zeros as a compressed member, in a file of 64 KiB."""
    torch.save({"model": {"w": torch.zeros(2**24)}}, path)
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)


def overlapping(path: Path, canary: Path) -> None:
    """Writes a storage once and gives it to eight members, so that together they are larger than the file."""
    torch.save({"model": {str(number): torch.zeros(2**16) for number in range(8)}}, path)
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            if "/data/" not in name or name.endswith("/0"):
                file.writestr(name, data)
        first = next(info for info in file.infolist() if "/data/" in info.filename)
        for number in range(1, 8):
            other = copy.copy(first)
            other.filename = other.orig_filename = first.filename[:-1] + str(number)
            file.filelist.append(other)


def prepended(path: Path, canary: Path) -> None:
    """Writes an archive behind other bytes: readers differ in where they then look for its members."""
    torch.save({"model": {"w": torch.zeros(2)}}, path)
    path.write_bytes(path.read_bytes()[:64] + path.read_bytes())


RUNS_CODE = {
    "reduce os.system": partial(saved, lambda canary: Call(os.system, shell(canary))),
    "reduce subprocess": partial(saved, lambda canary: Call(subprocess.check_call, ["touch", str(canary)])),
    "reduce eval": partial(saved, lambda canary: Call(eval, code(canary))),
    "reduce exec": partial(saved, lambda canary: Call(exec, code(canary))),
    "reduce open": partial(saved, lambda canary: Call(open, str(canary), "w")),
    "reduce partial": partial(saved, lambda canary: Call(partial(os.system, shell(canary)))),
    "in args": partial(
        saved, lambda canary: argparse.Namespace(lr=Call(os.system, shell(canary))), key="args"
    ),
    "in the optimizer": partial(
        saved, lambda canary: {"state": Call(os.system, shell(canary))}, key="optimizer"
    ),
    "in model_ema": partial(saved, lambda canary: {"w": Call(os.system, shell(canary))}, key="model_ema"),
    "legacy format": partial(saved, lambda canary: Call(os.system, shell(canary)), legacy=True),
    "pickle protocol 4": partial(saved, lambda canary: Call(os.system, shell(canary)), protocol=4),
    "newobj": partial(opcodes, lambda canary: of_class(canary, text(canary) + pickle.TUPLE1 + pickle.NEWOBJ)),
    "newobj_ex": partial(
        opcodes,
        lambda canary: of_class(canary, b")}" + text("canary") + text(canary) + b"s" + pickle.NEWOBJ_EX),
    ),
    "build with setstate": partial(saved, MadeByState),
    "pickle within a tensor": partial(
        saved, lambda canary: Call(torch.storage._load_from_bytes, legacy_bytes(canary))
    ),
    "numpy objects": partial(saved, numpy_objects),
    "tensor rebuilt by a call": partial(saved, from_type),
    "a gadget of torch's": partial(saved, lambda canary: Call(torch.utils.collect_env.run, shell(canary))),
    "dotted name from an allowed module": partial(
        opcodes, lambda canary: b"\x80\x04" + call(canary, b"argparse\n_os.system") + b"."
    ),
    "dotted name from our module": partial(
        opcodes, lambda canary: b"\x80\x04" + call(canary, b"util.checkpoint\nos.system") + b"."
    ),
    "stack_global": partial(
        opcodes,
        lambda canary: b"\x80\x04" + text("os") + text("system") + b"\x93" + text(shell(canary)) + b"\x85R.",
    ),
    "inst": partial(opcodes, lambda canary: b"(" + text(shell(canary)) + b"ios\nsystem\n."),
    "obj": partial(opcodes, lambda canary: b"(cos\nsystem\n" + text(shell(canary)) + b"o."),
    "state of a Namespace": partial(opcodes, state_of_namespace),
    "persistent id": partial(opcodes, persistent),
    "plain pickle": plain_pickle,
    "tar format": in_tar,
}
ODD = {
    "TorchScript archive": torchscript,
    "asks for all memory": memory,
    "tensor outside its storage": outside_its_storage,
    "tensor without data": without_data,
    "sparse tensor": lambda path, canary: torch.save({"model": {"w": torch.ones(3).to_sparse()}}, path),
    "compressed members": deflated,
    "overlapping members": overlapping,
    "bytes before the archive": prepended,
    "methods hidden": partial(opcodes, methods_hidden),
    "names that move the cursor": names_that_move_the_cursor,
}
