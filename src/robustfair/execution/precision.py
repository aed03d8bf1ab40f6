"""The one place where numerical precision is chosen: around the model's forward pass, and in torch's own switches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from robustfair.config import Precision
from robustfair.execution.bundle import Bundled, may_gain
from robustfair.models.head import mode_of


class InPrecision(nn.Module):
    """A model whose forward pass runs in `precision` and whose logits come out as float32 at least.

    Weights stay in their own type; losses, attack updates and the optimizer never see bf16. With "fp32" the model is
    called as it is, unless `bundled`. Shares the model's parameters and modes.

    Args:
        bundled: let a CPU convolve several small images at a time, which adds up in another order; None does so in
            bf16 where the model has layers that gain by it.
    """

    training = mode_of("model")

    def __init__(
        self, model: nn.Module, precision: Precision, device_type: str, *, bundled: bool | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.device_type = device_type
        self.bundled = device_type == "cpu" and (self.bf16 and may_gain(model) if bundled is None else bundled)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        with Bundled() if self.bundled else nullcontext():
            if not self.bf16:
                return self.model(x)
            with torch.autocast(self.device_type, dtype=torch.bfloat16):
                return self.model(x).float()


@contextmanager
def numerics(deterministic: bool) -> Iterator[None]:
    """Torch's switches for one run, restored on leaving: algorithms that repeat exactly, or the fastest ones found.

    Deterministic also means float32 without TF32. Off, convolutions are timed once for each shape on CUDA.
    """
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = torch.backends.cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision
    were_deterministic, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        torch.use_deterministic_algorithms(True)
        conv.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were_deterministic, warn_only=only_warned)
        torch.backends.cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision = before


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 without TF32, whose ten bits CUDA's convolutions take unless told otherwise; restored on leaving."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def allow_deterministic_products() -> None:
    """Give cuBLAS the fixed workspace that its deterministic products need, for the rest of the process.

    It is read at the first product on a GPU, so this comes before any; a value that is set already stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
