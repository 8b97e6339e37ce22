"""What malloc does with memory that was freed."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BYTES = 2**30


def keep_freed() -> bool:
    """Have glibc's malloc keep freed memory for the next allocation; False where there is another malloc.

    By itself it gives the memory of large images back to the system and gets it again page by page. At which step that is depends
    on what lies behind it in memory, so that it meets some peers and not others.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, _BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, _BYTES))
