"""Mixed precision: the type in which a device computes, and the loss scaling that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.modes import eval_mode


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively; emulated, it is slower than float32."""
    flags = {"avx512_bf16", "amx_bf16", "bf16"}
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if any(capabilities.get(flag) for flag in flags):
        return True
    try:  # older versions of torch do not report it
        return bool(flags & set(Path("/proc/cpuinfo").read_text(encoding="ascii").split()))
    except (OSError, UnicodeDecodeError):
        return False


@dataclass(frozen=True)
class Precision:
    """The type in which convolutions and matrix products compute; everything else stays float32."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def choose(cls, device: torch.device, amp: bool) -> Precision:
        """Choose bfloat16 if the device has it natively, else float16 on CUDA, else float32."""
        if not amp:
            return cls(device)
        if device.type == "cuda":
            return cls(device, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16)
        return cls(device, torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler, which has no effect unless the type is float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def zero_idle_gradients_(model: nn.Module, inputs: Tensor) -> list[str]:
    """Zero the gradients of kernel positions that only ever meet padding, as they should be.

    oneDNN leaves them uninitialised in a bfloat16 convolution's weight gradient on very small maps (seen with torch 2.14:
    kernel 3, stride 2, padding 1 on a map of 1 px; kernel 5 on 1 px): the loss becomes NaN after a few steps, or worse,
    does not. All other positions are right.

    Args:
        model: a network; its 2-D convolutions get a hook on their weights if they need one.
        inputs: one batch of the size for training.

    Returns:
        The names of those convolutions.
    """
    used: dict[nn.Conv2d, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        rows, columns = (_used_positions(module, arguments[0].shape[2 + axis], axis) for axis in (0, 1))
        now = rows[:, None] & columns[None, :]
        used[module] = used[module] | now if module in used else now

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_pre_hook(record) for module in convolutions]
    with torch.no_grad(), eval_mode(model):
        model(inputs)
    for handle in handles:
        handle.remove()
    names = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module in used
            and not used[module].all()
            and getattr(module, "float_weight", module.weight).requires_grad
        ):
            idle = ~used[module].to(module.weight.device)
            # A quantized layer derives the weight that it computes with anew at every pass, and passes the hook on to it.
            register = getattr(module, "hook_image", module.weight.register_hook)
            register(lambda gradient, idle=idle: gradient.masked_fill(idle, 0.0))
            names.append(name)
    return names


def _used_positions(convolution: nn.Conv2d, size: int, axis: int) -> Tensor:
    """Return, for each kernel position along an axis, whether it meets a pixel of a map of ``size`` anywhere."""
    kernel, stride, dilation = convolution.kernel_size[axis], convolution.stride[axis], convolution.dilation[axis]
    if isinstance(convolution.padding, str):
        before = dilation * (kernel - 1) // 2 if convolution.padding == "same" else 0
        after = dilation * (kernel - 1) - before if convolution.padding == "same" else 0
    else:
        before = after = convolution.padding[axis]
    outputs = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    pixels = torch.arange(kernel)[:, None] * dilation + torch.arange(outputs)[None, :] * stride - before
    return ((pixels >= 0) & (pixels < size)).any(1)
