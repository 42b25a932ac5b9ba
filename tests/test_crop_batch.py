# SPDX-License-Identifier: BSD-3-Clause
"""crop_batch: against cropping and resizing one by one, and what its own options promise."""

from __future__ import annotations

import itertools
from math import inf, nan

import pytest
import torch
from cases import arrange, random_tensor
from conftest import CPU, Tolerance, assert_within
from torch import Tensor
from torch.nn.functional import interpolate

import glimpse_ext
from glimpse_ext import crop_batch, reference

F32, F64, U8 = torch.float32, torch.float64, torch.uint8

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Image, x1, y1, x2, y2: larger and smaller than the result, one pixel wide, the whole image.
WHOLE_BOXES = [
    (0, 3, 2, 45, 33),
    (1, 10, 5, 17, 12),
    (0, 0, 0, 50, 40),
    (1, 49, 0, 50, 40),
    (0, 7, 38, 31, 39),
    (1, 20, 10, 31, 17),
]
SHAPE = (2, 3, 40, 50)


def boxes_of(rows, dtype=F32, device="cpu") -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=device).reshape(-1, 5)


def one_by_one(image: Tensor, rows, size, antialias=True, pad="constant", fill=0.0) -> Tensor:
    """Cropping (with pixels around the image), then resizing, box by box; float64."""
    image = image.double()
    parts = []
    for n, x1, y1, x2, y2 in rows:
        left, top = max(-x1, 0), max(-y1, 0)
        right, bottom = max(x2 - image.shape[3], 0), max(y2 - image.shape[2], 0)
        around = (left, right, top, bottom)
        if pad == "constant":
            wide = torch.nn.functional.pad(image[n : n + 1], around, value=fill)
        else:
            wide = torch.nn.functional.pad(image[n : n + 1], around, mode="replicate")
        crop = wide[:, :, y1 + top : y2 + top, x1 + left : x2 + left]
        parts.append(interpolate(crop, size, mode="bilinear", antialias=antialias))
    return torch.cat(parts)


# ------------------------------------------------------------------- against cropping and resizing


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(11, 9), (7, 7), (42, 31), (1, 1), (64, 5)], ids=str)
def test_whole_boxes_are_cropped_and_resized(size, antialias, device, close):
    image = random_tensor(SHAPE, F64, "crop_batch").to(device.torch)
    boxes = boxes_of(WHOLE_BOXES, F64, device.torch)
    got = crop_batch(image, boxes, size, antialias=antialias, dtype=F64)
    close(got, one_by_one(image, WHOLE_BOXES, size, antialias))


@pytest.mark.parametrize("dtype", [U8, F32, torch.float16, torch.bfloat16], ids=str)
def test_float32_is_as_near_as_rounding(dtype, device):
    image = random_tensor(SHAPE, dtype, "crop_batch").to(device.torch)
    scale = 255.0 if dtype == U8 else 1.0
    got = crop_batch(image, boxes_of(WHOLE_BOXES, F32, device.torch), (11, 9))
    assert got.dtype == F32
    expected = one_by_one(image, WHOLE_BOXES, (11, 9)) / scale
    assert_within(got, expected, Tolerance(1e-6, 1e-6, "float32 weights and sums"), str(dtype))


@pytest.mark.parametrize("pad", ["constant", "border"])
def test_boxes_beyond_the_image(pad, device, close):
    """What torchvision's crop pads with zeros; and its other ways to pad."""
    rows = [(0, -5, -3, 20, 30), (1, 30, 20, 70, 60), (0, -30, -40, 90, 100), (1, -9, 5, -2, 9)]
    if pad == "border":
        rows = rows[:3]  # torch does not pad that far
    image = random_tensor(SHAPE, F64, "beyond").to(device.torch)
    for fill in (0.0, 0.375):
        got = crop_batch(
            image,
            boxes_of(rows, F64, device.torch),
            (11, 9),
            padding_mode=pad,
            fill=fill,
            dtype=F64,
        )
        close(got, one_by_one(image, rows, (11, 9), pad=pad, fill=fill), detail=f"fill {fill}")


