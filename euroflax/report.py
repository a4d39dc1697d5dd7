"""x"""

import pathlib


def write(run_dir: pathlib.Path) -> pathlib.Path:
    """X"""
    return run_dir
