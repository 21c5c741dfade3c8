"""The flash-attn packages, where installed: FlashAttention 4, 3 and 2 (Dao et al.), one backend each."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from encoder.nn.attend.contract import AttentionRequest
from encoder.nn.attend.packed import Needs, PackedPlan

FUNCTION = "flash_attn_varlen_func"
ARGUMENTS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "window_size",
)


@dataclass(frozen=True, kw_only=True)
class Flash:
    """One version of flash-attn."""

    name: str
    package: str  # what pip calls it
    module: str  # where FUNCTION is
    needs: Needs
    takes: tuple[str, ...]  # arguments of FUNCTION that we pass
    attend: Callable[[ModuleType], Callable[..., Tensor]]

    def why_not(self, request: AttentionRequest) -> str | None:
        """Device and precision first: nothing is imported where the kernel could not run anyway."""
        unmet = self.needs.unmet(request)
        if unmet:
            return unmet
        found = _import(self.module, self.package)
        if isinstance(found, str):
            return found
        takes = inspect.signature(getattr(found, FUNCTION)).parameters
        missing = [name for name in self.takes if name not in takes]
        if not missing:
            return None
        return (
            f"the installed {self.package} is too old or too new: it takes no {', '.join(missing)}"
        )

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> PackedPlan:
        """The documents as they are: nothing is read back from the device."""
        # a module: who plans has asked why_not before
        module = cast(ModuleType, _import(self.module, self.package))
        return PackedPlan(
            self.attend(module),
            cu_seqlens_S1=cu_seqlens_S1,
            max_seqlen=max_seqlen,
            radius=window_radius_tokens,
        )


def _torch_op(module: ModuleType) -> Callable[..., Tensor]:
    """Versions 2 and 3 register their kernels with torch: autograd and torch.compile know them."""

    def attend(
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        cu_seqlens_S1: Tensor,
        longest: int,
        radius: int | None,
    ) -> Tensor:
        out = module.flash_attn_varlen_func(
            q_THD,
            k_THD,
            v_THD,
            cu_seqlens_q=cu_seqlens_S1,
            cu_seqlens_k=cu_seqlens_S1,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            window_size=(-1, -1) if radius is None else (radius, radius),
        )

        # version 3 gave (out, log-sum-exp) in its betas
        if isinstance(out, tuple):
            return out[0]
        return out

    return attend


@cache
def _flash4_op(module: ModuleType) -> Callable[..., Tensor]:
    """Version 4 compiles its kernels in Python, which torch.compile cannot look through: they become one operator.

    torch's own use of version 4 refuses windows in the backward pass (torch.nn.attention, 2.11); the kernels take them.
    """

    def documents(cu_seqlens_S1: Tensor, longest: int) -> dict[str, Any]:
        return {
            "cu_seqlens_q": cu_seqlens_S1,
            "cu_seqlens_k": cu_seqlens_S1,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }

    @torch.library.custom_op("tessera::flash4", mutates_args=())
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        radius: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return module.flash_attn_varlen_func(
            q, k, v, window_size=(radius, radius), return_lse=True, **documents(cu_seqlens, longest)
        )

    @torch.library.custom_op("tessera::flash4_backward", mutates_args=())
    def backward(
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        radius: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(
            module._flash_attn_bwd(
                q,
                k,
                v,
                out,
                d_out,
                lse,
                window_size_left=radius,
                window_size_right=radius,
                **documents(cu_seqlens, longest),
            )
        )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.longest, ctx.radius = inputs
        ctx.save_for_backward(*tensors, *output)

    def back(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors

        # none for cu_seqlens, longest and radius; nothing uses the log-sum-exp, so d_lse is left
        return (
            *backward(d_out.contiguous(), q, k, v, out, lse, cu_seqlens, ctx.longest, ctx.radius),
            None,
            None,
            None,
        )

    # shapes and dtypes for the compiler: the log-sum-exp is fp32 [H, T]
    forward.register_fake(
        lambda q, k, v, cu_seqlens, longest, radius: (
            torch.empty_like(q),
            q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
        )
    )
    backward.register_fake(
        lambda d_out, q, k, v, out, lse, cu_seqlens, longest, radius: (
            torch.empty_like(q),
            torch.empty_like(k),
            torch.empty_like(v),
        )
    )
    forward.register_autograd(back, setup_context=keep)
    return lambda *args: forward(*args)[0]


@cache
def _import(module: str, package: str) -> ModuleType | str:
    """The module, or why it cannot be had; asked for at every forward, tried once."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # missing is not the package itself, but something that it imports
        inside = error.name and not (module + ".").startswith(error.name + ".")
        if inside:
            return f"{package} needs {error.name}, which is not installed"
        return f"{package} is not installed"
    except Exception as error:
        # a build for another torch or CUDA: any failure is an answer to "why not"
        said = str(error).splitlines() or [type(error).__name__]
        return f"{package} does not import: {said[0]}"
    if not hasattr(found, FUNCTION):
        return f"{package} has no {FUNCTION}"
    return found


FLASH = (
    # kernels for 9.0 to 11.x go forward and back; head widths above 128 only on some of them (4.0.0b36)
    Flash(
        name="flash4",
        package="flash-attn-4",
        module="flash_attn.cute.interface",
        attend=_flash4_op,
        takes=(*ARGUMENTS, "return_lse"),
        needs=Needs(at_least=(9, 0), below=(12, 0), head_widths=range(8, 129, 8)),
    ),
    Flash(
        name="flash3",
        package="flash-attn-3",
        module="flash_attn_interface",
        attend=_torch_op,
        takes=ARGUMENTS,
        needs=Needs(at_least=(9, 0), below=(10, 0)),
    ),
    Flash(
        name="flash2",
        package="flash-attn",
        module="flash_attn.flash_attn_interface",
        attend=_torch_op,
        takes=ARGUMENTS,
        needs=Needs(at_least=(8, 0)),
    ),
)
