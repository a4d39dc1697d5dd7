"""What a compiled program computes and moves, read from its text: FLOPs, memory traffic, collectives by mesh axis.

The text is that of an XLA program after partitioning (HLO), which stands for one device. What a loop contains is
counted as often as the loop runs.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_OVER_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")
_NO_TRAFFIC = frozenset(
    [
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "constant",
        "while",
        "conditional",
        "call",
        "after-all",
        "iota",
        "partition-id",
        "replica-id",
        "optimization-barrier",
        "custom-call",
    ]
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Messages of one kind over the same mesh axes in one step."""

    kind: str
    axis: str
    """The mesh axes, `fsdp+sequence` where there are several."""
    bytes: int
    """What each device sends in a step, nothing twice: `(n - 1) / n` of what is gathered or scattered over n."""
    count: int
    """Messages in a step."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One step on one device."""

    flops: int
    """Operations of matrix products, a multiplication and an addition being two."""
    memory_bytes: int
    """Bytes read and written by instructions that are not fused away: what passes between chip and memory at most."""
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    """Type of the result, as text."""
    op: str
    operands: tuple[str, ...]
    rest: str
    """The attributes."""
    is_root: bool


Computation = dict[str, _Instruction]


def read_program(text: str, mesh: dict[str, int]) -> Program:
    """What a program of the mesh does in one step.

    Args:
        text: a compiled, partitioned XLA program.
        mesh: the size of each axis, in the order of the devices.

    Raises:
        ValueError: it holds messages that cannot be followed.
    """
    computations, entry = _parse(text)
    times = _times(computations, entry)
    _check_reached(computations, times)
    scheduled = _scheduled(computations, entry)
    flops = memory = 0
    moved: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, count in times.items():
        computation = computations[name]
        for instruction in computation.values():
            flops += count * _flops(instruction, computation)
            if name in scheduled:
                memory += count * _traffic(instruction, computation, computations)
            if (kind := _collective(instruction)) is not None:
                ids = _group(instruction.rest, math.prod(mesh.values()))
                size = _bytes_moved(kind, instruction, len(ids))
                if len(ids) > 1:
                    entry_of = moved[kind, _axes(ids, mesh)]
                    entry_of[0] += count * size
                    entry_of[1] += count
    found = (Collective(kind, axis, size, count) for (kind, axis), (size, count) in sorted(moved.items()))
    return Program(flops, memory, tuple(found))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"^(ENTRY )?%?([\w.-]+) \(", line)):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif (found := _INSTRUCTION.match(line)) is not None:
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> _Instruction:
    at = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:at], text[at:].lstrip()
    op, _, text = text.partition("(")
    end = _closing("(" + text, 0) - 2
    operands = (text[:end],) if op == "constant" else tuple(re.findall(r"%([\w.-]+)", text[:end]))
    return _Instruction(name, shape, op.strip(), operands, text[end + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "({[") - (text[at] in ")}]")
        if depth == 0:
            return at + 1
    return len(text)


def _trips(instruction: _Instruction, computations: dict[str, Computation]) -> int:
    """How often a loop runs: what the compiler says, or the number that its counter is compared with."""
    if (known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)) is not None:
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", instruction.rest)
    inside = computations[condition[1]].values() if condition else ()
    constants = [i.operands[0] for i in inside if i.op == "constant" and i.shape.startswith("s32[]")]
    return max(map(int, constants), default=1)


