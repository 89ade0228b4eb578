"""Layers prepared for one sampling call (paper, 4.1: the same transformers, only faster): weights are cast
once, fixed factors are multiplied into them, and on a CPU they are packed once.

The blocks are from models/layers.py; `prepare_block` replaces their layers. The numbers are the same up
to rounding. Letters: M rows, R some of them, I inputs, O outputs, D width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import QKV, Block, RMSNormBlock
from models.sampling.options import SamplingOptions
from util.threads import cpu_name

MIN_PACKED_WEIGHTS = 2**18  # numbers; a smaller layer has finished before oneDNN has found its kernel
MIN_ONEDNN_GELU = 2**14  # numbers; for fewer, another GELU is faster
NO_ROWS, ALL_ROWS = range(0), range(1, 2**62)


@dataclass(frozen=True)
class Setup:
    """How one sampling call computes (docs/format.md, "Sampling").

    `dtype` is that of matrix products and caches; norms and sums keep the dtype of the weights.
    """

    dtype: torch.dtype
    options: SamplingOptions = SamplingOptions()  # noqa: RUF009  frozen

    def compile(self, function: Callable, device: torch.device) -> Callable:
        """Returns `function`, which takes tensors of few distinct shapes, compiled if the options say so.

        A sampler gives its class's function, not its own bound method. An object that holds its own method
        is a reference cycle: its prepared weights would stay until Python's garbage collector runs.
        """
        if not self.options.compiled:
            return function
        fast = torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)
        return lambda *args: fast(*args).clone()  # a graph's next run overwrites its output


@cache
def packed_rows(dtype: torch.dtype) -> range:
    """The numbers of rows for which a CPU multiplies by packed weights (oneDNN); none where it cannot.

    The public way to packed weights, torch.utils.mkldnn, copies every input and output; this is the operator
    that torch.compile calls. On Intel, MKL is as fast in float32 for one to three rows and for hundreds,
    without the memory.
    """
    try:
        x = torch.zeros(4, 4, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(x, 4)
        torch.ops.mkldnn._linear_pointwise(x, packed, x[0], "gelu", [], "none")
        torch.ops.mkldnn._linear_pointwise.binary(x, x, packed, x[0], "add")
    except (AttributeError, RuntimeError):
        return NO_ROWS
    return range(4, 257) if dtype == torch.float32 and "Intel" in cpu_name() else ALL_ROWS


class FastLinear:
    """A linear layer x W^T + b on rows (M, I) of `dtype`, as all blocks use it (paper, 4.1).

    After it come the exact GELU, if `gelu`, and the sum with a residual (M, O), if one is given.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False):
        weight = weight.detach().to(dtype)
        self.bias, self.gelu = None if bias is None else bias.detach().to(dtype), gelu
        # A FakeTensor, which is a subclass, has no data to pack.
        self.on_cpu = weight.device.type == "cpu" and type(weight) is Tensor
        small = weight.numel() < MIN_PACKED_WEIGHTS
        self.packed_rows = packed_rows(dtype) if self.on_cpu and not small else NO_ROWS
        self.transposed = weight.t().contiguous() if self.on_cpu and small else weight.t()  # (I, O)
        self.packed = None

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype, gelu: bool = False) -> "FastLinear":
        """The fast form of `layer`."""
        return cls(layer.weight, layer.bias, dtype, gelu)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling() and x.shape[0] in self.packed_rows:
            if self.packed is None:
                self.pack(x.shape[0])
            run = torch.ops.mkldnn._linear_pointwise
            if residual is not None and residual.dtype == x.dtype and not self.gelu:
                return run.binary(x, residual, self.packed, self.bias, "add")
            y = run.default(x, self.packed, self.bias, "gelu" if self.gelu else "none", [], "none")
        else:
            y = (
                torch.mm(x, self.transposed)
                if self.bias is None
                else torch.addmm(self.bias, x, self.transposed)
            )
            if self.gelu:
                # oneDNN's GELU takes 20 us to start; ATen's own, which a transposed input gets, takes 5 us.
                y = F.gelu(y.t()).t() if self.on_cpu and y.numel() < MIN_ONEDNN_GELU else F.gelu(y)
        return y if residual is None else residual + y

    def pack(self, rows: int) -> None:
        """Packs the weights for oneDNN, for products of `rows` rows."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.transposed.t().contiguous(), rows)
        if self.packed_rows == ALL_ROWS:
            self.transposed = None  # not needed again: half of a large model's memory


class FastQKV:
    """`QKV` made of fast layers (paper, 4.1); each is made when it is first used.

    A last block that computes some rows only uses the two parts, `queries` and `keys_and_values`.
    """

    def __init__(self, qkv: QKV, dtype: torch.dtype):
        self.qkv, self.dtype = qkv, dtype

    def _part(self, part: slice) -> FastLinear:
        return FastLinear(self.qkv.weight[part], self.qkv.bias[part], self.dtype)

    everything = cached_property(lambda self: self._part(slice(None)))
    queries = cached_property(lambda self: self._part(slice(self.qkv.in_features)))
    keys_and_values = cached_property(lambda self: self._part(slice(self.qkv.in_features, None)))

    def __call__(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.everything(x),) if rows is None else (self.queries(x[rows]), self.keys_and_values(x))


class FastLayerNorm:
    """LayerNorm on (..., D) in its weights' dtype, rounded to `dtype` (docs/format.md, "MAR levels")."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype):
        self.settings = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.layer_norm(x, *self.settings)
        return x if x.dtype == self.dtype else x.to(self.dtype)


