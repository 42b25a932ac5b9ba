# SPDX-License-Identifier: BSD-3-Clause
"""The demo of learning where to look: its canvases, its reader, and a short run to the picture."""

import json
import math
import socket

import pytest
import torch
from matplotlib.image import imread

from glimpse_ext import demo
from glimpse_ext.demo import reader, reading

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def apart():
    return reader.load_digits_apart()


@pytest.fixture
def canvases(apart):
    return reader.draw_canvases(apart[0], 6, torch.Generator().manual_seed(0), CPU)


def test_digits_need_no_network_and_are_apart(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the demo must not use the network")

    monkeypatch.setattr(socket, "socket", refuse)
    training, held_out = reader.load_digits_apart()
    assert (len(training.labels), len(held_out.labels)) == (1297, 500)
    for digits in (training, held_out):
        assert digits.images.shape == (len(digits.labels), reader.DIGIT, reader.DIGIT)
        assert digits.images.min() == 0
        assert digits.images.max() == 1
        # Every digit is there about as often, so that guessing is right in one of ten.
        assert (digits.labels.bincount(minlength=10) > 0.08 * len(digits.labels)).all()


def test_canvases_hold_the_digit_where_they_say(apart):
    training = apart[0]
    chosen = torch.arange(40)
    canvases = reader.place(training, chosen, torch.Generator().manual_seed(2))
    assert canvases.images.shape == (40, 1, reader.CANVAS, reader.CANVAS)
    assert torch.equal(canvases.labels, training.labels[chosen])
    for image, corner, ink in zip(
        canvases.images[:, 0], canvases.corners, training.images, strict=False
    ):
        y, x = corner.tolist()
        inside = image[y : y + reader.DIGIT, x : x + reader.DIGIT]
        assert (inside - ink).std() < 2 * reader.NOISE
        assert inside.sum() > image.sum() / 3
    assert canvases.corners.min() < 4
    assert canvases.corners.max() > reader.CANVAS - reader.DIGIT - 4


def test_canvases_depend_on_the_seed_only(apart):
    def draw(seed):
        return reader.draw_canvases(apart[0], 3, torch.Generator().manual_seed(seed), CPU).images

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_the_first_look_is_in_the_middle_and_later_ones_move(canvases):
    moving, fixed = (reader.build(moves, 0, CPU)(canvases.images) for moves in (True, False))
    shape = (reader.LOOKS, len(canvases.labels), 10)
    for reading_ in (moving, fixed):
        assert reading_.scores.shape == shape
        assert not reading_.gaze[0].any()
        assert reading_.gaze.abs().max() <= 1
    assert moving.gaze[1:].any()
    assert not fixed.gaze.any()
    # Both see the same at first.
    assert torch.equal(moving.scores[0], fixed.scores[0])


def test_the_loss_reaches_the_gaze(canvases):
    """What decides where to look learns from the label, through nothing but the offsets."""
    model = reader.build(True, 0, CPU)
    scores = model(canvases.images).scores
    loss = torch.nn.functional.cross_entropy(scores[-1], canvases.labels)
    loss.backward()
    for weight in (model.notice.weight, model.wish.weight):
        assert weight.grad.abs().max() > 0


def test_places_are_where_cells_lie():
    """A ramp of offsets as an image: what a cell shows is the place it stands for."""
    model = reader.build(True, 0, CPU)
    size = reader.CANVAS
    across = (torch.arange(size) + 0.5) * 2 / size - 1
    for axis in range(2):
        ramp = across[:, None] if axis == 0 else across[None, :]
        image = ramp.expand(1, 1, size, size)
        seen = reader.glimpse_ext.extract_glimpse(
            image,
            reader.GLIMPSE,
            torch.zeros(1, 2),
            noise="zero",
            mode="subpixel",
            scales=reader.SCALES,
        )
        torch.testing.assert_close(seen.flatten(), model.places[:, axis])


def check_outputs(folder, steps):
    summary = json.loads((folder / "reader.json").read_text())
    for losses in summary["losses"].values():
        assert len(losses) == steps
        assert all(math.isfinite(loss) for loss in losses)
    assert len(summary["accuracy_by_look"]) == reader.LOOKS
    picture = imread(folder / "reader.png")
    assert picture.shape[0] > 800
    assert picture.shape[1] > 1000
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, 4).tolist()}) > 100
    return summary


def test_quick_run(tmp_path, capsys):
    out = tmp_path / "out"
    assert demo.main(["--glimpse", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    summary = check_outputs(out, reading.QUICK_STEPS)
    assert 0 <= summary["accuracy"] <= 1
    assert "chance is 10%" in capsys.readouterr().out


@pytest.mark.parametrize(("accuracy", "fixed"), [(0.5, 0.1), (0.9, 0.5)])
def test_a_full_run_that_learns_nothing_fails(accuracy, fixed, tmp_path, monkeypatch, capsys):
    def run(*_):
        return {
            "accuracy": accuracy,
            "fixed_gaze_accuracy": fixed,
            "accuracy_by_look": [accuracy],
            "pixels_from_digit_by_look": [1.0],
            "chance": 0.1,
            "seconds": 1.0,
        }

    monkeypatch.setattr(reading, "run", run)
    assert demo.main(["--glimpse", "--out", str(tmp_path)]) == 1
    assert "should read at least" in capsys.readouterr().out
    assert demo.main(["--glimpse", "--out", str(tmp_path), "--steps", "10"]) == 0


@pytest.mark.slow
def test_full_run_learns_where_to_look(tmp_path):
    arguments = ["--glimpse", "--seed", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    summary = check_outputs(tmp_path, reading.STEPS)
    assert summary["accuracy"] >= reading.EXPECTED_ACCURACY
    assert summary["pixels_from_digit_by_look"][-1] < 3
