"""PACT: parameterized clipping activation (arXiv:1805.06085).

A ReLU becomes y = min(relu x, alpha), rounded to multiples of alpha / (2^k - 1) (equations 1 and 2), with its own learned
alpha, whose gradient is the sum over x >= alpha (equation 3). Weights are quantized by DoReFa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from compression.quantizers.overrides import Bits
from compression.quantizers.relu import ReLUQuantizer
from models.quantized.preparing import clips, replacement
from models.quantized.settings import PactSettings
from utils.options import number, option, optional

GROUP = "clips"


@dataclass
class PACTQuantizer(ReLUQuantizer):
    """Quantizes weights by DoReFa and learns where to clip each ReLU.

    Attributes:
        act_clip_init_val: the initial alpha.
        act_clip_decay: weight decay of the alphas; None takes the largest of the optimizer's groups, that of the weights.
    """

    act_clip_init_val: float = option(number(above=0), 8.0)
    act_clip_decay: float | None = option(optional(number(least=0)), None)

    method = "dorefa"

    def activation(self, module: nn.Module, name: str, bits: Bits) -> nn.Module | None:
        if not bits.activations:
            return None
        return replacement(module, "pact", PactSettings(bits.activations, self.act_clip_init_val))

    def mend_(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Put the learned clips into a parameter group of their own, the optimizer's last; add the group if it is missing."""
        alphas = clips(model)
        held = {id(alpha) for alpha in alphas}
        group = next((group for group in optimizer.param_groups if group.get("name") == GROUP), None)
        for other in optimizer.param_groups:
            if other is not group:
                other["params"] = [parameter for parameter in other["params"] if id(parameter) not in held]
        if group is not None:
            group["params"] = alphas
            return
        template = optimizer.param_groups[0]
        given: dict[str, Any] = {key: template[key] for key in ("lr", "initial_lr") if key in template}
        decays = [other["weight_decay"] for other in optimizer.param_groups if "weight_decay" in other]
        if decays:
            given["weight_decay"] = max(decays) if self.act_clip_decay is None else self.act_clip_decay
        optimizer.add_param_group({"params": alphas, "name": GROUP, **given})
