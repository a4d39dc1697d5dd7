"""Where every tensor lies: one alphabet of dimensions, and two tables from its letters to mesh axes.

A tensor's name ends in its dimensions: `query_DHK` is embed x heads x head dim. The letters are
A parts of a batch, W rows of the whole batch, B rows of one replica's batch, L length, R length of the residual
stream between blocks, S source length, D embed, H heads, G kv heads, K head dim, F mlp, V vocabulary, X chunks of it
and U entries of a chunk, N layers, M languages, I steps that were not applied, P ranges of rows that are skipped and Q
their two ends; and where tokens look up their embeddings, Y rows and E embed. J is embed half-way, over one of its two
axes: messages over both at once XLA does not find. A letter that is not in a table, or a mesh axis that comes twice in
one tensor, is an error, on one CPU as on a thousand accelerators.

The replicas of the slow axis are the leading dimension of a `vmap`, in `per_replica`: nothing below it crosses them.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from euroflax import experiment
from euroflax.experiment import ExperimentError

T = TypeVar("T")
Table = dict[str, str | tuple[str, ...] | None]

AXES = ("replica", "data", "fsdp", "sequence", "tensor")
"""Slowest network first."""

PARAMETERS: Table = {
    "N": None,
    "I": None,
    "P": None,
    "Q": None,
    "D": ("fsdp", "sequence"),
    "H": "tensor",
    "G": "tensor",
    "K": None,
    "F": "tensor",
    "V": "tensor",
    "U": None,
    "X": None,
}

ACTIVATIONS: Table = {
    "A": None,
    "W": ("replica", "data", "fsdp"),
    "B": ("data", "fsdp"),
    "L": "sequence",
    "R": ("sequence", "tensor"),
    "S": None,
    "D": None,
    "H": "tensor",
    "G": "tensor",
    "K": None,
    "F": "tensor",
    "V": "tensor",
    "U": None,
    "M": None,
    "Y": "data",
    "E": ("fsdp", "sequence"),
    "J": "fsdp",
}


def least_devices(mesh: experiment.Mesh) -> int:
    """As many devices as a mesh needs at least."""
    return math.prod(max(getattr(mesh, axis), 1) for axis in AXES)


def mesh_sizes(mesh: experiment.Mesh, num_devices: int) -> dict[str, int]:
    """The size of each mesh axis on `num_devices` devices, with -1 filled in.

    Raises:
        ExperimentError: the declared sizes do not make up the devices.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if num_devices % fixed or (not free and fixed != num_devices):
        shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"
        raise ExperimentError(f"mesh={shown} does not make up {num_devices} devices; {_fix(sizes, num_devices)}")
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def _fix(sizes: dict[str, int], num_devices: int) -> str:
    """What would make a mesh fit: the nearest sizes of one axis, the others as they are."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    fits = []
    for axis, size in sizes.items():
        left, over = divmod(num_devices, fixed // size)
        if size <= 1 or over:
            continue
        able = [s for s in range(1, left + 1) if left % s == 0] if free else [left]
        near = [*[s for s in able if s < size][-1:], *[s for s in able if s > size][:1]]
        fits.append(" or ".join(f"mesh.{axis}={s}" for s in near))
    if not fits:
        return f"use sizes whose product {'divides' if free else 'is'} {num_devices}"
    return f"use {', or '.join(fits)}{'' if free else ', or -1 in place of a size'}"


def make_mesh(
    declared: experiment.Experiment, num_devices: int | None = None, devices: Sequence[object] | None = None
) -> jax.sharding.Mesh | AbstractMesh:
    """The mesh of an experiment over this job's devices, over given ones, or over a number that need not exist.

    Raises:
        ExperimentError: the sizes do not make up the devices, or the model or batch does not divide over them.
    """
    count = num_devices or len(devices or jax.devices())
    sizes = mesh_sizes(declared.mesh, count)
    placed = dataclasses.replace(declared, mesh=experiment.Mesh(**sizes))
    if faults := experiment.validate(placed):
        raise ExperimentError(*faults)
    types = (AxisType.Auto,) * len(AXES)
    if num_devices is not None:
        return AbstractMesh(tuple(sizes.values()), AXES, axis_types=types)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def mesh_to_read(declared: experiment.Experiment, note: Callable[[str], None]) -> jax.sharding.Mesh:
    """The mesh of an experiment where it makes up this job's devices; else one of as many of them as it fits.

    For what changes nothing of the run: evaluation and generation. One process only takes another mesh.

    Raises:
        ExperimentError: none fits.
    """
    devices = jax.devices()
    try:
        found = make_mesh(declared)
    except ExperimentError:
        found = None
        for count in range(len(devices) if jax.process_count() == 1 else 0, 0, -1):
            other = dataclasses.replace(declared, mesh=experiment.Mesh(data=1, fsdp=count))
            with contextlib.suppress(ExperimentError):
                found = make_mesh(other, devices=devices[:count])
                note(f"the mesh of the experiment is not that of these devices; takes fsdp {count}")
                break
        if found is None:
            raise
    assert isinstance(found, jax.sharding.Mesh)
    return found


def folded(mesh: jax.sharding.Mesh, axes: Sequence[str]) -> jax.sharding.Mesh:
    """The same devices without some axes: replicas count as data, and devices that share rows as fsdp.

    Parameters lie on it as they lie on `mesh`.
    """
    sizes = dict(mesh.shape)
    for axis, into in (("replica", "data"), ("sequence", "fsdp")):
        if axis in axes:
            sizes[into], sizes[axis] = sizes[into] * sizes[axis], 1
    if sizes == dict(mesh.shape):
        return mesh
    return jax.sharding.Mesh(mesh.devices.reshape(tuple(sizes.values())), AXES, axis_types=mesh.axis_types)


def spec(letters: str, table: Table) -> PartitionSpec:
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


def constrain(value: jax.Array, letters: str, table: Table = ACTIVATIONS) -> jax.Array:
    """The same array, held to its place in a table; without a mesh only the letters are checked.

    Raises:
        ValueError: the letters do not fit the array, or a dimension does not divide over its mesh axes.
    """
    placement = spec(letters, table)
    if len(letters) != value.ndim:
        raise ValueError(f"{letters} names {len(letters)} dimensions of an array of shape {value.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return value
    for letter, size, ways in zip(letters, value.shape, _ways(placement, mesh), strict=True):
        if size % ways:
            raise ValueError(f"dimension {letter}={size} of {letters} does not divide over {ways} devices")
    return jax.lax.with_sharding_constraint(value, placement)


def scattered(gradient: jax.Array, letters: str) -> jax.Array:
    """The gradient of a parameter, summed over devices and split as parameters are: one axis after the other.

    Asked for both axes of D at once, XLA gathers activations over some meshes instead.
    """
    return constrain(constrain(gradient, letters.replace("D", "J")), letters, PARAMETERS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(value: jax.Array, letters: str) -> jax.Array:
    """A parameter as products take it: whole where parameters are split over fsdp; its gradient is split again."""
    return constrain(value, letters)


def _gather(value: jax.Array, letters: str) -> tuple[jax.Array, None]:
    return constrain(value, letters), None


def _scatter(letters: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (scattered(gradient, letters),)


gathered.defvjp(_gather, _scatter)


def per_replica(function: Callable[..., T], params: object, batch: dict, *rest: object) -> T:
    """The sum over replicas of `function(params, batch, *rest)`, each on its own rows; then replicas meet once.

    Args:
        function: gives a tree of arrays that add up over rows.
        params: the same in each replica.
        batch: arrays of `[W, L]`.
        rest: the same in each replica.
    """
    replicas = ways("W") // ways("B")
    if replicas == 1:
        return function(params, batch, *rest)
    parts = jax.tree.map(lambda values: values.reshape(replicas, -1, *values.shape[1:]), batch)
    each = jax.vmap(function, in_axes=(None, 0, *(None for _ in rest)), spmd_axis_name="replica")
    return jax.tree.map(lambda values: values.sum(axis=0), each(params, parts, *rest))


def ways(letter: str) -> int:
    """Over how many devices of the mesh in force the table of activations splits a dimension; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(spec(letter, ACTIVATIONS), mesh)[0]


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


def batch_sharding(mesh: jax.sharding.Mesh | AbstractMesh, letters: str = "WL") -> NamedSharding:
    """The sharding of a batch's arrays."""
    return NamedSharding(mesh, spec(letters, ACTIVATIONS))


def row_ways(mesh: jax.sharding.Mesh | AbstractMesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return _ways(spec("W", ACTIVATIONS), mesh)[0]


def local_rows(mesh: jax.sharding.Mesh, num_rows: int) -> list[int]:
    """Which rows of a batch of `num_rows` lie on devices of this process, in order."""
    placement = batch_sharding(mesh, "W").addressable_devices_indices_map((num_rows,))
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
