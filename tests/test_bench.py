# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark suite at tiny sizes: rows are complete and right, faults are seen, so is a loss."""

import copy
import dataclasses
import importlib.util
import json
import math
import sys
import time
import types
from contextlib import contextmanager

import pytest
import torch

import glimpse_ext
from glimpse_ext import _grid_sample, bench, cli
from glimpse_ext.bench import (
    again,
    devices,
    memory,
    overhead,
    peers,
    report,
    suite,
    targets,
    timing,
    workloads,
)
from glimpse_ext.bench.compare import compare
from glimpse_ext.bench.plot import COLOURS
from glimpse_ext.bench.suite import DIRECTIONS, Part, Plan

CPU = torch.device("cpu")
PART_FIELDS = ("devices", "dtypes", "layouts", "threads", "directions")
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
EXPECTED_PEERS = {"grid_sample", "torchvision"} if HAS_TORCHVISION else {"grid_sample"}


def tiny_plan(*names, **changes):
    chosen = tuple(workload.tiny() for workload in workloads.select(list(names)))
    part = Part(chosen, **{k: v for k, v in changes.items() if k in PART_FIELDS})
    rest = {k: v for k, v in changes.items() if k not in PART_FIELDS}
    fast = {"rounds": 3, "round_seconds": 1e-4, "seconds": 0.0, "peers": peers.PEER_NAMES}
    return Plan((part,), **{**fast, **rest})


@pytest.fixture(scope="module")
def results():
    return bench.run(tiny_plan("W1", "W2a", "W4a"), quick=True)


@pytest.fixture
def results_file(results, tmp_path):
    path = tmp_path / "results.json"
    report.save(results, path)
    return path


# Rows


def test_there_is_a_complete_row_for_every_combination(results):
    found = {(r["workload"], r["direction"], r["layout"], r["threads"]) for r in results["rows"]}
    assert found == {
        (name, direction, layout, 1)
        for name in ("W1", "W2a", "W4a")
        for direction in DIRECTIONS
        for layout in workloads.LAYOUTS
    }
    for row in results["rows"]:
        assert row["ok"], report.describe(row)
        assert row["rounds"] == 3
        assert 0 < row["seconds_spread"][0] <= row["seconds"] <= row["seconds_spread"][1]
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        if row["direction"] == "box gradient":
            assert row["peers"] == {}
            assert row["own"]["own backward"]["median"] > 0
            continue
        assert set(row["peers"]) == EXPECTED_PEERS
        for name, peer in row["peers"].items():
            if row["direction"] == suite.ALL_GRADIENTS and name == "torchvision":
                assert "no gradient to the boxes" in peer["left_out"]
                continue
            assert peer["accurate"], f"{name}: {report.describe(row)}"
            assert peer["ratio"]["low"] <= peer["ratio"]["median"] <= peer["ratio"]["high"]


def test_peers_have_our_numbers_where_sampling_is_adaptive_or_legacy(results):
    for row in results["rows"]:
        assert row["error"] < (1e-3 if "box" in row["direction"] else 1e-5)
        if "boxes" in row["direction"]:
            continue
        for name, peer in row["peers"].items():
            assert peer["error"] < 1e-4, f"{name}: {report.describe(row)}"


def test_sixteen_bit_rows_are_compared_with_what_there_is():
    directions = ("forward", "backward")
    plan = tiny_plan(
        "W3", dtypes=("float16", "bfloat16"), layouts=("channels_last",), directions=directions
    )
    rows = bench.run(plan, quick=True)["rows"]
    assert len(rows) == 2 * len(directions)
    for row in rows:
        assert row["ok"], report.describe(row)
        assert row["own"]["own float32"]["median"] > 0
        if row["direction"] != "box gradient":
            assert row["peers"]["grid_sample"]["accurate"]
            # Without an own kernel for it, a peer is named with the reason and the row goes on.
            for peer in row["peers"].values():
                assert ("ratio" in peer) != ("left_out" in peer)


def test_call_overhead_workload_keeps_its_size_under_quick():
    quick = {w.name: w.quick() for w in workloads.WORKLOADS}
    for workload in workloads.WORKLOADS:
        changed = quick[workload.name] != workload
        assert changed == (not workload.name.startswith("W5"))


def test_every_operator_with_a_peer_has_a_workload_and_one_for_its_call():
    for name, operator in peers.OPERATORS.items():
        of = [w for w in workloads.WORKLOADS if w.operator == name]
        assert any(not w.overhead for w in of), name
        everyone = [p for p in operator.peers if p.package in ("torch", "torchvision")]
        assert any(w.overhead for w in of) == bool(everyone), name


