"""Preparation: from text files to a tokenizer and token stores in the cache, once for all runs that need the same."""

import collections
import contextlib
import dataclasses
import hashlib
import html
import json
import multiprocessing
import pathlib
from collections.abc import Callable, Iterator, Mapping

from euroflax.data import coverage, documents, fingerprints, tokenizer
from euroflax.data.fingerprints import Progress, digests
from euroflax.data.packings import Packings, make_packings, open_packings
from euroflax.data.store import FORMAT, NotPrepared, Store, StoreWriter, open_store
from euroflax.data.tokenize import ALL, HELD_OUT, TRAIN, Tokenize, TokenizingPool, train_apart
from euroflax.data.tokenizer import Tokenizer
from euroflax.data.withdrawals import Ids, Withdrawal, continued, read_history, read_lists
from euroflax.experiment import Experiment, ExperimentError, Interrupted, Source, fingerprint
from euroflax.folders import Folders, made_once, make_folder, replace_file

_LINES_TO_JUDGE_BY = 10_000


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What an experiment reads, ready on disk."""

    tokenizer: Tokenizer
    tokenizer_path: pathlib.Path
    train: tuple[tuple[Source, Store], ...]
    """Each source of `data.sources` with its store, held-out documents left out."""
    evaluation: tuple[tuple[Source, Store], ...]
    """Each source that is evaluated on: the held-out shares, then `evaluation.sources`."""
    packings: Packings
    """The rows of each source of `train`, for each length of rows and each block list."""
    withdrawn: Ids
    """The block lists as they are now."""
    history: tuple[Withdrawal, ...]
    """What the run left out so far; empty where it has not begun."""
    left_out: dict[str, frozenset[int]]
    """Numbers of the documents of the held-out shares that are withdrawn now, by source."""
    unknown_ids: dict[str, list[str]]
    """Ids of the block lists as they are now that no document has, by source."""

    def held_out(self, source: Source, store: Store) -> Iterator[int]:
        """The numbers of the documents of a source that is evaluated on, but for those that are withdrawn."""
        left_out = self.left_out.get(source.name, frozenset())
        return (number for number in range(store.num_documents) if number not in left_out)

    def withdrawals(self, position: int | None = None) -> tuple[Withdrawal, ...]:
        """What the run leaves out, and from where: if it goes on at a position now, or as it stands on record."""
        if position is None and self.history:
            return self.history
        return continued(self.history, self.withdrawn, position or 0)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(source.name)}</td><td>{source.language}</td><td>{use}</td>"
            f"<td>{store.num_documents:,}</td><td>{store.num_bytes:,}</td><td>{store.num_tokens:,}</td></tr>"
            for use, parts in (("training", self.train), ("evaluation", self.evaluation))
            for source, store in parts
        )
        names = ("source", "language", "for", "documents", "bytes", "tokens")
        return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{cells}</table>"


@dataclasses.dataclass(frozen=True)
class _Part:
    """One store to be: a source, and which of its documents."""

    source: Source
    split: str
    files: list[pathlib.Path]
    digests: list[str]
    """SHA-256 of each file."""
    key: str

    @property
    def file_bytes(self) -> int:
        """Size of the files as they lie on disk."""
        return sum(file.stat().st_size for file in self.files)


def prepare(
    experiment: Experiment,
    folders: Folders,
    progress: Progress = lambda *_: None,
    reading: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Prepared:
    """Makes the tokenizer and the stores that are missing, and opens all.

    Work is spread over processes; a store appears under its name only when it is whole, and nothing is made twice.

    Args:
        experiment: what is to be read.
        folders: where its text is, and the cache.
        progress: told what is being done; what it raises ends the preparation.
        reading: entered while files are only read, which can hang with a file system and leaves nothing half.

    Raises:
        ExperimentError: a source has no files, no documents or too many unreadable lines, or the vocabulary
            cannot be filled.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker runs the script that called
        raise ExperimentError("prepare was called in a worker of itself; call it below if __name__ == '__main__':")
    try:
        return open_prepared(experiment, folders)  # also out of a cache that cannot be written
    except NotPrepared:
        make_folder(folders.cache_dir, "--cache-dir")
    with reading():
        found = digests(experiment, folders, progress)
    _check_held_out(experiment, found)
    path = _tokenizer_path(experiment, folders, found)
    if not path.is_file() and experiment.tokenizer_path is None:
        _train_tokenizer(experiment, path, found, progress)
    known = checked_tokenizer(experiment, path)
    missing = [part for part in _parts(experiment, known, found) if _find(folders, part) is None]
    if missing:
        _make_stores(experiment, folders, path, missing, progress)
    train, _ = _open_stores(experiment, folders, known, found)
    make_packings(experiment, folders.cache_dir, train, _lists(experiment, folders), progress)
    return open_prepared(experiment, folders)


