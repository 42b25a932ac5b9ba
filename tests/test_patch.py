# SPDX-License-Identifier: BSD-3-Clause
"""patch(): other libraries' models with our operators inside, against themselves."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import glimpse_ext
from glimpse_ext import patching

torchvision = pytest.importorskip(
    "torchvision", reason="the library to patch is not installed: pip install torchvision"
)
detection = pytest.importorskip("torchvision.models.detection")
SIZE = 128


@pytest.fixture(params=["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def model(request):
    """With random weights, in float64, so that no detection hangs on a last bit."""
    torch.manual_seed(0)
    made = getattr(detection, request.param)(
        weights=None, weights_backbone=None, num_classes=5, min_size=SIZE, max_size=2 * SIZE
    )
    return made.double()


def images():
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, SIZE, 160), (3, 144, SIZE)]
    return [torch.rand(s, generator=generator, dtype=torch.float64) for s in sizes]


def targets():
    found = []
    for image in images():
        height, width = image.shape[1:]
        boxes = torch.tensor([[10.0, 12, 70, 90], [40, 30, 120, 100], [5, 60, 60, 110]])
        masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        found.append({"boxes": boxes.double(), "labels": torch.tensor([1, 2, 3]), "masks": masks})
    return found


def training(model):
    """Losses and the gradients of all weights."""
    model.train()
    model.zero_grad()
    torch.manual_seed(2)  # samples of proposals
    losses = model(images(), targets())
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def test_losses_and_gradients(model):
    losses, gradients = training(model)
    with glimpse_ext.patch("torchvision", verify=True) as patch:
        ours, our_gradients = training(model)
    assert patch.report["torchvision.ops.poolers._multiscale_roi_align"].calls > 0
    torch.testing.assert_close(ours, losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-7, atol=1e-10)


def test_detections(model):
    model.eval()
    with torch.no_grad():
        expected = model(images())
        with glimpse_ext.patch("torchvision", verify=True) as patch:
            got = model(images())
    assert sum(len(found["boxes"]) for found in expected) > 0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert all(c.differing == 0 for c in patch.report.values()), patch.report
    if "masks" in expected[0]:
        assert patch.report["torchvision.models.detection.roi_heads.paste_masks_in_image"].calls > 0


def test_a_step_changes_weights_alike(model):
    def step():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        training(model)
        optimiser.step()
        after = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(before)
        return after

    expected = step()
    with glimpse_ext.patch("torchvision"):
        got = step()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_bfloat16_autocast(model):
    """The originals have no bfloat16 kernel on the CPU; ours keep it from end to end."""
    model.float().train()
    floats = [image.float() for image in images()]
    aims = [{**t, "boxes": t["boxes"].float()} for t in targets()]
    with glimpse_ext.patch("torchvision"), torch.autocast("cpu", torch.bfloat16):
        losses = model(floats, aims)
        total = sum(losses.values())
    total.backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_compiled(model):
    pool = model.roi_heads.box_roi_pool
    features = {str(i): torch.randn(2, 8, 32 >> i, 32 >> i) for i in range(4)}
    boxes = [torch.tensor([[4.0, 4, 60, 50], [0, 0, 120, 110]]), torch.tensor([[9.0, 8, 30, 70]])]
    shapes = [(SIZE, SIZE)] * 2
    expected = pool(features, boxes, shapes)
    with glimpse_ext.patch("torchvision"):
        compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(features, boxes, shapes), expected)


# ------------------------------------------------------------------------------------ the mechanics


def attributes():
    return [
        getattr(sys.modules[r.module], r.name)
        for replacements in patching.LIBRARIES.values()
        for r in replacements
        if r.module in sys.modules
    ]


def test_undo_puts_everything_back():
    before = attributes()
    user = types.ModuleType("a_users_module")
    user.pool = torchvision.ops.roi_align
    sys.modules[user.__name__] = user
    try:
        patch = glimpse_ext.patch("torchvision")
        assert user.pool is torchvision.ops.roi_align is not before[0]
        assert "a_users_module.pool" in patch.names
        patch.undo()
        patch.undo()
        assert user.pool is torchvision.ops.roi_align is before[0]
    finally:
        del sys.modules[user.__name__]
    assert attributes() == before
    assert patch.names == []


def test_an_error_inside_undoes_too():
    before = attributes()
    with pytest.raises(ZeroDivisionError), glimpse_ext.patch("torchvision"):
        raise ZeroDivisionError
    assert attributes() == before


def test_twice_is_refused():
    before = attributes()
    with glimpse_ext.patch("torchvision"), pytest.raises(RuntimeError, match="patched already"):
        glimpse_ext.patch("torchvision")
    assert attributes() == before


@pytest.mark.parametrize("names", [(), ("opencv",), ("torchvision", "opencv")], ids=str)
def test_unknown_libraries(names):
    before = attributes()
    with pytest.raises(ValueError, match="expects names among"):
        glimpse_ext.patch(*names)
    assert attributes() == before


def test_functions_keep_their_signature_and_modules_use_them():
    image, boxes = torch.randn(1, 3, 16, 20), torch.tensor([[0.0, 2, 3, 12, 13]])
    expected = torchvision.ops.RoIAlign(3, 0.5, 2, aligned=True)(image, boxes)
    with glimpse_ext.patch("torchvision"):
        torch.testing.assert_close(
            torchvision.ops.RoIAlign(3, 0.5, 2, aligned=True)(image, boxes), expected
        )
        moved = boxes.clone().requires_grad_()
        torchvision.ops.roi_align(image, moved, (3, 3), spatial_scale=0.5).sum().backward()
        assert moved.grad is not None
        # What crashes the original has a result.
        bad = torch.tensor([[0.0, float("nan"), 3, 12, 13]])
        assert not torchvision.ops.roi_align(image, bad, 3).any()


def test_verify_says_what_differs(monkeypatch):
    image, boxes = torch.randn(1, 3, 16, 20), torch.tensor([[0.0, 2, 3, 12, 13]])
    monkeypatch.setattr(patching, "roi_align", lambda *a: 2 * glimpse_ext.roi_align(*a))
    warned = pytest.warns(UserWarning, match=r"roi_align gave \[1, 3, 3, 3\].*differs")
    with glimpse_ext.patch("torchvision", verify=True) as patch, warned:
        torchvision.ops.roi_align(image, boxes, 3)
    compared = patch.report["torchvision.ops.roi_align.roi_align"]
    assert (compared.calls, compared.differing) == (1, 1)
    assert compared.largest == pytest.approx(1, rel=0.01)