def test_every_operator_has_right_rows():
    names = ["W6a", "W7", "W8a", "W9", "W10", "W11a", "W11b", "W12", "W5*"]
    plan = tiny_plan(*names, layouts=("contiguous",), directions=("forward", suite.ALL_GRADIENTS))
    rows = bench.run(plan, quick=True)["rows"]
    assert {row["workload"] for row in rows} == {w.name for w in plan.workloads}
    for row in rows:
        assert row["ok"], report.describe(row)
        for name, peer in row["peers"].items():
            assert peer.get("accurate", True), f"{name}: {report.describe(row)}"
    # What a call of the operator costs stands in each of its rows.
    for row in rows:
        same = [r for r in rows if r["operator"] == row["operator"] and r["overhead"]]
        same = [r["seconds"] for r in same if r["direction"] == row["direction"]]
        assert row["call_seconds"] == (same[0] if same else None)
    assert next(r for r in rows if r["workload"] == "W7")["own"]["copy"]["median"] > 0


def test_boxes_are_as_the_workload_says():
    for workload in workloads.WORKLOADS:
        boxes = workload.make_boxes().double()
        assert len(boxes) == workload.boxes
        extent = torch.tensor(workload.image[::-1])
        assert (boxes[:, 1:3] >= 0).all()
        assert (boxes[:, 3:] <= extent).all()
        assert boxes[:, 0].unique().tolist() == list(range(workload.batch))
        if workload.batch > 1:
            placed = peers.OPERATORS[workload.operator].place(workload, workload.make_boxes())
            assert placed.isfinite().all()
        sides = boxes[:, 3:] - boxes[:, 1:3]
        whole = (sides < 0.92 * extent).all(1)
        side = sides.prod(1).sqrt()[whole]
        low, high = workload.sides
        assert side.min() > 0.99 * low
        assert side.max() < 1.01 * high
        assert workload.boxes < 100 or side.max() / side.min() > 0.5 * high / low
        aspect = (sides[:, 1] / sides[:, 0])[whole]
        assert aspect.min() > 0.59
        assert aspect.max() < 1.61


def test_floor_counts_each_byte_once():
    # One sample per cell at index 1 and 2 of each axis: 4 pixels, two boxes that read the same.
    workload = workloads.Workload(
        name="T",
        what="",
        operator="roi_align",
        strides=(8,),
        channels=3,
        boxes=2,
        sides=(16, 16),
        output_size=2,
        sampling_ratio=1,
        aligned=True,
        image=(64, 96),
    )
    setting = suite.Setting(workload, devices.Cpu(), "float32", "contiguous")
    boxes = torch.tensor([[0.0, 8.0, 8.0, 24.0, 24.0]]).repeat(2, 1)
    touched = suite.touched_pixels(setting, boxes)
    assert touched == 4
    read, pooled, gradient = 4 * 3 * 4, 2 * 3 * 2 * 2 * 4, 3 * 8 * 12 * 4
    assert suite.floor_bytes(setting, touched, setting.features(), pooled) == {
        "forward": read + pooled,
        "backward": pooled + gradient,
        "forward+backward": read + 2 * pooled + gradient,
        suite.ALL_GRADIENTS: 2 * read + 2 * pooled + gradient,
        "box gradient": read + pooled,
    }


# Wrong numbers


def replace_ours(monkeypatch, pool):
    operator = peers.OPERATORS["roi_align"]
    changed = dataclasses.replace(operator, ours=pool(operator.ours))
    monkeypatch.setitem(peers.OPERATORS, "roi_align", changed)


def off_by(factor, dtypes):
    def wrap(make):
        def wrong(work, boxes, dtype):
            pool = make(work, boxes, dtype)
            return lambda maps: pool(maps) * (factor if maps[0].dtype in dtypes else 1)

        return wrong

    return wrap


def test_wrong_numbers_are_not_timed(monkeypatch, tmp_path, capsys):
    replace_ours(monkeypatch, off_by(1.001, [torch.float32]))
    options = ["--tiny", "--workloads", "W1", "--layouts", "contiguous", "--threads", "1"]
    options += ["--directions", "forward", "backward", "--rounds", "2", "--out", str(tmp_path)]
    assert bench.main(options) == 1
    rows = json.loads((tmp_path / bench.RESULTS).read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, False]
    assert not any("seconds" in row for row in rows)
    assert capsys.readouterr().out.count("WRONG") == 2


def test_numbers_that_differ_from_the_reference_stop_the_run(monkeypatch):
    replace_ours(monkeypatch, off_by(1 + 1e-6, [torch.float64]))
    with pytest.raises(RuntimeError, match=r"W1 .*forward differs from the reference"):
        bench.run(tiny_plan("W1"))


def test_a_wrong_peer_is_marked(monkeypatch):
    operator = peers.OPERATORS["roi_align"]
    peer = next(p for p in operator.peers if p.name == "grid_sample")
    wrong = peers.Peer(peer.name, off_by(1.01, [torch.float32])(peer.make))
    changed = dataclasses.replace(operator, peers=(wrong,))
    monkeypatch.setitem(peers.OPERATORS, "roi_align", changed)
    results = bench.run(tiny_plan("W1", directions=("forward",), layouts=("contiguous",)))
    found = results["rows"][0]["peers"]["grid_sample"]
    assert not found["accurate"]
    assert found["error"] == pytest.approx(0.01, rel=0.01)
    assert f"×{report.INACCURATE}" in report.table(results)


