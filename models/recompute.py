"""Dropout, RMSNorm and SwiGLU (docs/format.md, "AR levels") that need less memory in training.

Their backward pass computes cheap intermediate results again, instead of keeping them. Where torch's own
kernels are as good, those are used: on accelerators (except for SwiGLU) and under torch.compile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _plain(x: Tensor) -> bool:
    """Says whether torch's own kernels are to be used.

    Not on meta tensors: there torch has no kernels, and ours keep as much as those of accelerators.
    """
    return not (x.device.type == "cpu" or x.is_meta) or torch.compiler.is_compiling()


def _keep_mask(x: Tensor, p: float) -> Tensor:
    """Draws a bool mask of the shape of x, which is True with probability 1 - p, to within 1/65536.

    Each number takes 16 bits of torch's generator.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(torch.iinfo(torch.int64).min, None)
    return bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(2**16 * p) - 2**15


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        keep = _keep_mask(x, p)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, values: Tensor, p: float) -> Tensor:
        keep, values = _keep_mask(weights, p), values.contiguous()  # a view would keep queries and keys too
        ctx.save_for_backward(weights, values, keep)
        ctx.scale = 1 / (1 - p)
        return (weights * keep) @ values * ctx.scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, values, keep = ctx.saved_tensors
        grad = grad * ctx.scale
        return (grad @ values.transpose(-1, -2)).mul_(keep), (weights * keep).transpose(-1, -2) @ grad, None


class Dropout(nn.Dropout):
    """nn.Dropout (docs/format.md, "AR levels" and "MAR levels").

    On a CPU it keeps a mask of one byte for each number and is 3 times as fast as torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        idle = not (self.training and 0 < self.p < 1)
        return super().forward(x) if idle or _plain(x) else _Dropout.apply(x, self.p)

    def product(self, weights: Tensor, values: Tensor) -> Tensor:
        """Computes dropout(weights) @ values: (..., T, S) and (..., S, d) -> (..., T, d).

        The backward pass needs the weights and the mask, but does not keep their product.
        """
        idle = not (self.training and 0 < self.p < 1)
        return (
            self(weights) @ values
            if idle or _plain(weights)
            else _DroppedProduct.apply(weights, values, self.p)
        )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(inverse), grad_weight, None


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32, whatever the dtype of the input (docs/format.md, "AR levels")."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32 and not _plain(x):
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).type_as(x) * self.weight


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * value, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Computes silu(gate) * value of tensors of equal shape (docs/format.md, "AR levels")."""
    return F.silu(gate) * value if torch.compiler.is_compiling() else _GatedProduct.apply(gate, value)
