import subprocess
import sys

from tests.conftest import ROOT, user_environment

SCRIPT = """
import functools, pathlib, sys, time
from euroflax import devices
from euroflax.data.loader import empty_batch
from euroflax.experiment import load
from euroflax.processes import Processes

sizes = {"model.vocab_size": 4096, "model.num_layers": 1, "training.loss_chunk_entries": 1024}
declared = load("experiments/tiny_eu24.py", sizes | {"model.compute_dtype": sys.argv[1]})
devices.set_up(declared, "cpu", pathlib.Path(sys.argv[2]), Processes())
import jax
from euroflax.training.step import init_state, train_step
state = jax.eval_shape(functools.partial(init_state, declared))
batch = empty_batch(declared.batch_rows, declared.data.sequence_length, 0)
began = time.monotonic()
jax.jit(functools.partial(train_step, declared, declared.spans[0])).lower(state, batch).compile()
print(time.monotonic() - began)
"""


def compile_seconds(compute_dtype, folder):
    command = [sys.executable, "-c", SCRIPT, compute_dtype, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=user_environment(), capture_output=True, text=True, timeout=300)
    return float(done.stdout.split()[-1])


def test_bfloat16_with_several_chunks_of_the_loss_compiles_about_as_fast_as_float32(tmp_path):
    # With jaxlib 0.12 and a loop over the chunks the ratio is 7.
    ratio = compile_seconds("bfloat16", tmp_path / "a") / compile_seconds("float32", tmp_path / "b")
    assert ratio < 4
