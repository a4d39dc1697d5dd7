"""Documents that were withdrawn: block lists, and from which position of a run each of them holds."""

import dataclasses
import pathlib

from euroflax.experiment import Experiment, ExperimentError, fingerprint
from euroflax.folders import Folders, parse_json, replace_json

_FILE = "withdrawn.json"

Ids = dict[str, tuple[str, ...]]
"""Ids of withdrawn documents by the name of their source; sources without a list are left out."""


@dataclasses.dataclass(frozen=True)
class Withdrawal:
    """What is left out from a position of the run on."""

    position: int
    ids: Ids

    def summary(self) -> dict:
        """Position, number of ids by source, and a hash of them, as the manifest and checkpoints have it."""
        listed = {name: len(ids) for name, ids in self.ids.items()}
        return {"position": self.position, "listed": listed, "fingerprint": fingerprint(self.ids)}


def read_lists(declared: Experiment, folders: Folders) -> Ids:
    """The block lists of the sources as they are now.

    Raises:
        ExperimentError: one cannot be read.
    """
    found: Ids = {}
    for source in declared.data.sources:
        if source.block_list is None:
            continue
        path = folders.data_root / source.block_list
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ExperimentError(
                f"source {source.name}: block_list={source.block_list} cannot be read at {path} ({reason}); give a "
                "file of document ids, one a line"
            ) from error
        found[source.name] = tuple(sorted({line.strip() for line in lines if line.strip()}))
    return found


def read_history(run_dir: pathlib.Path) -> tuple[Withdrawal, ...]:
    """What a run left out so far, in the order of positions; empty for a run that has not begun.

    Raises:
        ExperimentError: the record is harmed.
    """
    path = run_dir / _FILE
    try:
        entries = parse_json(path.read_bytes())
        return tuple(
            Withdrawal(entry["position"], {name: tuple(ids) for name, ids in entry["ids"].items()}) for entry in entries
        )
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExperimentError(f"{path} is harmed; restore it, or give the run another name") from error


def write_history(run_dir: pathlib.Path, history: tuple[Withdrawal, ...]) -> None:
    """Keeps what a run leaves out."""
    replace_json(run_dir / _FILE, [dataclasses.asdict(entry) for entry in history])


def continued(history: tuple[Withdrawal, ...], current: Ids, position: int) -> tuple[Withdrawal, ...]:
    """The history of a run that goes on at a position with the lists as they are now."""
    kept = tuple(entry for entry in history if entry.position < position)
    if position and not kept:
        kept = (Withdrawal(0, {}),)
    return kept if kept and kept[-1].ids == current else (*kept, Withdrawal(position, current))
