# SPDX-License-Identifier: BSD-3-Clause
"""What holds for every operator, over the table of operators.py."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import CASES, LAYOUTS, SMOOTH_CASES, Case, arrange, random_tensor
from conftest import CPU, CUDA, DEVICES, compute_dtype
from operators import ALL_DTYPES, OPERATORS, Operator
from test_determinism import threads
from torch import Tensor

F32, F64 = torch.float32, torch.float64

BY_NAME = {case.name: case for case in CASES}
# Boxes inside, partly outside, and of every kind that is no box, on a map with an odd layout.
FEW = [BY_NAME[name] for name in ("inside", "partial", "nan", "channels")]
# Each of them in one layout, and one of them in all.
ARRANGED = [(FEW[0], layout) for layout in LAYOUTS]
ARRANGED += [(case, LAYOUTS[i % len(LAYOUTS)]) for i, case in enumerate(FEW[1:])]
ROWS = [(op, case) for op in OPERATORS for case in CASES]
DTYPE_ROWS = [(op, dtype) for op in OPERATORS for dtype in op.dtypes]
# Rows that differ in numbers only have one schema, fake kernel and derivative.
ONE_OF_EACH = list({op.public: op for op in OPERATORS}.values())
GRADIENT_ROWS = [
    (op, dtype, to)
    for op, dtype in DTYPE_ROWS
    for to in op.gradients
    if to == "boxes" or dtype.is_floating_point
]


def label(value: object) -> str:
    return str(value)


def inputs(op: Operator, case: Case, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    boxes = op.boxes(case).to(device.torch, compute_dtype(dtype))
    return case.image(dtype).to(device.torch), boxes


def leaves_of(op: Operator, image: Tensor, boxes: Tensor) -> list[Tensor]:
    """What has a gradient, and is made to want it."""
    named = {"image": image, "boxes": boxes}
    return [named[name].requires_grad_() for name in op.gradients]


def weights_like(result: Tensor, op: Operator, case: Case) -> Tensor:
    seed = f"{op} {case} weights"
    return random_tensor(tuple(result.shape), result.dtype, seed).to(result.device)


@functools.cache
def expected(op: Operator, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and gradients to the image and the boxes, by the reference."""
    wide = compute_dtype(dtype)
    image = case.image(dtype).to(wide).requires_grad_()
    boxes = op.boxes(case).to(wide).requires_grad_()
    result = op.reference(image, boxes, case, wide)
    if not result.requires_grad:
        # Nothing is read.
        return result, torch.zeros_like(image), torch.zeros_like(boxes)
    g = weights_like(result.to(op.result(dtype)), op, case).to(wide)
    to_image, to_boxes = torch.autograd.grad(result, (image, boxes), g, materialize_grads=True)
    return result.detach(), to_image, to_boxes


def check_values(op, case, dtype, layout, device, close):
    image, boxes = inputs(op, case, dtype, device)
    result = op.call(arrange(image, layout), boxes, case)
    assert result.dtype == op.result(dtype)
    scale = 255.0 if dtype == torch.uint8 else 1.0
    values = expected(op, case, dtype)[0]
    close(result / scale, values / scale, detail=f"{case}, {layout}")


def check_gradients(op, case, dtype, layout, device, close, to=("image", "boxes")):
    """Each gradient alone or both, to what is asked for."""
    image, boxes = inputs(op, case, dtype, device)
    image = arrange(image, layout)
    leaves = {"image": image, "boxes": boxes}
    for name in to:
        leaves[name].requires_grad_()
    result = op.call(image, boxes, case)
    g = weights_like(result, op, case)
    got = torch.autograd.grad(result, [leaves[name] for name in to], g)
    wanted = dict(zip(("image", "boxes"), expected(op, case, dtype)[1:], strict=True))
    for name, gradient in zip(to, got, strict=True):
        assert gradient.dtype == leaves[name].dtype
        # Numbers in fractions of an image have gradients in pixels times its size, and those of
        # uint8 images in pixels of up to 255.
        size = max(1.0, float(wanted[name].abs().max()) if wanted[name].numel() else 1.0)
        size = size if name == "boxes" else 1.0
        close(gradient / size, wanted[name] / size, "gradient", f"{case}, {layout}, to the {name}")


