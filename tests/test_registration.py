# SPDX-License-Identifier: BSD-3-Clause
"""Operators as PyTorch sees them: schemas, fake kernels, compile, export, AOTInductor."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import PYRAMIDS, SMOOTH_CASES, random_tensor
from conftest import CPU, CUDA, DEVICES
from frame_samples import frame_samples
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import glimpse_ext

F32, F64 = torch.float32, torch.float64
ops = torch.ops.glimpse_ext


@pytest.fixture(params=[d for d in DEVICES if d in (CPU, CUDA)], ids=str)
def device(request):
    """Emulated kernels stand behind the same operators as those of the CPU: nothing new to see."""
    return request.param


def image_and_boxes(device, k=7, h=19, w=15, n=2, c=4, dtype=F32):
    """Sizes are all different, those of a map of half the size too: the compiler takes sizes that
    are equal in the first call for one size, and compiles again where they are not."""
    image = random_tensor((n, c, h, w), dtype, f"image {n} {c} {h} {w}")
    unit = (random_tensor((k, 5), F32, f"boxes {k}") + 1) / 2
    columns = [
        unit[:, 0] * 1.99,
        unit[:, 1] * 3,
        unit[:, 2] * 4,
        unit[:, 3] * 3 + 3,
        unit[:, 4] * 4 + 4,
    ]
    return image.to(device.torch), torch.stack(columns, dim=1).to(device.torch)


def op_samples(device):
    """Arguments for every registered operator, with and without what is optional."""
    image, boxes = image_and_boxes(device, 3, 9, 7, dtype=F64)
    boxes = boxes.double()
    last = image.contiguous(memory_format=torch.channels_last)
    small = random_tensor((2, 4, 5, 4), F64, "small").to(device.torch)
    levels = torch.tensor([0, 1, 5], device=device.torch)
    index = torch.tensor([1, 0, 1], device=device.torch)
    tangent = random_tensor((3, 5), F64, "tangent").to(device.torch)
    grad = random_tensor((3, 4, 2, 3), F64, "grad").to(device.torch)
    plain = ([2, 3], 0, [2.0, 1.0], [1.0], [], 0.0)
    pyramid = ([2, 3], 0, [-1.0, 0.0], [1.0, 0.5], [1.0, 4.0, 1.0], 0.0)
    explicit = ([2, 3], 0, [2.0, 0.0], [1.0, 0.5], [], 0.0)
    corners = boxes[:, 1:]
    masks = random_tensor((3, 1, 3, 2), F64, "masks").to(device.torch)

    pictures = image.to(torch.uint8)
    numbers = (0.5, [0.5], [0.25])

    def grads(t):
        return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    return {
        "roi_align": (ops.roi_align.default, (image, boxes, 0.5, 2, 3, -1, False)),
        "roi_align gradients": (
            ops.roi_align.default,
            (grads(image), grads(boxes), 0.5, 2, 3, 2, True),
        ),
        "roi_align channels_last": (
            ops.roi_align.default,
            (grads(last), boxes, 1.0, 2, 3, 2, True),
        ),
        "roi_align uint8": (
            ops.roi_align.default,
            (image.to(torch.uint8), boxes, 1.0, 2, 3, 2, True),
        ),
        "roi_align float16": (
            ops.roi_align.default,
            (image.half(), boxes.float(), 1.0, 2, 3, 2, True),
        ),
        "roi_align no boxes": (ops.roi_align.default, (image, boxes[:0], 1.0, 2, 3, 2, True)),
        "multiscale_roi_align": (
            ops.multiscale_roi_align.default,
            (
                [grads(image), grads(small)],
                grads(boxes),
                None,
                2,
                3,
                [1.0, 0.5],
                2,
                True,
                4.0,
                1,
                0,
            ),
        ),
        "multiscale_roi_align levels": (
            ops.multiscale_roi_align.default,
            ([grads(last), small], boxes, levels, 2, 3, [1.0, 0.5], 2, True, 4.0, 1, 1),
        ),
        "crop": (ops.crop.default, (grads(image), grads(boxes), None, 2, 3, 2, False, 0)),
        "crop image index": (
            ops.crop.default,
            (grads(last), grads(corners), index, 2, 3, 0, True, 1),
        ),
        "crop even": (ops.crop.default, (image, grads(corners[:2]), None, 2, 3, 2, False, 1)),
        "crop_and_resize": (
            ops.crop_and_resize.default,
            (grads(image), grads(corners / 9), index, 2, 3, True, False, 7.0),
        ),
        "crop_and_resize nearest": (
            ops.crop_and_resize.default,
            (grads(last), grads(corners / 9), index, 2, 3, False, True, 7.0),
        ),
        "point_sample": (
            ops.point_sample.default,
            (grads(image), grads(corners[:2, :2] / 9), False),
        ),
        "_points_sample": (
            ops._points_sample.default,
            (grads(image), grads(corners[:2, :2].reshape(2, 1, 2) / 9), False),
        ),
        "_points_sample uint8": (
            ops._points_sample.default,
            (image.byte(), grads(corners[:2].reshape(2, 2, 2) / 9), True),
        ),
        "_points_gradients": (
            ops._points_gradients.default,
            (
                grads(grad[:2, :, 0]),
                grads(corners[:3].reshape(2, 3, 2) / 9),
                grads(image),
                False,
                [2, 4, 9, 7],
                False,
                True,
            ),
        ),
        "_points_gradients channels_last": (
            ops._points_gradients.default,
            (
                grads(grad[:2, :, 0]),
                corners[:3].reshape(2, 3, 2) / 9,
                None,
                True,
                [2, 4, 9, 7],
                True,
                True,
            ),
        ),
        "_points_gradients points": (
            ops._points_gradients.default,
            (
                grads(grad[:2, :, 0]),
                corners[:3].reshape(2, 3, 2) / 9,
                last,
                True,
                [2, 4, 9, 7],
                True,
                False,
            ),
        ),
        "extract_glimpse": (
            ops.extract_glimpse.default,
            (grads(image), corners[:2, :2] / 9, None, 2, 3, 2, True, True, 0),
        ),
        "extract_glimpse uint8": (
            ops.extract_glimpse.default,
            (image.byte(), corners[:2, :2] / 9, None, 2, 3, 1, False, True, 0),
        ),
        "extract_glimpse noise": (
            ops.extract_glimpse.default,
            (grads(last), corners[:2, :2] / 9, index[:1], 9, 3, 2, True, True, 2),
        ),
        "subpixel_glimpse": (
            ops.subpixel_glimpse.default,
            (grads(image), grads(corners[:2, :2] / 9), 2, 3, 2, True, True, 1),
        ),
        "subpixel_glimpse scales": (
            ops.subpixel_glimpse.default,
            (grads(last), grads(corners[:2, :3].abs().ceil()), 2, 3, 1, True, False, 0),
        ),
        "_sample": (
            ops._sample.default,
            ([grads(image)], grads(boxes), None, None, None, 0, *plain),
        ),
        "_sample tangent": (
            ops._sample.default,
            ([grads(image)], grads(boxes), None, None, grads(tangent), 1, *plain),
        ),
        "_sample both tangents": (
            ops._sample.default,
            ([grads(image), small], grads(boxes), None, None, grads(tangent), 3, *pyramid),
        ),
        "_sample image index": (
            ops._sample.default,
            ([grads(image), grads(small)], grads(corners), index, levels, None, 0, *explicit),
        ),
        "_sample_grad_features": (
            ops._sample_grad_features.default,
            (grads(grad), grads(boxes), None, None, None, 0, *plain, [2, 4, 9, 7], False),
        ),
        "_sample_grad_features channels_last": (
            ops._sample_grad_features.default,
            (grads(grad), boxes, None, None, None, 0, *pyramid, [2, 4, 9, 7, 5, 4], True),
        ),
        "_sample_grad_features tangent": (
            ops._sample_grad_features.default,
            (grads(grad), grads(boxes), None, None, grads(tangent), 2, *plain, [2, 4, 9, 7], False),
        ),
        "_sample_grad_boxes": (
            ops._sample_grad_boxes.default,
            ([grads(image)], grads(grad), grads(boxes), None, None, None, 0, *plain),
        ),
        "_sample_grad_boxes tangent": (
            ops._sample_grad_boxes.default,
            ([grads(image), small], grads(grad), grads(boxes), None, None, tangent, 3, *pyramid),
        ),
        "_sample_grad_boxes image index": (
            ops._sample_grad_boxes.default,
            ([image, small], grads(grad), grads(corners), index, levels, None, 0, *explicit),
        ),
        **frame_samples(device),
        "crop_batch": (
            ops.crop_batch.default,
            ([grads(image)], grads(boxes), None, 4, 3, True, False, False, *numbers, 0, False),
        ),
        "crop_batch bytes": (
            ops.crop_batch.default,
            ([pictures], boxes.detach(), None, 4, 3, False, True, True, *numbers, 2, True),
        ),
        "crop_batch list": (
            ops.crop_batch.default,
            (
                [pictures[:1], pictures[1:2, :, 1:]],
                boxes,
                None,
                4,
                3,
                True,
                False,
                True,
                *numbers,
                1,
                False,
            ),
        ),
        "paste_masks": (ops.paste_masks.default, (grads(masks), grads(corners), 5, 6, False)),
        "paste_masks snapped": (ops.paste_masks.default, (grads(masks), corners, 5, 6, True)),
        "paste_masks uint8": (ops.paste_masks.default, (masks.byte(), corners, 5, 6, False)),
        "paste_masks bool": (ops.paste_masks.default, (masks > 0, grads(corners), 5, 6, False)),
        "paste_masks float16": (
            ops.paste_masks.default,
            (masks.half(), corners.float(), 5, 6, False),
        ),
        "paste_masks no masks": (ops.paste_masks.default, (masks[:0], corners[:0], 5, 6, False)),
        "paste_masks_threshold": (
            ops.paste_masks_threshold.default,
            (masks, corners, 5, 6, 0.5, False),
        ),
        "paste_masks_threshold bytes": (
            ops.paste_masks_threshold.default,
            (masks, corners, 5, 6, -1.0, True),
        ),
        "paste_masks_to_bits": (
            ops.paste_masks_to_bits.default,
            (masks, corners, 5, 11, 0.5, False),
        ),
        "paste_masks_to_bits no masks": (
            ops.paste_masks_to_bits.default,
            (masks[:0], corners[:0], 5, 8, 0.5, True),
        ),
        "_paste_masks_runs": (
            ops._paste_masks_runs.default,
            (masks, corners, 5, 6, 0.5, False),
        ),
    }


SAMPLES = list(op_samples(CPU))


def test_every_operator_has_a_sample():
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("glimpse_ext::")
    }
    assert registered == {name.split()[0] for name in SAMPLES}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, device):
    """Schema, autograd registration, fake kernel and dispatch under compile, with real calls."""
    op, arguments = op_samples(device)[name]
    result = torch.library.opcheck(op, arguments)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_results_are_like_real_ones(name, device):
    """Shape, dtype, device and strides; sizes that are data are unknown to the fake."""
    op, arguments = op_samples(device)[name]
    real = op(*arguments)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = op(
            *torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), arguments
            )
        )
    for a, b in zip(
        fake if isinstance(fake, (list, tuple)) else [fake],
        real if isinstance(real, (list, tuple)) else [real],
        strict=True,
    ):
        if name == "_paste_masks_runs" and a is fake[0]:
            assert (a.dim(), a.dtype, a.device) == (b.dim(), b.dtype, b.device)
            continue
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


# ------------------------------------------------------------------------------- torch.compile


def loss(image, boxes):
    pooled = glimpse_ext.roi_align(image.relu(), boxes, (2, 3), 0.5, 2, True)
    return (pooled * pooled).sum()


def pyramid_loss(first, second, boxes):
    pooled = glimpse_ext.multiscale_roi_align(
        [first, second.relu()], boxes, (2, 3), (1.0, 0.5), canonical_size=4, canonical_level=1
    )
    return (pooled * pooled).sum()


def value_and_gradients(function, *inputs):
    inputs = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs
    ]
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


SIZES = [(7, 19, 15), (6, 19, 15), (8, 11, 10), (3, 13, 6), (17, 9, 12)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("dynamic", "most"), [(True, 1), (None, 3)])
def test_compile_does_not_recompile_for_sizes(dynamic, most, device, close):
    """fullgraph, forward and backward. dynamic=None learns one dimension after the other."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    for k, h, w in SIZES:
        inputs = image_and_boxes(device, k, h, w)
        got = value_and_gradients(compiled, *inputs)
        for a, b in zip(got, value_and_gradients(loss, *inputs), strict=True):
            close(a, b, "gradient", f"K={k}, H={h}, W={w}")
    assert counter.frame_count <= most
    # Zero and one are numbers of their own to the compiler.
    for k in (0, 1, 0, 1):
        value_and_gradients(compiled, *image_and_boxes(device, k))
    assert counter.frame_count <= most + 2


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_a_pyramid_does_not_recompile_for_sizes(device, close):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pyramid_loss, fullgraph=True, dynamic=True, backend=counter)
    for k, h, w in SIZES:
        first, boxes = image_and_boxes(device, k, h, w)
        inputs = (first, first[:, :, ::2, ::2].contiguous() + 1, boxes)
        got = value_and_gradients(compiled, *inputs)
        for a, b in zip(got, value_and_gradients(pyramid_loss, *inputs), strict=True):
            close(a, b, "gradient", f"K={k}, H={h}, W={w}")
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_other_arguments(device, close):
    """Lists of boxes, symbolic output sizes, channels_last, uint8, mixed dtypes."""

    def function(image, first, second, size):
        return glimpse_ext.roi_align(image, [first, second], (size, size + 1), aligned=True)

    image, boxes = image_and_boxes(device, 6)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    variants = [
        image,
        image.contiguous(memory_format=torch.channels_last),
        (image * 100).to(torch.uint8),
        image.half(),
    ]
    for variant in variants:
        for size in (2, 4):
            arguments = (variant, boxes[:2, 1:], boxes[2:, 1:], size)
            got, expected = compiled(*arguments), function(*arguments)
            assert got.stride() == expected.stride()
            close(got, expected, detail=f"{variant.dtype}, size {size}")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("which", ["one map", "pyramid"])
