# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's Mask R-CNN: sizes to choose, run lengths instead of images, one process or many."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops.misc import FrozenBatchNorm2d

import glimpse_ext


class PasteToRLE(GeneralizedRCNNTransform):
    """The transform of a detector, whose detections hold ``rles`` instead of pasted masks.

    torchvision pastes the 28×28 masks into ``[N, 1, H, W]`` floats, from which everybody computes
    run lengths. Here the run lengths come from the 28×28 masks, and the images are never made.
    """

    method = "detectron2"

    @classmethod
    def of(cls, transform: GeneralizedRCNNTransform) -> PasteToRLE:
        made = cls(
            transform.min_size, transform.max_size, transform.image_mean, transform.image_std
        )
        return made.train(transform.training)

    def postprocess(
        self,
        result: list[dict[str, Any]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        if self.training:
            return result
        for found, shape, size in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = resize_boxes(found["boxes"], shape, size)
            found["rles"] = glimpse_ext.paste_masks_to_rle(
                found.pop("masks"), found["boxes"], size, 0.5, self.method
            )
        return result


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def build_model(args: Namespace, classes: int) -> MaskRCNN:
    """torchvision's Mask R-CNN; ``classes`` counts the background."""
    # From random weights GroupNorm: it learns with two pictures per process, and a picture's
    # numbers do not depend on its company. Pretrained statistics are frozen, as usual.
    body = torchvision.models.get_model(
        args.backbone,
        weights="DEFAULT" if args.pretrained else None,
        norm_layer=FrozenBatchNorm2d if args.pretrained else group_norm,
    )
    if args.pretrained:
        for part in (body.conv1, body.layer1):
            part.requires_grad_(False)
    width = body.inplanes // 8
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    widths = [width << i for i in range(4)]
    backbone = BackboneWithFPN(body, layers, widths, args.channels)
    model = MaskRCNN(
        backbone,
        classes,
        min_size=args.min_size,
        max_size=args.max_size,
        box_batch_size_per_image=args.samples,
        mask_head=MaskRCNNHeads(args.channels, (args.channels,) * 4, 1),
    )
    model.roi_heads.mask_predictor = MaskRCNNPredictor(args.channels, args.channels, classes)
    model.transform = PasteToRLE.of(model.transform)
    if args.amp:
        # torchvision decodes boxes in the dtype of these outputs, and at pixel 1000 the next number
        # of bfloat16 is 1008.
        model.rpn.head.register_forward_hook(float_outputs)
        model.roi_heads.box_predictor.register_forward_hook(float_outputs)
    return model


def parts(model: MaskRCNN) -> list[nn.Module]:
    """The modules that hold nearly all weights and work; each is called once per forward pass."""
    heads = model.roi_heads
    return [model.backbone, model.rpn.head, heads.box_head, heads.mask_head]


def float_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map(lambda tensor: tensor.float(), outputs)


def compile_parts(model: MaskRCNN) -> None:
    """Backbone with pyramid, proposal head, both poolers and both heads, each as one graph.

    Between them are lists whose lengths depend on what is found (proposals, matching, NMS).
    """
    heads = model.roi_heads
    model.backbone.compile()
    model.rpn.head.compile()
    # The number of boxes changes with every step.
    for part in (heads.box_roi_pool, heads.box_head, heads.mask_roi_pool, heads.mask_head):
        part.compile(dynamic=True)


def check_sharding(device: torch.device) -> None:
    """FSDP needs two collectives that not every backend has; says so before anything is built."""
    whole = torch.ones(dist.get_world_size(), device=device)
    try:
        dist.reduce_scatter_tensor(whole[:1].clone(), whole)
        dist.all_gather_into_tensor(whole.clone(), whole[:1].clone())
    except (RuntimeError, NotImplementedError) as error:
        raise SystemExit(f"--fsdp: {dist.get_backend()} cannot shard here: {error}") from error


def distribute(model: MaskRCNN, shard: bool, device: torch.device) -> nn.Module:
    if shard:
        check_sharding(device)
        for part in parts(model):
            fully_shard(part)
        return fully_shard(model)
    # Without find_unused_parameters DDP sorts gradients into other buckets after the first step. A
    # number's place in its bucket decides in which order processes add it, so a resumed run, which
    # has another first step, would get other last bits.
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )


def weights_hash(model: nn.Module) -> str:
    """sha256 of names and bytes of all weights; on rank 0."""
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
