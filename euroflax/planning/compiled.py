"""The training step through the real compiler, for hardware that need not be here."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator

import jax

from euroflax import sharding
from euroflax.data.loader import empty_batch
from euroflax.experiment import Experiment, RunFailed, Span
from euroflax.planning.program import Program, read_program
from euroflax.planning.targets import Target, devices_of
from euroflax.training.step import abstract_state, compile_step, train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step on one device."""

    memory_bytes: int
    """All that the step needs at its peak."""
    program: Program | None
    """None where the compiler refused: it needs more memory than there is."""


def compiled_step(declared: Experiment, span: Span, target: Target) -> Compiled:
    """The step of a stage, compiled for a target.

    Raises:
        ExperimentError: the mesh does not make up the target's devices.
        RunFailed: the compiler failed, or its program cannot be read.
    """
    if declared.model.layer_loop == "auto":  # what it means elsewhere than on a CPU
        declared = dataclasses.replace(declared, model=dataclasses.replace(declared.model, layer_loop="scan"))
    mesh = sharding.make_mesh(declared, devices=devices_of(target))
    assert isinstance(mesh, jax.sharding.Mesh)
    state = abstract_state(declared, mesh)
    batch = _abstract_batch(span, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        lowered = compile_step(declared, span, shardings).lower(state, batch)
        try:
            with _without_cache():
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return Compiled(_needed(str(error), target), None)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    try:
        return Compiled(total, read_program(text, dict(mesh.shape)))
    except ValueError as error:
        raise RunFailed(f"the program that the compiler made for {target.name} cannot be read: {error}") from error


def trace_stages(declared: Experiment, num_devices: int) -> None:
    """Traces the step of each stage on an abstract mesh: a stage that cannot run fails here and not weeks later.

    Raises:
        ExperimentError: the mesh does not make up the devices.
    """
    model = dataclasses.replace(declared.model, layer_loop="scan")  # traces one layer instead of all
    declared = dataclasses.replace(declared, model=model)
    mesh = sharding.make_mesh(declared, num_devices)
    assert isinstance(mesh, jax.sharding.AbstractMesh)
    state = abstract_state(declared, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        for span in declared.spans:
            jax.eval_shape(functools.partial(train_step, declared, span), state, _abstract_batch(span, mesh))


def _abstract_batch(span: Span, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict:
    """The shapes, types and shardings of a stage's batch."""
    placed = sharding.batch_sharding(mesh)
    shape = (span.batch_rows, span.sequence_length)
    arrays = empty_batch(1, 1, 0)
    return {name: jax.ShapeDtypeStruct(shape, values.dtype, sharding=placed) for name, values in arrays.items()}


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Keeps a program out of the cache of compiled programs: one for absent hardware cannot be read back."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _needed(message: str, target: Target) -> int:
    """The memory that the compiler says it would need.

    Raises:
        RunFailed: it did not fail for memory.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise RunFailed(f"the compiler failed for {target.name}: {message.splitlines()[0][:300]}")
    sizes = re.findall(r"([\d.]+)\s*([KMGT]?)i?B?\b", message)
    return max(int(float(size) * _UNITS[unit]) for size, unit in sizes if size.strip("."))
