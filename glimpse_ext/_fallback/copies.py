# SPDX-License-Identifier: BSD-3-Clause
"""extract_glimpse and paste_masks in plain PyTorch: what is no product with tables."""

from __future__ import annotations

import torch
from torch import Tensor

from .._sampling import is_channels_last
from ..reference import coco_mask, pack_bits
from . import geometry
from .checks import (
    LARGEST_SIDE,
    check,
    check_box_numbers,
    check_output_size,
    check_same_device,
    check_storage,
    dtype_name,
    is_float,
)
from .geometry import Axis, Border, GlimpseRule, Taps
from .separable import compute_dtype, glimpse_rule

_ZERO, _UNIFORM, _GAUSSIAN = range(3)


# ---------------------------------------------------------------------------------------------
# Glimpses of whole pixels, and noise.h around them


def _spans(rule: GlimpseRule, offset: Tensor, size: int, extent: int) -> list[tuple[int, int, int]]:
    """GlimpseSpan of each image: first pixel, and the cells begin <= i < end that are pixels."""
    spans = []
    for origin in geometry.truncated(rule.origin(offset, size, extent)).tolist():
        first = int(origin) if abs(origin) < 2**63 else size
        if first >= size or first <= -extent:
            spans.append((0, 0, 0))
        else:
            spans.append((first, max(-first, 0), min(size - first, extent)))
    return spans