def test_inductor(which, device, close):
    """The default backend, in both directions."""
    image, boxes = image_and_boxes(device)
    if which == "one map":
        function, inputs = loss, (image, boxes)
    else:
        function, inputs = pyramid_loss, (image, image[:, :, ::2, ::2].contiguous(), boxes)
    compiled = torch.compile(function, fullgraph=True)
    got = value_and_gradients(compiled, *inputs)
    for a, b in zip(got, value_and_gradients(function, *inputs), strict=True):
        close(a, b, "gradient")


def test_make_fx_traces_values_and_gradients(device, close):
    image, boxes = image_and_boxes(device, dtype=F64)
    boxes = boxes.double()

    def gradients(image, boxes):
        return torch.func.grad(loss, argnums=(0, 1))(image, boxes)

    traced = make_fx(gradients, tracing_mode="symbolic")(image, boxes)
    for k, h, w in SIZES:
        inputs = [t.double() for t in image_and_boxes(device, k, h, w)]
        for a, b in zip(traced(*inputs), gradients(*inputs), strict=True):
            close(a, b, "gradient")


# -------------------------------------------------------------------- torch.export, AOTInductor


class Head(torch.nn.Module):
    """A layer, pooling on a pyramid, a layer: what a detector exports."""

    def __init__(self):
        super().__init__()
        self.before = torch.nn.Conv2d(4, 4, 1)
        self.after = torch.nn.Linear(4 * 2 * 3, 5)

    def forward(self, first, second, boxes):
        pooled = glimpse_ext.multiscale_roi_align(
            [self.before(first), second],
            boxes,
            (2, 3),
            (1.0, 0.5),
            canonical_size=4,
            canonical_level=1,
        )
        single = glimpse_ext.roi_align(second, boxes, (2, 3), 0.5, -1, True)
        return self.after((pooled + single).flatten(1))


