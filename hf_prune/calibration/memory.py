"""What the C library keeps of freed memory."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Hand freed memory back to the system where the C library is glibc, which keeps blocks of up to 32 MiB for itself.

    Activations are such blocks: after a pass over calibration data hundreds of MiB would stay, and what comes next, larger
    tensors or more small ones, would come on top.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
