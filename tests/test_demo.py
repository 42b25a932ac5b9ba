# SPDX-License-Identifier: BSD-3-Clause
"""The demo: its labels, its parts, and a short run from the photograph to the picture."""

import json
import math
import socket

import pytest
import torch
from matplotlib.image import imread
from torch.testing import assert_close

from glimpse_ext import demo
from glimpse_ext.demo import boxes as box
from glimpse_ext.demo import data, evaluation, training
from glimpse_ext.demo.detector import SCALES, Detections
from glimpse_ext.demo.pooling import GlimpsePooling, GridSamplePooling

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def halves():
    return data.load_halves()


@pytest.fixture
def batch(halves):
    generator = torch.Generator().manual_seed(0)
    return data.Crops(halves[0], 96, 2, generator, CPU).next()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# The photograph


def test_photograph_needs_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the demo must not use the network")

    monkeypatch.setattr(socket, "socket", refuse)
    assert [half.image.shape for half in data.load_halves()] == [(150, 384), (153, 384)]


def test_each_half_has_its_twelve_round_coins(halves):
    for half in halves:
        assert len(half.masks) == data.COINS_PER_HALF
        width, height = (half.boxes[:, 2:] - half.boxes[:, :2]).unbind(1)
        area = half.masks.sum((1, 2))
        # A disk fills pi/4 of its box; ancient coins are chipped and not quite round.
        assert ((area / (width * height) - math.pi / 4).abs() < 0.08).all()
        assert ((width / height - 1).abs() < 0.2).all()
        assert (width > 30).all()
        assert (width < 80).all()
        assert half.masks.sum(0).max() == 1, "coins overlap"


def test_no_coin_is_cut_by_the_split_or_by_the_photograph(halves):
    for half in halves:
        for edge in (0, -1):
            assert not half.masks[:, edge, :].any()
            assert not half.masks[:, :, edge].any()


def test_boxes_are_tight():
    masks = torch.zeros(2, 8, 9, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 7, 0] = True
    assert data.boxes_of(masks).tolist() == [[3, 2, 9, 5], [0, 7, 1, 8]]
    assert data.boxes_of(masks[:0]).shape == (0, 4)


def test_crops_depend_on_the_seed_only(halves):
    def crops(seed):
        return data.Crops(halves[0], 96, 2, torch.Generator().manual_seed(seed), CPU).next()

    assert_close(crops(3).images, crops(3).images, rtol=0, atol=0)
    assert not torch.equal(crops(3).images, crops(4).images)


def test_masks_of_a_crop_lie_on_its_coins(halves):
    crops = data.Crops(halves[0], 160, 4, torch.Generator().manual_seed(1), CPU)
    for _ in range(3):
        batch = crops.next()
        for image, masks, boxes in zip(batch.images[:, 0], batch.masks, batch.boxes, strict=True):
            assert_close(boxes, data.boxes_of(masks))
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                inside = torch.zeros_like(mask)
                inside[y1:y2, x1:x2] = True
                cloth = image[inside & ~masks.any(0)]
                assert image[mask].mean() > cloth.mean() + 0.1, "metal is brighter than cloth"


# Boxes and pooling


def greedy_nms(boxes, scores, threshold):
    overlap, kept = box.iou(boxes, boxes), []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap[index, other] <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms_is_greedy(generator, threshold):
    corners = torch.rand(120, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(120, 2, generator=generator)], 1)
    # Equal scores are resolved by order.
    scores = (torch.rand(120, generator=generator) * 20).round()
    assert box.nms(boxes, scores, threshold).tolist() == greedy_nms(boxes, scores, threshold)
    assert box.nms(boxes[:0], scores[:0], threshold).tolist() == []


def test_decode_undoes_encode(generator):
    low = torch.rand(2, 30, 2, generator=generator) * 50
    boxes, origins = torch.cat([low, low + 3 + 20 * torch.rand(2, 30, 2, generator=generator)], 2)
    assert_close(box.decode(box.encode(boxes, origins), origins), boxes, rtol=1e-4, atol=1e-3)


