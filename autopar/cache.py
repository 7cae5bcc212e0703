"""Records on disk that can be lost: found rules, found plans.

JSON under AUTOPAR_CACHE_DIR (default ~/.cache/autopar), one folder per kind, one file per content
hash. A file is written whole or not at all; where the folder cannot be written, work is repeated
and nothing else happens.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """AUTOPAR_CACHE_DIR, or autopar's folder in the user's cache."""
    own = os.environ.get("AUTOPAR_CACHE_DIR")
    return Path(own) if own else Path.home() / ".cache" / "autopar"


def record_file(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{key}.json"


def read_record(kind: str, key: str) -> Any | None:
    """None where there is no file, or none that can be read."""
    file = record_file(kind, key)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _LOG.info("%s cannot be read and is made anew: %s", file, error)
        return None


def write_record(kind: str, key: str, record: Any) -> None:
    """By renaming, so that a reader sees a whole file."""
    file = record_file(kind, key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as draft:
            json.dump(record, draft)
        os.replace(draft.name, file)
    except OSError as error:
        _LOG.info("%s cannot be written: %s", file, error)
