"""Where every tensor lies: one alphabet of dimensions, and two tables from its letters to mesh axes.

A tensor's name ends in its dimensions: `query_DHK` is embed x heads x head dim. The letters are
A parts of a batch, B batch, L length, S source length, D embed, H heads, G kv heads, K head dim, F mlp, V vocabulary,
N layers, M languages, C positions in a chunk. A letter that is not in a table, or a mesh axis that comes twice in one
tensor, is an error, on one CPU as on a thousand accelerators.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from euroflax import experiment
from euroflax.experiment import ExperimentError

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")

PARAMETERS: dict[str, str | tuple[str, ...] | None] = {
    "N": None,
    "D": "fsdp",
    "H": "tensor",
    "G": "tensor",
    "K": None,
    "F": "tensor",
    "V": "tensor",
}

ACTIVATIONS: dict[str, str | tuple[str, ...] | None] = {
    "A": None,
    "B": ("data", "fsdp"),
    "L": None,
    "S": None,
    "C": None,
    "D": None,
    "H": "tensor",
    "G": "tensor",
    "K": None,
    "F": "tensor",
    "V": "tensor",
    "M": None,
}


def mesh_sizes(mesh: experiment.Mesh, num_devices: int) -> dict[str, int]:
    """The size of each mesh axis on `num_devices` devices, with -1 filled in.

    Raises:
        ExperimentError: the declared sizes do not make up the devices.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if fixed > num_devices:
        raise ExperimentError(f"mesh={shown} is larger than the {num_devices} devices here; use a smaller mesh")
    free = [axis for axis, size in sizes.items() if size == -1]
    if num_devices % fixed or (not free and fixed != num_devices):
        fix = "use sizes whose product divides them" if free else "set one of the sizes to -1"
        raise ExperimentError(f"mesh={shown} does not make up the {num_devices} devices here; {fix}")
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def make_mesh(declared: experiment.Experiment, num_devices: int | None = None) -> jax.sharding.Mesh | AbstractMesh:
    """The mesh of an experiment over this job's devices, or, given a number, over devices that need not exist.

    Raises:
        ExperimentError: the sizes do not make up the devices, or the model or batch does not divide over them.
    """
    import dataclasses

    sizes = mesh_sizes(declared.mesh, jax.device_count() if num_devices is None else num_devices)
    placed = dataclasses.replace(declared, mesh=experiment.Mesh(**sizes))
    if faults := experiment.validate(placed):
        raise ExperimentError(*faults)
    types = (AxisType.Auto,) * len(AXES)
    if num_devices is not None:
        return AbstractMesh(tuple(sizes.values()), AXES, axis_types=types)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types)


def spec(letters: str, table: dict[str, str | tuple[str, ...] | None]) -> PartitionSpec:
    """The mesh axes of each dimension of a tensor.

    Raises:
        KeyError: a letter has no row in the table.
        ValueError: a mesh axis comes twice.
    """
    if unknown := [letter for letter in letters if letter not in table]:
        raise KeyError(f"dimension {unknown[0]} of {letters} has no row in the table")
    axes = [table[letter] for letter in letters]
    used = [name for axis in axes if axis is not None for name in ([axis] if isinstance(axis, str) else axis)]
    if len(used) != len(set(used)):
        raise ValueError(f"{letters} uses a mesh axis twice: {dict(zip(letters, axes, strict=True))}")
    return PartitionSpec(*axes)


def constrain(value: jax.Array, letters: str) -> jax.Array:
    """The same array, held to its place in the table of activations; without a mesh only the letters are checked.

    Raises:
        ValueError: the letters do not fit the array, or a dimension does not divide over its mesh axes.
    """
    placement = spec(letters, ACTIVATIONS)
    if len(letters) != value.ndim:
        raise ValueError(f"{letters} names {len(letters)} dimensions of an array of shape {value.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return value
    for letter, size, ways in zip(letters, value.shape, _ways(placement, mesh), strict=True):
        if size % ways:
            raise ValueError(f"dimension {letter}={size} of {letters} does not divide over {ways} devices")
    return jax.lax.with_sharding_constraint(value, placement)


def _ways(placement: PartitionSpec, mesh: jax.sharding.Mesh | AbstractMesh) -> list[int]:
    axes = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in placement]
    return [math.prod(mesh.shape[name] for name in names) for names in axes]


def letters_of(path: tuple) -> str:
    """The dimensions of the parameter at a path of a tree: the end of its name, behind N where layers are stacked.

    A path without a name that ends in dimensions is a scalar.
    """
    keys = name_of(path).split("/")
    name, _, dims = keys[-1].rpartition("_")
    if not name or not dims.isupper():
        return ""
    return ("N" if "layers" in keys else "") + dims


def name_of(path: tuple) -> str:
    """The path of a leaf as text: `layers/attention/query_DHK`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)


def shardings(tree: T, mesh: jax.sharding.Mesh | AbstractMesh) -> T:
    """A `NamedSharding` for each leaf of a tree of parameters or optimizer state, by the table of parameters.

    Raises:
        ValueError: a leaf's name does not tell its dimensions, or one does not divide.
    """

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        letters = letters_of(path)
        if len(letters) != len(leaf.shape):
            raise ValueError(f"{jax.tree_util.keystr(path)} of shape {leaf.shape} does not name its dimensions")
        placement = spec(letters, PARAMETERS)
        for letter, size, ways in zip(letters, leaf.shape, _ways(placement, mesh), strict=True):
            if size % ways:
                raise ValueError(f"{letter}={size} of {jax.tree_util.keystr(path)} does not divide over {ways} devices")
        return NamedSharding(mesh, placement)

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: jax.sharding.Mesh | AbstractMesh, letters: str = "BL") -> NamedSharding:
    """The sharding of a batch's arrays."""
    return NamedSharding(mesh, spec(letters, ACTIVATIONS))


def row_ways(mesh: jax.sharding.Mesh | AbstractMesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return _ways(spec("B", ACTIVATIONS), mesh)[0]


def local_rows(mesh: jax.sharding.Mesh, num_rows: int) -> list[int]:
    """Which rows of a batch of `num_rows` lie on devices of this process, in order."""
    placement = batch_sharding(mesh, "B").addressable_devices_indices_map((num_rows,))
    return sorted({row for index in placement.values() if index for row in range(num_rows)[index[0]]})


def place_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, mine: list[int], num_rows: int) -> dict:
    """A batch of `num_rows` over all devices, `[B, L]` each, from the rows that this process has read."""
    sharding = batch_sharding(mesh)
    at = {row: place for place, row in enumerate(mine)}

    def part(values: np.ndarray) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
        def cut(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return values[[at[row] for row in range(num_rows)[index[0]]]][:, index[1]]

        return cut

    shapes = {key: (num_rows, values.shape[1]) for key, values in batch.items()}
    return {key: jax.make_array_from_callback(shapes[key], sharding, part(batch[key])) for key in batch}


def bytes_per_device(tree: object, placed: object) -> int:
    """Bytes that one device holds of a tree of shapes under a tree of shardings."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, placed
    )
    return sum(jax.tree.leaves(sizes))
