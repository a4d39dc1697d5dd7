"""The Hugging Face format: a run's parameters written into it, and published weights read out of it."""

from euroflax.huggingface.folder import Folder, check_agreement
from euroflax.huggingface.writer import DTYPES, export

__all__ = ["DTYPES", "Folder", "check_agreement", "export"]