def test_pil(device):
    """PIL's own filter, on 8-bit pictures, and its way to read around a box between pixels."""
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = random_tensor((1, 1, 40, 50), U8, "pil")
    picture = image_module.fromarray(image[0, 0].numpy()).convert("F")
    box = (3.25, 2.5, 45.75, 33.125)
    for corners in (box, (10.2, 5.1, 14.9, 12.4), (0, 0, 50, 40)):
        resized = picture.resize((9, 11), image_module.Resampling.BILINEAR, box=corners)
        expected = torch.frombuffer(bytearray(resized.tobytes()), dtype=F32).double().reshape(11, 9)
        boxes = torch.tensor([corners], dtype=F32, device=device.torch)
        got = crop_batch(image.to(device.torch), boxes, (11, 9), support="image", scale=1.0)
        assert (got[0, 0].cpu() - expected).abs().max() < 2e-4, corners


def test_torchvision_resizes_alike(device):
    """In float64 but for the last bits; the weights of torch are float32 for other pictures."""
    functional = pytest.importorskip(
        "torchvision.transforms.v2.functional", reason="torchvision is not installed"
    )
    image = random_tensor(SHAPE, U8, "torchvision").to(device.torch)
    rows = [*WHOLE_BOXES, (0, -5, -3, 20, 30), (1, 30, 20, 70, 60)]
    for dtype, limit in ((F64, 1e-12), (F32, 1e-4)):
        boxes = boxes_of(rows, dtype, device.torch)
        for size in ((11, 9), (50, 60)):
            expected = []
            for n, x1, y1, x2, y2 in rows:
                one = functional.crop(image[n], y1, x1, y2 - y1, x2 - x1)
                one = functional.to_dtype(one, dtype, scale=True)
                one = functional.resize(one, list(size), antialias=True)
                expected.append(functional.normalize(one, MEAN, STD))
            pictures = image if dtype == F32 else image.double() / 255
            got = crop_batch(pictures, boxes, size, mean=MEAN, std=STD, dtype=dtype)
            error = (got - torch.stack(expected)).abs().max()
            assert error < limit, f"{dtype}, {size}: {error}"


# ----------------------------------------------------------------------------- between the pixels


BOXES = [
    (0, 3.3, 2.7, 45.1, 33.9),
    (1, 10.25, 5.5, 14.75, 12.125),
    (0, -4.6, -3.2, 20.7, 30.1),
    (1, 30.2, 20.6, 70.4, 60.9),
    (0, 7.1, 8.2, 7.4, 8.9),
    (1, 6.9, 8.2, 7.2, 9.1),
    (0, 45.1, 33.9, 3.3, 2.7),
    (1, -200.5, -100.25, 300.5, 200.75),
    (0, 60.0, 5.0, 70.0, 9.0),
]


@pytest.mark.parametrize("support", ["box", "image"])
@pytest.mark.parametrize("pad", ["constant", "border"])
@pytest.mark.parametrize("antialias", [True, False])
def test_as_the_reference(support, pad, antialias, device, close):
    image = random_tensor(SHAPE, F64, "between").to(device.torch)
    boxes = boxes_of(BOXES, F64, device.torch)
    options = {"support": support, "padding_mode": pad, "antialias": antialias, "fill": 0.25}
    for size in ((11, 9), (3, 70)):
        got = crop_batch(image, boxes, size, dtype=F64, **options)
        close(
            got, reference.crop_batch(image.cpu(), boxes.cpu(), size, **options), detail=f"{size}"
        )


