"""Layers made ready for one sampling call: weights cast once, fixed factors folded in, and on a CPU packed once.

Training and likelihoods run the modules of layers.py; these give the same numbers, up to rounding, in fewer operations.
Letters: M rows, I in, O out, D width, n sequences, T tokens, h heads, d = D / h.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Block

SMALL = 2**18  # weights; a smaller layer is over before oneDNN has found its kernel
FEW = 2**14  # numbers
NONE, EVERY = range(0), range(1, 2**62)


@dataclass(frozen=True)
class Setup:
    """How a sampling call computes.

    dtype     of the levels' matrix products and caches: autocast's, else the weights'. Norms and sums keep the weights'
    chunk     at most so many patches of a level below the top are drawn together; None: all of a step
    compiled  torch.compile what is called most, on CUDA as graphs
    refresh   steps of a top MAR level between two full computations of its features; 1 is exact (see models/sampling/feature_cache.py)
    watch_levels  whose steps a step callback sees, from the top
    """

    dtype: torch.dtype
    chunk: int | None = None
    compiled: bool = False
    refresh: int = 1
    watch_levels: int = 1

    def compile(self, function: Callable, device: torch.device) -> Callable:
        """`function`, of tensors of few distinct shapes, compiled if that is wanted."""
        if not self.compiled:
            return function
        fast = torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)
        return lambda *args: fast(*args).clone()  # a graph's next run overwrites its output


@cache
def packed_rows(dtype: torch.dtype) -> range:
    """The numbers of rows for which a CPU runs oneDNN's product with packed weights; none where it is not to be had.

    The public way to packed weights, torch.utils.mkldnn, copies every input and output; this is the operator that
    torch.compile calls. On Intel, MKL is as fast in float32 for a vector or two and for hundreds, without the memory.
    """
    try:
        x = torch.zeros(4, 4, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(x, 4)
        torch.ops.mkldnn._linear_pointwise(x, packed, x[0], "gelu", [], "none")
        torch.ops.mkldnn._linear_pointwise.binary(x, x, packed, x[0], "add")
    except (AttributeError, RuntimeError):
        return NONE
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    return range(4, 257) if dtype == torch.float32 and "Intel" in name else EVERY


class Linear:
    """x W^T + b on (M, I) of `dtype`; then the exact GELU, or `residual` (M, O) added."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.on_cpu = weight.device.type == "cpu" and type(weight) is Tensor  # not a fake one
        small = weight.numel() < SMALL
        self.packed_rows = packed_rows(dtype) if self.on_cpu and not small else NONE
        self.transposed = weight.t().contiguous() if self.on_cpu and small else weight.t()  # (I, O)
        self.packed = None

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> "Linear":
        return cls(layer.weight, layer.bias, dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        if not torch.compiler.is_compiling() and x.shape[0] in self.packed_rows:
            return self._packed(x, residual, gelu)
        y = torch.mm(x, self.transposed) if self.bias is None else torch.addmm(self.bias, x, self.transposed)
        if gelu:
            # oneDNN's GELU of a few numbers takes 20 us to start, ATen's own 5; it is the one for a transposed input.
            y = F.gelu(y.t()).t() if self.on_cpu and y.numel() < FEW else F.gelu(y)
        return y if residual is None else residual + y

    def _packed(self, x: Tensor, residual: Tensor | None, gelu: bool) -> Tensor:
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(
                self.transposed.t().contiguous(), x.shape[0]
            )
            if self.packed_rows == EVERY:
                self.transposed = None  # not needed again: half of a large model's memory
        run = torch.ops.mkldnn._linear_pointwise
        if residual is not None and residual.dtype == x.dtype:
            return run.binary(x, residual, self.packed, self.bias, "add")
        y = run.default(x, self.packed, self.bias, "gelu" if gelu else "none", [], "none")
        return y if residual is None else residual + y


class Norm:
    """LayerNorm on (..., D), in the dtype of its weights, rounded to `dtype`."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype):
        self.settings = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.layer_norm(x, *self.settings)
        return x if x.dtype == self.dtype else x.to(self.dtype)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) / sqrt(D), as x / hypot(|x|, sqrt(D eps)), on (M, D).

    The factor sqrt(D) and the norm's weight are left to the layer that follows, in `scale` (D,).
    """

    def __init__(self, norm: nn.RMSNorm, dtype: torch.dtype):
        (dim,) = norm.normalized_shape
        self.floor = norm.weight.new_full((), (dim * norm.eps) ** 0.5, dtype=torch.float32)
        self.scale = norm.weight.detach() * dim**0.5
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        return (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)).to(self.dtype)


class PreparedBlock:
    """A Block of layers.py, in parts: its attention differs from level to level."""

    def __init__(self, block: Block, dtype: torch.dtype):
        self.norm1, self.norm2 = Norm(block.norm1, dtype), Norm(block.norm2, dtype)
        self.qkv, self.proj = Linear.of(block.attn.qkv, dtype), Linear.of(block.attn.proj, dtype)
        self.fc1, self.fc2 = Linear.of(block.mlp.fc1, dtype), Linear.of(block.mlp.fc2, dtype)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Tokens (M, D) and what attention gave them (M, D) -> tokens (M, D)."""
        return self.mlp(self.proj(attended, residual=x))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.norm2(x), gelu=True), residual=x)


def split_heads(x: Tensor, n: int, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """(n * T, parts * D) -> parts of (n, h, T, d)."""
    return x.view(n, -1, parts, num_heads, x.shape[1] // parts // num_heads).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """(n, h, T, d) -> (n * T, D)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])
