"""Every test runs on eight simulated devices; experiments are the shipped ones, shrunk."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import hypothesis
import pytest

from euroflax import devices
from euroflax.experiment import Experiment, Mixture, load, override, to_json
from euroflax.folders import Folders
from euroflax.processes import Processes

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "experiments" / "tiny_eu24.py"

SMALL = {
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.mlp_dim": 64,
    "model.vocab_size": 512,
    "model.compute_dtype": "float32",
    "data.sequence_length": 64,
    "data.tokenizer.sample_bytes": 1_000_000,
    "training.batch_tokens": 8 * 64,
    "training.tokens": 6 * 8 * 64,
    "training.schedule.warmup_tokens": 512,
    "training.schedule.decay_tokens": 512,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_every_steps": None,
    "evaluation.every_steps": 3,
    "evaluation.sample_tokens": 0,
}


_SHARED = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
_ALWAYS = {"deadline": 10_000, "suppress_health_check": _SHARED, "database": None}
hypothesis.settings.register_profile("short", max_examples=60, derandomize=True, **_ALWAYS)
hypothesis.settings.register_profile("long", max_examples=3000, **_ALWAYS)
hypothesis.settings.load_profile("short")


def small(path: pathlib.Path = TINY, languages: tuple[str, ...] = ("el", "en", "mt"), **changes: object) -> Experiment:
    """A shipped experiment with the sizes of SMALL and the embedded text in some languages; `a__b` sets `a.b`."""
    declared = load(path)
    tiny = load(TINY)
    sources = tuple(s for s in tiny.data.sources if s.language in languages)
    held_out = tuple(s for s in tiny.evaluation.sources if s.language in languages)
    weights = {source.name: 1 / len(sources) for source in sources}
    declared = dataclasses.replace(
        declared,
        data=dataclasses.replace(declared.data, sources=sources, mixture=Mixture(weights=weights)),
        evaluation=dataclasses.replace(declared.evaluation, sources=held_out),
    )
    return override(declared, SMALL | {name.replace("__", "."): value for name, value in changes.items()})


def write_experiment(path: pathlib.Path, declared: Experiment) -> pathlib.Path:
    """An experiment file that declares `declared`."""
    text = json.dumps(to_json(dataclasses.replace(declared, name="")), ensure_ascii=False)
    path.write_text(
        f"import json\nfrom euroflax.experiment import from_json\nexperiment = from_json(json.loads({text!r}))\n",
        encoding="utf-8",
    )
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the fault suite in full: more kills, longer waits")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the fault suite runs in full."""
    return request.config.getoption("--full")


class Fault:
    """What a test of the fault suite tells for the table at the end."""

    def __init__(self, tell) -> None:
        self._tell = tell

    def expected(self, fault: str, expected: str) -> None:
        """What befalls a run, and what it should do."""
        self._tell("fault", fault)
        self._tell("expected", expected)

    def happened(self, text: str) -> None:
        """What it did."""
        self._tell("happened", " ".join(text.split()))


@pytest.fixture
def fault(record_property) -> Fault:
    """Tells of a fault for the table at the end."""
    return Fault(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of the faults: what was caused, what was expected, what happened."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"]
    told = [(report, dict(report.user_properties)) for report in reports]
    rows = sorted((told["fault"], told["expected"], told.get("happened"), report) for report, told in told if told)
    if not rows:
        return
    terminalreporter.section("faults")
    for fault, expected, happened, report in rows:
        said = happened if report.passed and happened else f"FAILED: {happened or report.nodeid}"
        for name, text in (("fault", fault), ("expected", expected), ("happened", said)):
            lines = textwrap.wrap(text, 100, break_long_words=False) or [""]
            for i, line in enumerate(lines):
                terminalreporter.write_line(f"{name if i == 0 else '':10}{line}")
        terminalreporter.write_line("")


def deterministic(folder: pathlib.Path) -> list[dict]:
    """The metrics of a run without times."""
    keep = ("step", "loss", "loss_by_language", "grad_norm", "learning_rate", "tokens", "sequences", "eval")
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key in keep} for line in lines]


def user_environment() -> dict[str, str]:
    """The environment without the level of logging that JAX has set in this process, as a user has it."""
    return {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


def start(
    experiment: pathlib.Path, *arguments: object, root: pathlib.Path = ROOT, environment: dict | None = None
) -> subprocess.Popen:
    """The command line of the package below `root` on an experiment in a process of its own, its output piped as text.

    Args:
        experiment: its file.
        arguments: the rest of the command.
        root: where the package is.
        environment: variables beside those of a user.
    """
    command = [sys.executable, "-m", "euroflax.run", str(experiment), *map(str, arguments)]
    given, pipe = user_environment() | (environment or {}), subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=given, stdout=pipe, stderr=pipe, text=True)


def run(experiment: pathlib.Path, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """The command line on an experiment, to its end."""
    process = start(experiment, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_trees_close(expected: object, found: object, tolerance: float) -> None:
    """Each leaf differs from its like by at most `tolerance` of its norm."""
    import jax
    import numpy as np

    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a), jax.tree_util.keystr(path)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices(tmp_path_factory: pytest.TempPathFactory) -> None:
    import jax

    devices.set_up(small(), "cpu:8", tmp_path_factory.mktemp("compiled"), Processes())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache folder that all tests share, as runs do."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folders(cache: pathlib.Path, tmp_path: pathlib.Path) -> Folders:
    """The shared cache, and a runs folder and data root of the test's own."""
    return Folders(cache_dir=cache, runs_dir=tmp_path / "runs", data_root=tmp_path)


@pytest.fixture(scope="session")
def trained(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory):
    """A small run that is complete, with samples, and the folders that it used: `(declared, folders, run)`."""
    from euroflax import verbs

    root = tmp_path_factory.mktemp("trained")
    folders = Folders(cache_dir=cache, runs_dir=root / "runs", data_root=root)
    declared = small(training__schedule__peak_learning_rate=2e-2, evaluation__sample_tokens=12, model__qk_norm=True)
    return declared, folders, verbs.train(declared, folders)