# -------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize(("op", "case"), ROWS, ids=label)
def test_every_case(op, case, device, close):
    check_values(op, case, F64, "contiguous", device, close)
    check_gradients(op, case, F64, "contiguous", device, close, op.gradients)


@pytest.mark.parametrize(("op", "dtype"), DTYPE_ROWS, ids=label)
def test_values(op, dtype, device, close):
    for case, layout in ARRANGED:
        check_values(op, case, dtype, layout, device, close)


@pytest.mark.parametrize(("op", "dtype", "to"), GRADIENT_ROWS, ids=label)
def test_gradients(op, dtype, to, device, close):
    for case, layout in ARRANGED:
        check_gradients(op, case, dtype, layout, device, close, (to,))


# --------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("op", [op for op in OPERATORS if op.linear], ids=str)
def test_the_gradient_is_the_adjoint(op, device, close):
    """<A x, g> = <x, A^T g> for the part that is linear in the image."""
    for case in FEW:
        image, boxes = inputs(op, case, F64, device)
        nothing = op.call(torch.zeros_like(image), boxes, case)
        leaf = image.requires_grad_()
        result = op.call(leaf, boxes, case)
        g = weights_like(result, op, case)
        (to_image,) = torch.autograd.grad(result, leaf, g)
        probe = random_tensor(tuple(image.shape), F64, f"{op} {case}").to(device.torch)
        left = ((op.call(probe, boxes, case) - nothing) * g).sum()
        close(left, (probe * to_image).sum(), "gradient", str(case))


def smooth_call(op, case, device):
    """The function of what is differentiable, with those inputs."""
    image, boxes = inputs(op, case, F64, device)
    return (lambda i, b: op.call(i, b, case)), (
        image.requires_grad_(),
        boxes.requires_grad_(op.box_slopes and "boxes" in op.gradients),
    )


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_first_derivatives(op, device):
    """Both modes against differences."""
    for case in SMOOTH_CASES:
        function, leaves = smooth_call(op, case, device)
        assert torch.autograd.gradcheck(function, leaves), case


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_forward_mode(op, device):
    function, leaves = smooth_call(op, SMOOTH_CASES[1], device)
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, check_backward_ad=False
    )


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_double_backward(op, device):
    """Along one axis second derivatives are zero; mixed ones are not. Random directions."""
    function, leaves = smooth_call(op, SMOOTH_CASES[0], device)
    if not op.second:
        leaves = (leaves[0], leaves[1].detach())
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_vmap(op, device, close):
    """Over images, over boxes, over both, and of a gradient: as a loop."""
    case = FEW[0]
    image, boxes = inputs(op, case, F64, device)
    images = torch.stack([image, image.flip(3), image * 2])
    # Image indices are integers in a column of boxes: what is moved is where is read.
    moved = torch.stack([boxes, boxes * 0.999, boxes * 0.99])
    moved = op.with_indices(moved, boxes)
    arguments = tuple(("image", "boxes").index(name) for name in op.gradients)

    def call(i, b):
        return op.call(i, b, case)

    def gradient(i, b):
        return torch.func.grad(lambda *x: call(*x).square().sum(), arguments)(i, b)

    for dims in ((0, None), (None, 0), (0, 0)):
        got = torch.func.vmap(call, dims)(
            images if dims[0] == 0 else image, moved if dims[1] == 0 else boxes
        )
        for k in range(3):
            one = (images[k] if dims[0] == 0 else image, moved[k] if dims[1] == 0 else boxes)
            close(got[k], call(*one), detail=f"{dims}, {k}")
    mapped = torch.func.vmap(gradient)(images, moved)
    for k in range(3):
        for a, b in zip(mapped, gradient(images[k], moved[k]), strict=True):
            size = max(1.0, float(b.abs().max()))
            close(a[k] / size, b / size, "gradient", f"gradient {k}")


