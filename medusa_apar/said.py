"""Warnings that would otherwise come with every call."""

from __future__ import annotations

import functools
import logging


@functools.cache
def say_once(logger: logging.Logger, sentence: str) -> None:
    """In the life of the process."""
    logger.warning(sentence)
