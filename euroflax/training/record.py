"""The record of a run on disk: `experiment.json`, `manifest.json` and `metrics.jsonl` of its folder. No jax here."""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Callable, Iterable
from typing import IO

from euroflax.data.fertility import tokenizer_figures
from euroflax.data.order import Order
from euroflax.data.prepare import Prepared
from euroflax.data.store import Store
from euroflax.data.tokenizer import BESIDE
from euroflax.data.withdrawals import write_history
from euroflax.experiment import Experiment, ExperimentError, Source, from_json, to_json
from euroflax.experiment.codec import shown
from euroflax.folders import is_full, make_folder, open_lock, parse_json, replace_file, replace_json
from euroflax.languages import fold
from euroflax.training.goodput import goodput, lost, moved, next_number, recover, totals
from euroflax.training.shapes import EVAL_LINE, SAMPLES, TRAIN_LINE, completed, fits

_MAY_DIFFER = re.compile(
    r"mesh\.|checkpoint\.|evaluation\.|data\.(tokenizer\.max_lost_fraction|bad_line_fraction)$"
    r"|training\.(batch_tokens|accumulation_steps)$|stages\[\d+\]\.batch_tokens$"
    r"|data\.sources\[\d+\]\.block_list$|(data|stages\[\d+\])\.mixture\.max_epochs$"
)
_MAX_FAULTS = 8
_MAX_COUNTS = 100
NO_SAVES = {"count": 0, "blocking_seconds": 0.0, "longest_seconds": 0.0}
"""Of a session: its saves, how long they held up the steps, and how long the longest took to its end."""
_MANIFEST = ("versions", "data", "mixture", "ledger", "sources", "tokenizer", "sessions")
_PROVENANCE = ("name", "licence", "provider", "origin", "opt_out", "generator")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "tensorstore")


