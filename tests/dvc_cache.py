"""DVC's cache, filled as DVC does it after a stage."""

from __future__ import annotations

import hashlib
from pathlib import Path


def put_in_cache(root: Path, content: bytes) -> str:
    """Lay a file into the cache of the project in `root`; its MD5, under which dvc.lock has it."""
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    cached = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    return md5
