"""Pipelines to run; they import what a user would import, and workers never import them."""

from __future__ import annotations

import logging


def _is_wanted(record: logging.LogRecord) -> bool:
    # Said on import by a Beam without its gcp extra, of a client that nothing here uses.
    return "apitools not found" not in str(record.msg)


logging.getLogger().addFilter(_is_wanted)