def _lists(experiment: Experiment, folders: Folders) -> list[Ids]:
    """The block lists that the rows of the run depend on: as they are now, and as they were."""
    history = read_history(folders.run_dir(experiment.name))
    return [read_lists(experiment, folders), *(entry.ids for entry in history)]


def open_prepared(experiment: Experiment, folders: Folders) -> Prepared:
    """Opens what `prepare` made.

    Raises:
        NotPrepared: something is missing.
    """
    found = digests(experiment, folders, None)
    _check_held_out(experiment, found)
    path = _tokenizer_path(experiment, folders, found)
    if not path.is_file():
        raise NotPrepared("data.tokenizer")
    known = checked_tokenizer(experiment, path)
    train, evaluation = _open_stores(experiment, folders, known, found)
    packings = open_packings(experiment, folders.cache_dir, train, _lists(experiment, folders))
    history, lists = read_history(folders.run_dir(experiment.name)), read_lists(experiment, folders)
    left_out, unknown = _held_out_and_unknown(packings, evaluation, lists)
    return Prepared(known, path, train, evaluation, packings, lists, history, left_out, unknown)


def _held_out_and_unknown(
    packings: Packings, evaluation: tuple[tuple[Source, Store], ...], lists: Ids
) -> tuple[dict[str, frozenset[int]], dict[str, list[str]]]:
    """The withdrawn documents of held-out shares, and the ids that no document of the source has."""
    unknown = {
        name: packing.manifest["unknown"]
        for (name, how), packing in packings.items()
        if how.withdrawn == lists.get(name)
    }
    left_out = {}
    for source, store in evaluation:
        if source.holdout_fraction and lists.get(source.name):
            numbers, unknown[source.name] = store.find(unknown[source.name])
            left_out[source.name] = frozenset(numbers.tolist())
    return left_out, unknown | {name: [] for name, ids in lists.items() if not ids}


def _open_stores(
    experiment: Experiment, folders: Folders, known: Tokenizer, digests: dict[str, list]
) -> tuple[tuple[tuple[Source, Store], ...], tuple[tuple[Source, Store], ...]]:
    """The stores to train and to evaluate on."""
    train, evaluation = [], []
    for part in _parts(experiment, known, digests):
        store = _find(folders, part)
        if store is None:
            raise NotPrepared(f"source {part.source.name}")
        _check_bad_lines(experiment, folders, part, store.manifest["bad_lines"], store.manifest["lines"])
        (train if part.split == TRAIN else evaluation).append((part.source, store))
    return tuple(train), tuple(evaluation)


