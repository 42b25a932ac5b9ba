# SPDX-License-Identifier: BSD-3-Clause
"""A small, complete two-stage detector: backbone, pyramid, proposals, box head, mask head.

It is Mask R-CNN (He et al. 2017) with few channels and one class. All boxes are in edge units of
the image.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import boxes as box
from .data import Batch
from .pooling import Pooling

STRIDES = (4, 8, 16)
SCALES = tuple(1 / stride for stride in STRIDES)
CHANNELS = 64

# Anchors are squares: coins are round. Two per octave, relative to the stride of their level.
ANCHOR_SIZES = (6.0, 8.5)
ANCHOR_FOREGROUND, ANCHOR_BACKGROUND = (
    0.6,
    0.3,
)  # overlap with a coin that makes an anchor one or the other
ANCHORS_PER_IMAGE, ANCHORS_FOREGROUND = 128, 32

PROPOSALS_PER_LEVEL = 100
PROPOSALS_PER_IMAGE = 100
PROPOSAL_NMS = 0.7

ROI_FOREGROUND = 0.5
ROIS_PER_IMAGE, ROIS_FOREGROUND = 64, 16
BOX_CELLS, MASK_CELLS, MASK_SIZE = 7, 14, 28

# The box head learns corrections in tenths and fifths of the box, so that the loss sees numbers
# around one.
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

SCORE_THRESHOLD, DETECTION_NMS, DETECTIONS_PER_IMAGE = 0.05, 0.5, 50


@dataclass(frozen=True)
class Detections:
    """Found in one image, best first.

    boxes: ``[K, 4]``.   scores: ``[K]``.   masks: ``[K, 28, 28]`` in 0..1.
    """

    boxes: Tensor
    scores: Tensor
    masks: Tensor

    def cpu(self) -> "Detections":
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.masks.cpu())


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3×3 convolution, normalisation, ReLU. Groups, not batches: batches are small."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            convolution(channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(8, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Pyramid(nn.Module):
    """Backbone and feature pyramid: image ``[N, 1, H, W]`` to one map of 64 channels per stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 32, stride=2)
        widths = (32, 48, 64, 96)
        self.stages = nn.ModuleList(
            nn.Sequential(convolution(before, width, stride=2), Residual(width))
            for before, width in itertools.pairwise(widths)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, CHANNELS, 1) for width in widths[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in STRIDES)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem((images - 0.5) / 0.25)
        laterals = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            laterals.append(lateral(x))
        for fine, coarse in ((1, 2), (0, 1)):
            size = laterals[fine].shape[-2:]
            laterals[fine] = laterals[fine] + F.interpolate(laterals[coarse], size=size)
        return [smooth(x) for smooth, x in zip(self.smooth, laterals, strict=True)]


class ProposalHead(nn.Module):
    """A score and a box correction for each anchor at each place of each level."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.score = nn.Conv2d(CHANNELS, len(ANCHOR_SIZES), 1)
        self.delta = nn.Conv2d(CHANNELS, len(ANCHOR_SIZES) * 4, 1)
        for layer in (self.score, self.delta):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[N, A]`` and corrections ``[N, A, 4]`` of one level, ordered as `anchors`."""
        shared = F.relu(self.shared(feature))
        scores = self.score(shared).permute(0, 2, 3, 1).flatten(1)
        deltas = self.delta(shared).permute(0, 2, 3, 1).reshape(len(feature), -1, 4)
        return scores, deltas


def anchors(feature: Tensor, stride: int) -> Tensor:
    """Anchor boxes ``[A, 4]`` of one level: rows, then columns, then sizes."""
    height, width = feature.shape[-2:]
    y = (torch.arange(height, device=feature.device) + 0.5) * stride
    x = (torch.arange(width, device=feature.device) + 0.5) * stride
    half = torch.tensor(ANCHOR_SIZES, device=feature.device) * stride / 2
    y, x, half = torch.meshgrid(y, x, half, indexing="ij")
    return torch.stack([x - half, y - half, x + half, y + half], dim=-1).reshape(-1, 4)


