# SPDX-License-Identifier: BSD-3-Clause
"""Average precision on the held-out half, computed by pycocotools."""

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

import glimpse_ext

from .data import Half
from .detector import Detections


def _encode(mask: Tensor) -> dict[str, Any]:
    encoded: dict[str, Any] = rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return encoded


def _xywh(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def average_precision(half: Half, found: Detections) -> dict[str, float]:
    """COCO's AP (mean over overlaps 0.5 to 0.95), AP at 0.5 and at 0.75, of boxes and of masks."""
    height, width = half.image.shape
    truth = [
        {
            "id": number + 1,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": 0,
            "area": int(mask.sum()),
            "bbox": _xywh(box),
            "segmentation": _encode(mask),
        }
        for number, (box, mask) in enumerate(zip(half.boxes, half.masks, strict=True))
    ]
    pasted = glimpse_ext.paste_masks(found.masks, found.boxes, (height, width))
    results = [
        {
            "image_id": 1,
            "category_id": 1,
            "score": float(score),
            "bbox": _xywh(box),
            "segmentation": _encode(mask),
        }
        for box, score, mask in zip(found.boxes, found.scores, pasted, strict=True)
    ]
    precision = {}
    # pycocotools prints its progress and its tables; the demo has its own.
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = {
            "info": {},
            "images": [{"id": 1, "height": height, "width": width}],
            "categories": [{"id": 1, "name": "coin"}],
            "annotations": truth,
        }
        ground.createIndex()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            stats = [0.0] * 3
            if results:
                evaluation = COCOeval(ground, _load(ground, results, kind), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                stats = [float(value) for value in evaluation.stats[:3]]
            for label, value in zip(("AP", "AP50", "AP75"), stats, strict=True):
                precision[f"{name}_{label}"] = value
    return precision


def _load(ground: Any, results: list[dict[str, Any]], kind: str) -> Any:
    """`COCO.loadRes` takes the first key it knows of each result, so only one kind may be there."""
    dropped = "segmentation" if kind == "bbox" else "bbox"
    return ground.loadRes([{k: v for k, v in r.items() if k != dropped} for r in results])