def _parts(experiment: Experiment, known: Tokenizer, digests: dict[str, list]) -> Iterator[_Part]:
    for split, sources in (
        (TRAIN, experiment.data.sources),
        (HELD_OUT, [source for source in experiment.data.sources if source.holdout_fraction]),
        (ALL, experiment.evaluation.sources),
    ):
        for source in sources:
            files = digests[source.path]
            fields = (source.text_field, source.id_field, source.provider_field, source.licence_field)
            share = source.holdout_fraction if split != ALL else 0.0
            key = fingerprint(
                [FORMAT, known.fingerprint, known.vocab_size, split, share, fields, [d for _, d in files]]
            )
            yield _Part(source, split, [pathlib.Path(name) for name, _ in files], [d for _, d in files], key)


def _store_path(folders: Folders, part: _Part) -> pathlib.Path:
    return folders.cache_dir / "stores" / part.key


def _find(folders: Folders, part: _Part) -> Store | None:
    return open_store(_store_path(folders, part))


def _check_held_out(experiment: Experiment, digests: dict[str, list]) -> None:
    """Refuses to evaluate on a file that is trained on too, or to hold out of it in two ways."""
    trained: dict[str, str] = {}
    shares: dict[str, tuple] = {}
    for source in experiment.data.sources:
        for name, digest in digests[source.path]:
            share = (source.holdout_fraction, source.id_field if source.holdout_fraction else None)
            if shares.setdefault(digest, share) != share:
                raise ExperimentError(
                    f"sources {trained[digest]} and {source.name} both read {pathlib.Path(name).name} and hold out "
                    "different shares of it; give both the same holdout_fraction and id_field"
                )
            trained[digest] = source.name
    for source in experiment.evaluation.sources:
        for name, digest in digests[source.path]:
            if digest in trained:
                raise ExperimentError(
                    f"evaluation source {source.name}: file {pathlib.Path(name).name} is also trained on, in source "
                    f"{trained[digest]}; take it out of one, or use holdout_fraction"
                )


def _tokenizer_path(experiment: Experiment, folders: Folders, digests: dict[str, list]) -> pathlib.Path:
    declared = experiment.data.tokenizer
    if experiment.tokenizer_path is not None:
        return folders.data_root / experiment.tokenizer_path
    asked = [
        (
            source.language,
            source.text_field,
            source.id_field,
            source.holdout_fraction,
            [d for _, d in digests[source.path]],
        )
        for source in experiment.data.sources
    ]
    key = fingerprint([2, experiment.model.vocab_size, declared.sample_bytes, asked])
    return folders.cache_dir / "tokenizers" / key / "tokenizer.json"


def _train_tokenizer(experiment: Experiment, path: pathlib.Path, digests: dict[str, list], progress: Progress) -> None:
    files = {source.name: [pathlib.Path(f) for f, _ in digests[source.path]] for source in experiment.data.sources}
    total = experiment.data.tokenizer.sample_bytes
    total = min(total, sum(file.stat().st_size * 8 for names in files.values() for file in names))
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress("tokenizer", done, max(total, done))

    text = train_apart(experiment, files, advance)
    progress("tokenizer", done, done)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path.with_suffix(".sha256"), hashlib.sha256(text.encode()).hexdigest() + "\n")
    replace_file(path, text)