def test_a_box_that_moves_has_no_jumps(device):
    """From one whole box to the next one, in small steps: small steps of the result."""
    image = random_tensor((1, 1, 12, 14), F64, "moves").to(device.torch)
    steps = torch.linspace(0, 1, 257, dtype=F64)
    start, end = torch.tensor([2.0, 3, 9, 8]), torch.tensor([3.0, 4, 11, 9])
    boxes = (start + steps[:, None] * (end - start)).to(device.torch)
    for antialias in (True, False):
        got = crop_batch(image, boxes, (3, 4), antialias=antialias, dtype=F64)
        assert (got[1:] - got[:-1]).abs().max() < 0.06


def test_a_constant_image_stays_constant(device):
    image = torch.full((1, 3, 12, 14), 77, dtype=U8, device=device.torch)
    boxes = torch.tensor([[1.3, 2.2, 12.9, 11.7], [5.1, 5.2, 5.3, 5.4], [0, 0, 14, 12]])
    for size in ((3, 4), (30, 40)):
        got = crop_batch(image, boxes.to(device.torch), size, scale=1.0)
        assert (got - 77).abs().max() < 1e-4


# --------------------------------------------------------------------------------------- options


def test_normalised_as_said(device, close):
    image = random_tensor(SHAPE, U8, "normalised").to(device.torch)
    boxes = boxes_of(BOXES, F32, device.torch)
    plain = crop_batch(image, boxes, (11, 9), scale=1.0)
    mean, std = (torch.tensor(v, device=device.torch)[:, None, None] for v in (MEAN, STD))
    got = crop_batch(image, boxes, (11, 9), mean=MEAN, std=STD)
    assert ((plain / 255 - mean) / std - got).abs().max() < 2e-6
    got = crop_batch(image, boxes, (11, 9), mean=0.5, std=0.25, scale=2.0)
    assert ((plain * 2 - 0.5) / 0.25 - got).abs().max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_type_and_memory_of_the_result(dtype, memory, device, same_bits):
    image = random_tensor(SHAPE, U8, "result").to(device.torch)
    boxes = boxes_of(BOXES, F32, device.torch)
    plain = crop_batch(image, boxes, (11, 9), mean=MEAN, std=STD)
    got = crop_batch(image, boxes, (11, 9), mean=MEAN, std=STD, dtype=dtype, memory_format=memory)
    assert got.is_contiguous(memory_format=memory)
    if device.name == "simple" and dtype == F64:  # it sums in double, whatever it is asked for
        assert (got - plain).abs().max() < 1e-5
    else:
        same_bits(got, plain.to(dtype))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", [U8, F32, F64, torch.float16], ids=str)
def test_memory_of_the_images(channels, dtype, device, same_bits):
    """However the numbers lie, the bits are the same; also as a list."""
    image = random_tensor((2, channels, 21, 19), dtype, "memory").to(device.torch)
    rows = [(0, 3.3, 2.7, 15.1, 20.9), (1, -2, 5.5, 30.75, 12.125), (1, 18, 2, 19, 9)]
    boxes = boxes_of(rows, F32, device.torch)
    last = image.permute(0, 2, 3, 1).contiguous()
    padded = torch.nn.functional.pad(last, (0, 1))[..., :channels]
    results = [
        crop_batch(image, boxes, (6, 5)),
        crop_batch(arrange(image, "channels_last"), boxes, (6, 5)),
        crop_batch(arrange(image, "strided"), boxes, (6, 5)),
        crop_batch(last, boxes, (6, 5), input_format="NHWC"),
        crop_batch(padded, boxes, (6, 5), input_format="NHWC"),
        crop_batch(list(image), boxes, (6, 5)),
        crop_batch(list(last), boxes, (6, 5), input_format="NHWC"),
        crop_batch(image, boxes, (6, 5), memory_format=torch.channels_last),
    ]
    for i, other in enumerate(results[1:]):
        same_bits(other, results[0], f"way {i + 1}")