def test_a_peer_beyond_patience_is_left_out():
    plan = tiny_plan("W1", directions=("forward",), layouts=("contiguous",), patience=0.0)
    row = bench.run(plan)["rows"][0]
    assert row["ok"]
    assert set(row["peers"]) == EXPECTED_PEERS
    assert all("forward takes" in peer["left_out"] for peer in row["peers"].values())


def test_a_peer_that_a_target_is_about_is_waited_for():
    needed = suite.Comparison("W1", "grid_sample", "cpu", "float32", "contiguous", 1)
    assert needed in targets.COMPARISONS
    plan = tiny_plan("W1", directions=("forward",), patience=0.0, needed=frozenset({needed}))
    rows = {row["layout"]: row for row in bench.run(plan)["rows"]}
    assert "ratio" in rows["contiguous"]["peers"]["grid_sample"]
    assert "left_out" in rows["channels_last"]["peers"]["grid_sample"]


# Measuring


class FakeWatch:
    def __init__(self, seconds):
        self.seconds = iter(seconds)

    def __call__(self):
        return next(self.seconds)


def test_ratios_are_taken_within_rounds():
    # The machine is slower by the factor 10 in every other round; the ratio stays what it is.
    watches = {
        "ours": FakeWatch([1.0, 10.0, 1.0, 10.0, 1.0]),
        "peer": FakeWatch([3.0, 30.0, 3.0, 30.0, 3.0]),
    }
    times = timing.interleave(watches, 5, 1.0)
    ratio = timing.summarise(timing.ratios(times["peer"], times["ours"]))
    assert ratio == timing.Spread(3.0, 3.0, 3.0)


def test_slow_peers_get_fewer_rounds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing, "timer", lambda: clock[0])

    def watch(seconds):
        def measure():
            clock[0] += seconds
            return seconds

        return measure

    watches = {"ours": watch(0.01), "slow": watch(5.0), "fast": watch(1.0)}
    times = timing.interleave(watches, 100, 5.5)
    assert not any(math.isnan(t) for t in times["ours"])
    assert sum(not math.isnan(t) for t in times["slow"]) == timing.LEAST_LONG_ROUNDS
    assert sum(not math.isnan(t) for t in times["fast"]) == 6
    assert len(times["ours"]) == 6
    assert len(timing.interleave({"ours": watch(1.0)}, 100, 5.5)["ours"]) == 6


def test_stopwatch_reads_seconds():
    def wait():
        start = timing.timer()
        while timing.timer() - start < 0.003:
            pass

    assert 0.003 <= devices.Cpu().watch([wait], "eager", 1, 0.01)() < 0.3