def checked_tokenizer(experiment: Experiment, path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a file, which fits the model and gives back text in the languages of the experiment.

    Raises:
        ExperimentError: it does not.
    """
    seal = path.with_suffix(".sha256")
    sealed = seal.read_text().strip() if experiment.tokenizer_path is None and seal.is_file() else None
    if sealed is not None and sealed != hashlib.sha256(path.read_bytes()).hexdigest():
        raise ExperimentError(f"tokenizer {path} is not as it was made; delete its folder and prepare again")
    known = tokenizer.read(path)
    if known.vocab_size > experiment.model.vocab_size:
        raise ExperimentError(
            f"model.vocab_size={experiment.model.vocab_size} is less than the {known.vocab_size} entries of "
            f"the tokenizer {path}; use {known.vocab_size} or more"
        )
    coverage.check_languages(experiment, known, path)
    return known


def _make_stores(
    experiment: Experiment, folders: Folders, tokenizer_path: pathlib.Path, parts: list[_Part], progress: Progress
) -> None:
    total = sum(part.file_bytes for part in parts)
    done = 0
    with contextlib.closing(TokenizingPool(tokenizer_path)) as pool:
        for part in parts:

            def advance(size: int, what: str | None = None, part: _Part = part, before: int = done) -> None:
                progress(what or f"tokens {part.source.name}", before + size, total)

            _make_store(experiment, folders, part, pool, advance)
            done += part.file_bytes
            advance(part.file_bytes)


def _make_store(
    experiment: Experiment, folders: Folders, part: _Part, pool: TokenizingPool, advance: Callable[..., None]
) -> None:
    final = _store_path(folders, part)

    def waits(what: str) -> None:
        advance(0, what)

    with made_once(final, lambda: open_store(final) is not None, waits) as partial:
        if partial is None:
            return
        with contextlib.closing(StoreWriter(partial, experiment.model.vocab_size)) as writer:
            bad, lines = _write_documents(experiment, folders, part, pool.tokenize, writer, advance)
            if not writer.documents and part.split != HELD_OUT:
                raise ExperimentError(documents.no_document(part.source, bad))
            coverage.check_source(experiment, part.source, writer.lost_bytes, writer.bytes)
            files = [file.name for file in part.files]
            writer.finish({"split": part.split, "files": files, "bad_lines": bad, "lines": lines})


def bad_lines_file(folders: Folders, key: str) -> pathlib.Path | None:
    """The file with the lines of a store's text that hold no document; None where there is none."""
    folder = folders.cache_dir / "quarantine"
    found = [folder / f"{key}.jsonl", *sorted(folder.glob(f"*-{key}.jsonl"))]  # the latter by earlier versions
    return next((path for path in found if path.is_file()), None)


def _write_documents(
    experiment: Experiment,
    folders: Folders,
    part: _Part,
    tokenize: Tokenize,
    writer: StoreWriter,
    advance: Callable[[int], None],
) -> tuple[dict[str, int], int]:
    """Tokenizes and appends in order; returns unreadable lines by reason, and all lines."""
    reasons: collections.Counter[str] = collections.Counter()
    lines = before = 0
    most_bytes = experiment.data.max_document_bytes
    path = folders.cache_dir / "quarantine" / f"{part.key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as quarantine:
        for file, digest in zip(part.files, part.digests, strict=True):
            hashed = hashlib.sha256()
            raw = documents.read_raw(file, part.source, most_bytes, hashed.update)
            for found in tokenize(raw, part.source, part.split, most_bytes):
                writer.append(found.tokens, found.rows, found.lengths)
                lines += found.lines
                for line in found.bad:
                    reasons[line.reason] += 1
                    quarantine.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")
                advance(before + found.bytes_read)
                if lines >= _LINES_TO_JUDGE_BY and 2 * sum(reasons.values()) > lines:
                    _check_bad_lines(experiment, folders, part, reasons, lines)
            if hashed.hexdigest() != digest:
                fingerprints.forget(folders, part.source)
                raise Interrupted(
                    f"source {part.source.name}: file {file} changed while it was read; wait until it is whole, and "
                    "run the same command again"
                )
            before += file.stat().st_size
    _check_bad_lines(experiment, folders, part, reasons, lines)
    if not reasons:
        path.unlink()
    return dict(sorted(reasons.items())), lines


def _check_bad_lines(experiment: Experiment, folders: Folders, part: _Part, bad: Mapping[str, int], lines: int) -> None:
    count, bound = sum(bad.values()), experiment.data.bad_line_fraction
    if count > bound * lines:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(bad.items()))
        file = bad_lines_file(folders, part.key)
        raise ExperimentError(
            f"source {part.source.name}: {count} of {lines} lines hold no document ({reasons}), over "
            f"data.bad_line_fraction={bound}; {f'see {file}, then ' if file else ''}correct them or raise the bound"
        )