class Record:
    """The folder of a run, held by one job at a time; in a job of several processes only process 0 writes."""

    def __init__(self, path: pathlib.Path, declared: Experiment, writes: bool) -> None:
        """Opens or makes the folder.

        Raises:
            ExperimentError: it cannot be written, another process holds it, or it is of another experiment.
        """
        self.path, self._declared, self._writes = path, declared, writes
        self.manifest: dict = {"sessions": []}
        if writes:
            make_folder(path, "run folder")
        earlier = read_json(path / "experiment.json")
        if earlier is not None and (faults := differences(earlier, to_json(declared), path)):
            raise ExperimentError(*faults)
        if writes:
            self._lock = self._take_lock()
        try:
            self.manifest = self._read_manifest() or self.manifest
        except ExperimentError:
            self.close()
            raise
        self._metrics = path / "metrics.jsonl"
        self._unwritten = b""
        self.missing_steps = 0
        """Steps before the one to which the metrics were cut back that they do not hold."""
        self.on_line: Callable[[dict], None] = lambda line: None
        """Told of each line of the metrics, in the process that writes."""
        self._evaluated: set[int] = set()

    def _read_manifest(self) -> dict | None:
        file = self.path / "manifest.json"
        manifest = read_json(file)
        spoilt = [] if manifest is None else completed(manifest)
        if manifest is not None and "sessions" not in manifest:
            spoilt.append("sessions")
        if spoilt:
            raise ExperimentError(
                f"{file} is not the record of a run ({', '.join(spoilt)}); restore it, or move it away: the run then "
                "goes on with a record that begins here"
            )
        return manifest

    def _take_lock(self) -> IO:
        lock = open_lock(self.path / "lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise ExperimentError(
                f"run folder={self.path} is in use by another process; wait for it, or give the run another name"
            ) from error
        return lock

    def close(self) -> None:
        """Lets another process have the folder."""
        if self._writes:
            self._lock.close()

    def begin(self, session: dict, prepared: Prepared, order: Order, position: int) -> None:
        """Writes the experiment, the tokenizer, and the manifest with a new session.

        Args:
            session: what this start runs on.
            prepared: what it reads.
            order: the order of its rows.
            position: rows that it has consumed.

        Raises:
            ExperimentError: the data or the mixture is not what the run began with.
        """
        stores = {source.name: store.path.name for source, store in prepared.train}
        data = {"tokenizer": prepared.tokenizer.fingerprint, "stores": stores}
        before = self.manifest.get("data", data)
        changed = [name for name in before["stores"] if data["stores"].get(name) != before["stores"][name]]
        if before["tokenizer"] != data["tokenizer"]:
            changed.insert(0, "the tokenizer")
        if changed:
            raise ExperimentError(
                f"run folder={self.path}: {', '.join(changed[:5])} changed since the run began; "
                "put the data back or start a run of another name"
            )
        self.manifest |= {"versions": versions(), "data": data}
        self._check_order(order, position)
        self.keep_order(order)
        self.manifest["sources"] = [_provenance(*part) for part in (*prepared.train, *prepared.evaluation)]
        if not self.manifest.get("tokenizer") and self._writes:
            self.manifest["tokenizer"] = tokenizer_figures(self._declared, prepared)
        self.manifest["sessions"].append(
            {"number": len(self.manifest["sessions"])}
            | {"from": now(), "to": None, "steps": 0, "flops": 0, "seconds": {}, "saves": dict(NO_SAVES)}
            | {"energy_joules": None, "energy_boundary": None, "energy_estimate_joules": None}
            | session
        )
        if self._writes:
            replace_json(self.path / "experiment.json", to_json(self._declared))
            self._keep_tokenizer(prepared.tokenizer_path)
            self.write_manifest()

    def forget_session(self) -> None:
        """Takes the session that began last out of the manifest, since it had nothing to do."""
        if len(self.manifest["sessions"]) > 1:
            self.manifest["sessions"].pop()
            self.write_manifest()

    def keep_order(self, order: Order) -> None:
        """Notes in which order the run reads its rows, and what they leave out."""
        asked = [dataclasses.asdict(span.mixture) for span in self._declared.spans]
        self.manifest["mixture"] = {"asked": asked, "resolved": order.to_json()}
        self.manifest["withdrawn"] = [withdrawal.summary() for withdrawal in order.withdrawals]
        if self._writes:
            write_history(self.path, order.withdrawals)

    def _check_order(self, order: Order, position: int) -> None:
        """Refuses an order of rows that gives those before the position otherwise than the run has read them."""
        before = self.manifest.get("mixture", {}).get("resolved", [])
        for old, new in zip(before, order.to_json(), strict=False):
            changed = [name for name in ("first_row", "packings", "weights", "begins") if old[name] != new[name]]
            if old["first_row"] < position and changed:
                raise ExperimentError(
                    f"run folder={self.path}: the mixture of stage {old['stage']} has other {', '.join(changed)} than "
                    "the run began with; put training.tokens and the data back, or start a run of another name"
                )

    def _keep_tokenizer(self, path: pathlib.Path) -> None:
        """Copies the tokenizer into the run folder, with the files that belong to it."""
        for file in (path, *map(path.with_name, BESIDE)):
            target = self.path / "tokenizer" / ("tokenizer.json" if file == path else file.name)
            if file.is_file() and not (target.is_file() and target.read_bytes() == file.read_bytes()):
                target.parent.mkdir(exist_ok=True)
                replace_file(target, file.read_bytes())

    def write_manifest(self) -> None:
        """Replaces the manifest with what it is now."""
        sessions = self.manifest["sessions"]
        self.manifest["goodput"] = {"fraction": goodput(sessions), "seconds": totals(sessions)}
        if self._writes:
            try:
                replace_json(self.path / "manifest.json", self.manifest)
            except OSError as error:  # the one before stands, and the next start brings it up to date
                if not is_full(error):
                    raise

    def cut_back(self, step: int, *, begins: bool = False) -> dict[str, float]:
        """Drops metrics of steps after `step`, and a torn last line, so that each step stands once.

        What sessions spent on them is lost work. Returns that of this session: seconds by what they were spent on.

        Args:
            step: the last one to keep.
            begins: whether the session has only just begun.
        """
        if not self._writes:
            return {}
        self._metrics.touch()
        self._unwritten = b""
        lines = list(_lines(self._metrics))
        *earlier, this = self.manifest["sessions"]
        this["number"] = max(this["number"], next_number(value for _, value in lines)) if begins else this["number"]
        by_number = {session.get("number"): session for session in earlier}
        recover(by_number, (value for _, value in lines))
        gone = lost((value for _, value in lines), step)
        mine = gone.pop(this["number"], {})
        for number, spent in gone.items():
            if number in by_number:
                by_number[number]["seconds"] = moved(by_number[number]["seconds"], spent)
        kept = [(line, value) for line, value in lines if value["step"] <= step]
        self._evaluated = {value["step"] for _, value in kept if "eval" in value}
        self.missing_steps = step - len({value["step"] for _, value in kept if "loss" in value})
        replace_file(self._metrics, b"".join(line for line, _ in kept))
        return mine

    def append(self, values: Iterable[dict]) -> None:
        """Adds lines to the metrics, on disk when this returns, or held back where the disk is full."""
        if not self._writes:
            return
        for value in values:
            if "eval" in value:
                self._evaluated.add(value["step"])
            finite = _finite(value)
            self._unwritten += (json.dumps(finite, ensure_ascii=False) + "\n").encode()
            self.on_line(finite)
        try:
            self.flush()
        except OSError as error:
            if not is_full(error):
                raise

    @property
    def holds_back(self) -> bool:
        """Whether there are lines that are not on disk."""
        return bool(self._unwritten)

    def flush(self) -> None:
        """Writes what is held back.

        Raises:
            OSError: it cannot be written; nothing half of it is left.
        """
        if not self._unwritten:
            return
        with open(self._metrics, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                left = memoryview(self._unwritten)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self._unwritten = b""

    def keep_samples(self, samples: dict) -> None:
        """Writes what the model wrote after `samples["step"]` steps."""
        replace_json(self.path / "samples.json", samples)

    def sampled(self, step: int) -> bool:
        """Whether what the model wrote after `step` steps is kept."""
        return (read_samples(self.path) or {}).get("step") == step

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is in the metrics."""
        return step in self._evaluated


def _provenance(source: Source, store: Store) -> dict:
    """What a release must say of a source: as declared, with what the store holds."""
    declared = {field: getattr(source, field) for field in _PROVENANCE} | {"language": fold(source.language)}
    held = {field: store.manifest[field] for field in ("split", "documents", "tokens", "bytes", "lines", "bad_lines")}
    by_document = {f"{column}s": _most(store.counts(column)) for column in ("licence", "provider")}
    return declared | held | {name: counts for name, counts in by_document.items() if counts}


def _most(counts: dict[str, int]) -> dict[str, int]:
    """The largest counts, and the sum of the rest."""
    listed = list(counts.items())
    rest = sum(count for _, count in listed[_MAX_COUNTS:])
    return dict(listed[:_MAX_COUNTS]) | ({"others": rest} if rest else {})


def read_json(file: pathlib.Path) -> dict | None:
    """The object in a file; None where there is no file.

    Raises:
        ExperimentError: the file holds something else.
    """
    try:
        value = parse_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ExperimentError(f"{file} is not a JSON object; restore it, or move it away")
    return value


def differences(earlier: dict, later: dict, path: pathlib.Path) -> list[str]:
    """The faults of resuming a run as another experiment: each field that may not differ and does."""
    with contextlib.suppress(ExperimentError):  # a field that it does not know has the default, as it had then
        earlier = to_json(from_json(earlier))
    before, after = dict(leaves(earlier, "")), dict(leaves(later, ""))
    faults = []
    for field in sorted(before.keys() | after.keys()):
        old, new = before.get(field, "nothing"), after.get(field, "nothing")
        longer = field == "training.tokens" and isinstance(old, int) and isinstance(new, int) and new >= old
        if old == new or longer or _MAY_DIFFER.match(field):
            continue
        faults.append(
            f"{field}={shown(new)} differs from {shown(old)}, with which run folder {path} began; "
            "put it back, or give the run another name with --set name=..."
        )
    return faults if len(faults) <= _MAX_FAULTS else [*faults[:_MAX_FAULTS], f"{len(faults)} fields differ in all"]


def leaves(value: object, path: str) -> Iterable[tuple[str, object]]:
    """The fields of an experiment as JSON, each with its path: `("model.num_layers", 2)`."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def read_manifest(path: pathlib.Path) -> dict:
    """The manifest of a run.

    Raises:
        ExperimentError: the run has none, or it is harmed.
    """
    manifest = read_json(path / "manifest.json")
    if manifest is None:
        raise ExperimentError(f"run folder={path} holds no manifest.json; train first")
    if lacking := [name for name in _MANIFEST if not manifest.get(name)]:
        raise ExperimentError(f"{path / 'manifest.json'} lacks {', '.join(lacking)}; restore it")
    if spoilt := completed(manifest):
        raise ExperimentError(f"{path / 'manifest.json'} is corrupt in {', '.join(spoilt)}; restore it")
    return manifest


def read_samples(path: pathlib.Path) -> dict | None:
    """What the finished model wrote; None where there is nothing, or nothing whole."""
    try:
        samples = parse_json((path / "samples.json").read_bytes())
    except (OSError, ValueError):
        return None
    return samples if fits(samples, SAMPLES) else None


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The lines of a run's metrics, oldest first; those that are not whole are left out."""
    file = path / "metrics.jsonl"
    values = [value for _, value in _lines(file)] if file.is_file() else []
    return [value for value in values if fits(value, EVAL_LINE if "eval" in value else TRAIN_LINE)]


def _lines(file: pathlib.Path) -> Iterable[tuple[bytes, dict]]:
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(value, dict) and isinstance(value.get("step"), int):
            yield line, value


def _finite(value: dict) -> dict:
    """The value with None for what is not finite."""
    return {key: _finite_item(item) for key, item in value.items()}


def _finite_item(value: object) -> object:
    if isinstance(value, dict):
        return _finite(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    """The time as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what takes part in the result."""
    installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "euroflax": importlib.metadata.version("euroflax"), **installed}