def test_peak_memory_is_what_a_call_needs_beyond_its_result():
    size = 32 * 2**20

    def call():
        scratch = torch.ones(size, dtype=torch.uint8)
        return scratch[: size // 2] + 1

    extra = memory.peak_extra(call, CPU)
    if extra is None:
        pytest.skip("needs Linux with glibc and a writable /proc/self/clear_refs")
    assert size - 2**20 <= extra <= size + 4 * 2**20
    assert memory.peak_extra(lambda: torch.ones(size, dtype=torch.uint8), CPU) <= 4 * 2**20


def test_calls_on_the_cpu_are_not_repeated_where_they_are_slow():
    count = [0]

    def slow():
        count[0] += 1
        time.sleep(0.21)

    watch = devices.Cpu().watch([slow], "eager", 1, 0.01, first_seconds=0.5)
    assert watch() > 0.2
    assert count == [1]


def test_minutes_are_shared_by_the_rows_that_are_left(monkeypatch):
    plan = tiny_plan("W1", seconds=100.0, minutes=10.0)
    runner = suite.Runner(plan)
    clock = [0.0]
    monkeypatch.setattr(suite, "timer", lambda: clock[0])
    runner._start = 0.0
    share = runner._seconds(2)
    assert share == pytest.approx(600 / runner.steps / 2 / 2)
    clock[0] = 300.0
    assert runner._seconds(2) == pytest.approx(share / 2)
    clock[0] = 1e6
    assert runner._seconds(2) == suite.LEAST_SECONDS

    def late():
        clock[0] += 601
        return clock[0]

    monkeypatch.setattr(suite, "timer", late)
    stopped = suite.Runner(dataclasses.replace(plan, stops=True))
    assert stopped.run(lambda row: pytest.fail("a row after the end")) == []
    assert len(stopped.unfinished) == 2


def wait_with_deadline():
    start = time.monotonic()
    with suite.deadline(0.05, "compiling"):
        while time.monotonic() - start < 5:
            pass


def test_what_takes_too_long_is_stopped():
    start = time.monotonic()
    with pytest.raises(suite.TooSlow, match="compiling takes more than 0 s"):
        wait_with_deadline()
    assert time.monotonic() - start < 1
    with suite.deadline(0.05, "nothing"):
        pass
    time.sleep(0.06)


# Peers


def compiled_plan(**changes):
    only = {"directions": ("forward",), "layouts": ("contiguous",)}
    return tiny_plan("W1", compiled=("W1",), peers=peers.COMPILED, **only, **changes)


def test_compiled_peers_run_only_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    row = bench.run(compiled_plan())["rows"][0]
    assert set(row["peers"]) == set(peers.COMPILED)
    assert all(peer["accurate"] for peer in row["peers"].values())
    plan = dataclasses.replace(compiled_plan(), compiled=())
    assert bench.run(plan)["rows"][0]["peers"] == {}


def test_a_peer_that_does_not_compile_is_left_out_with_the_reason(monkeypatch):
    def broken(function, dynamic):
        def call(*args, **kwargs):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    row = bench.run(compiled_plan())["rows"][0]
    assert row["ok"]
    assert {peer["left_out"] for peer in row["peers"].values()} == {
        "TooSlow: RuntimeError: no C++ compiler"
    }


@pytest.fixture
def others(monkeypatch):
    """detectron2, mmcv and kornia as far as they are called, from our own operators."""

    def module(name, **functions):
        found = types.ModuleType(name)
        found.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(found).update(functions)
        monkeypatch.setitem(sys.modules, name, found)

    def mmcv_roi_align(maps, rois, size, scale, ratio, mode, aligned):
        mode = {"avg": "mean", "max": "max"}[mode]
        return glimpse_ext.roi_align(maps, rois, size, scale, ratio, aligned, mode=mode)

    def mmcv_rotated(maps, rois, size, scale, ratio, aligned, clockwise):
        assert aligned
        assert not clockwise
        rois = torch.cat([rois[:, :5], rois[:, 5:].rad2deg()], 1)
        return glimpse_ext.roi_align_rotated(maps, rois, size, scale, ratio)

    def rotated(size, scale, ratio):
        return lambda maps, rois: glimpse_ext.roi_align_rotated(maps, rois, size, scale, ratio)

    def paste(masks, boxes, size, threshold):
        return glimpse_ext.paste_masks(masks[:, None], boxes, size, threshold)[:, 0]

    module("mmcv")
    module("mmcv.ops", roi_align=mmcv_roi_align, roi_align_rotated=mmcv_rotated)
    module("detectron2")
    module("detectron2.layers", ROIAlignRotated=rotated, paste_masks_in_image=paste)


@pytest.mark.usefixtures("others")
def test_packages_that_are_installed_take_part():
    plan = tiny_plan(
        "W1", "W12", "W10", "W6a", layouts=("contiguous",), directions=("forward", "backward")
    )
    rows = bench.run(plan)["rows"]
    found = {(row["workload"], name) for row in rows for name in row["peers"]}
    expected = {("W1", "mmcv"), ("W12", "mmcv"), ("W10", "mmcv"), ("W10", "detectron2")}
    assert expected | {("W6a", "detectron2")} <= found
    for row in rows:
        for name, peer in row["peers"].items():
            assert peer["accurate"], f"{name}: {report.describe(row)}"


def test_both_ways_of_detectron2_paste_the_same():
    work = workloads.select(["W6a"])[0].tiny()
    masks, boxes = work.make_features(torch.float32, "contiguous"), work.make_boxes()[:, 1:]
    by_box, whole = (
        _grid_sample.paste_masks(masks[0], boxes, work.image, b) for b in (True, False)
    )
    assert torch.equal(by_box, whole)
    assert by_box.any()


@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs the peer: pip install torchvision")
def test_a_peer_with_another_convention_is_compared_with_that():
    rows = bench.run(tiny_plan("W6a"))["rows"]
    assert len(rows) == 1
    pasted = rows[0]["peers"]["torchvision"]
    assert pasted["accurate"]
    assert pasted["error"] < 0.05


# CUDA, on paper


class FakeCuda:
    """torch.cuda as far as `devices.Cuda` uses it: a host, a device, and calls between them.

    A call takes ``host`` seconds of the host and ``device`` seconds of the device, which works
    behind the host, unless the call waits for it.
    """

    def __init__(self, host=1.0, device=0.25, waits=False, cache=1000):
        self.log = []
        self.host_seconds, self.device_seconds, self.call_waits = host, device, waits
        self.host = self.busy_until = 0.0
        self.streams = ["default"]
        self.mode = "default"
        self.recording = None
        self.cache = cache

    def call(self):
        if self.call_waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        if self.recording is not None:
            self.recording.calls += 1
            return
        assert self.streams[-1] != "default" or not self.log
        self.log.append("call")
        self.host += self.host_seconds
        self.busy_until = max(self.busy_until, self.host) + self.device_seconds
        if self.call_waits:
            self.host = self.busy_until

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=self.cache)

    def current_stream(self, device):
        return FakeStream(self, self.streams[-1])

    def Stream(self, device):
        return FakeStream(self, "side")

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream.name)
        yield
        self.streams.pop()

    def synchronize(self, device=None):
        self.host = max(self.host, self.busy_until)

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    def CUDAGraph(self):
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph, stream):
        assert stream.name == "side", "the default stream cannot be captured"
        assert self.mode == "default"
        self.log.append("capture")
        self.recording = graph
        yield
        self.recording = None


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = max(self.cuda.host, self.cuda.busy_until)

    def synchronize(self):
        self.cuda.synchronize()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.calls = cuda, 0

    def replay(self):
        self.cuda.log.append("replay")
        start = max(self.cuda.host, self.cuda.busy_until)
        self.cuda.busy_until = start + self.calls * self.cuda.device_seconds


