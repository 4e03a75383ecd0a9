"""Mixed precision: which type a device computes in, and the loss scaling that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively; where it has to be emulated it is slower than float32."""
    flags = {"avx512_bf16", "amx_bf16", "bf16"}
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if any(capabilities.get(flag) for flag in flags):
        return True
    try:  # older torch does not tell
        return bool(flags & set(Path("/proc/cpuinfo").read_text(encoding="ascii").split()))
    except (OSError, UnicodeDecodeError):
        return False


@dataclass(frozen=True)
class Precision:
    """The type that convolutions and matrix products compute in; everything else stays float32."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def choose(cls, device: torch.device, amp: bool) -> Precision:
        """Choose bfloat16 where the device has it natively, else float16 on CUDA, else float32."""
        if not amp:
            return cls(device)
        if device.type == "cuda":
            return cls(device, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16)
        return cls(device, torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context to run a forward pass in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler, which does nothing unless the type is float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")