class FastRMSNorm:
    """RMSNorm on (M, D) without its factors (docs/format.md, "AR levels").

    It computes x / sqrt(mean(x^2) + eps) / sqrt(D) as x / hypot(|x|, sqrt(D eps)). The factors, sqrt(D) and
    the norm's weight, are in `scale` (D,); the weights of the layer that follows are multiplied by them.
    """

    def __init__(self, norm: nn.RMSNorm, dtype: torch.dtype):
        (dim,) = norm.normalized_shape
        self.floor = norm.weight.new_full((), (dim * norm.eps) ** 0.5, dtype=torch.float32)
        self.scale = norm.weight.detach() * dim**0.5
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        return (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)).to(self.dtype)


def swap(module: nn.Module, **layers) -> nn.Module:
    """Returns a shallow copy of `module` with `layers` in place of its own; `module` stays unchanged."""
    other = copy.copy(module)
    other._modules = {}
    other.__dict__.update(layers)
    return other


def prepare_block(block: Block, dtype: torch.dtype) -> Block:
    """Returns the block (paper, 4.1) with fast layers, for tokens (M, D). It still runs `Block.forward`.

    Samplers call `forward` itself, because what surrounds a module's call shows in the time of small models
    (docs/log.md).
    """
    linear = partial(FastLinear.of, dtype=dtype)
    if isinstance(block, RMSNormBlock):
        norm1, norm2 = FastRMSNorm(block.attention_norm, dtype), FastRMSNorm(block.ffn_norm, dtype)
        attention, feed_forward = block.attention, block.feed_forward
        wqkv = FastLinear(attention.wqkv.weight * norm1.scale, None, dtype)
        both_gates = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight]) * norm2.scale
        gates = FastLinear(both_gates, None, dtype)
        feed_forward = swap(
            feed_forward, gates=lambda x: gates(x).chunk(2, dim=1), w2=linear(feed_forward.w2)
        )
        return swap(
            block,
            attention_norm=norm1,
            attention=swap(attention, wqkv=lambda x, rows: (wqkv(x),), wo=linear(attention.wo)),
            ffn_norm=norm2,
            feed_forward=feed_forward.forward,
        )
    attn, mlp = block.attn, block.mlp
    return swap(
        block,
        norm1=FastLayerNorm(block.norm1, dtype),
        attn=swap(attn, qkv=FastQKV(attn.qkv, dtype), proj=linear(attn.proj)),
        norm2=FastLayerNorm(block.norm2, dtype),
        mlp=swap(mlp, hidden=linear(mlp.fc1, gelu=True), fc2=linear(mlp.fc2)).forward,
    )