def test_both_poolings_agree_with_their_gradients(generator):
    sizes = [(25, 40), (13, 20), (7, 10)]
    features = [torch.randn(3, 5, *size, generator=generator) for size in sizes]
    low = torch.rand(40, 2, generator=generator) * torch.tensor([100.0, 40.0])
    side = 4 + 150 * torch.rand(40, 2, generator=generator) ** 2
    corners = box.clip(torch.cat([low, low + side], 1), (100, 160))
    # The last image has no box.
    boxes = torch.cat([torch.arange(40.0)[:, None] % 2, corners], 1)
    results = []
    for pooling in (GlimpsePooling(), GridSamplePooling()):
        leaves = [feature.clone().requires_grad_() for feature in features]
        pooled = pooling.pyramid(leaves, boxes, 7, SCALES)
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
        results.append((pooled.detach(), *torch.autograd.grad((pooled * weight).sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.abs().max() > 0.5
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = (
        pooling.image(features[0], boxes * 0.25, 6)
        for pooling in (GlimpsePooling(), GridSamplePooling())
    )
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Detector


def test_crops_without_any_coin_give_a_finite_loss(generator):
    empty = data.Batch(
        torch.rand(2, 1, 96, 96, generator=generator),
        [torch.zeros(0, 4)] * 2,
        [torch.zeros(0, 96, 96, dtype=torch.bool)] * 2,
    )
    detector = training.build_detector(GlimpsePooling(), 0, CPU)
    losses = detector.loss(empty, generator)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["mask"] == losses["box"] == losses["proposal box"] == 0
    assert detector.proposal_head.score.weight.grad.abs().max() > 0


def test_every_weight_learns(batch, generator):
    detector = training.build_detector(GlimpsePooling(), 0, CPU)
    torch.stack(list(detector.loss(batch, generator).values())).sum().backward()
    for name, weight in detector.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_training_repeats_itself(halves):
    def train():
        generator = torch.Generator().manual_seed(5)
        crops = data.Crops(halves[0], 96, 2, generator, CPU)
        with training.deterministic():
            detector = training.build_detector(GlimpsePooling(), 5, CPU)
            history = training.train(detector, crops, 3, generator)
            return history, detector(crops.next().images)

    (first, found), (second, again) = train(), train()
    assert first == second
    for one, other in zip(found, again, strict=True):
        assert_close(one.boxes, other.boxes, rtol=0, atol=0)
        assert_close(one.masks, other.masks, rtol=0, atol=0)


def test_deterministic_mode_is_put_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with training.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


# Evaluation


def test_average_precision_of_the_truth_and_of_less(halves):
    half = halves[1]
    count = len(half.boxes)
    masks = GlimpsePooling().image(
        half.masks[:, None].float(),
        torch.cat([torch.arange(float(count))[:, None], half.boxes], 1),
        28,
    )[:, 0]
    truth = Detections(half.boxes, torch.linspace(0.9, 0.5, count), masks)
    precision = evaluation.average_precision(half, truth)
    assert precision["box_AP"] == pytest.approx(1)
    assert precision["mask_AP50"] == pytest.approx(1)
    assert precision["mask_AP"] > 0.9

    shifted = Detections(half.boxes + 8, truth.scores, masks)
    worse = evaluation.average_precision(half, shifted)
    assert 0 < worse["box_AP"] < 0.5

    # Half of the coins: precision is perfect up to a recall of one half.
    some = Detections(half.boxes[:6], truth.scores[:6], masks[:6])
    assert evaluation.average_precision(half, some)["box_AP"] == pytest.approx(0.5, abs=0.01)

    none = Detections(half.boxes[:0], truth.scores[:0], masks[:0])
    assert set(evaluation.average_precision(half, none).values()) == {0.0}


# The command


def check_outputs(folder, steps):
    summary = json.loads((folder / "coins.json").read_text())
    assert all(len(losses) == steps for losses in summary["losses"].values())
    assert all(math.isfinite(x) for losses in summary["losses"].values() for x in losses)
    assert all(0 <= value <= 1 for value in summary["precision"].values())
    for way in ("glimpse_ext", "grid_sample"):
        assert summary["times"][f"{way}_pooling_seconds"] > 0
        assert summary["times"][f"{way}_step_seconds"] > 0
    picture = imread(folder / "coins.png")
    assert picture.shape[0] > 1000
    assert picture.shape[1] > 1000
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, 4).tolist()}) > 100
    return summary


def test_quick_run(tmp_path, capsys):
    assert demo.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    summary = check_outputs(tmp_path / "out", demo.QUICK_STEPS)
    assert summary["held_out_coins"] == data.COINS_PER_HALF
    printed = capsys.readouterr().out
    assert "classical segmentation" in printed
    assert "AP@0.5" in printed


def test_a_full_run_without_coins_fails(tmp_path, monkeypatch, capsys):
    def run(*_):
        return {
            "precision": dict.fromkeys(("box_AP", "box_AP50", "mask_AP", "mask_AP50"), 0.5),
            "times": {
                f"{way}_{what}": 0.1
                for way in ("glimpse_ext", "grid_sample")
                for what in ("step_seconds", "share")
            },
            "seconds": 1.0,
        }

    monkeypatch.setattr(demo, "run", run)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "at least 0.8" in capsys.readouterr().out
    assert demo.main(["--out", str(tmp_path), "--steps", "10"]) == 0


def test_steps_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "--steps" in capsys.readouterr().err


@pytest.mark.slow
def test_full_run_finds_the_coins(tmp_path):
    assert demo.main(["--seed", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    precision = check_outputs(tmp_path, demo.STEPS)["precision"]
    assert precision["box_AP50"] >= 0.95
    assert precision["mask_AP50"] >= 0.95
