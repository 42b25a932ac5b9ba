# SPDX-License-Identifier: BSD-3-Clause
"""RoIAlign of rotated boxes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._arguments import check_indices, choose, join_boxes, size_pair
from ._autograd_frames import call_rotated

_COLUMNS = ("centre x", "centre y", "width", "height", "angle")
_IN_DEGREES = {"degrees": True, "radians": False}


def roi_align_rotated(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = True,
    clockwise: bool = False,
    angle_unit: str = "degrees",
) -> Tensor:
    """Mean of bilinear samples in each cell of each rotated box.

    With the defaults the numbers are those of detectron2's ``ROIAlignRotated``; with
    ``angle_unit="radians"`` those of mmcv's, ``aligned`` and ``clockwise`` being mmcv's arguments::

              ______                    ____
             | 1  2 |  angle 0        _/  2 \\_  angle 45: counter-clockwise, on a picture
             | 3  4 |                / 1    4 \\  with y pointing down; cells and their
             |______|                \\_  3  _/   samples turn with the box
                                       \\___/

    Args:
        input: ``[N, C, H, W]`` of float64, float32, float16, bfloat16 or uint8, any strides.
        boxes: ``[K, 6]`` rows of image index, centre x, centre y, width, height, angle, or a list
            with one ``[L, 5]`` tensor for each image. Centres are in edge units (pixel k covers k
            to k + 1) and sizes in pixels of the image that the feature map was made from. Any float
            dtype, independent of that of ``input``. The image index is truncated.
        output_size: cells per box, ``height, width`` or one number for both.
        spatial_scale: feature map pixels per image pixel.
        sampling_ratio: samples per cell and direction of the box. 0 or less: as many as the cell
            covers pixels, rounded up.
        aligned: whether centres are in edge units (True) or are read as pixel indices, half a pixel
            late, with sides of at least one pixel of the map (False).
        clockwise: whether positive angles turn with the clock.
        angle_unit: ``"degrees"`` or ``"radians"``. Quarter turns in degrees are exact.

    Returns:
        ``[K, C, height, width]`` in the dtype (uint8 gives float32) and memory format of
        ``input``: channels_last in, channels_last out. Coordinates and sums are float32, or
        float64 where ``input`` is; sine and cosine are taken in float64, with the same bits on
        every device.

    Samples farther than one pixel outside the map count as 0, nearer ones read the edge pixel.
    A box gives zeros where a number of it is NaN or infinite, where its angle is beyond 2**20
    quarter turns, and under adaptive sampling where a side is zero or negative. With a positive
    ``sampling_ratio`` a zero side puts the samples of a direction in one place, and a negative one
    mirrors the box. Samples that cannot be on the map are not looked at: a box of 1e9 pixels costs
    no more than one that covers the map at any angle, with at most about two samples per pixel and
    direction.

    Gradients:
        To ``input`` and ``boxes`` (centre, size and angle), in reverse and forward mode, under
        ``vmap`` and ``torch.func``, and the gradients of these. A third derivative in the boxes
        raises. Numbers of samples count as constant; the jump where samples leave the map has no
        derivative. Every result has the same bits in every run, at any number of threads.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; on CPU also an image index outside
            the batch. On CUDA such a box gives zeros; see :func:`set_check_indices`.
        ValueError, TypeError: a list of boxes, an output size or an angle unit that is none.

    Source:
        The CPU kernels of ``ROIAlignRotated`` of detectron2 and ``roi_align_rotated`` of mmcv.
        Numbers stored from both are tested.

    Differences from detectron2 and mmcv: boxes have gradients, box and image dtypes may differ,
    16-bit types, uint8 and channels_last are native, ``spatial_scale`` is not rounded to float32,
    and negative sides, NaN and huge boxes are defined.

    >>> import torch, glimpse_ext
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> boxes = torch.tensor([[0.0, 2.0, 2.0, 2.0, 2.0, 90.0]])
    >>> glimpse_ext.roi_align_rotated(image, boxes, output_size=2)
    tensor([[[[ 9.,  5.],
              [10.,  6.]]]])
    """
    name = "roi_align_rotated"
    boxes = join_boxes(name, boxes, _COLUMNS)
    height, width = size_pair(name, output_size)
    degrees = choose(name, "angle_unit", angle_unit, _IN_DEGREES)
    if input.dim() == 4:
        check_indices(name, boxes, input.shape[0])
    return call_rotated(
        input,
        boxes,
        spatial_scale,
        height,
        width,
        sampling_ratio,
        aligned,
        clockwise,
        degrees,
    )
