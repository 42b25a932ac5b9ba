# SPDX-License-Identifier: BSD-3-Clause
"""Pooled values: what must hold for any implementation, then the reference over every case."""

from __future__ import annotations

import functools

import cases
import pytest
import torch
from cases import CASES, MODES, PYRAMIDS, arrange, random_tensor
from conftest import compute_dtype

import glimpse_ext
from glimpse_ext import reference

F32, F64 = torch.float32, torch.float64


def uniform(shape, low, high, seed):
    return (random_tensor(shape, F64, seed) + 1) / 2 * (high - low) + low


def middles(cells):
    return (torch.arange(cells, dtype=F64) + 0.5) / cells


def inner_boxes(count, height, width, seed, margin=1.0):
    """Boxes at a distance from the edge of the image, so that every sample reads two pixels."""
    corners = uniform((count, 2, 2), 0, 1, seed).sort(dim=1).values
    x = corners[:, :, 0] * (width - 2 * margin) + margin
    y = corners[:, :, 1] * (height - 2 * margin) + margin
    index = torch.zeros(count, dtype=F64)
    return torch.stack([index, x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


# ------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_constant_image_stays_constant_inside(mode, device, dtype):
    boxes = inner_boxes(5, 12, 10, "constant", margin=1.5).to(device.torch)
    image = torch.full((1, 2, 12, 10), 0.625, dtype=dtype, device=device.torch)
    pooled = glimpse_ext.roi_align(image, boxes, (3, 2), 1.0, mode.sampling_ratio, mode.aligned)
    # Weights of thirds do not add up to exactly 1.
    bound = {F64: 1e-15, F32: 4e-7}.get(dtype, 0)
    assert (pooled - 0.625).abs().max() <= bound


@pytest.mark.parametrize("ratio", [-1, 1, 3])
@pytest.mark.parametrize("aligned", [False, True])
def test_a_ramp_is_read_at_the_middle_of_the_cell(ratio, aligned, device, close):
    """Bilinear samples of a linear image are exact and placed evenly: their mean is the middle."""
    height, width = 11, 14
    y, x = torch.meshgrid(
        torch.arange(height, dtype=F64), torch.arange(width, dtype=F64), indexing="ij"
    )
    image = torch.stack([x, y, 3 * x - 2 * y + 1])[None].to(device.torch)
    boxes = inner_boxes(6, height - 1, width - 1, "ramp")
    boxes[:, 3:] = torch.maximum(boxes[:, 3:], boxes[:, 1:3] + 1)
    boxes[:, 3:] = torch.minimum(boxes[:, 3:], torch.tensor([width - 1.0, height - 1.0], dtype=F64))
    pooled = glimpse_ext.roi_align(image, boxes.to(device.torch), (3, 4), 1.0, ratio, aligned).cpu()
    _, x1, y1, x2, y2 = (column[:, None] for column in boxes.unbind(1))
    shift = 0.5 if aligned else 0.0
    middle_y = y1 + middles(3) * (y2 - y1) - shift
    middle_x = x1 + middles(4) * (x2 - x1) - shift
    at_y = middle_y[:, :, None].expand(-1, -1, 4)
    at_x = middle_x[:, None, :].expand(-1, 3, -1)
    expected = torch.stack([at_x, at_y, 3 * at_x - 2 * at_y + 1], dim=1)
    assert (boxes[:, 3] - boxes[:, 1]).min() >= 1, "narrower boxes would be widened by legacy mode"
    close(pooled, expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_shift_of_image_and_box_changes_nothing(mode, device, close):
    image = random_tensor((1, 2, 8, 9), F64, "shift")
    boxes = inner_boxes(4, 8, 9, "shift boxes", margin=2)
    # Eighths: adding whole numbers to them does not round.
    boxes = (boxes * 8).round() / 8
    moved = torch.zeros(1, 2, 20, 20, dtype=F64)
    moved[:, :, 5:13, 7:16] = image
    moved_boxes = boxes + torch.tensor([0, 7.0, 5, 7, 5], dtype=F64)
    arguments = ((2, 3), 1.0, mode.sampling_ratio, mode.aligned)
    here = glimpse_ext.roi_align(image.to(device.torch), boxes.to(device.torch), *arguments)
    there = glimpse_ext.roi_align(moved.to(device.torch), moved_boxes.to(device.torch), *arguments)
    close(there, here)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_x_and_y_are_treated_alike(case, mode, device, close):
    image, boxes = case.image().to(device.torch), case.boxes().to(device.torch)
    arguments = (case.spatial_scale, mode.sampling_ratio, mode.aligned)
    pooled = glimpse_ext.roi_align(image, boxes, case.output_size, *arguments)
    turned = glimpse_ext.roi_align(
        image.transpose(2, 3), boxes[:, [0, 2, 1, 4, 3]], case.output_size[::-1], *arguments
    )
    close(turned.transpose(2, 3), pooled)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_a_reversed_box_is_a_mirrored_crop(ratio, device, close):
    image = random_tensor((1, 2, 8, 9), F64, "mirror").to(device.torch)
    boxes = inner_boxes(4, 8, 9, "mirror boxes").to(device.torch)
    pooled = glimpse_ext.roi_align(image, boxes, (3, 4), 1.0, ratio, aligned=True)
    flips = {(3,): [0, 3, 2, 1, 4], (2,): [0, 1, 4, 3, 2], (2, 3): [0, 3, 4, 1, 2]}
    for axes, columns in flips.items():
        flipped = glimpse_ext.roi_align(image, boxes[:, columns], (3, 4), 1.0, ratio, aligned=True)
        close(flipped, pooled.flip(axes), detail=f"reversed along {axes}")


@pytest.mark.parametrize("aligned", [False, True])
def test_samples_of_a_cell_are_the_cells_of_a_finer_grid(aligned, device, close):
    image = random_tensor((1, 2, 8, 9), F64, "finer").to(device.torch)
    boxes = inner_boxes(4, 8, 9, "finer boxes")
    boxes[:, 3:] += 1.25
    boxes = boxes.to(device.torch)
    pooled = glimpse_ext.roi_align(image, boxes, (3, 2), 1.0, 4, aligned)
    fine = glimpse_ext.roi_align(image, boxes, (12, 8), 1.0, 1, aligned)
    close(torch.nn.functional.avg_pool2d(fine, 4), pooled)


def test_one_aligned_sample_is_grid_sample(device, close):
    """The relation to another operator of torch: align_corners=False, padding_mode="border"."""
    height, width = 8, 9
    image = random_tensor((1, 3, height, width), F64, "grid").to(device.torch)
    boxes = inner_boxes(5, height, width, "grid boxes", margin=-0.4)
    pooled = glimpse_ext.roi_align(image, boxes.to(device.torch), (3, 4), 1.0, 1, aligned=True)
    _, x1, y1, x2, y2 = (column[:, None] for column in boxes.unbind(1))
    y = (y1 + middles(3) * (y2 - y1)) / height * 2 - 1
    x = (x1 + middles(4) * (x2 - x1)) / width * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, 3, -1), y[:, :, None].expand(-1, -1, 4)], dim=-1)
    expected = torch.nn.functional.grid_sample(
        image.cpu().expand(5, -1, -1, -1), grid, "bilinear", "border", align_corners=False
    )
    close(pooled, expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_pooling_is_linear_in_the_image(mode, device, close):
    case = CASES[1]
    a, b = case.image().to(device.torch), case.image(salt="other").to(device.torch)
    boxes = case.boxes().to(device.torch)

    def pool(image):
        return glimpse_ext.roi_align(image, boxes, 3, 1.0, mode.sampling_ratio, mode.aligned)

    close(pool(3 * a - 0.5 * b), 3 * pool(a) - 0.5 * pool(b))


def test_the_picture_in_the_docstring(device):
    """Box 1..3, four cells, one sample each, on an image whose pixels hold their own index."""
    image = torch.arange(4.0, device=device.torch).expand(1, 1, 4, 4)
    boxes = torch.tensor([[0.0, 1, 1, 3, 3]], device=device.torch)
    aligned = glimpse_ext.roi_align(image, boxes, (1, 4), sampling_ratio=1, aligned=True)
    assert aligned.flatten().tolist() == [0.75, 1.25, 1.75, 2.25]
    legacy = glimpse_ext.roi_align(image, boxes, (1, 4), sampling_ratio=1)
    assert legacy.flatten().tolist() == [1.25, 1.75, 2.25, 2.75]


# ------------------------------------------------------------------------- equals the reference


@functools.cache
def expected_pooled(case, mode, dtype):
    """The reference does not depend on device and layout, so it runs once for all of them."""
    wide = compute_dtype(dtype)
    arguments = (case.output_size, case.spatial_scale, mode.sampling_ratio, mode.aligned)
    return reference.roi_align(case.image(dtype), case.boxes(wide), *arguments, dtype=wide)


@functools.cache
def expected_multiscale(name, aligned, assign, dtype):
    pyramid = next(p for p in PYRAMIDS if p.name == name)
    wide = compute_dtype(dtype)
    return reference.multiscale_roi_align(
        pyramid.features(dtype),
        pyramid.boxes(wide),
        pyramid.output_size,
        pyramid.scales,
        2,
        aligned,
        assign=assign,
        **pyramid.rule,
        dtype=wide,
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, mode, device, dtype, layout, close):
    image = arrange(case.image(dtype).to(device.torch), layout)
    boxes = case.boxes(compute_dtype(dtype)).to(device.torch)
    arguments = (case.output_size, case.spatial_scale, mode.sampling_ratio, mode.aligned)
    pooled = glimpse_ext.roi_align(image, boxes, *arguments)
    assert pooled.dtype == dtype
    close(pooled, expected_pooled(case, mode, dtype))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_uint8_image_equals_reference(case, mode, device, layout, close):
    image = arrange(case.image(torch.uint8).to(device.torch), layout)
    boxes = case.boxes(F32).to(device.torch)
    arguments = (case.output_size, case.spatial_scale, mode.sampling_ratio, mode.aligned)
    pooled = glimpse_ext.roi_align(image, boxes, *arguments)
    assert pooled.dtype == F32
    close(pooled, expected_pooled(case, mode, torch.uint8))


@pytest.mark.parametrize("boxes_dtype", [F64, F32, torch.float16, torch.bfloat16], ids=str)
def test_boxes_of_another_dtype(boxes_dtype, dtype, device, close):
    """Boxes keep their own numbers: they are not rounded to the dtype of the image."""
    case = CASES[0]
    image, boxes = case.image(dtype).to(device.torch), case.boxes(boxes_dtype).to(device.torch)
    pooled = glimpse_ext.roi_align(image, boxes, case.output_size, 1.0, 2)
    same = boxes.to(compute_dtype(dtype))
    expected = reference.roi_align(
        image.cpu(), same.cpu(), case.output_size, 1.0, 2, dtype=compute_dtype(dtype)
    )
    assert pooled.dtype == dtype
    close(pooled, expected)


@pytest.mark.parametrize("assign", ["torchvision", "detectron2"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("pyramid", PYRAMIDS, ids=str)
def test_multiscale_equals_reference(pyramid, aligned, assign, device, dtype, layout, close):
    features = [arrange(f.to(device.torch), layout) for f in pyramid.features(dtype)]
    boxes = pyramid.boxes(compute_dtype(dtype)).to(device.torch)
    arguments = (pyramid.output_size, pyramid.scales, 2, aligned)
    pooled = glimpse_ext.multiscale_roi_align(
        features, boxes, *arguments, assign=assign, **pyramid.rule
    )
    assert pooled.dtype == dtype
    close(pooled, expected_multiscale(pyramid.name, aligned, assign, dtype))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_multiscale_with_levels_of_the_caller(index_dtype, device, close):
    pyramid = PYRAMIDS[0]
    features = [f.to(device.torch) for f in pyramid.features()]
    boxes = pyramid.boxes().to(device.torch)
    levels = torch.tensor([2, 0, -1, 3, 1], dtype=index_dtype, device=device.torch)
    arguments = (pyramid.output_size, pyramid.scales)
    pooled = glimpse_ext.multiscale_roi_align(features, boxes, *arguments, levels=levels)
    expected = reference.multiscale_roi_align(
        [f.cpu() for f in features], boxes.cpu(), *arguments, levels=levels.cpu()
    )
    close(pooled, expected)
    assert not pooled[2:4].any(), "a level that does not exist gives zeros"
    assert pooled[[0, 1, 4]].any()


def test_multiscale_is_roi_align_on_the_level_of_the_box(device, same_bits):
    pyramid = PYRAMIDS[0]
    features = [f.to(device.torch) for f in pyramid.features(F32)]
    boxes = pyramid.boxes(F32).to(device.torch)
    levels = reference.assign_levels(boxes.cpu(), pyramid.scales, **pyramid.rule).tolist()
    assert set(levels) == {0, 1, 2}
    pooled = glimpse_ext.multiscale_roi_align(
        features, boxes, pyramid.output_size, pyramid.scales, **pyramid.rule
    )
    for k, level in enumerate(levels):
        alone = glimpse_ext.roi_align(
            features[level], boxes[k : k + 1], pyramid.output_size, pyramid.scales[level], 2
        )
        same_bits(pooled[k : k + 1], alone, f"box {k} on level {level}")


@pytest.mark.parametrize("levels", [1, 8])
def test_one_and_the_most_levels(levels, device, close):
    sizes = tuple((2 + 3 * i, 3 + 2 * i) for i in range(levels, 0, -1))
    pyramid = cases.Pyramid(
        "many", PYRAMIDS[0].rows, sizes, tuple(2.0 ** -(i + 1) for i in range(levels))
    )
    features = [f.to(device.torch) for f in pyramid.features()]
    boxes = pyramid.boxes().to(device.torch)
    arguments = (pyramid.output_size, pyramid.scales, 2, True, 8, 2)
    pooled = glimpse_ext.multiscale_roi_align(features, boxes, *arguments)
    expected = reference.multiscale_roi_align([f.cpu() for f in features], boxes.cpu(), *arguments)
    close(pooled, expected)


# ------------------------------------------------------------------------------------ arguments


def test_one_number_is_both_sizes(device, same_bits):
    case = CASES[0]
    image, boxes = case.image(F32).to(device.torch), case.boxes(F32).to(device.torch)
    same_bits(glimpse_ext.roi_align(image, boxes, 3), glimpse_ext.roi_align(image, boxes, (3, 3)))


@pytest.mark.parametrize("kind", [list, tuple])
def test_boxes_as_one_tensor_per_image(kind, device, same_bits):
    image = random_tensor((4, 2, 7, 7), F32, "list").to(device.torch)
    rows = [
        [[1.0, 1.0, 4.0, 5.0], [0.0, 0.5, 3.0, 3.0]],
        [],
        [[2.0, 2.0, 5.0, 5.5]],
    ]  # one entry fewer than images: the last image has no boxes
    per_image = kind(torch.tensor(r, device=device.torch).reshape(-1, 4) for r in rows)
    matrix = torch.tensor(
        [[i, *row] for i, boxes in enumerate(rows) for row in boxes], device=device.torch
    )
    pooled = glimpse_ext.roi_align(image, per_image, 2)
    same_bits(pooled, glimpse_ext.roi_align(image, matrix, 2))
    maps = [image, image[:, :, ::2, ::2]]
    pooled = glimpse_ext.multiscale_roi_align(maps, per_image, 2, (1, 0.5), canonical_size=4)
    same_bits(pooled, glimpse_ext.multiscale_roi_align(maps, matrix, 2, (1, 0.5), canonical_size=4))


def test_a_list_of_16_bit_boxes_counts_images_beyond_256(device):
    """bfloat16 holds no 257: the image of a box must not be rounded with the box."""
    image = (
        torch.arange(300, dtype=F32, device=device.torch).reshape(300, 1, 1, 1).expand(300, 1, 2, 2)
    )
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=torch.bfloat16, device=device.torch)
    pooled = glimpse_ext.roi_align(image, [box] * 300, 1)
    assert pooled.flatten().tolist() == list(range(300))


def test_a_mapping_of_features(device, same_bits):
    pyramid = PYRAMIDS[0]
    features = [f.to(device.torch) for f in pyramid.features(F32)]
    boxes = pyramid.boxes(F32).to(device.torch)
    named = dict(zip(("p3", "p2", "p1"), features, strict=True))
    arguments = (boxes, pyramid.output_size, pyramid.scales)
    same_bits(
        glimpse_ext.multiscale_roi_align(named, *arguments),
        glimpse_ext.multiscale_roi_align(features, *arguments),
    )


def test_the_memory_format_of_the_result(device):
    case = CASES[0]
    boxes = case.boxes(F32).to(device.torch)
    for layout, expected in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        image = arrange(case.image(F32).to(device.torch), layout)
        pooled = glimpse_ext.roi_align(image, boxes, case.output_size)
        assert pooled.is_contiguous(memory_format=expected), layout
        pooled = glimpse_ext.multiscale_roi_align([image, image], boxes, 2, (1, 0.5))
        assert pooled.is_contiguous(memory_format=expected), layout


def test_the_arguments_are_not_written(device):
    case = CASES[1]
    image, boxes = case.image(F32).to(device.torch), case.boxes(F32).to(device.torch)
    before = image.clone(), boxes.clone()
    glimpse_ext.roi_align(image, boxes, 3)
    assert torch.equal(image, before[0])
    assert torch.equal(boxes, before[1])


def test_read_only_and_expanded_tensors(device, same_bits):
    """Strides of zero are strides like any other."""
    case = CASES[0]
    row = case.image(F32).to(device.torch)[:1, :1, :1]
    expanded = row.expand(2, 3, 9, 7)
    boxes = case.boxes(F32).to(device.torch)
    same_bits(
        glimpse_ext.roi_align(expanded, boxes[:1].expand(4, 5), 2),
        glimpse_ext.roi_align(expanded.contiguous(), boxes[:1].repeat(4, 1), 2),
    )
