"""The parameters of a checkpoint, read piece by piece, also of a run that goes on meanwhile."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import tensorstore as ts

from euroflax.checkpoint.folder import latest_good, of_first, read_facts
from euroflax.experiment import Interrupted
from euroflax.sharding import name_of

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SavedParams:
    """The parameters of a checkpoint, read piece by piece: memory holds no more than what is asked for."""

    path: pathlib.Path
    """The folder `checkpoints` of a run, which a running job may own; nothing in it is changed."""
    step: int
    facts: dict
    """What was saved beside the state: experiment, mixture, tokenizer, position."""

    def read(self, name: str, index: tuple[slice | int, ...] | None = None) -> np.ndarray:
        """A piece of a parameter, as it was saved: `read("layers/mlp/gate_DF", (3,))` is that of layer 3.

        Raises:
            Interrupted: a run that goes on has deleted the checkpoint meanwhile.
        """
        try:
            return self._read(name, index)
        except (ValueError, OSError) as error:
            raise Interrupted(
                f"checkpoint {self.step} went away or was changed while it was read; the same command reads the latest"
            ) from error

    def _read(self, name: str, index: tuple[slice | int, ...] | None) -> np.ndarray:
        if name not in self._opened:
            kvstore = {**_kvstore(self.path, self.step), "path": f"params.{name.replace('/', '.')}/"}
            spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
            self._opened[name] = ts.open(spec, open=True, read=True).result()
        return self._opened[name][index or ()].read().result()

    @functools.cached_property
    def _opened(self) -> dict[str, ts.TensorStore]:
        return {}

    def place(self, abstract_params: T) -> T:
        """All parameters, onto the shardings of `abstract_params`, whatever mesh saved them."""

        def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = name_of(path)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: self.read(name, index))

        return jax.tree_util.tree_map_with_path(place, abstract_params)


def _kvstore(path: pathlib.Path, step: int) -> dict:
    """The store of a checkpoint's arrays, as TensorStore opens it. A URL would need its path escaped."""
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{(path / str(step) / 'state').resolve()}/"}}


def check_readable(path: pathlib.Path, step: int) -> None:
    """Opens a checkpoint with the reader that `SavedParams` uses.

    Raises:
        ValueError: it cannot be opened, or holds nothing.
    """
    if not ts.KvStore.open(_kvstore(path, step)).result().list().result():
        raise ValueError(f"checkpoint {step} was written and cannot be read")


def open_latest(path: pathlib.Path, check: Callable[[dict], None], note: Callable[[str], None]) -> SavedParams | None:
    """The parameters of the latest checkpoint that is whole; None where there is none.

    Args:
        path: the folder `checkpoints` of a run.
        check: given the facts of the checkpoint; raises where it is not wanted.
        note: told, in a sentence, of each checkpoint that is passed over.
    """
    latest = of_first(latest_good(path, note)[0] if jax.process_index() == 0 else None)
    if latest is None:
        return None
    facts = read_facts(path, latest)
    check(facts)
    return SavedParams(path, latest, facts)