def exported_head(device):
    torch.manual_seed(0)
    head = Head().to(device.torch).eval()
    k, h, w = (torch.export.Dim(name, min=2, max=4096) for name in ("k", "h", "w"))
    h2, w2 = (torch.export.Dim(name, min=2, max=4096) for name in ("h2", "w2"))
    program = torch.export.export(
        head,
        head_inputs(device, *SIZES[0]),
        dynamic_shapes=({2: h, 3: w}, {2: h2, 3: w2}, {0: k}),
    )
    return head, program


def head_inputs(device, k, h, w):
    first, boxes = image_and_boxes(device, k, h, w)
    return first, first[:, :, ::2, ::2].contiguous(), boxes


def test_export_with_dynamic_sizes(device, close):
    head, program = exported_head(device)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "glimpse_ext.multiscale_roi_align.default" in targets
    assert "glimpse_ext.roi_align.default" in targets
    module = program.module()
    for k, h, w in SIZES:
        inputs = head_inputs(device, k, h, w)
        close(module(*inputs), head(*inputs), detail=f"K={k}, H={h}, W={w}")


def test_an_exported_program_survives_a_file(device, close, tmp_path):
    head, program = exported_head(device)
    torch.export.save(program, tmp_path / "head.pt2")
    module = torch.export.load(tmp_path / "head.pt2").module()
    inputs = head_inputs(device, 8, 11, 10)
    close(module(*inputs), head(*inputs))