# --------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_constants_stay_constant_inside(op, device, close):
    case = Case("constant", ((0, 2.2, 2.3, 5.6, 6.1), (1, 2.5, 3.5, 4.75, 5.25)), (2, 2, 12, 10))
    boxes = op.boxes(case).to(device.torch)
    image = torch.full(case.shape, 0.625, dtype=F64, device=device.torch)
    result = op.call(image, boxes, case)
    if op.image_rows:
        # A window of the size of the case, from one of its boxes: the part inside of the image.
        reached = op.call(torch.ones_like(image), boxes, case) > 1 - 1e-12
        assert reached.any()
        result = result[reached]
    close(result, torch.full_like(result, 0.625))


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_boxes_are_independent(op, device, dtype, same_bits):
    """Shuffled, split, alone: the same bits, and the same for gradients to the boxes."""
    case = BY_NAME["inside"]
    image, boxes = inputs(op, case, dtype, device)
    count = boxes.shape[op.rows]

    def both(index):
        own_image, own_boxes = op.take(image, boxes, index)
        own_boxes = own_boxes.detach()
        if "boxes" not in op.gradients:
            return op.call(own_image, own_boxes, case), own_boxes
        result = op.call(own_image, own_boxes.requires_grad_(), case)
        g = weights.index_select(op.outputs, index)
        return result.detach(), torch.autograd.grad(result, own_boxes, g)[0]

    weights = weights_like(op.call(image, boxes, case), op, case)
    everything = torch.arange(count, device=device.torch)
    whole, to_boxes = both(everything)
    for index in (everything.flip(0), everything[: count // 2], everything[-1:]):
        some, to_some = both(index)
        same_bits(some, whole.index_select(op.outputs, index))
        same_bits(to_some, to_boxes.index_select(op.rows, index))


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_any_number_of_threads(op, device, same_bits):
    unit = (random_tensor((40, 4), F64, "crowd") + 1) / 2
    rows = torch.cat([unit[:, :2] * 15, unit[:, :2] * 15 + unit[:, 2:] * 12], 1)
    crowd = tuple((i % 2, *row) for i, row in enumerate(rows.tolist()))
    shape = (2, 3, 17, 19) if device.name == "emulated" else (2, 40, 17, 19)
    case = Case("crowd", crowd, shape)
    image, boxes = inputs(op, case, F32, device)

    def run():
        own_image, own_boxes = image.detach(), boxes.detach()
        leaves = leaves_of(op, own_image, own_boxes)
        result = op.call(own_image, own_boxes, case)
        return result, *torch.autograd.grad(result, leaves, weights_like(result, op, case))

    with threads(1):
        one = run()
    for count in (2, 5):
        with threads(count):
            for a, b in zip(run(), one, strict=True):
                same_bits(a, b, f"{count} threads")


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_bad_boxes_read_nothing(op, device):
    """Every number of a box that is not finite gives the fill value, and no gradient."""
    case = BY_NAME["nan"]
    image, boxes = inputs(op, case, F64, device)
    bad = op.with_indices(torch.full_like(boxes, torch.nan), boxes)
    leaves = leaves_of(op, image, bad)
    result = op.call(image, bad, case)
    assert (result == op.fill).all()
    for gradient in torch.autograd.grad(result.sum(), leaves):
        assert not gradient.any()


# --------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("device", [d for d in DEVICES if d in (CPU, CUDA)], ids=str, indirect=True)
@pytest.mark.parametrize("op", ONE_OF_EACH, ids=str)
def test_compile(op, device, close):
    """fullgraph, forward and backward, with sizes that change."""
    torch._dynamo.reset()

    def loss(image, boxes, case):
        return op.call(image.relu(), boxes, case).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (BY_NAME["inside"], BY_NAME["cells"]):
        for function in (compiled, loss):
            image, boxes = inputs(op, case, F64, device)
            leaves = leaves_of(op, image, boxes)
            value = function(image, boxes, case)
            got = (value.detach(), *torch.autograd.grad(value, leaves))
            if function is compiled:
                first = got
        for a, b in zip(first, got, strict=True):
            size = max(1.0, float(b.abs().max()))
            close(a / size, b / size, "gradient", str(case))


def test_the_table_is_complete():
    """Every registered operator that the package calls by name is in the table."""
    import glimpse_ext

    names = {op.public.split("(")[0] for op in OPERATORS}
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("glimpse_ext::")
    }
    named = {name for name in registered if not name.startswith("_")}
    # Bits have no gradient and no reference of another type: tests/test_paste_bits.py.
    assert named & set(glimpse_ext.__all__) <= names | {"paste_masks_to_bits"}
    assert {dtype for op in OPERATORS for dtype in op.dtypes} == set(ALL_DTYPES)
