# SPDX-License-Identifier: BSD-3-Clause
"""benchmarks/gpu_check.py without a GPU: the CPU is the device, sizes are tiny."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"
if not PATH.exists():
    pytest.skip("benchmarks/ is part of the source only", allow_module_level=True)


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["gpu_check"]


@pytest.fixture
def setting(gpu_check, monkeypatch):
    # One workload of each operator in one dtype.
    every = list(gpu_check.combinations(gpu_check.Setting(torch.device("cpu"), True)))
    few = [c for c in every if c[1:] in ((torch.float32, "contiguous"), (torch.half, "contiguous"))]
    monkeypatch.setattr(gpu_check, "combinations", lambda setting: few)
    return gpu_check.Setting(torch.device("cpu"), True)


def test_every_operator_is_checked(gpu_check):
    found = {work.operator for work in gpu_check.one_of_each()}
    assert found == set(gpu_check.OPERATORS)


@pytest.mark.parametrize("name", ["streams", "graphs", "no_sync", "repeats", "memory"])
def test_parts_pass(gpu_check, setting, name):
    report = gpu_check.run_part(name, setting)
    assert report["ok"], report


@pytest.mark.parametrize(("name", "word"), [("graphs", "replay"), ("repeats", "differ")])
def test_parts_see_results_that_change(gpu_check, setting, monkeypatch, name, word):
    count = iter(range(10**6))
    right = gpu_check.Inputs.call
    monkeypatch.setattr(
        gpu_check.Inputs, "call", lambda self: [right(self)[0] + next(count), *right(self)[1:]]
    )
    report = gpu_check.run_part(name, setting)
    assert not report["ok"]
    assert word in report["faults"][0]


def test_hostile_part_compares_with_the_cpu(gpu_check, setting, monkeypatch):
    import cases
    import operators

    monkeypatch.setattr(operators, "OPERATORS", operators.OPERATORS[::4])
    monkeypatch.setattr(cases, "CASES", cases.CASES[:5])
    report = gpu_check.run_part("hostile", setting)
    assert report["ok"], report
    assert report["cases"] > 10


def test_timing_is_the_bench_and_is_kept_in_its_own_file(gpu_check, tmp_path):
    from glimpse_ext.bench import report as bench_report

    setting = gpu_check.Setting(torch.device("cpu"), True)
    report = gpu_check.run_part("timing16", setting)
    assert report["ok"], report
    gpu_check.keep_results(report, tmp_path / "t.json")
    assert "results" not in report
    assert {row["dtype"] for row in bench_report.load(tmp_path / "t.json")["rows"]} == {
        "float16",
        "bfloat16",
    }
    report["seconds"] = 1
    text = gpu_check.markdown(
        {"environment": gpu_check.environment(setting), "parts": {"timing16": report}}
    )
    assert "| W1 | forward |" in text
    assert "| timing16 | passed |" in text


def test_time_of_all_parts_fits(gpu_check):
    assert set(gpu_check.LIMITS) == set(gpu_check.PARTS)
    assert max(gpu_check.LIMITS.values()) < 600
    assert sum(gpu_check.LIMITS.values()) <= 1800


def test_the_last_report_is_found_behind_other_output(gpu_check):
    assert gpu_check.last_report('noise\n{"ok": true, "cases": 3}\nmore') == {
        "ok": True,
        "cases": 3,
    }
    assert gpu_check.last_report("nothing") is None


def test_inputs_with_every_other_box_are_half(gpu_check):
    setting = gpu_check.Setting(torch.device("cpu"), True)
    for work in gpu_check.small_works(setting):
        inputs = gpu_check.Inputs.make(setting, work, torch.float32, "contiguous")
        dimension = gpu_check.OPERATORS[work.operator].rows
        half = inputs.every_other()
        assert 2 * half.rows.shape[dimension] == pytest.approx(inputs.rows.shape[dimension], abs=1)
        assert replace(half).call()[0].isfinite().all()