def test_aot_inductor_package(device, close, tmp_path):
    """Compiled to a shared library, loaded, and called with other sizes than it was made for."""
    head, program = exported_head(device)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "head.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for k, h, w in SIZES:
            inputs = head_inputs(device, k, h, w)
            close(package(*inputs), head(*inputs), "gradient", f"K={k}, H={h}, W={w}")


# ------------------------------------------------------------------- operators without the package


def bare(image, boxes):
    """As someone calls it who knows torch.ops only: nothing of the Python functions is used."""
    return ops.roi_align(image, boxes, 1.0, 2, 3, 2, True)


def bare_pyramid(image, boxes):
    return ops.multiscale_roi_align(
        [image, image], boxes, None, 2, 3, [1.0, 0.5], 2, True, 4.0, 1, 0
    )


BARE = [bare, bare_pyramid]


def named(function):
    return function.__name__


def smooth(device):
    case = SMOOTH_CASES[0]
    return case.image().to(device.torch), case.boxes().to(device.torch)


def tangent_by_reverse_mode(function, image, boxes, tangents):
    """J t, from J^T applied to every unit vector."""
    inputs = (image.detach().requires_grad_(), boxes.detach().requires_grad_())
    out = function(*inputs)
    rows = []
    for unit in torch.eye(out.numel(), dtype=out.dtype, device=out.device):
        gradients = torch.autograd.grad(out, inputs, unit.reshape(out.shape), retain_graph=True)
        rows.append(sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)))
    return torch.stack(rows).reshape(out.shape)