def _philox(seed: int, *counters: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of four random words of a counter; int64 holds 32-bit numbers."""
    mask = 0xFFFFFFFF

    def multiplied(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
        # Products of 64 bits wrap around, and a shift of negative ones keeps what is masked here.
        product = word * factor
        return (product >> 32) & mask, product & mask

    c0, c1, c2, c3 = (c & mask for c in counters)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = multiplied(0xD2511F53, c0)
        high1, low1 = multiplied(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1


def _noise(image: Tensor, number: int, size: tuple[int, int], noise: int, seed: int) -> Tensor:
    """A field of noise of one image ``[C, H, W]``, in float64."""
    channels = image.shape[0]
    pixels = image.double().flatten(1)
    if pixels.numel() == 0:
        return pixels.new_full((channels, *size), torch.nan)
    c, y, x = torch.meshgrid(
        *(torch.arange(n, device=image.device) for n in (channels, *size)), indexing="ij"
    )
    word0, word1 = _philox(seed, x, y, c, torch.full_like(c, number))
    # 0 for -0.
    low, high = pixels.amin(1) + 0.0, pixels.amax(1) + 0.0
    if noise == _UNIFORM:
        low, high = low.amin(), high.amax()
        uniform = word0.double() * 2.0**-32
        # In halves, because the width of a range of finite numbers need not be finite.
        drawn = 2.0 * (low * 0.5 + uniform * (high * 0.5 - low * 0.5))
    else:
        low, high = low[:, None, None], high[:, None, None]
        mean = pixels.mean(1)
        deviation = (pixels - mean[:, None]).square().mean(1).sqrt()
        chance = (((word0 << 20) | (word1 >> 12)).double() + 0.5) * 2.0**-52
        drawn = mean[:, None, None] + deviation[:, None, None] * torch.special.ndtri(chance)
    return torch.where(drawn < low, low, torch.where(drawn > high, high, drawn))


def extract_glimpse(
    input: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    version: int,
    centered: bool,
    normalized: bool,
    noise: int,
) -> Tensor:
    name = "extract_glimpse"
    check(input.dim() == 4, name, "input must be [N, C, H, W], got ", input.shape)
    check(
        input.element_size() in (1, 2, 4, 8),
        name,
        "input must have elements of 1, 2, 4 or 8 bytes, got ",
        dtype_name(input.dtype),
    )
    check(
        max(input.shape[2:]) <= LARGEST_SIDE,
        name,
        "input height and width must fit in 32 bits, got ",
        input.shape,
    )
    check(
        offsets.shape == (len(input), 2),
        name,
        f"offsets must be [{len(input)}, 2] (y, x), got ",
        offsets.shape,
    )
    check(
        is_float(offsets),
        name,
        "offsets must be float64, float32, float16 or bfloat16, got ",
        dtype_name(offsets.dtype),
    )
    check_same_device(name, "offsets", offsets, input)
    rule = glimpse_rule(name, version, centered, normalized)
    size = check_output_size(name, (height, width))
    check(noise in range(3), name, f"does not know noise {noise}")
    number = 0
    if noise != _ZERO:
        check(
            is_float(input),
            name,
            "noise needs an image of float64, float32, float16 or bfloat16, got ",
            dtype_name(input.dtype),
            '; use noise="zero"',
        )
        check(
            seed is not None and seed.numel() == 1 and seed.dtype == torch.int64,
            name,
            "noise needs a seed, one int64 number",
        )
        assert seed is not None
        check_same_device(name, "the seed", seed, input)
        number = int(seed)
    memory = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    output = torch.empty(
        (len(input), input.shape[1], *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory,
    ).zero_()
    places = offsets.to(compute_dtype(offsets.dtype))
    windows = zip(
        _spans(rule, places[:, 0], input.shape[2], height),
        _spans(rule, places[:, 1], input.shape[3], width),
        strict=True,
    )
    for n, ((y, y0, y1), (x, x0, x1)) in enumerate(windows):
        image = input[n]
        if noise != _ZERO and (y1 - y0 < height or x1 - x0 < width):
            output[n] = _noise(image, n, size, noise, number)
        if y1 > y0 and x1 > x0:
            output[n, :, y0:y1, x0:x1] = image[:, y + y0 : y + y1, x + x0 : x + x1]
    return output


# ---------------------------------------------------------------------------------------------
# Masks


def _line(
    low: Tensor, high: Tensor, grow: float | None, mask: int, pixels: int
) -> tuple[Axis, Tensor]:
    """PasteLine: the axis of each mask along one direction, and the pixel that is its cell 0."""
    anchor = torch.zeros_like(low)
    if grow is not None:
        half, reach = (high + low) * 0.5, (high - low) * 0.5 * grow
        first, last = geometry.truncated(half - reach), geometry.truncated(half + reach)
        read = torch.isfinite(first) & torch.isfinite(last) & (last >= first)
        whole_first = torch.where(read, first, 0.0).to(torch.int64)
        covered = torch.where(read, last, 0.0).to(torch.int64) - whole_first + 1
        # Edges may be 64 bits apart.
        wide = (covered.double() + 2.0**64).to(low.dtype)
        # A tensor over a tensor: a number over one would be rounded twice.
        extent = torch.full_like(low, mask + 2)
        step = extent / torch.where(covered > 0, covered.to(low.dtype), wide)
        origin = (0.5 - whole_first.to(low.dtype)) * step - 1.5
        origin = torch.where(read, origin, torch.inf)
    else:
        anchor = torch.where((low > 0) & (low < pixels), low.trunc(), anchor)
        step = torch.full_like(low, mask) / ((high - anchor) - (low - anchor))
        origin = (0.5 - (low - anchor)) * step - 0.5
    return geometry.given_axis(origin, step), anchor.to(torch.int64)


def _reached(axis: Axis, anchor: Tensor, k: int, pixels: int, mask: int) -> tuple[Tensor, Taps]:
    """The pixels of the image that mask k reaches along a direction, and what they read."""
    pixel = torch.arange(pixels if int(axis.samples[k]) else 0, device=anchor.device)
    box = torch.full_like(pixel, k)
    position = axis.position(box, pixel - anchor[k], torch.zeros_like(pixel))
    taps = geometry.border_taps(Border(1.0, geometry.DROP), position, mask)
    reads = taps.there.any(1)
    return pixel[reads], Taps(*(t[reads] for t in taps))


def _met(taps: Taps, lines: Tensor) -> Tensor:
    """Taps of the lines ``[M, ...]``, each operation rounded once, as thresholds ask for."""
    shape = (-1,) + (1,) * (lines.dim() - 1)
    first, second = (lines[taps.pixel[:, i]] * taps.weight[:, i].reshape(shape) for i in range(2))
    one, two = (taps.there[:, i].reshape(shape) for i in range(2))
    return torch.where(one & two, first + second, torch.where(one, first, second))


class Pasting:
    """Masks on their way into images."""

    def __init__(
        self, name: str, masks: Tensor, boxes: Tensor, height: int, width: int, snapped: bool
    ) -> None:
        check(
            masks.dim() == 4 and masks.shape[1] == 1,
            name,
            "masks must be [N, Mh, Mw] or [N, 1, Mh, Mw], got ",
            masks.shape,
        )
        check(
            boxes.shape == (len(masks), 4),
            name,
            f"boxes must be [{len(masks)}, 4] (x1, y1, x2, y2), one for each mask, got ",
            boxes.shape,
        )
        check_box_numbers(name, boxes, masks)
        check(
            len(masks) == 0 or 0 not in masks.shape[2:],
            name,
            "masks must have at least one pixel, got ",
            masks.shape,
        )
        check(
            max(masks.shape[2:]) <= LARGEST_SIDE,
            name,
            "mask height and width must fit in 32 bits, got ",
            masks.shape,
        )
        if masks.dtype != torch.bool:
            check_storage(name, masks.dtype)
        self.height, self.width = check_output_size(name, (height, width))
        self.dtype = compute_dtype(masks.dtype)
        self.masks = masks
        rows, columns = self.mask_size = (masks.shape[2], masks.shape[3])
        grow = (columns + 2) / max(columns, 1) if snapped else None
        x1, y1, x2, y2 = boxes.to(self.dtype).unbind(1)
        self.lines = (
            _line(y1, y2, grow, rows, self.height),
            _line(x1, x2, grow, columns, self.width),
        )

    def values(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns of the image that mask k reaches, and the values there."""
        (axis_y, anchor_y), (axis_x, anchor_x) = self.lines
        rows, y = _reached(axis_y, anchor_y, k, self.height, self.mask_size[0])
        columns, x = _reached(axis_x, anchor_x, k, self.width, self.mask_size[1])
        mask = self.masks[k, 0].to(self.dtype)
        return rows, columns, _met(y, _met(x, mask.T).T)

    def empty(self, dtype: torch.dtype) -> Tensor:
        shape = (len(self.masks), 1, self.height, self.width)
        return torch.zeros(shape, dtype=dtype, device=self.masks.device)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, snapped: bool) -> Tensor:
    pasting = Pasting("paste_masks", masks, boxes, height, width, snapped)
    images = pasting.empty(masks.dtype if masks.is_floating_point() else torch.float32)
    for k in range(len(masks)):
        rows, columns, values = pasting.values(k)
        images[k, 0, rows[:, None], columns] = values.to(images.dtype)
    return images