def fake_device(**options):
    api = FakeCuda(**options)
    device = devices.Cuda(CPU, api)
    device.now = lambda: api.host
    return api, device


def test_eager_calls_on_cuda_include_the_host():
    api, device = fake_device(host=1.0, device=0.25)
    with device.scope():
        watch = device.watch([api.call] * 2, "eager", 1, 8.0)
        assert watch() == pytest.approx(1.0, rel=0.1)
        assert watch.device_seconds[-1] == pytest.approx(1.0, rel=0.1)
    # Where the device is slower, it is the device.
    api, device = fake_device(host=0.25, device=1.0)
    with device.scope():
        assert device.watch([api.call], "eager", 1, 8.0)() == pytest.approx(1.0, rel=0.2)


def test_replay_of_a_graph_is_the_device_alone():
    api, device = fake_device(host=1.0, device=0.25)
    with device.scope():
        watch = device.watch([api.call] * 3, "graph", 1, 60.0)
        assert watch() == pytest.approx(0.25)
    capture = api.log.index("capture")
    # Everything is on the side stream, has run there before, and is never run again by itself.
    assert api.log[0] == "side waits for default"
    assert api.log[:capture].count("call") >= devices.WARM_UPS
    assert "call" not in api.log[capture:]
    assert api.log[-1] == "default waits for side"
    assert watch._count % 3 == 0
    assert watch._count <= devices.MOST_IN_GRAPH


def test_what_waits_for_the_device_is_not_captured():
    api, device = fake_device(waits=True)
    with device.scope(), pytest.raises(devices.NotCaptured, match="eager only: called a synchron"):
        device.watch([api.call], "graph", 1, 1.0)
    assert "capture" not in api.log
    assert api.mode == "default"


def test_cold_calls_have_more_maps_than_the_cache_holds():
    device = devices.Cuda(CPU, FakeCuda(cache=1000))
    assert device.sets(10_000) == 2
    assert device.sets(1000) == 3
    assert device.sets(1) == devices.MOST_SETS


class CpuAsCuda(devices.Cpu):
    """The rows of CUDA, on the CPU; peers that wait cannot be captured."""

    name = "cuda"
    launches = devices.Cuda.launches

    def sets(self, nbytes):
        return 2

    def watch(self, calls, launch, threads, round_seconds, first_seconds=0.0):
        # After ours comes the one peer.
        self.watched += 1
        if launch == "graph" and self.watched % 2 == 0:
            raise devices.NotCaptured("waits for the device, eager only")
        return super().watch(calls, launch, threads, round_seconds, first_seconds)

    watched = -1  # the first watch is that of the rate of a copy


def test_rows_of_cuda_are_eager_and_by_graph_cold_and_hot(tmp_path):
    two = ("forward", "backward")
    only = {"devices": ("cuda",), "layouts": ("contiguous",), "directions": two}
    plan = tiny_plan("W1", peers=("grid_sample",), **only)
    results = bench.run(plan, quick=True, devices={"cuda": CpuAsCuda()})
    rows = results["rows"]
    kinds = [(row["launch"], row["cache"]) for row in rows]
    assert kinds == list(devices.Cuda.launches) * 2
    assert len(set(map(report.row_key, rows))) == len(rows)
    assert all(row["ok"] for row in rows)
    reasons = [p["left_out"] for row in rows for p in row["peers"].values() if "left_out" in p]
    assert set(reasons) == {"waits for the device, eager only"}
    text = report.table(results)
    assert "cuda graph cold" in text
    assert "left out: grid_sample: waits for the device, eager only" in text
    assert "cuda eager hot" in report.markdown(results)
    path = tmp_path / "cuda.json"
    report.save(results, path)
    assert bench.main(["--plot", str(path)]) == 0
    assert compare(results, results).worse == []


# Overhead


def test_layers_of_a_call_are_all_timed(tmp_path, capsys):
    found = overhead.measure(devices.Cpu(), workloads.select(["W5", "W5p"]), 1, 1e-4)
    assert set(overhead.LAYERS) <= set(found["roi_align"])
    assert "grid_sample forward+backward" in found["roi_align"]
    assert set(found["paste_masks"]) & set(overhead.LAYERS) == set(overhead.LAYERS[:3])
    assert found["roi_align"]["empty result"] < found["roi_align"]["forward+backward"]
    lines = overhead.table(found).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


# Targets


def aimed_row(target, **changes):
    names = ("workload", "direction", "layout", "dtype", "threads", "device", "launch")
    row = {name: getattr(target, name) for name in names}
    row |= {"cache": "cold" if target.device == "cuda" else "hot", "ok": True, "own": {}}
    row |= {"peers": {}, "times_floor": 1.1, "peak_extra_bytes": 100}
    return row | changes


