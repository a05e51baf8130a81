"""What to do about running out of file descriptors, as messages end."""

from __future__ import annotations

import errno


def descriptor_remedy(code: int | None) -> str:
    """What to do about errno `code` where it says that there are no more descriptors, else ""."""
    if code == errno.EMFILE:
        return "; raise `ulimit -n`, or close files and engines"
    if code == errno.ENFILE:
        return "; raise `sysctl fs.file-max`, or close other programs"
    return ""
