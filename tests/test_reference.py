# SPDX-License-Identifier: BSD-3-Clause
"""The reference on its own: its derivatives, its special boxes, the examples in its text."""

from __future__ import annotations

import doctest
import time

import cases
import pytest
import torch

from glimpse_ext import reference

F64 = torch.float64


def test_examples_in_the_docstrings():
    result = doctest.testmod(reference)
    assert result.attempted >= 6
    assert result.failed == 0


@pytest.mark.parametrize("mode", cases.MODES, ids=str)
@pytest.mark.parametrize("case", cases.SMOOTH_CASES, ids=str)
def test_derivatives_are_those_of_the_values(case, mode):
    """gradcheck and gradgradcheck: finite differences know nothing of the formulas."""
    image, boxes = case.image().requires_grad_(), case.boxes().requires_grad_()

    def pooled(image, boxes):
        return reference.roi_align(
            image, boxes, case.output_size, case.spatial_scale, mode.sampling_ratio, mode.aligned
        )

    assert torch.autograd.gradcheck(pooled, (image, boxes))
    assert torch.autograd.gradgradcheck(pooled, (image, boxes), fast_mode=True)


@pytest.mark.parametrize("mode", cases.MODES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_no_box_makes_a_number_that_is_not_one(case, mode):
    image, boxes = case.image().requires_grad_(), case.boxes().requires_grad_()
    pooled = reference.roi_align(
        image, boxes, case.output_size, case.spatial_scale, mode.sampling_ratio, mode.aligned
    )
    assert pooled.shape == case.pooled_shape
    assert pooled.isfinite().all()
    assert pooled.abs().max() <= 1, "a mean of values of at most 1"
    for gradient in torch.autograd.grad(pooled, (image, boxes), case.grad()):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("aligned", [False, True])
def test_a_box_of_a_billion_pixels_costs_little(aligned):
    boxes = torch.tensor([[0.0, -1e9, -1e9, 1e9, 1e9]], dtype=F64)
    started = time.perf_counter()
    pooled = reference.roi_align(torch.ones(1, 1, 8, 8), boxes, 7, 1.0, -1, aligned)
    assert time.perf_counter() - started < 2
    # Only the middle cell covers the image: 10 x 10 of its samples are on a pixel or next to one.
    assert torch.count_nonzero(pooled) == 1
    samples = -(-2e9 // 7)
    assert 81 <= pooled[0, 0, 3, 3] * samples**2 <= 121


@pytest.mark.parametrize("aligned", [False, True])
def test_more_samples_than_a_count_holds(aligned):
    too_many = torch.tensor([[0.0, -1e10, 0, 1e10, 4]], dtype=F64)
    assert not reference.roi_align(torch.ones(1, 1, 4, 4), too_many, 1, 1.0, -1, aligned).any()


def test_pixels_without_a_tap_are_not_read():
    """A dense product would spread the NaN: zero times NaN is NaN."""
    image = torch.full((1, 1, 6, 6), torch.nan)
    image[..., 1:3, 1:3] = 2.0
    boxes = torch.tensor([[0.0, 1.25, 1.25, 2.75, 2.75]], requires_grad=True)
    pooled = reference.roi_align(image, boxes, 2, 1.0, 1, aligned=True)
    assert torch.equal(pooled, torch.full((1, 1, 2, 2), 2.0, dtype=F64))
    assert torch.autograd.grad(pooled.sum(), boxes)[0].isfinite().all()


def test_image_index():
    image = torch.arange(1.0, 4.0).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    index = [0, 0.9, -0.9, 2.99, -1, 3, torch.nan, torch.inf, 1e30]
    boxes = torch.tensor([[i, 0, 0, 4, 4] for i in index])
    pooled = reference.roi_align(image, boxes, 1)
    assert pooled.flatten().tolist() == [1, 1, 1, 3, 0, 0, 0, 0, 0]
    with pytest.raises(IndexError, match=r"must be in \[0, 3\), got -1"):
        reference.roi_align(image, boxes, 1, bad_index="raise")


def test_list_of_boxes_is_the_matrix():
    image = cases.random_tensor((3, 2, 6, 6), F64, "list")
    per_image = [
        torch.tensor([[1.0, 1, 4, 5], [0, 0, 3, 3]]),
        torch.zeros(0, 4),
        torch.tensor([[2.0, 2, 5, 5]]),
    ]
    matrix = torch.tensor([[0.0, 1, 1, 4, 5], [0, 0, 0, 3, 3], [2, 2, 2, 5, 5]])
    assert torch.equal(
        reference.roi_align(image, per_image, 2), reference.roi_align(image, matrix, 2)
    )


def test_asked_for_dtype_is_the_dtype_of_positions():
    """The sample is a billionth beyond index 4, the last one that is kept; float32 cannot tell."""
    boxes = torch.tensor([[0.0, 3.5 + 1e-9, 0.0, 4.0, 1.0]], dtype=F64)
    for dtype, expected in ((F64, 0.0), (torch.float32, 1.0)):
        pooled = reference.roi_align(torch.ones(1, 1, 1, 4), boxes, 1, 1.0, 1, dtype=dtype)
        assert pooled.dtype == dtype
        assert pooled.item() == expected


@pytest.mark.parametrize(
    ("box", "torchvision", "detectron2"),
    [
        ((0, 0, 224, 224), 4, 4),
        ((0, 0, 224, 223.9999), 4, 3),
        ((0, 0, 112, 111.9999), 3, 2),
        ((0, 0, 112, 112), 3, 3),
        ((0, 0, 1, 1), 2, 2),
        ((0, 0, 0, 50), 2, 2),
        ((0, 0, 5000, 5000), 5, 5),
        ((10, 0, 0, 50), None, None),
        ((240, 240, 10, 10), 4, 4),
        ((torch.nan, 0, 10, 10), None, None),
    ],
)
def test_levels(box, torchvision, detectron2):
    boxes, scales = torch.tensor([box]), [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    for assign, level in (("torchvision", torchvision), ("detectron2", detectron2)):
        expected = -1 if level is None else level - 2
        assert reference.assign_levels(boxes, scales, assign=assign).tolist() == [expected], assign
    assert reference.assign_levels(boxes, scales[:1]).tolist() == [0]


def test_multiscale_is_a_loop_over_levels():
    pyramid = cases.PYRAMIDS[0]
    features, boxes = pyramid.features(), pyramid.boxes()
    levels = reference.assign_levels(boxes, pyramid.scales, **pyramid.rule)
    assert set(levels.tolist()) == {0, 1, 2}, "every level has a box"
    pooled = reference.multiscale_roi_align(
        features, boxes, pyramid.output_size, pyramid.scales, **pyramid.rule
    )
    for k, level in enumerate(levels.tolist()):
        alone = reference.roi_align(
            features[level], boxes[k : k + 1], pyramid.output_size, pyramid.scales[level], 2
        )
        assert torch.equal(pooled[k], alone[0])


def test_arguments_are_checked():
    image, boxes = torch.zeros(1, 1, 2, 2), torch.zeros(1, 5)
    for call, text in (
        (lambda: reference.roi_align(image[0], boxes, 1), "input must be"),
        (lambda: reference.roi_align(image, boxes[:, :4], 1), "boxes must be"),
        (lambda: reference.roi_align(image, [], 1), "empty list"),
        (lambda: reference.roi_align(image, [boxes], 1), r"boxes\[0\] must be"),
        (lambda: reference.roi_align(image, boxes, 1, bad_index="clamp"), "bad_index"),
        (lambda: reference.assign_levels(boxes, [1.0], assign="mean"), "assign"),
        (lambda: reference.assign_levels(boxes[:, :3], [1.0, 0.5]), "boxes must be"),
        (lambda: reference.multiscale_roi_align([image], boxes, 1, [1, 0.5]), "scales must be"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
