# SPDX-License-Identifier: BSD-3-Clause
"""patch("detectron2"): the Python of detectron2 that is installed, with our operators and without.

Of its compiled part only roi_align_rotated is called here; compiled_parts.py has it where there is
no compiled part.
"""

from __future__ import annotations

import compiled_parts
import pytest
import torch

import glimpse_ext

pytest.importorskip(
    "detectron2", reason="the library to patch is not installed: its Python files are enough"
)
Image = pytest.importorskip("PIL.Image", reason="detectron2 needs Pillow")
if not hasattr(Image, "LINEAR"):
    Image.LINEAR = Image.BILINEAR  # detectron2 0.6 has default arguments of Pillow before 10.
STAND_IN = compiled_parts.complete_detectron2()

from detectron2 import layers, structures  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_model, poolers  # noqa: E402
from detectron2.projects.point_rend import point_features  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

POOLER = "detectron2.modeling.poolers.ROIPooler.forward"
ROTATED = "detectron2.layers.roi_align_rotated."
PASTE = "detectron2.layers.mask_ops.paste_masks_in_image"


def maps(levels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, 128 >> level, 160 >> level, generator=generator).to(dtype)
        for level in range(levels)
    ]


def box_lists(rotated=False):
    """Two images of 512 by 640, with boxes of all sizes."""
    generator = torch.Generator().manual_seed(1)
    lists = []
    for count in (30, 9):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([560.0, 440.0])
        side = 8 * 60 ** torch.rand(count, 2, generator=generator)
        angle = torch.rand(count, 1, generator=generator) * 720 - 360
        if rotated:
            lists.append(structures.RotatedBoxes(torch.cat([corner, side, angle], 1)))
        else:
            lists.append(structures.Boxes(torch.cat([corner, corner + side], 1)))
    return lists


def make_pooler(kind, levels, ratio=2, size=7):
    scales = [0.25 / 2**level for level in range(levels)]
    return poolers.ROIPooler(size, scales, ratio, kind)


def run(pooler, features, boxes):
    leaves = [one.clone().requires_grad_() for one in features]
    pooled = pooler(leaves, boxes)
    weights = torch.cos(torch.arange(pooled.numel()).to(pooled.dtype)).view(pooled.shape)
    return [pooled.detach(), *torch.autograd.grad(pooled, leaves, weights)]


def both(call):
    original = call()
    with glimpse_ext.patch("detectron2", verify=True) as patch:
        ours = call()
    return original, ours, patch.report


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("ratio", [0, 2])
def test_pooler(kind, levels, ratio):
    pooler = make_pooler(kind, levels, ratio)
    original, ours, report = both(lambda: run(pooler, maps(levels), box_lists()))
    torch.testing.assert_close(ours, original, rtol=2e-5, atol=2e-4)
    assert (report[POOLER].compared, report[POOLER].differing) == (1, 0), f"\n{report}"
    assert 0 < report[POOLER].largest_gradient < 1e-5


def test_pooler_in_float64():
    """Boxes of detectron2 are always float32, and so is its choice of levels."""
    pooler = make_pooler("ROIAlignV2", 4)
    original, ours, report = both(lambda: run(pooler, maps(4, torch.float64), box_lists()))
    torch.testing.assert_close(ours, original, rtol=1e-9, atol=1e-10)
    assert report[POOLER].differing == 0, f"\n{report}"


def test_layer():
    layer = layers.ROIAlign((3, 5), 0.25, 0, aligned=True)
    boxes = poolers.convert_boxes_to_pooler_format(box_lists())
    original, ours, report = both(lambda: run(lambda f, b: layer(f[0], b), maps(1), boxes))
    torch.testing.assert_close(ours, original, rtol=2e-5, atol=2e-4)
    assert report["detectron2.layers.roi_align.ROIAlign.forward"].compared == 1


@pytest.mark.parametrize("ratio", [0, 2])
def test_rotated(ratio):
    boxes = poolers.convert_boxes_to_pooler_format(box_lists(rotated=True)).double()
    layer = layers.ROIAlignRotated((3, 5), 0.25, ratio)
    features = maps(1, torch.float64)
    original, ours, report = both(lambda: run(lambda f, b: layer(f[0], b), features, boxes))
    torch.testing.assert_close(ours, original, rtol=1e-9, atol=1e-10)
    assert report[ROTATED + "ROIAlignRotated.forward"].compared == 1

    def function(f, b):
        return layers.roi_align_rotated(f[0], b, (3, 5), 0.25, ratio)

    original, ours, report = both(lambda: run(function, features, boxes))
    torch.testing.assert_close(ours, original, rtol=1e-9, atol=1e-10)
    assert report[ROTATED + "roi_align_rotated"].differing == 0


def test_rotated_pyramids_go_level_by_level():
    pooler = make_pooler("ROIAlignRotated", 4)
    features, boxes = maps(4), box_lists(rotated=True)
    original, ours, report = both(lambda: run(pooler, features, boxes))
    torch.testing.assert_close(ours, original, rtol=2e-4, atol=2e-4)
    assert report[POOLER].left == {"levels are ROIAlignRotated": 1}
    assert report[ROTATED + "ROIAlignRotated.forward"].compared == 4