@pytest.mark.parametrize("function", BARE, ids=named)
def test_reverse_mode_of_bare_operators(function, device):
    inputs = [t.requires_grad_() for t in smooth(device)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("of", ["image", "boxes", "both"])
@pytest.mark.parametrize("function", BARE, ids=named)
def test_forward_mode_of_bare_operators(function, of, device, close):
    """Elsewhere in the ecosystem it is silently zero."""
    image, boxes = smooth(device)
    tangents = [
        random_tensor(tuple(t.shape), F64, name).to(device.torch)
        if of in (name, "both")
        else torch.zeros_like(t)
        for name, t in (("image", image), ("boxes", boxes))
    ]
    expected = tangent_by_reverse_mode(function, image, boxes, tangents)
    assert expected.abs().max() > 0.01
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(p, t) if of in (name, "both") else p
            for name, p, t in zip(("image", "boxes"), (image, boxes), tangents, strict=True)
        ]
        got = forward_ad.unpack_dual(function(*duals)).tangent
    assert got is not None, "no tangent is a silent zero"
    close(got, expected, "gradient")


@pytest.mark.parametrize("function", BARE, ids=named)
def test_torch_func_of_bare_operators_raises(function, device):
    """PyTorch has no place where an operator could say how; the public functions do it right."""
    image, boxes = smooth(device)
    with pytest.raises(RuntimeError, match="call the functions of glimpse_ext instead"):
        torch.func.grad(lambda i: (function(i, boxes) ** 2).sum())(image)
    with pytest.raises(RuntimeError, match="call the functions of glimpse_ext instead"):
        torch.func.grad(lambda b: (function(image, b) ** 2).sum())(boxes)
    with pytest.raises(RuntimeError, match="call the functions of glimpse_ext instead"):
        torch.func.jvp(function, (image, boxes), (image, boxes))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("function", BARE, ids=named)
