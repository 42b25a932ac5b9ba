# SPDX-License-Identifier: BSD-3-Clause
"""Pictures and masks of a data set in COCO's format, their order, and average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image, write_png
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

Key = tuple[int, int]
"""Epoch and index of a picture."""
Target = dict[str, Tensor]
Found = dict[int, list[dict[str, Any]]]
"""COCO results by the identifier of their picture."""


# -------------------------------------------------------------------------------------------- data


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """``[3, H, W]`` pixels in 0..1 and boxes, labels and masks of ``FOLDER/SPLIT``.

    Labels are 1..C in the order of COCO's identifiers. For training, crowds and boxes without a
    pixel are dropped, so are pictures with nothing left, and half of the pictures are mirrored:
    which ones depends on the seed and the key only, not on the process that loads them.
    """

    def __init__(self, folder: Path, split: str, train: bool, seed: int = 0) -> None:
        self.pictures = folder / split
        self.train = train
        self.seed = seed
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(folder / "annotations" / f"instances_{split}.json")
        self.categories: list[int] = sorted(self.coco.getCatIds())
        self.labels = {category: label + 1 for label, category in enumerate(self.categories)}
        self.ids = [i for i in sorted(self.coco.imgs) if not train or self.annotations(i)]

    def __len__(self) -> int:
        return len(self.ids)

    def annotations(self, image_id: int) -> list[dict[str, Any]]:
        """What is trained on."""
        found = self.coco.imgToAnns[image_id]
        return [a for a in found if not a["iscrowd"] and a["bbox"][2] >= 1 and a["bbox"][3] >= 1]

    def pixels(self, image_id: int) -> Tensor:
        path = self.pictures / self.coco.imgs[image_id]["file_name"]
        return decode_image(str(path), ImageReadMode.RGB)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        epoch, index = key
        image_id = self.ids[index]
        image = self.pixels(image_id).float() / 255
        target = {"image_id": torch.tensor(image_id)}
        if not self.train:
            return image, target
        found = self.annotations(image_id)
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.stack([torch.from_numpy(self.coco.annToMask(a)) for a in found])
        random = torch.Generator().manual_seed(mix(self.seed, epoch, index))
        if torch.rand((), generator=random) < 0.5:
            image, masks = image.flip(2), masks.flip(2)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
        target["boxes"] = boxes
        target["labels"] = torch.tensor([self.labels[a["category_id"]] for a in found])
        target["masks"] = masks
        return image, target


class Order(Sampler[list[Key]]):
    """The batches of one process in one epoch, from batch ``first`` on.

    Every epoch has another order of all pictures, which all processes know; they take turns batch
    by batch. What would be a smaller last batch is left out, so that all do the same number.
    """

    def __init__(self, count: int, batch: int, rank: int, world: int, seed: int) -> None:
        self.count, self.batch, self.rank, self.world, self.seed = count, batch, rank, world, seed
        self.epoch = self.first = 0
        self.batches = count // (batch * world)
        if self.batches == 0:
            raise SystemExit(f"{count} pictures are not one batch of {batch} for {world} processes")

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        random = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=random).tolist()
        for batch in range(self.first, self.batches):
            start = (batch * self.world + self.rank) * self.batch
            yield [(self.epoch, index) for index in order[start : start + self.batch]]


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in samples], [target for _, target in samples]


def load(dataset: CocoDetection, batches: Any, workers: int) -> DataLoader[Any]:
    # A loader draws its workers' seeds from the generator it is given, else from the global one,
    # whose state is that of the training.
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


# -------------------------------------------------------------------------------------- evaluation


def shares(count: int, rank: int, world: int) -> list[list[Key]]:
    """Batches of one picture, so that no result depends on company.

    A sharded model needs all processes for each picture, so all have the same number of them. The
    last ones may be done twice; they count once, because results are kept by picture.
    """
    return [[(0, min(start + rank, count - 1))] for start in range(0, count, world)]


@torch.no_grad()
def detect(
    model: nn.Module, batches: Any, categories: Sequence[int], device: torch.device
) -> Found:
    """What the model, whose transform is :class:`PasteToRLE`, finds on the pictures of a loader."""
    found: Found = {}
    training = model.training
    model.eval()
    for images, targets in batches:
        results = model([image.to(device, non_blocking=True) for image in images])
        for target, result in zip(targets, results, strict=True):
            image_id = int(target["image_id"])
            boxes = result["boxes"].float()
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
            rows = (boxes.tolist(), result["labels"].tolist(), result["scores"].tolist())
            found[image_id] = [
                {
                    "image_id": image_id,
                    "category_id": categories[label - 1],
                    "bbox": box,
                    "score": score,
                    "segmentation": rle,
                }
                for box, label, score, rle in zip(*rows, result["rles"], strict=True)
            ]
    model.train(training)
    return found


def gather(found: Found) -> Found | None:
    """The results of all processes, on rank 0."""
    parts: list[Found] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, parts)
    return None if parts is None else {i: rows for part in parts for i, rows in part.items()}


def average_precision(coco: COCO, found: Found) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 of boxes and masks, in 0..1."""
    rows = [row for image_id in sorted(found) for row in found[image_id]]
    precision = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, name, other in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox")):
            stats = [0.0] * 3
            if rows:
                # loadRes reads the first kind of result that it finds.
                kept = [{k: v for k, v in row.items() if k != other} for row in rows]
                evaluation = COCOeval(coco, coco.loadRes(kept), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                stats = [float(value) for value in evaluation.stats[:3]]
            for label, value in zip(("AP", "AP50", "AP75"), stats, strict=True):
                precision[f"{name}_{label}"] = value
    return precision


# ----------------------------------------------------------------------------------------- drawing


def draw(path: Path, dataset: CocoDetection, found: Found, count: int = 8) -> None:
    """The first pictures of the data set: on the left the truth, on the right what was found."""
    coco = dataset.coco
    names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    tiles = []
    for image_id in dataset.ids[:count]:
        pixels = dataset.pixels(image_id)
        good = [row for row in found.get(image_id, []) if row["score"] >= 0.5]
        for rows in (coco.imgToAnns[image_id], good):
            tile = pixels
            if rows:
                masks = torch.stack([torch.from_numpy(coco.annToMask(row)).bool() for row in rows])
                boxes = torch.tensor([row["bbox"] for row in rows])
                boxes[:, 2:] += boxes[:, :2]
                labels = [
                    names[row["category_id"]] + (f" {row['score']:.2f}" if "score" in row else "")
                    for row in rows
                ]
                colours = [("orange", "cyan", "lime", "magenta")[i % 4] for i in range(len(rows))]
                tile = draw_segmentation_masks(tile, masks, alpha=0.4, colors=colours)
                tile = draw_bounding_boxes(tile, boxes, labels, colours)
            tiles.append(tile)
    height, width = (max(tile.shape[i] for tile in tiles) for i in (1, 2))
    tiles = [nn.functional.pad(t, (0, width - t.shape[2], 0, height - t.shape[1])) for t in tiles]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(make_grid(torch.stack(tiles), nrow=4, padding=4, pad_value=255), str(path))
