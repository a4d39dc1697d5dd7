"""What can be known to be wrong from an experiment's values alone, on any machine and without a device."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from euroflax import languages
from euroflax.experiment.codec import decode, shown
from euroflax.experiment.mixtures import mixtures
from euroflax.experiment.schema import Experiment, Source, Span

NUM_SPECIAL_TOKENS = 3
_BYTE_VOCABULARY = 256 + NUM_SPECIAL_TOKENS
_MAX_ROWS = 2**32 - 1
_MAX_SEED = 2**31 - 1
_SPLIT_BY_TENSOR = ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size")
_LEAST_WINDOW = 8
_MOST = {
    "num_layers": 10_000,
    "embed_dim": 2**20,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "mlp_dim": 2**24,
    "vocab_size": 2**28,
}
_LONGEST_ROW = 2**26
_MOST_TRIED = 10**6
_SHOWN = 24


def check_types(experiment: Experiment) -> list[str]:
    """The faults of fields that hold another type than they declare."""
    faults: list[str] = []
    decode(Experiment, experiment, "", faults)
    return faults


def validate(experiment: Experiment) -> list[str]:
    """All faults of an experiment's values: each names field, value, rule and fix. Empty where there are none."""
    faults = check_types(experiment)
    if faults:
        return faults
    for rules in (_sizes, _data, _sources, mixtures, _stages, _rows_of_stages, _training, _schedule, _guard, _mesh):
        faults.extend(rules(experiment))
    return faults


def _at_least(field: str, value: float, least: float) -> Iterator[str]:
    if not value >= least or not math.isfinite(value):
        yield f"{field}={value} is less than {least} or not finite; use {least} or more"


def _sizes(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    if experiment.continue_from is not None and not experiment.continue_from.strip():
        yield "continue_from= is empty; name a Hugging Face folder below the data root, or leave it out"
    if not re.fullmatch(r"[\w.+-]*", experiment.name) or experiment.name.startswith("."):
        yield f"name={shown(experiment.name)} is no folder name; use letters, digits, and - _ . +"
    for field in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
        yield from _at_least(f"model.{field}", getattr(model, field), 1)
    for field, most in _MOST.items():
        if getattr(model, field) > most:
            yield f"model.{field}={getattr(model, field)} is more than any model has; use {most} or less"
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"use one of {_divisors(model.num_heads)}"
        )
    if model.head_dim % 2:
        yield f"model.head_dim={model.head_dim} is odd and rotary positions turn pairs; use {model.head_dim + 1}"
    if model.vocab_size < _BYTE_VOCABULARY:
        yield (
            f"model.vocab_size={model.vocab_size} cannot hold 256 bytes and {NUM_SPECIAL_TOKENS} special tokens; "
            f"use {_BYTE_VOCABULARY} or more"
        )
    for field in ("rope_theta", "norm_epsilon", "init_std"):
        if not 0 < getattr(model, field) < math.inf:
            yield f"model.{field}={getattr(model, field)} is not a positive number; use its default"


def _data(experiment: Experiment) -> Iterator[str]:
    yield from _at_least("data.sequence_length", experiment.data.sequence_length, 2)
    if experiment.data.sequence_length > _LONGEST_ROW:
        yield f"data.sequence_length={experiment.data.sequence_length} is too long; use {_LONGEST_ROW} or less"
    yield from _at_least("data.tokenizer.sample_bytes", experiment.data.tokenizer.sample_bytes, 1)
    yield from _at_least("data.max_document_bytes", experiment.data.max_document_bytes, 1)
    if experiment.data.max_document_bytes > 2**31:
        yield f"data.max_document_bytes={experiment.data.max_document_bytes} is too large; use {2**31} or less"
    if not 0 <= experiment.data.tokenizer.max_lost_fraction < 1:
        lost = experiment.data.tokenizer.max_lost_fraction
        yield f"data.tokenizer.max_lost_fraction={lost} is not in [0, 1); use 0 or a small fraction"
    if not 0 <= experiment.data.bad_line_fraction <= 1:
        yield f"data.bad_line_fraction={experiment.data.bad_line_fraction} is not a fraction; use 0 to 1"