def _called(instruction: _Instruction, computations: dict[str, Computation]) -> list[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    rest = instruction.rest
    if instruction.op == "while":
        body = re.search(r"\bbody=%?([\w.-]+)", rest)
        return [(body[1], _trips(instruction, computations))] if body else []
    if instruction.op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
        names = branches[1] if branches else " ".join(re.findall(r"(?:true|false)_computation=(%?[\w.-]+)", rest))
        return [(name, 1) for name in re.findall(r"%?([\w.-]+)", names)]
    if instruction.op in ("fusion", "call", "call-start", "async-start", "custom-call"):
        return [(name, 1) for name in re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", rest)]
    return []


def _times(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """How often each computation runs in a step."""
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name].values():
            for called, trips in _called(instruction, computations):
                if called in computations:
                    visit(called, count * trips)

    visit(entry, 1)
    return times


def _check_reached(computations: dict[str, Computation], times: dict[str, int]) -> None:
    """Refuses a program that sends messages from where no instruction that is known here leads."""
    for name in computations.keys() - times.keys():
        if any(_collective(instruction) for instruction in computations[name].values()):
            raise ValueError(f"nothing known runs {name}, which sends messages")


def _scheduled(computations: dict[str, Computation], entry: str) -> set[str]:
    """Computations whose instructions run one by one: not those inside a fusion."""
    found, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        found.add(name)
        for instruction in computations[name].values():
            if instruction.op != "fusion":
                waiting += [n for n, _ in _called(instruction, computations) if n in computations and n not in found]
    return found


def _sizes(shape: str) -> list[int]:
    """Bytes of each array in a type, those that a TPU keeps on the chip left out."""
    sizes = []
    for kind, dims, layout in _SHAPE.findall(shape):
        bits = _BITS.get(kind) or int(re.sub(r"\D.*", "", kind.lstrip("bcfsu")) or 0)
        sizes.append(0 if "S(1)" in layout else math.prod(_dims(dims)) * bits // 8)
    return sizes


def _dims(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _shape_of(name: str, computation: Computation) -> list[int]:
    found = _SHAPE.search(computation[name].shape)
    return _dims(found[2]) if found else []


def _flops(instruction: _Instruction, computation: Computation) -> int:
    """Operations of a matrix product; 0 for everything else."""
    if instruction.op not in ("dot", "convolution"):
        return 0
    out = math.prod(_dims(_SHAPE.findall(instruction.shape)[0][1]))
    left, right = (_shape_of(name, computation) for name in instruction.operands[:2])
    if instruction.op == "convolution":
        return round(2 * out * _taps(instruction, left, right))
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    return 2 * out * math.prod(left[int(dim)] for dim in contracted[1].split(",") if dim) if contracted else 0


def _taps(instruction: _Instruction, left: list[int], right: list[int]) -> float:
    """Products that make up an entry of a convolution, on average: a TPU writes matrix products as such.

    Batch dimensions become windows over dilated space, of which all places but one are empty.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 0
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    taps = right[labels[2].index("i")]
    out = _dims(_SHAPE.findall(instruction.shape)[0][1])
    for number in range(len(given.get("size", "").split("x")) if given else 0):
        size, stride, dilate = (
            int(given[name].split("x")[number]) if name in given else 1 for name in ("size", "stride", "lhs_dilate")
        )
        pad = int(given["pad"].split("x")[number].split("_")[0]) if "pad" in given else 0
        inside, outside = left[labels[1].index(str(number))], out[labels[3].index(str(number))]
        places = np.arange(outside)[:, None] * stride + np.arange(size) - pad
        filled = (places >= 0) & (places <= (inside - 1) * dilate) & (places % dilate == 0)
        taps = taps * int(filled.sum()) / outside
    return taps


def _traffic(instruction: _Instruction, computation: Computation, computations: dict[str, Computation]) -> int:
    """Bytes that an instruction reads from memory and writes to it."""
    op = instruction.op
    if op in _NO_TRAFFIC or op.endswith("-done") or op.endswith("-start") or op in COLLECTIVES:
        return 0
    written = sum(_sizes(instruction.shape))
    read = [sum(_sizes(computation[name].shape)) for name in instruction.operands if name in computation]
    if op in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if op == "dynamic-update-slice":
        return 2 * read[1]
    if op == "fusion":
        inner = computations[_called(instruction, computations)[0][0]]
        return _fused_traffic(inner, read, written)
    return written + sum(read)


def _fused_traffic(inner: Computation, read: list[int], written: int) -> int:
    """Traffic of a fusion: of what is only sliced the slices, and of what is updated in place the updates."""
    uses: dict[str, list[_Instruction]] = collections.defaultdict(list)
    for instruction in inner.values():
        for name in instruction.operands:
            uses[name].append(instruction)
    total = written
    for parameter in (i for i in inner.values() if i.op == "parameter"):
        size = sum(_sizes(parameter.shape))
        users = _users(parameter.name, uses)
        if users and all(user.op in ("dynamic-slice", "gather") for user in users):
            size = sum(sum(_sizes(user.shape)) for user in users)
        elif any(user.op == "dynamic-update-slice" and len(user.operands) > 1 for user in users):
            updates = [user for user in users if user.op == "dynamic-update-slice"]
            whole = [user for user in updates if sum(_sizes(user.shape)) == size]
            if whole:
                total -= size  # written in place: what is written is the update
                size = sum(sum(_sizes(inner[user.operands[1]].shape)) for user in whole)
        total += size
    return max(total, 0)


def _users(name: str, uses: dict[str, list[_Instruction]]) -> list[_Instruction]:
    """The instructions that use a value, seen through changes of its form alone."""
    found = []
    for user in uses[name]:
        found += _users(user.name, uses) if user.op in ("bitcast", "copy", "convert") else [user]
    return found


def _collective(instruction: _Instruction) -> str | None:
    kind = instruction.op.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _bytes_moved(kind: str, instruction: _Instruction, devices: int) -> int:
    """Bytes that each device of a group sends."""
    size = sum(_plain_sizes(instruction.shape))
    if instruction.op.endswith("-start"):  # the type holds operands and results
        size = {
            "all-gather": size * devices // (devices + 1),
            "reduce-scatter": size * devices // (devices + 1),
            "all-to-all": size // 2,
            "collective-permute": size // 2,
            "all-reduce": size,
        }[kind]
    elif kind == "reduce-scatter":
        size *= devices
    if kind == "collective-permute":
        return size
    return (2 if kind == "all-reduce" else 1) * size * (devices - 1) // devices


def _plain_sizes(shape: str) -> list[int]:
    return _sizes(re.sub(r"\{[^}]*\}", "", shape))


@functools.lru_cache(maxsize=4096)
def _ids(text: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group."""
    if (named := _OVER_MESH.match(text)) is not None:
        order = np.arange(devices)
        if named[2]:
            order = order.reshape(_dims(named[2])).transpose(_dims(named[3]) if named[3] else None)
        inside = dict(re.findall(r"'(\w+)'(?::(\(\d+\)\d+))?", named[4]))
        dims, index = [], []
        for name, size in re.findall(r"'(\w+)'=(\d+)", named[1]):
            before, within = map(int, re.findall(r"\d+", inside.get(name) or f"(1){size}"))
            dims += [before, within, int(size) // before // within]
            index += [0, slice(None) if name in inside else 0, 0]
        return tuple(np.ravel(order.reshape(dims)[tuple(index)]).tolist())
    if (iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)) is not None:
        grid = np.arange(devices).reshape(_dims(iota[2]))
        if iota[3]:
            grid = grid.transpose(_dims(iota[3]))
        return tuple(grid.reshape(_dims(iota[1]))[0].tolist())
    if (listed := re.match(r"\{\{([\d,]+)\}", text)) is not None:
        return tuple(_dims(listed[1]))
    if text.startswith("{}"):
        return tuple(range(devices))
    raise ValueError(f"cannot read the devices of a message: {text[:100]}")


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """The devices that take part in the same message; one alone where nothing is sent."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
    if pairs is not None:
        sent = (tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1]) if pair[0] != pair[1])
        return next(sent, (0,))
    at = rest.find("replica_groups=")
    return _ids(rest[at + len("replica_groups=") :], devices) if at >= 0 else tuple(range(devices))


def _axes(ids: tuple[int, ...], mesh: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.array(ids), tuple(mesh.values())))
    return "+".join(axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1)
