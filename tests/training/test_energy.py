"""Energy from counters that are there, that begin anew, and that are not there."""

import sys
import types

import pytest

from euroflax import verbs
from euroflax.accelerators import ACCELERATORS, accelerator_of, estimated_joules
from euroflax.training import energy
from euroflax.training.energy import Energy, Reading, combine
from euroflax.training.record import read_manifest
from tests.conftest import small


@pytest.fixture
def powercap(tmp_path):
    """RAPL of two packages, one with a part of its own that is in it already."""

    def zone(name, kind, joules):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(f"{kind}\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
        (folder / "energy_uj").write_text(f"{joules * 10**6}\n")

    zone("intel-rapl:0", "package-0", 100)
    zone("intel-rapl:1", "package-1", 990)
    zone("intel-rapl:0:0", "core", 50)
    zone("intel-rapl:2", "psys", 500)
    return tmp_path


def test_processors_are_counted_whole_over_a_counter_that_begins_anew(powercap):
    counters = Energy(powercap=powercap)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("130000000")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("15000000")
    assert counters.read().processors == pytest.approx(30 + 25)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("16000000")
    assert counters.read().processors == pytest.approx(30 + 26)
    counters.close()


def test_counters_that_are_not_there_or_not_for_us_give_nothing(powercap, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Energy(gpus=[0], powercap=tmp_path / "none").read() == Reading(energy.socket.gethostname(), None, None)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("denied")
    assert Energy(powercap=powercap).read().processors is None


def test_a_counter_that_fails_later_gives_no_figure_and_no_fault(powercap):
    counters = Energy(powercap=powercap)
    assert counters.read().processors == 0
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert counters.read().processors is None and counters.read().processors is None
    counters.close()


@pytest.fixture
def nvml(monkeypatch):
    """NVML of four GPUs, of which each has used a hundred joules more than the one before."""
    used = {i: 100_000 * i for i in range(4)}
    module = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: {"GPU-d": 3}[name],
        nvmlDeviceGetTotalEnergyConsumption=lambda device: used[device],
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return used


@pytest.mark.parametrize(("visible", "mine"), [(None, (1, 2)), ("3,0,2", (0, 2)), ("0,GPU-d,1", (3, 1))])
def test_gpus_are_those_of_this_process_as_cuda_numbers_them(nvml, monkeypatch, tmp_path, visible, mine):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    counters = Energy(gpus=[1, 2], powercap=tmp_path)
    for device in nvml:
        nvml[device] += 1000 * 10**device
    assert counters.read().gpus == pytest.approx(sum(10**device for device in mine))


def test_a_job_counts_each_host_once_and_says_what_it_counted():
    two = [Reading("a", 10.0, 3.0), Reading("a", 20.0, 3.1), Reading("b", 5.0, 2.0)]
    joules, boundary = combine(two, on_accelerator=True)
    assert joules == pytest.approx(35 + 3.1 + 2) and boundary.startswith("GPUs (NVML) and whole processors (RAPL), not")
    assert combine([Reading("a", 10.0, None)], on_accelerator=True)[1].endswith("cooling and not processors")
    assert combine([Reading("a", None, 3.0)], on_accelerator=True)[0] is None
    assert combine([Reading("a", 1.0, None), Reading("b", None, None)], on_accelerator=True)[0] is None
    assert combine([Reading("a", None, 3.0)], on_accelerator=False) == (
        3.0,
        "whole processors (RAPL), whoever uses them, not memory, network, storage or cooling",
    )
    assert combine([Reading("a", None, None)], on_accelerator=False)[0] is None


def test_the_estimate_is_the_plans_and_unknown_where_the_power_is():
    assert accelerator_of("NVIDIA H100 80GB HBM3") is ACCELERATORS["h100"]
    assert estimated_joules(ACCELERATORS["h100"], 10.0) == 10 * 700 * 1.5
    assert estimated_joules(ACCELERATORS["v5p"], 10.0) is None and estimated_joules(accelerator_of("cpu"), 1.0) is None


def test_a_session_says_its_joules_with_their_boundary_or_null(folders, powercap, monkeypatch):
    (session,) = read_manifest(verbs.train(small(name="without"), folders).path)["sessions"]
    assert session["energy_joules"] is None and session["energy_boundary"].startswith("not measured")
    monkeypatch.setattr(energy.Energy.__init__, "__defaults__", ((), powercap))

    class Burns(verbs.SilentDisplay):
        def step(self, metrics, total):
            if metrics["step"] == 3:
                (powercap / "intel-rapl:0" / "energy_uj").write_text("142000000")

    (session,) = read_manifest(verbs.train(small(name="with"), folders, Burns()).path)["sessions"]
    assert session["energy_joules"] == pytest.approx(42) and "RAPL" in session["energy_boundary"]