def _divisors(number: int) -> str:
    """The divisors of a number, the smallest and largest where they are many."""
    small = [d for d in range(1, min(math.isqrt(number), _MOST_TRIED) + 1) if number % d == 0]
    found = sorted({*small, *(number // d for d in small)})
    shown = found if len(found) <= _SHOWN else [*found[: _SHOWN // 2], "...", *found[-_SHOWN // 2 :]]
    return ", ".join(map(str, shown))


def _sources(experiment: Experiment) -> Iterator[str]:
    groups = (("data.sources", experiment.data.sources), ("evaluation.sources", experiment.evaluation.sources))
    for group, sources in groups:
        counts = collections.Counter(source.name for source in sources)
        for name, count in counts.items():
            if count > 1:
                yield f"{group} has {count} sources named {name}; give each a name of its own"
        for i, source in enumerate(sources):
            yield from _source(f"{group}[{i}]", source)
    if not experiment.data.sources:
        yield "data.sources=() names no source; give at least one"
    for i, source in enumerate(experiment.evaluation.sources):
        if source.block_list is not None:
            yield (
                f"evaluation.sources[{i}].block_list={source.block_list} is for text that is trained on; take the "
                "documents out of the file, and leave it out"
            )
        if source.holdout_fraction:
            yield (
                f"evaluation.sources[{i}].holdout_fraction={source.holdout_fraction} has no meaning, "
                "since all of it is evaluated on; leave it out"
            )


def _source(path: str, source: Source) -> Iterator[str]:
    if not re.fullmatch(r"[\w.+-]+", source.name):
        yield f"{path}.name={shown(source.name)} is no file name; use letters, digits, and - _ . +"
    if languages.fold(source.language) is None:
        close = ", ".join(languages.neighbours(source.language)) or "listed in euroflax/languages.py"
        yield f"{path}.language={shown(source.language)} is not a known language; the nearest are {close}"
    for field in ("path", "licence", "provider"):
        if not getattr(source, field).strip():
            yield f"{path}.{field}= is empty; state it{'' if field == 'path' else ', or write unknown'}"
    if (source.origin == "synthetic") != (source.generator is not None):
        rule = "needs a generator" if source.origin == "synthetic" else "has a generator, which only synthetic text has"
        fix = "name the model that wrote it" if source.origin == "synthetic" else "leave generator out"
        yield f"{path}.origin={source.origin} {rule}; {fix}"
    if not 0 <= source.holdout_fraction < 1:
        yield f"{path}.holdout_fraction={source.holdout_fraction} is not in [0, 1); use for example 0.01"
    if source.holdout_fraction and source.id_field is None:
        yield f"{path}.id_field=None leaves nothing to hold documents out by; name the field of the document id"
    if source.block_list is not None and not source.block_list.strip():
        yield f"{path}.block_list= is empty; name a file of document ids below the data root, or leave it out"
    for field in ("expected_bytes", "expected_tokens"):
        if getattr(source, field) is not None:
            yield from _at_least(f"{path}.{field}", getattr(source, field), 1)


def _training(experiment: Experiment) -> Iterator[str]:
    training, length = experiment.training, experiment.data.sequence_length
    positive = ("tokens", "batch_tokens", "accumulation_steps", "loss_chunk_entries")
    for field in positive:
        yield from _at_least(f"training.{field}", getattr(training, field), 1)
    for field in ("weight_decay", "z_loss", "seed"):
        yield from _at_least(f"training.{field}", getattr(training, field), 0)
    for field in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, field) < 1:
            yield f"training.{field}={getattr(training, field)} is not in [0, 1); use its default"
    for field in ("clip_norm", "adam_epsilon"):
        if not 0 < getattr(training, field) < math.inf:
            yield f"training.{field}={getattr(training, field)} is not a positive number; use its default"
    if min(length, *(getattr(training, field) for field in positive)) >= 1:
        yield from _batches(experiment)
    checkpoint, evaluation = experiment.checkpoint, experiment.evaluation
    yield from _at_least("checkpoint.every_steps", checkpoint.every_steps, 1)
    yield from _at_least("checkpoint.keep_last", checkpoint.keep_last, 1)
    yield from _at_least("evaluation.every_steps", evaluation.every_steps, 1)
    yield from _at_least("evaluation.sample_tokens", evaluation.sample_tokens, 0)
    if checkpoint.keep_every_steps is not None:
        yield from _at_least("checkpoint.keep_every_steps", checkpoint.keep_every_steps, 1)
    if evaluation.max_documents is not None:
        yield from _at_least("evaluation.max_documents", evaluation.max_documents, 1)


def _batches(experiment: Experiment) -> Iterator[str]:
    training = experiment.training
    batch_tokens = training.batch_tokens
    for span in _valid_spans(experiment):
        if span.number and (changed := experiment.stages[span.number - 1].batch_tokens) is not None:
            batch_tokens = changed
        length = span.sequence_length
        if batch_tokens % length:
            fits = " or ".join(map(str, _near(batch_tokens, length)))
            field, length_field = (_field_of(experiment, span, name) for name in ("batch_tokens", "sequence_length"))
            yield f"{field}={batch_tokens} is not a multiple of {length_field}={length}; use {fits}"
        elif span.batch_rows % training.accumulation_steps:
            yield (
                f"training.accumulation_steps={training.accumulation_steps} does not divide the "
                f"{span.batch_rows} rows of a batch; use one of {_divisors(span.batch_rows)}"
            )
    if experiment.total_rows > _MAX_ROWS:
        yield f"training.tokens={training.tokens} is more than {_MAX_ROWS} rows; use fewer tokens or longer rows"


def _empty_stages(experiment: Experiment) -> Iterator[str]:
    """The faults of stages that begin within a row and end in it."""
    for before, span in itertools.pairwise(experiment.spans):
        for empty in (before, span) if span is experiment.spans[-1] else (before,):
            if empty.first_row == empty.stop_row:
                field = f"stages[{empty.number - 1}]" if empty.number else "the beginning of the run"
                yield (
                    f"{field} has no row of {empty.sequence_length} tokens: stages begin at whole rows; begin the one "
                    "after it later, or leave it out"
                )


def _valid_spans(experiment: Experiment) -> tuple[Span, ...]:
    """The stages, where their numbers are such that rows and batches can be computed."""
    return () if list(_stages(experiment)) else experiment.spans


def _stages(experiment: Experiment) -> Iterator[str]:
    before, field = 0, "the beginning of the run"
    for i, stage in enumerate(experiment.stages):
        path = f"stages[{i}]"
        if not before < stage.from_tokens < experiment.training.tokens:
            rule = (
                f"is not after {field} at {before} tokens"
                if stage.from_tokens <= before
                else f"is not before the end of the run, training.tokens={experiment.training.tokens}"
            )
            yield f"{path}.from_tokens={stage.from_tokens} {rule}; stages begin one after the other within the run"
        before, field = stage.from_tokens, f"{path}, which begins"
        for name, least in (("sequence_length", 2), ("batch_tokens", 1)):
            if (value := getattr(stage, name)) is not None:
                yield from _at_least(f"{path}.{name}", value, least)
        if stage.mixture is stage.sequence_length is stage.batch_tokens is None:
            yield f"{path} changes nothing; give it a mixture, a sequence_length or batch_tokens, or leave it out"


def _rows_of_stages(experiment: Experiment) -> Iterator[str]:
    if experiment.data.sequence_length > 0 and not list(_stages(experiment)):
        yield from _empty_stages(experiment)


def _schedule(experiment: Experiment) -> Iterator[str]:
    schedule, tokens, seed = experiment.training.schedule, experiment.training.tokens, experiment.training.seed
    if seed > _MAX_SEED:
        yield f"training.seed={seed} is too large; use {_MAX_SEED} or less"
    for field in ("warmup_tokens", "decay_tokens"):
        yield from _at_least(f"training.schedule.{field}", getattr(schedule, field), 0)
    if not 0 < schedule.peak_learning_rate < math.inf:
        yield f"training.schedule.peak_learning_rate={schedule.peak_learning_rate} is not positive; use 3e-4 or so"
    if not 0 <= schedule.final_fraction <= 1:
        yield f"training.schedule.final_fraction={schedule.final_fraction} is not a fraction; use 0 to 1"
    if schedule.warmup_tokens + schedule.decay_tokens > tokens:
        yield (
            f"training.schedule.warmup_tokens={schedule.warmup_tokens} and decay_tokens={schedule.decay_tokens} "
            f"together exceed training.tokens={tokens}; shorten one of them"
        )
    if schedule.kind == "cosine" and schedule.decay_tokens:
        yield (
            f"training.schedule.decay_tokens={schedule.decay_tokens} is not used by kind=cosine, which decays "
            "from the warm-up to the end; leave it out"
        )


def _guard(experiment: Experiment) -> Iterator[str]:
    guard = experiment.training.guard
    if guard.deviations is not None and not 1 <= guard.deviations < math.inf:
        yield f"training.guard.deviations={guard.deviations} would refuse common steps; use 6 or so, or None"
    yield from _at_least("training.guard.window_steps", guard.window_steps, 2)
    if guard.deviations is not None and 2 <= guard.window_steps < _LEAST_WINDOW:
        yield (
            f"training.guard.window_steps={guard.window_steps} would refuse common steps, since so few say nothing of "
            f"their deviation; use {_LEAST_WINDOW} or more, or training.guard.deviations=None"
        )
    yield from _at_least("training.guard.max_skipped", guard.max_skipped, 0)
    yield from _at_least("training.guard.max_returns", guard.max_returns, 0)
    for name, most in (("window_steps", 10**6), ("max_skipped", 10**4), ("max_returns", 100)):
        if getattr(guard, name) > most:
            yield f"training.guard.{name}={getattr(guard, name)} is more than the guard keeps; use {most} or less"
    if guard.max_skipped >= guard.window_steps >= 2:
        yield (
            f"training.guard.max_skipped={guard.max_skipped} is never exceeded in window_steps="
            f"{guard.window_steps} steps; use {guard.window_steps - 1} or less"
        )


def _mesh(experiment: Experiment) -> Iterator[str]:
    mesh = experiment.mesh
    sizes = dataclasses.asdict(mesh)
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{axis}={size} is no number of devices; use 1 or more, or -1 for what is left"
    if len(free := [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]) > 1:
        yield f"{'='.join(free)}=-1 asks for what is left more than once; give all sizes but one"
    divided: list[tuple[str, int, tuple[str, ...]]] = []
    divided += [(f"model.{f}", getattr(experiment.model, f), ("tensor",)) for f in _SPLIT_BY_TENSOR]
    divided.append(("model.embed_dim", experiment.model.embed_dim, ("fsdp", "sequence")))
    if experiment.data.sequence_length > 0:
        for span in _valid_spans(experiment):
            field = _field_of(experiment, span, "sequence_length")
            length, ways = span.sequence_length, mesh.sequence * max(mesh.tensor, 1)
            divided.append((field, length, ("sequence", "tensor")))
            if mesh.sequence > 1 and length % (2 * mesh.sequence) and length % ways == 0:
                yield (
                    f"{field}={length} does not divide into two pieces for each of mesh.sequence={mesh.sequence}; "
                    f"use {' or '.join(map(str, _near(length, 2 * mesh.sequence)))}"
                )

    def split(axes: tuple[str, ...]) -> set[str]:
        return {axis for axis in axes if sizes[axis] > 1}

    for field, value, axes in dict.fromkeys(divided):
        ways = math.prod(max(sizes[axis], 1) for axis in axes)
        if value > 0 and value % ways:  # the fix fits all that these axes divide, so that the fixes of all lines agree
            common = math.gcd(*(v for _, v, over in divided if v > 0 and split(over) == split(axes)))
            near, over = " or ".join(map(str, _divisors_near(common, ways))), sorted(split(axes))
            fix = f"mesh.{over[0]}={near}" if len(over) == 1 else f"{near} devices"
            yield f"{field}={value} does not divide over {_product(sizes, axes)}; use {fix}"
    yield from _rows_over_mesh(experiment)


def _rows_over_mesh(experiment: Experiment) -> Iterator[str]:
    sizes = dataclasses.asdict(experiment.mesh)
    axes = ("replica", "data", "fsdp")
    ways = math.prod(sizes[axis] for axis in axes) * experiment.training.accumulation_steps
    if min(*(sizes[axis] for axis in axes), experiment.data.sequence_length, ways) <= 0:
        return
    for span in _valid_spans(experiment):
        if span.batch_rows % ways:
            rows, parts = _near(span.batch_rows, ways), experiment.training.accumulation_steps
            able = [] if span.batch_rows % parts else _divisors_near(span.batch_rows // parts, ways // parts)
            fewer = f", or {' or '.join(map(str, able))} devices" if able else ""
            yield (
                f"{_field_of(experiment, span, 'batch_tokens')}={span.batch_rows * span.sequence_length} is "
                f"{span.batch_rows} rows and does not divide over {_product(sizes, axes)}"
                f" x accumulation_steps {parts} = {ways}; "
                f"use {' or '.join(str(number * span.sequence_length) for number in rows)}{fewer}"
            )


def _field_of(experiment: Experiment, span: Span, name: str) -> str:
    """The field that gives a stage its row length or its batch."""
    set_in = [i for i, stage in enumerate(experiment.stages[: span.number]) if getattr(stage, name) is not None]
    first = "data.sequence_length" if name == "sequence_length" else "training.batch_tokens"
    return f"stages[{set_in[-1]}].{name}" if set_in else first


def _product(sizes: dict[str, int], axes: tuple[str, ...]) -> str:
    """The axes that split something, with their sizes."""
    return " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1) or "one device"


def _near(value: int, factor: int) -> list[int]:
    """The multiples of a factor that are nearest to a value, from below and above."""
    below = value // factor * factor
    return [multiple for multiple in (below, below + factor) if multiple > 0]


def _divisors_near(value: int, ways: int) -> list[int]:
    """The divisors of a value that are nearest to a number of devices, from below and above."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    return [max(d for d in divisors if d <= ways), *[d for d in divisors if d > ways][:1]]