def make_list(dtype, device, count=35):
    sizes = [(9 + 3 * i % 17, 8 + 5 * i % 13) for i in range(count)]
    images = [random_tensor((3, *size), dtype, f"list {i}") for i, size in enumerate(sizes)]
    boxes = [
        torch.tensor([[1.25, 2, 6.5, 7]] * (i % 3), dtype=F32).reshape(-1, 4) for i in range(count)
    ]
    return [image.to(device.torch) for image in images], [b.to(device.torch) for b in boxes]


@pytest.mark.parametrize("dtype", [U8, F32], ids=str)
def test_a_list_of_images_of_many_sizes(dtype, device, same_bits):
    images, boxes = make_list(dtype, device)
    got = crop_batch(images, boxes, (5, 4), mean=MEAN, std=STD)
    expected = torch.cat(
        [
            crop_batch(image[None], own, (5, 4), mean=MEAN, std=STD)
            for image, own in zip(images, boxes, strict=True)
            if len(own)
        ]
    )
    same_bits(got, expected)
    index = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)]).to(device.torch)
    same_bits(
        crop_batch(images, torch.cat(boxes), (5, 4), image_index=index, mean=MEAN, std=STD), got
    )


def test_as_many_boxes_for_each_image(device, same_bits):
    images, _ = make_list(U8, device, 4)
    boxes = torch.tensor([[1.25, 2, 6.5, 7], [0, 0, 5, 5]] * 4, device=device.torch)
    got = crop_batch(images, boxes, 4)
    index = torch.arange(4, device=device.torch).repeat_interleave(2)
    same_bits(got, crop_batch(images, boxes, 4, image_index=index))


def test_flipped(device, close):
    image = random_tensor(SHAPE, F64, "flipped").to(device.torch)
    boxes = boxes_of(BOXES, F64, device.torch)
    plain = crop_batch(image, boxes, (11, 9), dtype=F64)
    close(crop_batch(image, boxes, (11, 9), dtype=F64, flip=True), plain.flip(3))
    flip = torch.arange(len(boxes), device=device.torch) % 2 == 0
    got = crop_batch(image, boxes, (11, 9), dtype=F64, flip=flip)
    close(got, torch.where(flip[:, None, None, None], plain.flip(3), plain))
    apart = crop_batch(
        image, boxes[:, 1:], (11, 9), dtype=F64, flip=flip, image_index=boxes[:, 0].long()
    )
    close(apart, got)


def test_reversed_boxes_mirror(device, close):
    image = random_tensor(SHAPE, F64, "mirror").to(device.torch)
    box = torch.tensor([[3.3, 2.7, 45.1, 33.9]] * 2, dtype=F64, device=device.torch)
    plain = crop_batch(image, box, (11, 9), dtype=F64)
    for order, dims in (((2, 1, 0, 3), (3,)), ((0, 3, 2, 1), (2,)), ((2, 3, 0, 1), (2, 3))):
        got = crop_batch(image, box[:, list(order)], (11, 9), dtype=F64)
        close(got, plain.flip(dims))


# --------------------------------------------------------------------------------- hostile boxes


@pytest.mark.parametrize("pad", ["constant", "border"])
@pytest.mark.parametrize("dtype", [U8, F32, F64], ids=str)
def test_boxes_that_are_none(pad, dtype, device):
    """They are the fill value, scaled; and the box beside them is what it is alone."""
    good = (0.0, 1.5, 2.5, 9.0, 8.0)
    bad = [
        (0.0, *good[1:i], value, *good[i + 1 :]) for i in range(1, 5) for value in (nan, inf, -inf)
    ]
    bad += [(0.0, 3, 2, 3, 7), (0.0, 3, 2, 7, 2)]
    image = random_tensor((1, 3, 12, 14), dtype, "hostile").to(device.torch)
    options = {"padding_mode": pad, "fill": 3.0, "scale": 0.5, "mean": 0.25}
    wide = F64 if dtype == F64 else F32
    got = crop_batch(image, boxes_of([good, *bad], wide, device.torch), (4, 5), **options)
    assert torch.equal(got[1:], torch.full_like(got[1:], 1.25))
    alone = crop_batch(image, boxes_of([good], wide, device.torch), (4, 5), **options)
    assert torch.equal(got[:1], alone)


