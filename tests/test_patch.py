# SPDX-License-Identifier: BSD-3-Clause
"""patch(): other libraries' models with our operators inside, against themselves."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types

import pytest
import torch

import glimpse_ext
from glimpse_ext import _patch_libraries, patching

torchvision = pytest.importorskip(
    "torchvision", reason="the library to patch is not installed: pip install torchvision"
)
detection = pytest.importorskip("torchvision.models.detection")
SIZE = 96
# Of proposals and detections, so that a test takes a second.
FEW = {
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 40,
    "box_batch_size_per_image": 32,
    "box_detections_per_img": 10,
}


@pytest.fixture(params=["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def model(request):
    """With random weights, in float64, so that no detection hangs on a last bit."""
    torch.manual_seed(0)
    made = getattr(detection, request.param)(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        min_size=SIZE,
        max_size=2 * SIZE,
        **FEW,
    )
    return made.double()


def images():
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, SIZE, 120), (3, 108, SIZE)]
    return [torch.rand(s, generator=generator, dtype=torch.float64) for s in sizes]


def targets():
    found = []
    for image in images():
        height, width = image.shape[1:]
        boxes = torch.tensor([[8.0, 9, 52, 68], [30, 22, 90, 75], [4, 45, 45, 82]])
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
        for r in patching.LIBRARIES["torchvision"].replacements
    ]


def small():
    return torch.randn(1, 3, 16, 20), torch.tensor([[0.0, 2, 3, 12, 13]])


@pytest.fixture
def module():
    """A user's module."""
    made = types.ModuleType("a_users_module")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def test_undo_puts_everything_back(module):
    before = attributes()
    module.pool = torchvision.ops.roi_align
    patch = glimpse_ext.patch("torchvision")
    assert module.pool is torchvision.ops.roi_align is not before[0]
    assert "a_users_module.pool" in patch.names
    module.imported_later = torchvision.ops.roi_align
    patch.undo()
    patch.undo()
    assert module.pool is module.imported_later is torchvision.ops.roi_align is before[0]
    assert attributes() == before
    assert patch.names == []


def test_undo_leaves_what_others_replaced_since(module):
    before = attributes()
    module.pool = torchvision.ops.roi_align
    with glimpse_ext.patch("torchvision"):
        module.pool = print
    assert module.pool is print
    assert attributes() == before


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


