"""The packings that an experiment needs, made where they are missing: by source, row length and block list."""

import pathlib
from collections.abc import Callable, Iterable, Iterator

from euroflax.data.packing import Packing, Recipe, make_packing, open_packing
from euroflax.data.store import NotPrepared, Store
from euroflax.data.withdrawals import Ids
from euroflax.experiment import Experiment, ExperimentError, Source
from euroflax.folders import made_once

Train = tuple[tuple[Source, Store], ...]
Packings = dict[tuple[str, Recipe], Packing]
"""By the name of the source, and how its rows are made."""


def recipe(declared: Experiment, source: Source, sequence_length: int, ids: Ids) -> Recipe:
    """How the rows of a source are made."""
    data = declared.data
    return Recipe(sequence_length, data.packing, data.long_documents, ids.get(source.name, ()))


def _needed(declared: Experiment, train: Train, lists: Iterable[Ids]) -> Iterator[tuple[Source, Store, Recipe]]:
    lengths = dict.fromkeys(span.sequence_length for span in declared.spans)
    wanted = ((s, store, recipe(declared, s, n, ids)) for ids in lists for n in lengths for s, store in train)
    yield from {(source.name, how): (source, store, how) for source, store, how in wanted}.values()


def _path(cache_dir: pathlib.Path, store: Store, how: Recipe) -> pathlib.Path:
    return cache_dir / "packings" / how.key(store)


def open_packings(declared: Experiment, cache_dir: pathlib.Path, train: Train, lists: Iterable[Ids]) -> Packings:
    """Opens what `make_packings` made.

    Raises:
        NotPrepared: one is missing.
        ExperimentError: one is harmed, or a source has no document that is not withdrawn.
    """
    found: Packings = {}
    for source, store, how in _needed(declared, train, lists):
        packing = open_packing(_path(cache_dir, store, how), store)
        if packing is None:
            raise NotPrepared(f"source {source.name} in rows of {how.sequence_length} tokens")
        if packing.num_rows == 0:
            raise ExperimentError(f"source {source.name}: all its documents are withdrawn; take the source out")
        found[source.name, how] = packing
    return found


def make_packings(
    declared: Experiment,
    cache_dir: pathlib.Path,
    train: Train,
    lists: Iterable[Ids],
    progress: Callable[[str, int, int], None],
) -> None:
    """Plans the rows of each source as often as the experiment needs, once for all runs that need the same."""
    for source, store, how in _needed(declared, train, lists):
        final = _path(cache_dir, store, how)
        if open_packing(final, store) is not None:
            continue
        total, task = store.num_tokens, f"rows of {source.name}"

        def advance(done: int, task: str = task, total: int = total) -> None:
            progress(task, done, total)

        def is_there(final: pathlib.Path = final, store: Store = store) -> bool:
            return open_packing(final, store) is not None

        with made_once(final, is_there, lambda what: progress(what, 0, 1)) as partial:
            if partial is not None:
                make_packing(partial, store, how, advance)
