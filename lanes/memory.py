"""Out of memory: telling it from a program's own errors, and giving memory back."""

from __future__ import annotations

import errno
import gc

import torch

_CPU_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "cannot allocate memory")
_CUDA_WORDS = ("cuda out of memory", "cuda error: out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a lack of memory: torch's own, Python's, or the CPU allocator's."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # a memory map that found no room
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(words in text for words in (*_CPU_WORDS, *_CUDA_WORDS)):
            return True
        error = error.__cause__ or error.__context__
    return False


def give_back(device: torch.device | str) -> None:
    """Return what nobody holds any more to the device, so that another program, or a smaller engine, can have it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
