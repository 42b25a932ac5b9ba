# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark suite at tiny sizes: rows are complete and right, faults are seen, so is a loss."""

import copy
import importlib.util
import json
import math

import pytest
import torch

import glimpse_ext
from glimpse_ext import bench, cli
from glimpse_ext.bench import memory, peers, report, suite, timing, workloads
from glimpse_ext.bench.compare import compare
from glimpse_ext.bench.suite import DIRECTIONS, Plan

CPU = torch.device("cpu")
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
EXPECTED_PEERS = {"grid_sample", "torchvision"} if HAS_TORCHVISION else {"grid_sample"}


def tiny_plan(*names, **changes):
    chosen = tuple(workload.tiny() for workload in workloads.select(list(names)))
    fast = {"rounds": 3, "round_seconds": 1e-4, "seconds": 0.0, "peers": peers.PEER_NAMES}
    return Plan(chosen, **{**fast, **changes})


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
            assert row["times_own_backward"]["median"] > 0
            continue
        assert set(row["peers"]) == EXPECTED_PEERS
        for name, peer in row["peers"].items():
            assert peer["accurate"], f"{name}: {report.describe(row)}"
            assert peer["ratio"]["low"] <= peer["ratio"]["median"] <= peer["ratio"]["high"]


def test_peers_have_our_numbers_where_sampling_is_adaptive_or_legacy(results):
    for row in results["rows"]:
        assert row["error"] < 1e-5
        for name, peer in row["peers"].items():
            assert peer["error"] < 1e-4, f"{name}: {report.describe(row)}"


def test_sixteen_bit_rows_are_compared_with_what_there_is():
    plan = tiny_plan("W3", dtypes=("float16", "bfloat16"), layouts=("channels_last",))
    rows = bench.run(plan, quick=True)["rows"]
    assert len(rows) == 2 * len(DIRECTIONS)
    for row in rows:
        assert row["ok"], report.describe(row)
        if row["direction"] != "box gradient":
            assert row["peers"]["grid_sample"]["accurate"]
            # Without an own kernel for it, a peer is named with the reason and the row goes on.
            for peer in row["peers"].values():
                assert ("ratio" in peer) != ("left_out" in peer)


def test_call_overhead_workload_keeps_its_size_under_quick():
    quick = {w.name: w.quick() for w in workloads.WORKLOADS}
    for workload in workloads.WORKLOADS:
        changed = quick[workload.name] != workload
        assert changed == (workload.name != "W5")


def test_boxes_are_as_the_workload_says():
    for workload in workloads.WORKLOADS:
        boxes = workload.make_boxes().double()
        assert len(boxes) == workload.boxes
        extent = torch.tensor(workload.image[::-1])
        assert (boxes[:, 1:3] >= 0).all()
        assert (boxes[:, 3:] <= extent).all()
        assert boxes[:, 0].unique().tolist() == list(range(workload.batch))
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
    setting = suite.Setting(workload, CPU, "float32", "contiguous", 1)
    boxes = torch.tensor([[0.0, 8.0, 8.0, 24.0, 24.0]]).repeat(2, 1)
    touched = suite.touched_pixels(setting, boxes)
    assert touched == 4
    read, pooled, gradient = 4 * 3 * 4, 2 * 3 * 2 * 2 * 4, 3 * 8 * 12 * 4
    assert suite.floor_bytes(setting, touched, setting.features()) == {
        "forward": read + pooled,
        "backward": pooled + gradient,
        "forward+backward": read + 2 * pooled + gradient,
        "box gradient": read + pooled,
    }


# Wrong numbers


def replace_ours(monkeypatch, pool):
    operator = peers.OPERATORS["roi_align"]
    changed = peers.Operator(pool(operator.ours), operator.reference, operator.peers)
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
    changed = peers.Operator(operator.ours, operator.reference, (wrong,))
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
    times = timing.interleave(watches, 100, 6.0)
    assert not any(math.isnan(t) for t in times["ours"])
    assert sum(not math.isnan(t) for t in times["slow"]) == timing.LEAST_ROUNDS
    assert sum(not math.isnan(t) for t in times["fast"]) == 6
    assert len(times["ours"]) == 6
    assert len(timing.interleave({"ours": watch(1.0)}, 100, 6.0)["ours"]) == 6


def test_stopwatch_reads_seconds():
    def wait():
        start = timing.timer()
        while timing.timer() - start < 0.003:
            pass

    assert 0.003 <= timing.Stopwatch(wait, CPU, 1, 0.01)() < 0.3


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
        for peer in row["peers"].values():
            peer["ratio"] = {"median": 5.0, "low": 4.0, "high": 6.0}
    slow = changed["rows"][9]
    assert slow["direction"] == "backward"
    slow["peers"]["grid_sample"]["ratio"] = {"median": 0.9, "low": 0.8, "high": 1.0}
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
    assert "our backward" in next(line for line in body if "box gradient" in line)


def test_plot_is_written_as_its_name_says(results_file, tmp_path):
    png, svg = tmp_path / "a.png", tmp_path / "b.svg"
    assert cli.main(["bench", "--plot", str(results_file), str(png), str(svg)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text
    assert text.count("<path") > 40
    assert bench.main(["--plot", str(results_file)]) == 0
    assert results_file.with_suffix(".png").stat().st_size > 10_000


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
        for peer in row["peers"].values():
            peer["ratio"] = {"median": 5.0, "low": 4.9, "high": 5.1}
        if "times_own_backward" in row:
            row["times_own_backward"] = {"median": 1.2, "low": 1.18, "high": 1.22}
    return made


def slow_down(row, factor, every_peer=True):
    row["seconds"] *= factor
    row["seconds_spread"] = [t * factor for t in row["seconds_spread"]]
    for name, peer in row["peers"].items():
        if every_peer or name == "grid_sample":
            peer["ratio"] = {key: r / factor for key, r in peer["ratio"].items()}
    if "times_own_backward" in row:
        row["times_own_backward"] = {k: r * factor for k, r in row["times_own_backward"].items()}


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_missing_gpu_is_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--devices", "cuda"])
    assert "no GPU" in capsys.readouterr().err