def test_vmap_of_bare_operators(function, in_dims, device, close):
    image, boxes = smooth(device)
    batched = (
        torch.stack([image, image * 2, image + 1]),
        torch.stack([boxes, boxes + 0.01, boxes - 0.01]),
    )
    arguments = [
        b if dim == 0 else one for b, one, dim in zip(batched, (image, boxes), in_dims, strict=True)
    ]
    looped = [
        function(*[t[i] if dim == 0 else t for t, dim in zip(arguments, in_dims, strict=True)])
        for i in range(3)
    ]
    close(torch.vmap(function, in_dims=in_dims)(*arguments), torch.stack(looped))


# -------------------------------------------------------------------------------------- elsewhere


def test_a_worker_process_of_a_data_loader():
    """A forked process has the threads of its parent's pool in name only."""
    torch.set_num_threads(2)
    try:
        glimpse_ext.roi_align(torch.ones(4, 64, 32, 32), torch.tensor([[0.0, 1, 1, 9, 9]] * 64), 7)
        loader = torch.utils.data.DataLoader(
            Crops(), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        got = torch.cat(list(loader))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(got, torch.stack([Crops()[i] for i in range(4)]))


class Crops(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = random_tensor((1, 64, 32, 32), F32, f"item {index}")
        boxes = torch.tensor([[0.0, 1, 1, 9, 9]] * 64)
        return glimpse_ext.roi_align(image, boxes, 7)


@pytest.mark.parametrize("image_dtype", [F32, torch.float16, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(autocast_dtype, image_dtype, device, same_bits):
    """Half images with float32 boxes are what autocast makes, and what is taken without it."""
    image, boxes = image_and_boxes(device, dtype=image_dtype)
    expected = value_and_gradients(loss, image, boxes)
    with torch.autocast(device.torch.type, dtype=autocast_dtype):
        pooled = glimpse_ext.roi_align(image, boxes, 2)
        assert pooled.dtype == image_dtype
        leaves = [image.detach().requires_grad_(), boxes.detach().requires_grad_()]
        value = glimpse_ext.roi_align(leaves[0].relu(), leaves[1], (2, 3), 0.5, 2, True)
    value = (value * value).sum()
    for a, b in zip((value.detach(), *torch.autograd.grad(value, leaves)), expected, strict=True):
        same_bits(a, b)


def test_levels_that_leave_autocast_in_two_dtypes(device, close):
    """A convolution gives bfloat16 and a normalisation float32: all is then pooled in float32."""
    pyramid = PYRAMIDS[0]
    features = [f.to(device.torch) for f in pyramid.features(F32)]
    mixed = [features[0].bfloat16(), *features[1:]]
    boxes = pyramid.boxes(F32).to(device.torch)
    arguments = (boxes, pyramid.output_size, pyramid.scales)
    with torch.autocast(device.torch.type, dtype=torch.bfloat16):
        pooled = glimpse_ext.multiscale_roi_align(mixed, *arguments)
    assert pooled.dtype == F32
    widened = [f.float() for f in mixed]
    close(pooled, glimpse_ext.multiscale_roi_align(widened, *arguments))
