"""A disk on which nothing more fits."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def full_disk():
    """No file may grow beyond some kilobytes: the system's error is another than a full disk's, its way the same."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
