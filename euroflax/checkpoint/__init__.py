"""Checkpoints: saved by Orbax, and trusted only behind a manifest of hashes of our own.

Orbax commits a step by renaming its folder; then we hash every file in it and write `manifests/STEP.json`, by rename
as well. A step without a manifest, or whose files do not fit theirs, is no checkpoint: the one before is.
"""

from euroflax.checkpoint.folder import hash_files, latest_step, listed_steps, verify
from euroflax.checkpoint.manager import Checkpoints, SaveFailed
from euroflax.checkpoint.params import SavedParams, open_latest

__all__ = [
    "Checkpoints",
    "SaveFailed",
    "SavedParams",
    "hash_files",
    "latest_step",
    "listed_steps",
    "open_latest",
    "verify",
]
