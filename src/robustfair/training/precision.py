"""The one place where numerical precision is chosen: around the model's forward pass, nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustfair.config import Precision


class InPrecision(nn.Module):
    """A model whose forward pass runs in `precision` and whose logits come out as float32 at least.

    Weights stay in their own type; losses, attack updates and the optimizer never see bf16. With "fp32" the model is
    called as it is. Shares the model's parameters and modes.
    """

    def __init__(self, model: nn.Module, precision: Precision, device_type: str) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.device_type = device_type

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        if not self.bf16:
            return self.model(x)
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            return self.model(x).float()