@pytest.mark.parametrize("support", ["box", "image"])
@pytest.mark.parametrize("pad", ["constant", "border"])
def test_huge_boxes(support, pad, device):
    """A cost of the image, not of the box; a mean of the padding, mostly."""
    image = torch.full((1, 2, 12, 14), 2.0, device=device.torch)
    rows = [
        (0, -1e9, -1e9, 1e9, 1e9),
        (0, 2, -1e30, 5, 1e30),
        (0, -3e38, 1, 3e38, 5),
        (0, 1e20, 1, 2e20, 5),
        (0, 16777216.0, 1, 16777218.0, 5),
        (0, -50, -60, 70, 80),
    ]
    got = crop_batch(
        image,
        boxes_of(rows, F32, device.torch),
        (3, 4),
        support=support,
        padding_mode=pad,
        fill=1.0,
        memory_format=torch.channels_last,
    )
    assert got.isfinite().all()
    assert (got > 0.999).all()
    assert (got < 2.001).all()
    if pad == "border":
        assert (got[[0, 1, 3, 5]] - 2).abs().max() < 1e-3


def test_pixels_outside_the_box_do_not_count(device):
    """Not even if they are NaN."""
    image = torch.full((1, 2, 12, 14), nan, dtype=F32, device=device.torch)
    image[:, :, 3:9, 4:11] = random_tensor((1, 2, 6, 7), F32, "inside").to(device.torch)
    boxes = torch.tensor([[4.0, 3, 11, 9], [5, 4, 6, 5], [4.25, 3.5, 10.5, 8.75]])
    for size, antialias in itertools.product(((3, 2), (6, 7), (13, 15)), (True, False)):
        got = crop_batch(image, boxes.to(device.torch), size, antialias=antialias)
        assert got.isfinite().all(), (size, antialias)


def test_a_bad_image_index(device):
    image = random_tensor((2, 3, 12, 14), U8, "index").to(device.torch)
    images = list(image)
    for which in (image, images):
        boxes = boxes_of([(0, 1, 1, 5, 5), (2, 1, 1, 5, 5), (-1, 1, 1, 5, 5)], F32, device.torch)
        if device.raises_on_bad_index:
            with pytest.raises(RuntimeError, match="crop_batch: box 1 refers to image 2"):
                crop_batch(which, boxes, 3)
        else:
            got = crop_batch(which, boxes, 3, fill=51.0)
            assert (got[1:] - 51 / 255).abs().max() < 1e-6


