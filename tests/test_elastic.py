"""The global order of rows is the same on 1, 2 and 4 real processes, on any mesh, across resumes that change them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from euroflax.data.loader import BATCH_KEYS, Rows
from euroflax.data.prepare import prepare
from euroflax.experiment import Mixture, Stage
from euroflax.folders import Folders
from tests.conftest import ROOT, run, small, user_environment, write_experiment
from tests.test_processes import assert_agree, ended, free_port, job, metrics

STAGES = (
    Stage(from_tokens=30 * 64, sequence_length=128, batch_tokens=8 * 128, mixture=Mixture(languages="uniform")),
    Stage(from_tokens=60 * 128, sequence_length=32, batch_tokens=16 * 32),
)

EMIT = """
import json, os, pathlib, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from euroflax import devices, sharding
from euroflax.data.loader import Rows, batches
from euroflax.data.prepare import open_prepared
from euroflax.experiment import load
from euroflax.folders import Folders
from euroflax.processes import Processes
import functools

if __name__ == "__main__":
    path, cache, out, port, number, count, position, stop, changes = sys.argv[1:]
    declared = load(path, json.loads(changes))
    folders = Folders(cache_dir=pathlib.Path(cache), runs_dir=pathlib.Path(out).parent)
    coordinator = f"127.0.0.1:{port}" if int(count) > 1 else None
    processes = Processes(coordinator=coordinator, process_id=int(number), process_count=int(count))
    devices.set_up(declared, f"cpu:{8 // int(count)}", folders.cache_dir, processes)
    assert jax.process_count() == int(count) and jax.device_count() == 8
    mesh = sharding.make_mesh(declared)
    mine = functools.partial(sharding.local_rows, mesh)
    at, kept = int(position), []
    for batch in batches(declared, Rows(declared, open_prepared(declared, folders)), at, mine):
        span = declared.span_at(at)
        placed = sharding.place_batch(batch, mesh, mine(span.batch_rows), span.batch_rows)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        whole = jax.jit(lambda batch: batch, out_shardings=everywhere)(placed)
        after = min(at + span.batch_rows, span.stop_row)
        kept += [{key: np.asarray(value)[i] for key, value in whole.items()} for i in range(after - at)]
        at = after
        if at >= int(stop):
            break
    if int(number) == 0:
        np.savez(out, *[row[key] for row in kept for key in sorted(row)])
    if int(count) > 1:  # JAX aborts a process whose coordinator, process 0, ends before it
        multihost_utils.sync_global_devices("end")
        time.sleep(2 if int(number) == 0 else 0)
    os._exit(0)
"""


@pytest.fixture(scope="module", params=["concat", "best-fit"])
def staged(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    declared = small(training__tokens=9000, data__packing=request.param, stages=STAGES, mesh__data=8)
    path = write_experiment(folder / "x.py", declared)
    prepared = prepare(declared, Folders(cache_dir=folder / "cache", runs_dir=folder / "runs"))
    rows = Rows(declared, prepared)
    expected = [rows.batch(declared.span_at(i), [i]) for i in range(declared.total_rows)]
    return path, folder, declared, expected


def emit(staged, tmp_path, count, position, stop, changes):
    """The rows from a position on, as so many processes have them on their devices."""
    path, folder, *_ = staged
    script, out, port = tmp_path / "emit.py", tmp_path / f"rows-{count}-{position}.npz", free_port()
    script.write_text(EMIT)
    environment = user_environment() | {"PYTHONPATH": str(ROOT)}
    arguments = [str(value) for value in (count, position, stop, json.dumps(changes))]
    started = [
        subprocess.Popen(
            [sys.executable, script, path, folder / "cache", out, str(port), str(number), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    codes, outputs = ended(started)
    assert codes == [0] * count, outputs
    with np.load(out) as found:
        values = [found[name] for name in found.files]
    keys = sorted(BATCH_KEYS)
    return [dict(zip(keys, values[i : i + len(keys)], strict=True)) for i in range(0, len(values), len(keys))]


def test_the_rows_on_devices_are_the_same_for_any_processes_mesh_and_batch(staged, tmp_path):
    *_, declared, expected = staged
    total = declared.total_rows
    stages = [dict(vars(stage), mixture=None if stage.mixture is None else vars(stage.mixture)) for stage in STAGES]
    stages[0]["batch_tokens"], stages[1]["batch_tokens"] = 4 * 128, 8 * 32
    other = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "training.batch_tokens": 4 * 64, "stages": stages}
    found = [
        *emit(staged, tmp_path, 1, 0, 24, {}),
        *emit(staged, tmp_path, 2, 24, 60, {"mesh.data": 4, "mesh.fsdp": 2}),
        *emit(staged, tmp_path, 4, 62, total, other),
    ]
    assert [span.first_row for span in declared.spans][1:] == [30, 75] and len(found) == total
    for row, wanted in zip(found, expected, strict=True):
        assert all(np.array_equal(row[key], wanted[key][0]) for key in BATCH_KEYS)


@pytest.mark.slow
def test_a_run_with_stages_gives_the_same_losses_when_processes_mesh_and_batch_change(staged, tmp_path):
    path, folder, declared, _ = staged
    common = ("--cache-dir", folder / "cache")
    alone = run(path, "--runs-dir", tmp_path / "one" / "runs", *common, "--devices", "cpu:8")
    assert alone.returncode == 0, alone.stderr
    codes, outputs = ended(job(path, tmp_path, folder / "cache", 2, 4, "--set=mesh.data=4", "--set=mesh.fsdp=2"))
    assert codes == [0, 0], outputs
    assert_agree(metrics(tmp_path), metrics(tmp_path / "one"))
    last = metrics(tmp_path)[-2]
    assert last["sequences"] == declared.total_rows and last["tokens"] == declared.total_tokens
