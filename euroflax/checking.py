"""What can be known to be wrong before a run starts: values, files, the tokenizer, folders, and each stage's step."""

import os

from euroflax import huggingface, planning, sharding, tables
from euroflax.data import documents, withdrawals
from euroflax.data import prepare as preparation
from euroflax.data.files import find_files, not_read
from euroflax.data.loader import Rows
from euroflax.data.store import NotPrepared
from euroflax.experiment import Experiment, ExperimentError
from euroflax.folders import Folders, make_folder


def _check_sources(declared: Experiment, folders: Folders) -> tuple[list[dict], list[str], list[str]]:
    """The sources with their files and sizes, what their folders hold and is not read, and the faults found."""
    sources: list[dict] = []
    passed_over: list[str] = []
    faults: list[str] = []
    for source in declared.data.sources + declared.evaluation.sources:
        try:
            files = find_files(source, folders.data_root)
            unreadable = [file for file in files if not os.access(file, os.R_OK)]
            faults += [
                f"source {source.name}: file {file} cannot be read; check its permissions" for file in unreadable
            ]
            if not unreadable and (fault := documents.first_fault(files[0], source, declared.data.max_document_bytes)):
                faults.append(fault)
        except ExperimentError as error:
            faults.extend(error.faults)
            continue
        if (line := not_read(source, folders.data_root)) is not None:
            passed_over.append(line)
        size = sum(file.stat().st_size for file in files)
        sources.append({"source": source.name, "language": source.language, "files": len(files), "file_bytes": size})
    return sources, passed_over, faults


def check(declared: Experiment, folders: Folders, *, deep: bool = False) -> dict:
    """Looks at the files that an experiment needs, without a device: sizes of its sources, folders to write.

    Raises:
        ExperimentError: with all faults found.
    """
    sources, passed_over, faults = _check_sources(declared, folders)
    if declared.data.tokenizer.path is not None:
        try:
            preparation.checked_tokenizer(declared, folders.data_root / declared.data.tokenizer.path)
        except ExperimentError as error:
            faults.extend(error.faults)
    if declared.continue_from is not None:
        try:
            huggingface.check_agreement(declared, folders.data_root)
        except ExperimentError as error:
            faults.extend(error.faults)
    try:
        withdrawals.read_lists(declared, folders)
    except ExperimentError as error:
        faults.extend(error.faults)
    try:
        prepared = None if faults else preparation.open_prepared(declared, folders)
    except NotPrepared:
        prepared = None
    for path, option in ((folders.cache_dir, "--cache-dir"), (folders.runs_dir, "--runs-dir")):
        try:
            if prepared is None or path != folders.cache_dir:
                make_folder(path, option)
        except ExperimentError as error:
            faults.extend(error.faults)
    if faults:
        raise ExperimentError(*faults)
    if deep and prepared is not None:
        for store in {store.path: store for _, store in (*prepared.train, *prepared.evaluation)}.values():
            store.check_content()
    planning.trace_stages(declared, sharding.least_devices(declared.mesh))
    order = None if prepared is None else Rows(declared, prepared).order
    stages = planning.describe_stages(declared, order)
    left_out = [] if prepared is None else tables.about_withdrawn(prepared)
    bad = [] if prepared is None else tables.about_bad_lines(folders, prepared)
    found = {"name": declared.name, "sources": sources, "stages": stages, "withdrawn": left_out}
    return found | {"not_read": passed_over, "bad_lines": bad, "faults": []}
