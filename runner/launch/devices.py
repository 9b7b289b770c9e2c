"""How many GPUs there are, asked without importing torch."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def cuda_count() -> int:
    """The GPUs that torch would find here: none where its build or the driver has no CUDA."""
    if not _torch_has_cuda():
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _torch_has_cuda() -> bool:
    found = importlib.util.find_spec("torch")
    return (
        any(Path(folder, "lib", "libtorch_cuda.so").exists() for folder in found.submodule_search_locations or ())
        if found
        else False
    )