def aimed_results(rows, isa="avx512", quick=False, allocator=None):
    machine = {"processor": "abacus", "asked_for": isa, "allocator": allocator or {}}
    return {"rows": rows, "machine": machine, "quick": quick}


def against(target, ratio):
    spread = {"median": ratio, "low": ratio, "high": ratio}
    if target.versus in suite.YARDSTICKS:
        return aimed_row(target, own={target.versus: spread})
    return aimed_row(target, peers={target.versus: {"ratio": spread}})


def test_targets_are_hit_missed_or_say_why_not():
    target = targets.Target("W1", "forward", "torchvision", 10, isa="avx512", hint=False)

    def word(results):
        return targets.judge(results, [target])[0].word

    assert word(aimed_results([against(target, 10.1)])) == "hit"
    assert word(aimed_results([against(target, 9.9)])) == "MISS"
    assert word(aimed_results([aimed_row(target)])) == "no row"
    assert word(aimed_results([against(target, 9.9)], isa="avx2")) == "other"
    hinted = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert word(aimed_results([against(target, 9.9)], allocator=hinted)) == "other"
    assert word(aimed_results([{**against(target, 99.0), "ok": False}])) == "no row"


def test_targets_of_time_and_bytes_are_upper_limits():
    time_ = targets.Target("W5", "forward", "torchvision", most=0.8)
    own = targets.Target("W1", "box gradient", "own backward", most=1.8)
    floor = targets.Target("W6a", "forward", targets.FLOOR, most=1.3, device="cuda")
    extra = targets.Target("W1", "backward", targets.MEMORY, most=1e6)
    rows = [against(time_, 1.3), against(own, 1.7), aimed_row(floor), aimed_row(extra)]
    verdicts = targets.judge(aimed_results(rows), [time_, own, floor, extra])
    assert [v.word for v in verdicts] == ["hit"] * 4
    rows = [against(time_, 1.2), against(own, 1.9), aimed_row(floor, times_floor=1.4)]
    rows += [aimed_row(extra, peak_extra_bytes=2e6)]
    verdicts = targets.judge(aimed_results(rows), [time_, own, floor, extra])
    assert [v.word for v in verdicts] == ["MISS"] * 4


def test_every_target_names_a_row_that_a_whole_run_has():
    known = {w.name: w for w in workloads.WORKLOADS}
    options = ["--devices", "cpu", "--threads", "1", "2"]
    plan = bench.make_plan(bench.parse(options))
    cuda = dataclasses.replace(plan.parts[0], devices=("cuda",), dtypes=tuple(suite.DTYPES))
    cuda = dataclasses.replace(cuda, layouts=tuple(workloads.LAYOUTS), threads=(1,))
    cpu = devices.Cpu()
    plan = dataclasses.replace(plan, parts=(*plan.parts, cuda))
    rows = {
        (s.work.name, direction, s.layout, s.dtype_name, s.threads, name)
        for name in ("cpu", "cuda")
        for s in plan.settings({"cpu": cpu, "cuda": CpuAsCuda()})
        if s.device.name == name
        for direction in s.directions
    }
    for t in targets.TARGETS:
        assert (t.workload, t.direction, t.layout, t.dtype, t.threads, t.device) in rows, t
        assert (t.least is None) != (t.most is None)
        others = {p.name for p in peers.OPERATORS[known[t.workload].operator].peers}
        assert t.versus in others | set(suite.YARDSTICKS) | {targets.FLOOR, targets.MEMORY}
    assert len(set(targets.TARGETS)) == len(targets.TARGETS)