class BoxHead(nn.Module):
    """Background or coin, and a box correction, from 7×7 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(CHANNELS * BOX_CELLS**2, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, 256),
            nn.ReLU(inplace=True),
        )
        self.score = nn.Linear(256, 2)
        self.delta = nn.Linear(256, 4)
        nn.init.normal_(self.delta.weight, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(pooled)
        return self.score(x), self.delta(x)


class MaskHead(nn.Module):
    """A 28×28 mask from 14×14 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(CHANNELS, CHANNELS),
            convolution(CHANNELS, CHANNELS),
            nn.ConvTranspose2d(CHANNELS, 32, 2, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 1, 1),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.body(pooled)[:, 0]
        return logits


def draw(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to ``count`` indices of true elements, at random."""
    found = torch.nonzero(candidates)[:, 0]
    return found[torch.randperm(len(found), generator=generator).to(found.device)[:count]]


class Detector(nn.Module):
    """``loss`` is for training, ``forward`` for finding. ``pooling`` may be changed any time."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.pyramid = Pyramid()
        self.proposal_head = ProposalHead()
        self.box_head = BoxHead()
        self.mask_head = MaskHead()

    # Region proposals

    def _score_anchors(
        self, features: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        places = [
            anchors(feature, stride) for feature, stride in zip(features, STRIDES, strict=True)
        ]
        scores, deltas = zip(*(self.proposal_head(feature) for feature in features), strict=True)
        return places, list(scores), list(deltas)

    @torch.no_grad()
    def _propose(
        self,
        places: list[Tensor],
        scores: list[Tensor],
        deltas: list[Tensor],
        size: torch.Size,
    ) -> list[Tensor]:
        """The most promising boxes of each image."""
        proposals = []
        for image in range(len(scores[0])):
            boxes, ranks = [], []
            for level_places, level_scores, level_deltas in zip(
                places, scores, deltas, strict=True
            ):
                count = min(PROPOSALS_PER_LEVEL, len(level_places))
                rank, best = level_scores[image].topk(count)
                boxes.append(box.decode(level_deltas[image, best], level_places[best]))
                ranks.append(rank)
            clipped = box.clip(torch.cat(boxes), size)
            rank = torch.cat(ranks)
            large = (clipped[:, 2:] - clipped[:, :2]).min(1).values >= 1
            clipped, rank = clipped[large], rank[large]
            proposals.append(clipped[box.nms(clipped, rank, PROPOSAL_NMS)[:PROPOSALS_PER_IMAGE]])
        return proposals

    def _proposal_loss(
        self,
        places: Tensor,
        scores: Tensor,
        deltas: Tensor,
        truth: list[Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        score_loss, delta_loss = [], []
        for image, coins in enumerate(truth):
            overlap = box.iou(places, coins)
            if len(coins):
                best, owner = overlap.max(1)
                # Also the best anchors of each coin are foreground, however badly they fit.
                foreground = (best >= ANCHOR_FOREGROUND) | (overlap == overlap.amax(0)).any(1)
                background = (best < ANCHOR_BACKGROUND) & ~foreground
            else:
                foreground = torch.zeros_like(places[:, 0], dtype=torch.bool)
                owner, background = foreground.long(), ~foreground
            chosen = draw(foreground, ANCHORS_FOREGROUND, generator)
            others = draw(background, ANCHORS_PER_IMAGE - len(chosen), generator)
            sampled = torch.cat([chosen, others])
            score_loss.append(
                F.binary_cross_entropy_with_logits(
                    scores[image, sampled], foreground[sampled].float()
                )
            )
            target = box.encode(coins[owner[chosen]], places[chosen])
            loss = F.smooth_l1_loss(deltas[image, chosen], target, beta=0.1, reduction="sum")
            delta_loss.append(loss / len(sampled))
        return torch.stack(score_loss).mean(), torch.stack(delta_loss).mean()

    # Second stage

    def _delta_weights(self, like: Tensor) -> Tensor:
        return torch.tensor(DELTA_WEIGHTS, device=like.device)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The five losses of a training step."""
        features = self.pyramid(batch.images)
        places, scores, deltas = self._score_anchors(features)
        proposal_score, proposal_box = self._proposal_loss(
            torch.cat(places), torch.cat(scores, 1), torch.cat(deltas, 1), batch.boxes, generator
        )

        # Match proposals to coins. Mask targets are read from the mask of the coin that owns the
        # proposal: all masks of the batch are one stack of pictures, `picture` says which.
        rois, coins, labels, pictures = [], [], [], []
        picture_offset = 0
        for proposals, truth in zip(
            self._propose(places, scores, deltas, batch.images.shape[-2:]), batch.boxes, strict=True
        ):
            candidates = torch.cat([proposals, truth])
            if len(truth):
                best, owner = box.iou(candidates, truth).max(1)
            else:
                best, owner = candidates.new_zeros(len(candidates)), candidates[:, 0].long() * 0
            foreground = best >= ROI_FOREGROUND
            chosen = draw(foreground, ROIS_FOREGROUND, generator)
            others = draw(~foreground, ROIS_PER_IMAGE - len(chosen), generator)
            sampled = torch.cat([chosen, others])
            rois.append(candidates[sampled])
            labels.append(foreground[sampled])
            coins.append(truth[owner[chosen]])
            pictures.append(owner[chosen] + picture_offset)
            picture_offset += len(truth)
        roi_boxes = box.with_image_index(rois)
        label, coin, picture = torch.cat(labels), torch.cat(coins), torch.cat(pictures)

        pooled = self.pooling.pyramid(features, roi_boxes, BOX_CELLS, SCALES)
        class_scores, box_deltas = self.box_head(pooled)
        losses = {
            "proposal score": proposal_score,
            "proposal box": proposal_box,
            "class": F.cross_entropy(class_scores, label.long()),
        }
        found = roi_boxes[label]
        target = box.encode(coin, found[:, 1:]) * self._delta_weights(found)
        losses["box"] = F.smooth_l1_loss(box_deltas[label], target, reduction="sum") / len(label)

        masks = torch.cat(batch.masks)[:, None].float()
        mask_rois = torch.cat([picture[:, None].to(found), found[:, 1:]], dim=1)
        mask_target = (self.pooling.image(masks, mask_rois, MASK_SIZE)[:, 0] > 0.5).float()
        mask_logits = self.mask_head(self.pooling.pyramid(features, found, MASK_CELLS, SCALES))
        # A sum and not a mean: crops without any coin have no mask to learn from.
        mask_loss = F.binary_cross_entropy_with_logits(mask_logits, mask_target, reduction="sum")
        losses["mask"] = mask_loss / max(mask_target.numel(), 1)
        return losses

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Detections]:
        """Find the coins of each image ``[N, 1, H, W]``."""
        features = self.pyramid(images)
        size = images.shape[-2:]
        proposals = self._propose(*self._score_anchors(features), size)
        results = []
        roi_boxes = box.with_image_index(proposals)
        class_scores, deltas = self.box_head(
            self.pooling.pyramid(features, roi_boxes, BOX_CELLS, SCALES)
        )
        refined = box.decode(deltas / self._delta_weights(deltas), roi_boxes[:, 1:])
        for image in range(len(images)):
            mine = roi_boxes[:, 0] == image
            scores = class_scores[mine].softmax(1)[:, 1]
            boxes = box.clip(refined[mine], size)
            likely = scores >= SCORE_THRESHOLD
            boxes, scores = boxes[likely], scores[likely]
            kept = box.nms(boxes, scores, DETECTION_NMS)[:DETECTIONS_PER_IMAGE]
            boxes, scores = boxes[kept], scores[kept]
            index = torch.full_like(scores, image)[:, None]
            pooled = self.pooling.pyramid(
                features, torch.cat([index, boxes], 1), MASK_CELLS, SCALES
            )
            results.append(Detections(boxes, scores, self.mask_head(pooled).sigmoid()))
        return results