@pytest.mark.parametrize("threshold", [0.5, 0.3, -1])
def test_paste(threshold):
    generator = torch.Generator().manual_seed(2)
    masks = torch.rand(9, 14, 14, generator=generator)
    # Mask pixels of up to two image pixels: the original does not look farther around a box.
    corner = torch.rand(9, 2, generator=generator) * 90
    boxes = torch.cat([corner, corner + torch.rand(9, 2, generator=generator) * 22 + 4], 1)
    for given in (boxes, structures.Boxes(boxes)):
        original, ours, report = both(
            lambda given=given: layers.paste_masks_in_image(masks, given, (100, 120), threshold)
        )
        assert ours.dtype == original.dtype == (torch.bool if threshold >= 0 else torch.uint8)
        assert (report[PASTE].compared, report[PASTE].differing) == (1, 0), f"\n{report}"


def test_no_masks():
    none = layers.paste_masks_in_image
    with glimpse_ext.patch("detectron2", verify=True) as patch:
        pasted = layers.paste_masks_in_image(torch.zeros(0, 4, 4), torch.zeros(0, 4), (9, 8))
    assert layers.paste_masks_in_image is none
    assert (pasted.shape, pasted.dtype) == ((0, 9, 8), torch.uint8)
    assert patch.report[PASTE].left == {"no masks": 1}


@pytest.mark.parametrize("shape", [(7,), (3, 4)], ids=["list", "grid"])
def test_point_sample(shape):
    points = torch.rand(2, *shape, 2) * 1.2 - 0.1

    def call():
        return run(
            lambda f, p: point_features.point_sample(f[0], p, align_corners=False), maps(1), points
        )

    original, ours, report = both(call)
    torch.testing.assert_close(ours, original, rtol=1e-5, atol=1e-5)
    name = "detectron2.projects.point_rend.point_features.point_sample"
    assert (report[name].compared, report[name].differing) == (1, 0), f"\n{report}"


# ----------------------------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def model():
    """Mask R-CNN with a feature pyramid, small, with random weights."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 2
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    torch.manual_seed(0)
    made = build_model(cfg)
    # Scores that differ by more than rounding.
    torch.nn.init.normal_(made.roi_heads.box_predictor.cls_score.weight, std=1.0)
    return made


def inputs():
    generator = torch.Generator().manual_seed(1)
    found = []
    for height, width in ((128, 160), (144, 128)):
        boxes = torch.tensor([[8.0, 9, 72, 88], [30, 22, 120, 100]])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        instances = structures.Instances((height, width))
        instances.gt_boxes = structures.Boxes(boxes)
        instances.gt_classes = torch.tensor([0, 2])
        instances.gt_masks = structures.BitMasks(masks)
        image = torch.rand(3, height, width, generator=generator) * 255
        found.append({"image": image, "instances": instances, "height": height, "width": width})
    return found


def test_model_losses_and_gradients(model):
    def call():
        model.train()
        model.zero_grad()
        torch.manual_seed(2)
        with EventStorage(0):
            losses = model(inputs())
        sum(losses.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    (losses, gradients), (our_losses, our_gradients), report = both(call)
    torch.testing.assert_close(our_losses, losses, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        apart = (our_gradients[name] - gradient).abs().max()
        assert apart <= 1e-3 * gradient.abs().max() + 1e-6, name
    assert report[POOLER].compared == 2
    assert all(seen.differing == 0 for seen in report.values()), f"\n{report}"


def test_model_detections(model):
    def call():
        model.eval()
        with torch.no_grad():
            return [found["instances"] for found in model(inputs())]

    original, ours, report = both(call)
    assert sum(map(len, original)) > 0
    for mine, theirs in zip(ours, original, strict=True):
        torch.testing.assert_close(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)
        torch.testing.assert_close(mine.scores, theirs.scores)
        assert torch.equal(mine.pred_classes, theirs.pred_classes)
        assert (mine.pred_masks != theirs.pred_masks).float().mean() < 1e-4
    assert report[PASTE].compared == 2
    assert all(seen.differing == 0 for seen in report.values()), f"\n{report}"


# --------------------------------------------------------------- differences (docs/patching.md)


def test_boxes_keep_their_places_beside_16_bit_maps():
    """The original computes in the type of the map: in float16, 1501.3 becomes 1501."""
    ramp = (torch.arange(2000.0) - 1500).expand(1, 1, 8, 2000).half()
    box = torch.tensor([[0.0, 1501.3, 2, 1505.3, 6]])
    layer = layers.ROIAlign((1, 1), 1.0, 1, aligned=True)
    assert float(layer(ramp, box)) == 2.0
    with glimpse_ext.patch("detectron2"):
        assert float(layer(ramp, box)) == pytest.approx(2.8, abs=2e-3)


def test_pyramids_and_cells_that_are_not_square():
    pooler = make_pooler("ROIAlignV2", 4, size=(3, 5))
    with pytest.raises(RuntimeError):
        pooler(maps(4), box_lists())
    with glimpse_ext.patch("detectron2"):
        pooled = pooler(maps(4), box_lists())
    assert pooled.shape[2:] == (3, 5)


def test_soft_edges_beyond_the_margin():
    """The original computes one pixel around a box on the CPU, and leaves the rest False."""
    mask, box = torch.ones(1, 2, 2), torch.tensor([[10.0, 10, 30, 30]])
    theirs = layers.paste_masks_in_image(mask, box, (40, 40), 0.2)
    with glimpse_ext.patch("detectron2"):
        ours = layers.paste_masks_in_image(mask, box, (40, 40), 0.2)
    assert int(ours.sum()) > int(theirs.sum())
    assert bool((ours | ~theirs).all())