def test_target_report_puts_misses_first_and_fails(tmp_path, capsys, results):
    t = next(t for t in targets.TARGETS if (t.workload, t.versus) == ("W1", "torchvision"))
    changed = {**results, "quick": False, "rows": [against(t, t.least / 2)]}
    changed["machine"] = aimed_results([])["machine"]
    report.save(changed, tmp_path / "r.json")
    assert bench.main(["--targets", str(tmp_path / "r.json")]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| W")]
    assert lines[0].endswith("MISS |")
    assert len(lines) == sum(t.device == "cpu" for t in targets.TARGETS)
    report.save(results, tmp_path / "quick.json")
    assert bench.main(["--targets", str(tmp_path / "quick.json")]) == 2
    assert "--quick" in capsys.readouterr().err


# Plans


def test_a_whole_run_has_both_layouts_all_threads_and_sixteen_bits():
    plan = bench.make_plan(bench.parse(["--threads", "1", "2"]))
    settings = list(plan.settings({"cpu": devices.Cpu()}))
    assert len({str(s) for s in settings}) == len(settings)
    for work in workloads.WORKLOADS:
        found = {(s.layout, s.threads, s.dtype_name) for s in settings if s.work == work}
        layouts = ["contiguous"] if work.mask else list(workloads.LAYOUTS)
        expected = {(layout, n, "float32") for layout in layouts for n in (1, 2)}
        if work.name in ("W1", "W2a", "W3"):
            expected |= {("channels_last", 1, name) for name in ("float16", "bfloat16")}
        assert found == expected, work.name
        everything = next(s for s in settings if s.work == work)
        assert everything.directions == peers.OPERATORS[work.operator].directions(DIRECTIONS)


def test_quick_and_given_options_are_kept():
    plan = bench.make_plan(bench.parse(["--quick", "--threads", "1", "--layouts", "channels_last"]))
    assert plan.compiled == ()
    assert plan.minutes <= 2
    assert plan.parts[0].layouts == ("channels_last",)
    plan = bench.make_plan(bench.parse(["--dtypes", "bfloat16", "--minutes", "3"]))
    assert [part.dtypes for part in plan.parts] == [("bfloat16",)]
    assert plan.minutes == 3
    assert "rows in about 3 minutes" in bench.forecast(suite.Runner(plan))


# Results on paper


def test_results_survive_the_file(results, results_file):
    loaded = report.load(results_file)
    assert loaded["schema"] == report.SCHEMA
    assert loaded["quick"] is True
    assert loaded["versions"]["glimpse_ext"] == glimpse_ext.__version__
    assert loaded["machine"]["cores"] >= 1
    assert loaded["machine"]["processor"]
    assert loaded["plan"]["workloads"]["W1"]["boxes"] == 6
    assert list(map(report.row_key, loaded["rows"])) == list(map(report.row_key, results["rows"]))
    for before, after in zip(results["rows"], loaded["rows"], strict=True):
        assert after["seconds"] == pytest.approx(before["seconds"], rel=1e-3)
    assert all(rate > 1e6 for rate in loaded["copy_bytes_per_second"].values())


def test_other_files_are_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    for text in ("{}", "[]", "not JSON", '{"schema": 0}'):
        path.write_text(text)
        assert bench.main(["--readme", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    assert bench.main(["--readme", str(tmp_path / "missing.json")]) == 2


def test_rows_where_a_peer_is_faster_come_first(results):
    changed = copy.deepcopy(results)
    for row in changed["rows"]:
        for name in row["peers"]:
            peer = {"accurate": True, "ratio": {"median": 5.0, "low": 4.0, "high": 6.0}}
            row["peers"][name] = peer
    slow = next(
        r for r in changed["rows"] if (r["workload"], r["direction"]) == ("W2a", "backward")
    )
    slow["peers"]["grid_sample"]["ratio"] = {"median": 0.9, "low": 0.8, "high": 1.0}
    body = [line for line in report.markdown(changed).splitlines() if line.startswith("| W")]
    assert body[0].startswith("| W2a | backward")
    first = report.table(changed).splitlines()[2]
    assert first.split()[:2] == [slow["workload"], slow["direction"]]
    assert first.endswith("slower than grid_sample")
    assert "0.9×" in first


def test_readme_table_has_a_line_per_workload_and_direction(results_file, capsys):
    assert cli.main(["bench", "--readme", str(results_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    body = [line for line in lines if line.startswith("| W")]
    assert len(body) == 3 * len(DIRECTIONS)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "channels_last" in next(line for line in lines if line.startswith("| workload"))
    assert "our gradient to the maps" in next(line for line in body if "box gradient" in line)


def test_plot_is_written_as_its_name_says(results_file, tmp_path):
    png, svg = tmp_path / "a.png", tmp_path / "b.svg"
    assert cli.main(["bench", "--plot", str(results_file), str(png), str(svg)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text
    assert text.count("<path") > 40
    assert bench.main(["--plot", str(results_file)]) == 0
    assert results_file.with_suffix(".png").stat().st_size > 10_000


def test_every_peer_has_a_colour_of_its_own():
    assert set(COLOURS) >= set(peers.PEER_NAMES)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_nothing_to_plot_is_said(results, tmp_path, capsys):
    path = tmp_path / "results.json"
    alone = {**results, "rows": [r for r in results["rows"] if r["direction"] == "box gradient"]}
    report.save(alone, path)
    assert bench.main(["--plot", str(path)]) == 2
    assert "nothing to plot" in capsys.readouterr().err


# Comparison


@pytest.fixture
def steady(results):
    """Results whose rounds agree within 4 %."""
    made = copy.deepcopy(results)
    for row in made["rows"]:
        row["seconds"], row["seconds_spread"] = 1e-3, [0.98e-3, 1.02e-3]
        row["floor_seconds"] = 1e-4
        for name in row["peers"]:
            peer = {"accurate": True, "ratio": {"median": 5.0, "low": 4.9, "high": 5.1}}
            row["peers"][name] = peer
        for name in row["own"]:
            row["own"][name] = {"median": 1.2, "low": 1.18, "high": 1.22}
    return made


def slow_down(row, factor, every_peer=True):
    row["seconds"] *= factor
    row["seconds_spread"] = [t * factor for t in row["seconds_spread"]]
    for name, peer in row["peers"].items():
        if every_peer or name == "grid_sample":
            peer["ratio"] = {key: r / factor for key, r in peer["ratio"].items()}
    for name, own in row["own"].items():
        row["own"][name] = {key: r * factor for key, r in own.items()}


def saved(results, path):
    report.save(results, path)
    return str(path)


@pytest.mark.parametrize("place", range(len(DIRECTIONS)), ids=list(DIRECTIONS))
def test_a_planted_regression_is_flagged(steady, tmp_path, capsys, place):
    new = copy.deepcopy(steady)
    slow_down(new["rows"][place], 1.3)
    old_path, new_path = saved(steady, tmp_path / "old.json"), saved(new, tmp_path / "new.json")
    assert cli.main(["bench", "--compare", old_path, new_path]) == 1
    lines = capsys.readouterr().out.splitlines()
    worse = [line for line in lines if line.startswith("WORSE")]
    assert len(worse) == 1
    assert report.describe(steady["rows"][place]) in worse[0]
    assert "0.77" in worse[0]
    # The other way round it is an improvement, and that is no failure.
    assert cli.main(["bench", "--compare", new_path, old_path]) == 0
    assert "0 worse, 1 better" in capsys.readouterr().out


def test_equal_results_and_small_changes_pass(steady):
    assert compare(steady, steady).worse == []
    new = copy.deepcopy(steady)
    for row in new["rows"]:
        slow_down(row, 1.05)
    assert compare(steady, new).worse == []


def test_noise_of_the_machine_or_of_one_peer_is_no_regression(steady):
    new = copy.deepcopy(steady)
    compared, noisy = new["rows"][0], new["rows"][1]
    # All times double, ours and the peers': the neighbours, not this package.
    compared["seconds"] *= 2
    compared["seconds_spread"] = [t * 2 for t in compared["seconds_spread"]]
    # A large change, but rounds differ by more.
    slow_down(noisy, 1.5)
    for peer in noisy["peers"].values():
        peer["ratio"]["high"] = 5.0
    assert compare(steady, new).worse == []


@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs a second peer: pip install torchvision")
def test_one_peer_that_became_faster_is_no_regression(steady):
    new = copy.deepcopy(steady)
    slow_down(new["rows"][0], 1.5, every_peer=False)
    assert compare(steady, new).worse == []


def test_a_row_that_became_wrong_or_vanished_is_told(steady):
    new = copy.deepcopy(steady)
    new["rows"][0]["ok"] = False
    gone = new["rows"].pop(3)
    comparison = compare(steady, new)
    assert [change.factor for change in comparison.worse] == [0.0]
    assert comparison.missing == [report.describe(gone)]
    assert "wrong numbers" in str(comparison)


def test_results_of_other_workloads_are_not_compared(steady, tmp_path, capsys):
    other = {**steady, "quick": False}
    paths = [saved(steady, tmp_path / "a.json"), saved(other, tmp_path / "b.json")]
    assert bench.main(["--compare", *paths]) == 2
    assert "--quick" in capsys.readouterr().err


def test_rows_that_scatter_are_measured_again_and_no_others(steady, monkeypatch):
    old = {**copy.deepcopy(steady), "quick": False}
    disturbed = old["rows"][1]
    disturbed["seconds_spread"] = [1e-3, 1.6e-3]
    plans = []

    def run(plan):
        plans.append(plan)
        return {**copy.deepcopy(steady), "rows": [{**r, "seconds": 5.0} for r in steady["rows"]]}

    monkeypatch.setattr(report, "environment", lambda: steady)
    new = again.measured_again(old, Plan(()), run)
    (part,) = plans[0].parts
    assert [w.name for w in part.workloads] == [disturbed["workload"]]
    assert part.directions == (disturbed["direction"],)
    assert part.layouts == (disturbed["layout"],)
    assert [row["seconds"] == 5.0 for row in new["rows"]] == [
        row is disturbed for row in old["rows"]
    ]
    assert new["again"][0]["rows"] == 1
    assert "1 rows whose rounds scattered" in report.markdown(new)
    assert again.measured_again({**steady, "quick": False}, Plan(()), run)["rows"] == steady["rows"]
    assert len(plans) == 1  # nothing scatters there
    with pytest.raises(ValueError, match="whole run"):
        again.measured_again(steady, Plan(()), run)
    with pytest.raises(ValueError, match="here is"):
        again.measured_again({**old, "versions": {"torch": "1.0"}}, Plan(()), run)


def test_another_machine_is_remarked(steady):
    other = copy.deepcopy(steady)
    other["machine"]["processor"] = "abacus"
    assert any("abacus" in remark for remark in compare(steady, other).remarks)


# Command line


def test_unknown_workload_is_refused(capsys):
    assert bench.main(["--workloads", "W99"]) == 2
    assert "W99" in capsys.readouterr().err


def test_workloads_are_found_by_name_and_number():
    assert [w.name for w in workloads.select(["W2"])] == ["W2a", "W2b"]
    assert [w.name for w in workloads.select(["W2b", "W1", "W2"])] == ["W2b", "W1", "W2a"]
    assert {w.name[:2] for w in workloads.select(["W5*"])} == {"W5"}
    assert len(workloads.select(["W5*"])) > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_missing_gpu_is_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--devices", "cuda"])
    assert "no GPU" in capsys.readouterr().err
