"""The arithmetic that sigma is computed in: float32 as it is, or rounded where that is stated."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it, and torch the library that uses them; False
    where this torch cannot tell, and on ARM, where it was not measured.
    """
    able = _capabilities()
    return torch.backends.mkldnn.enabled and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@cache
def _capabilities() -> dict:
    known = torch.backends.mkldnn.is_available() and hasattr(torch.cpu, "get_capabilities")
    return dict(torch.cpu.get_capabilities()) if known else {}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within, float32 is not rounded to TF32 or bfloat16, and the algorithm does not depend on the
    batch, where CUDA could choose.
    """
    cudnn = torch.backends.cudnn
    chosen = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with _ieee_by_newer_settings() if _newer_settings() else _ieee_by_older_settings():
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = chosen


def _newer_settings() -> bool:
    """Whether float32's precision was set by `fp32_precision`: then torch's older settings, which
    it was set by before torch 2.9, are errors.
    """
    try:
        return (
            torch.get_float32_matmul_precision() is None or torch.backends.cudnn.allow_tf32 is None
        )
    except RuntimeError:
        return True


def _operations() -> list:
    """Those of torch whose precision in float32 can be set."""
    cuda, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return [
        *(torch.backends.cuda.matmul, cuda.conv, cuda.rnn),
        *(mkldnn.matmul, mkldnn.conv, mkldnn.rnn),
    ]


@contextmanager
def _ieee_by_older_settings() -> Iterator[None]:
    operations, mkldnn = _operations(), torch.backends.mkldnn
    precisions = [operation.fp32_precision for operation in operations]
    older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    mkldnn.conv.fp32_precision = mkldnn.rnn.fp32_precision = "ieee"  # which no older one is of
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older[0])
        torch.backends.cudnn.allow_tf32 = older[1]
        for operation, precision in zip(operations, precisions, strict=True):
            if operation.fp32_precision != precision:
                operation.fp32_precision = precision


@contextmanager
def _ieee_by_newer_settings() -> Iterator[None]:
    operations = _operations()
    precisions = [operation.fp32_precision for operation in operations]
    for operation in operations:
        operation.fp32_precision = "ieee"
    try:
        yield
    finally:
        for operation, precision in zip(operations, precisions, strict=True):
            inherited = precision == torch.backends.fp32_precision
            operation.fp32_precision = "none" if inherited else precision


def full_precision(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision as float32, any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