BROKEN = {
    "no module": (None, "broken is not installed"),
    "a module it needs": ("import broken._C", "needs broken._C, which is not there; a remedy"),
    "a library of another torch": (
        "raise RuntimeError('operator broken::nms does not exist')",
        "fails with RuntimeError.*broken::nms does not exist.*; a remedy",
    ),
    "the function": ("__version__ = '0.1'", "broken 0.1 has no broken.roi_align"),
    "the class": ("__version__ = '0.1'\ndef roi_align(): pass", "has no broken.Pooler.forward"),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_missing_is_said_and_nothing_stays_replaced(source, message, tmp_path, monkeypatch):
    if source is not None:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("roi_align", "Pooler.forward")
    library = _patch_libraries.Library(
        tuple(_patch_libraries.Replacement("broken", name, lambda call: print) for name in names),
        "a remedy",
    )
    monkeypatch.setitem(patching.LIBRARIES, "broken", library)
    before = attributes()
    with pytest.raises(ImportError, match=message):
        glimpse_ext.patch("torchvision", "broken")
    assert attributes() == before
    sys.modules.pop("broken", None)


def test_a_failure_half_way_undoes_the_first_half(monkeypatch):
    def fails(call):
        raise MemoryError

    first, *others = patching.LIBRARIES["torchvision"].replacements
    broken = [dataclasses.replace(other, make=fails) for other in others]
    library = _patch_libraries.Library((first, *broken), "")
    monkeypatch.setitem(patching.LIBRARIES, "torchvision", library)
    before = attributes()
    with pytest.raises(MemoryError):
        glimpse_ext.patch("torchvision")
    assert attributes() == before


def test_functions_keep_their_names_and_modules_use_them():
    image, boxes = small()
    original = torchvision.ops.roi_align
    expected = torchvision.ops.RoIAlign(3, 0.5, 2, aligned=True)(image, boxes)
    for verify in (False, True):
        with glimpse_ext.patch("torchvision", verify=verify):
            ours = torchvision.ops.roi_align
            assert list(inspect.signature(ours).parameters) == list(
                inspect.signature(original).parameters
            )
            # mmcv looks here to see what torchvision can do.
            assert "aligned" in ours.__code__.co_varnames
            assert (ours.__module__, ours.__name__) == (original.__module__, original.__name__)
            pool = torchvision.ops.RoIAlign(3, 0.5, 2, aligned=True)
            torch.testing.assert_close(pool(image, boxes), expected)


def test_what_the_original_cannot_do():
    image, boxes = small()
    with glimpse_ext.patch("torchvision"):
        moved = boxes.clone().requires_grad_()
        torchvision.ops.roi_align(image, moved, (3, 3), spatial_scale=0.5).sum().backward()
        assert moved.grad is not None
        # What makes the original read outside the map has a result.
        bad = torch.tensor([[0.0, float("nan"), 3, 12, 13]])
        assert not torchvision.ops.roi_align(image, bad, 3, 1.0, 2).any()


def test_traced_calls_are_the_originals():
    image, boxes = small()
    with glimpse_ext.patch("torchvision", verify=True) as patch:
        traced = torch.jit.trace(torchvision.ops.RoIAlign(3, 1.0, 2), (image, boxes))
    assert "torchvision::roi_align" in str(traced.inlined_graph)
    assert "traced by torch.jit" in patch.report["torchvision.ops.roi_align.roi_align"].left


# ------------------------------------------------------------------------------------------ verify


def wrong(call, factor=1.0, gradient_factor=1.0):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return factor * value

        @staticmethod
        def backward(ctx, grad):
            return factor * gradient_factor * grad

    def serve(*args):
        return Scaled.apply(glimpse_ext.roi_align(*args))

    def replacement(input, boxes, output_size, *more):
        return call(serve, None, input, boxes, output_size, *more)

    return replacement


@pytest.mark.parametrize(
    ("factors", "message", "seen"),
    [
        ((2.0, 1.0), r"roi_align gave \[1, 3, 3, 3\].*that differs from", "largest"),
        ((1.0, 2.0), "has a gradient that differs", "largest_gradient"),
    ],
    ids=["result", "gradient"],
)
def test_verify_says_what_differs(factors, message, seen, monkeypatch):
    first, *others = patching.LIBRARIES["torchvision"].replacements
    broken = dataclasses.replace(first, make=lambda call: wrong(call, *factors))
    library = _patch_libraries.Library((broken, *others), "")
    monkeypatch.setitem(patching.LIBRARIES, "torchvision", library)
    image, boxes = small()
    warned = pytest.warns(UserWarning, match=message)
    with glimpse_ext.patch("torchvision", verify=True) as patch, warned as record:
        torchvision.ops.roi_align(image.requires_grad_(), boxes, 3)
    assert record[0].filename == __file__
    compared = patch.report["torchvision.ops.roi_align.roi_align"]
    assert (compared.calls, compared.compared, compared.differing) == (1, 1, 1)
    assert getattr(compared, seen) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_verify_compares_16_bits_with_float32(dtype):
    """The originals round positions to 16 bits, or have no kernel at all."""
    image = torch.randn(1, 3, 40, 40).to(dtype).requires_grad_()
    boxes = torch.tensor([[0.0, 2.3, 3.1, 32.7, 33.9]]).to(dtype)
    with glimpse_ext.patch("torchvision", verify=True) as patch:
        torchvision.ops.roi_align(image, boxes, 7, 1.0, 2).sum().backward()
    compared = patch.report["torchvision.ops.roi_align.roi_align"]
    assert (compared.compared, compared.differing) == (1, 0), compared
    assert compared.largest_gradient > 0


def test_verify_changes_nothing():
    """Neither gradients, nor random numbers; and what the original cannot do is no error."""
    image, boxes = small()
    results = []
    for verify in (False, True):
        torch.manual_seed(0)
        leaf = image.clone().requires_grad_()
        with glimpse_ext.patch("torchvision", verify=verify) as patch:
            out = torchvision.ops.roi_align(2 * leaf, boxes.double(), 3)
            out.square().sum().backward()
        results.append((out.detach(), leaf.grad, torch.rand(3)))
    for unverified, verified in zip(*results, strict=True):
        assert torch.equal(unverified, verified)
    compared = patch.report["torchvision.ops.roi_align.roi_align"]
    assert (compared.calls, compared.compared) == (1, 0)
    assert "RuntimeError" in next(iter(compared.failed))


def test_verify_compares_with_the_original_inside_too(monkeypatch):
    """The original pooler calls roi_align, which is replaced, level by level."""
    served = []
    ours = _patch_libraries.roi_align
    monkeypatch.setattr(
        _patch_libraries, "roi_align", lambda *a, **k: served.append(1) or ours(*a, **k)
    )
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1"], 3, 2)
    features = {"0": torch.randn(1, 3, 32, 32), "1": torch.randn(1, 3, 16, 16)}
    with glimpse_ext.patch("torchvision", verify=True) as patch:
        pool(features, [torch.tensor([[2.0, 3, 40, 50]])], [(64, 64)])
    assert patch.report["torchvision.ops.poolers._multiscale_roi_align"].compared == 1
    assert not served


def test_the_report_can_be_read():
    image, boxes = small()
    with glimpse_ext.patch("torchvision", verify=True) as patch:
        torchvision.ops.roi_align(image, boxes, 3)
        torchvision.ops.roi_align(image, boxes.double(), 3)
        torch.jit.trace(torchvision.ops.RoIAlign(3, 1.0, 2), (image, boxes), check_trace=False)
    head, *lines = str(patch.report).splitlines()
    assert head.split() == ["calls", "compared", "differing", "result", "gradient"]
    assert lines[0].split()[:4] == ["torchvision.ops.roi_align.roi_align", "2", "1", "0"]
    assert "left to the original: traced by torch.jit" in lines[1]
    assert "1 only ours could do: RuntimeError" in lines[2]
    assert len(lines) == 5
    assert "verify=True" in str(patching.Report())