def test_nothing_to_do(device):
    image = random_tensor((1, 3, 12, 14), U8, "nothing").to(device.torch)
    none = torch.zeros(0, 5, device=device.torch)
    assert crop_batch(image, none, (3, 4)).shape == (0, 3, 3, 4)
    one = boxes_of([(0, 1, 1, 5, 5)], F32, device.torch)
    assert crop_batch(image, one, (0, 4)).shape == (1, 3, 0, 4)
    assert crop_batch(image[:, :0], one, (3, 4)).shape == (1, 0, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"images": torch.zeros(3, 4, 4)}, RuntimeError, "images must be"),
        ({"images": []}, ValueError, "non-empty list"),
        ({"images": [torch.zeros(1, 3, 4, 4)]}, RuntimeError, r"images\[0\] must be"),
        ({"images": [torch.zeros(3, 4, 4), torch.zeros(2, 4, 4)]}, RuntimeError, "channel count"),
        ({"images": [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4).double()]}, RuntimeError, "dtype"),
        ({"images": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, RuntimeError, "int32"),
        ({"images": 3}, TypeError, "images must be"),
        ({"boxes": torch.zeros(1, 3)}, RuntimeError, r"boxes must be \[K, 5\]"),
        ({"boxes": torch.zeros(1, 5).long()}, RuntimeError, "boxes must be float"),
        ({"mean": (0.5, 0.5)}, RuntimeError, "offset|multiplier"),
        ({"mean": (0.5, 0.5), "std": (1, 1, 1)}, ValueError, "same length"),
        ({"std": 0.0}, ValueError, "zero"),
        ({"flip": torch.zeros(3, dtype=torch.bool)}, ValueError, "flip"),
        ({"dtype": torch.int32}, ValueError, "dtype"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format"),
        ({"input_format": "CHW"}, ValueError, "input_format"),
        ({"support": "all"}, ValueError, "support"),
        ({"padding_mode": "reflect"}, ValueError, "padding_mode"),
        ({"output_size": 2.5}, TypeError, "output_size"),
        ({"boxes": [torch.zeros(1, 4)], "image_index": torch.zeros(1)}, TypeError, "image_index"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(arguments, error, words):
    given = {"images": torch.zeros(1, 3, 4, 4), "boxes": torch.zeros(1, 5), "output_size": 2}
    with pytest.raises(error, match=f"crop_batch: .*{words}|{words}"):
        crop_batch(**{**given, **arguments})


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [U8, F32, torch.float16], ids=str)
def test_values_are_the_same_where_gradients_are_wanted(dtype, device, same_bits):
    image = random_tensor(SHAPE, dtype, "wanted").to(device.torch)
    boxes = boxes_of(BOXES, F32, device.torch)
    plain = crop_batch(image, boxes, (11, 9), mean=MEAN, std=STD, fill=0.5)
    same_bits(
        crop_batch(image, boxes.requires_grad_(), (11, 9), mean=MEAN, std=STD, fill=0.5).detach(),
        plain,
    )


def gradient_case(device, count):
    images = [random_tensor((2, 6 + i % 4, 7), F64, f"gradients {i}") for i in range(count)]
    leaves = [image.to(device.torch).requires_grad_() for image in images]
    corners = random_tensor((2 * count, 4), F64, "corners")
    boxes = torch.cat([corners[:, :2] + 1.51, corners[:, 2:] * 2 + 5.53], 1)
    index = torch.arange(2 * count)[:, None] % count
    boxes = torch.cat([index + 0.5, boxes], 1).to(device.torch)
    options = {"mean": (0.1, 0.2), "std": (0.5, 0.7), "fill": 0.75, "dtype": F64}
    return leaves, boxes.requires_grad_(), options


@pytest.mark.parametrize("count", [1, 3, 10])
def test_gradients_of_lists(count, device, close):
    """More images than a pyramid has levels; images that no box reads."""
    leaves, boxes, options = gradient_case(device, count)
    flip = torch.arange(len(boxes), device=device.torch) % 2 == 0
    got = crop_batch(leaves, boxes, (3, 4), flip=flip, **options)
    right = reference.crop_batch(leaves, boxes, (3, 4), flip=flip, **options)
    close(got, right)
    g = random_tensor(tuple(got.shape), F64, "g").to(device.torch)
    ours = torch.autograd.grad(got, [boxes, *leaves], g)
    wanted = torch.autograd.grad(right, [boxes, *leaves], g)
    for a, b in zip(ours, wanted, strict=True):
        close(a, b, "gradient")


@pytest.mark.parametrize("pad", ["constant", "border"])
@pytest.mark.parametrize("support", ["box", "image"])
def test_derivatives_against_differences(support, pad, device):
    leaves, boxes, options = gradient_case(device, 2)

    def function(boxes, *images):
        return crop_batch(list(images), boxes, (2, 3), support=support, padding_mode=pad, **options)

    assert torch.autograd.gradcheck(function, (boxes, *leaves))
    assert torch.autograd.gradcheck(
        function, (boxes, *leaves), check_forward_ad=True, check_backward_ad=False
    )


def test_second_derivatives(device, close):
    """Those in images and mixed ones exist; those in boxes are refused by name."""
    leaves, boxes, options = gradient_case(device, 1)
    image = leaves[0]

    def of_images(image):
        out = crop_batch(image[None], boxes.detach(), (2, 3), **options)
        return torch.autograd.grad(out.square().sum(), image, create_graph=True)[0]

    assert torch.autograd.gradcheck(of_images, (image,))

    def mixed(crop):
        still = boxes.detach().requires_grad_()
        (to_image,) = torch.autograd.grad(
            crop(image[None], still, (2, 3), **options).square().sum(), image, create_graph=True
        )
        return torch.autograd.grad(to_image.cos().sum(), still)[0]

    # The square has a second derivative in the boxes by its first one alone.
    close(mixed(crop_batch), mixed(reference.crop_batch), "gradient")

    out = crop_batch(image[None], boxes, (2, 3), **options)
    (to_boxes,) = torch.autograd.grad(out.square().sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="crop_batch: second derivatives in the boxes"):
        torch.autograd.grad(to_boxes.sum(), boxes)


def test_uint8_images_have_box_gradients(device, close):
    image = random_tensor(SHAPE, U8, "boxes").to(device.torch)
    boxes = boxes_of(BOXES[:3], F64, device.torch)

    def gradient(crop, image, **options):
        leaf = boxes.detach().clone().requires_grad_()
        out = crop(image, leaf, (3, 4), **options)
        return torch.autograd.grad(out.sum(), leaf)[0]

    got = gradient(crop_batch, image, scale=1 / 255)
    right = gradient(reference.crop_batch, image, scale=1 / 255)
    assert (got - right).abs().max() < 1e-4 * right.abs().max()


# ------------------------------------------------------------------------------------ many sizes


@pytest.mark.parametrize("dtype", [U8, F32], ids=str)
def test_threads_and_company_change_no_bit(dtype, same_bits):
    from test_determinism import threads

    image = random_tensor((2, 3, 120, 140), dtype, "threads")
    unit = random_tensor((9, 4), F32, "threads boxes") / 2 + 0.5
    boxes = torch.cat([unit[:, :2] * 60, unit[:, :2] * 60 + unit[:, 2:] * 90 + 1], 1)
    index = torch.arange(9) % 2

    def crop(some):
        own = (boxes[some], (61, 67))
        return crop_batch(image, *own, image_index=index[some], mean=MEAN, std=STD)

    with threads(1):
        one = crop(slice(None))
        alone = [crop(slice(k, k + 1)) for k in range(9)]
    same_bits(torch.cat(alone), one)
    for count in (2, 5):
        with threads(count):
            same_bits(crop(slice(None)), one)


@pytest.mark.parametrize("device", [CPU], ids=str, indirect=True)
def test_large_enlargements_and_reductions(device):
    """Rows of weights of every length that has a kernel, and of more."""
    image = random_tensor((1, 3, 90, 300), U8, "lengths")
    for width in (1, 2, 3, 17, 40, 60, 75, 100, 150, 299, 600):
        boxes = torch.tensor([[0.0, 0, 0, 300, 90], [0, 1.5, 3.25, 298.5, 80.125]])
        got = crop_batch(image, boxes, (5, width), scale=1.0)
        right = reference.crop_batch(image, boxes, (5, width), scale=1.0)
        assert (got - right).abs().max() < 3e-4, width


def test_the_module():
    module = glimpse_ext.nn.CropBatch(4, mean=MEAN, std=STD, input_format="NHWC")
    image = random_tensor((1, 9, 8, 3), U8, "module")
    boxes = torch.tensor([[1.0, 1, 6, 7]])
    got = module(image, boxes)
    assert torch.equal(got, crop_batch(image, boxes, 4, mean=MEAN, std=STD, input_format="NHWC"))
    assert "input_format='NHWC'" in repr(module)
