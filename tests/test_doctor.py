# SPDX-License-Identifier: BSD-3-Clause
"""The doctor tells health from illness, and the console script finds its commands."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

import glimpse_ext
from glimpse_ext import cli, doctor


def test_this_installation_is_healthy(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "all is well" in printed
    assert torch.__version__ in printed
    assert "libglimpse_cpu" in printed


def test_json_says_the_same(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert report["problems"] == []
    assert report["versions"]["glimpse_ext"] == glimpse_ext.__version__
    assert int(report["machine"]["threads"]) == torch.get_num_threads()
    assert report["libraries"]["cpu"].endswith(".so")
    checked = report["self check (against glimpse_ext.reference)"]
    assert checked["cpu"].startswith("ok")


def examine_and_expect(capsys, problem):
    """Exit status 1, the problem, and something to do about it, in both formats."""
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert problem in printed
    assert "what to do: " in printed
    assert "all is well" not in printed
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is False
    assert any(problem in found["what"] and found["remedy"] for found in report["problems"])


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_wrong_numbers_are_noticed(monkeypatch, capsys, error):
    right = glimpse_ext.roi_align
    monkeypatch.setattr(glimpse_ext, "roi_align", lambda *a, **k: right(*a, **k) + error)
    examine_and_expect(capsys, "wrong numbers on cpu")


def test_wrong_gradients_are_noticed(monkeypatch, capsys):
    right = glimpse_ext.roi_align

    def wrong(image, *arguments, **options):
        # The same value with a gradient that is 0.1 % too large.
        image = image * 1.001 - image.detach() * 0.001
        return right(image, *arguments, **options)

    monkeypatch.setattr(glimpse_ext, "roi_align", wrong)
    examine_and_expect(capsys, "wrong numbers on cpu")


def test_an_operator_that_raises_is_noticed(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(glimpse_ext, "roi_align", broken)
    examine_and_expect(capsys, "does not run on cpu: undefined symbol")


def test_a_missing_library_is_noticed(monkeypatch, capsys):
    info = {"cpu_library": None, "cpu_error": "file not found"}
    monkeypatch.setattr(doctor, "library_info", lambda: info)
    examine_and_expect(capsys, "the CPU library did not load: file not found")


def test_a_broken_loader_is_noticed(monkeypatch, capsys):
    def broken(_):
        raise ImportError("no such module")

    monkeypatch.setattr(importlib, "import_module", broken)
    examine_and_expect(capsys, "ImportError: no such module")


def test_old_torch_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    examine_and_expect(capsys, "torch 2.9.1+cpu is too old")


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "pretended")


def test_a_gpu_without_the_cuda_library_is_noticed(monkeypatch, capsys):
    pretend_gpu(monkeypatch, (9, 0))
    info = {"cpu_library": "a.so", "cuda_library": None, "cuda_error": "built without CUDA"}
    monkeypatch.setattr(doctor, "library_info", lambda: info)
    examine_and_expect(capsys, "CUDA library did not load: built without CUDA")


def test_a_gpu_that_the_library_was_not_built_for_is_noticed(monkeypatch):
    pretend_gpu(monkeypatch, (8, 6))
    info = {"cuda_library": "b.so", "cuda_build_info": "CUDA architectures: 7.5 9.0+PTX"}
    report = doctor.Report()
    doctor.check_devices(report, info)
    assert [problem.what for problem in report.problems] == [
        "the CUDA library has no code for cuda:0 (architecture 8.6)"
    ]
    assert "TORCH_CUDA_ARCH_LIST=8.6" in report.problems[0].remedy


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((8, 6), "8.0", True),
        ((8, 6), "8.9", False),
        ((9, 0), "8.0", False),
        ((9, 0), "8.0+PTX", True),
        ((12, 0), "7.5;9.0+PTX", True),
        ((7, 5), "8.0+PTX", False),
        ((10, 0), "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", True),
        ((9, 0), "9.0a", True),
        ((8, 0), "none", False),
    ],
)
def test_which_gpu_runs_which_code(capability, built, expected):
    assert doctor.runs_on(capability, doctor.architectures(built)) is expected


# The console script


def test_commands_run_from_any_folder(tmp_path):
    command = [sys.executable, "-m", "glimpse_ext.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healthy"] is True


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_reach_the_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: glimpse-ext {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(command.help in printed for command in cli.COMMANDS.values())


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["cure"])
    assert exit_.value.code == 2
    assert "cure" in capsys.readouterr().err


@pytest.mark.parametrize("package", sorted(cli.COMMANDS["demo"].packages))
def test_a_missing_extra_is_one_sentence(monkeypatch, capsys, package):
    for name in list(sys.modules):
        if name == package or name.startswith((f"{package}.", "glimpse_ext.demo")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(glimpse_ext, "demo", raising=False)
    # None in sys.modules is how Python marks a package that cannot be imported.
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["demo", "--quick"]) == 2
    printed = capsys.readouterr().err
    assert printed == f'glimpse-ext demo needs {package}: pip install "glimpse-ext[demo]"\n'


def test_an_error_of_our_own_is_not_hidden(monkeypatch):
    def broken(_):
        raise ModuleNotFoundError("No module named 'glimpse_ext.gone'", name="glimpse_ext.gone")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        cli.main(["demo"])