def paste_masks_threshold(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, snapped: bool
) -> Tensor:
    return _thresholded("paste_masks", masks, boxes, height, width, threshold, snapped)


def _thresholded(
    name: str,
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float,
    snapped: bool,
) -> Tensor:
    pasting = Pasting(name, masks, boxes, height, width, snapped)
    images = pasting.empty(torch.bool if threshold >= 0 else torch.uint8)
    # In the precision of the values: 1e-50 is zero in float32.
    least = torch.tensor(threshold, dtype=pasting.dtype, device=masks.device)
    if threshold >= 0 and bool(least <= 0):
        images.fill_(True)
    for k in range(len(masks)):
        rows, columns, values = pasting.values(k)
        if threshold >= 0:
            images[k, 0, rows[:, None], columns] = values >= least
        else:
            scaled = (values * 255).nan_to_num(nan=0.0).clamp(0, 255)
            images[k, 0, rows[:, None], columns] = scaled.to(torch.uint8)
    return images


def paste_masks_to_bits(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, snapped: bool
) -> Tensor:
    name = "paste_masks_to_bits"
    check(threshold >= 0, name, f"threshold must be zero or more, got {threshold:g}")
    images = _thresholded(name, masks, boxes, height, width, threshold, snapped)
    return pack_bits(images)


def paste_masks_runs(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, snapped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = "paste_masks_to_rle"
    check(threshold >= 0, name, f"threshold must be zero or more, got {threshold:g}")
    images = _thresholded(name, masks, boxes, height, width, threshold, snapped)
    text, ends, areas, tight = b"", [], [], []
    for image in images[:, 0].cpu():
        counts, area, box = coco_mask(image)
        text += counts
        ends.append(len(text))
        areas.append(area)
        tight.append(box)
    count = len(ends)
    return (
        torch.tensor(list(text), dtype=torch.uint8),
        torch.tensor(ends, dtype=torch.int64).reshape(count, 1),
        torch.tensor(areas, dtype=torch.int64).reshape(count, 1),
        torch.tensor(tight, dtype=torch.int64).reshape(count, 4),
    )
