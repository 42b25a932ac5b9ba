# SPDX-License-Identifier: BSD-3-Clause
"""Every public operator through the compilers: torch.compile, torch.export, AOTInductor.

test_registration.py has the operators as PyTorch registers them, and their derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import Case, random_tensor
from operators import OPERATORS, Operator
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import glimpse_ext

F32 = torch.float32
# Rows that differ in numbers only are one operator to a compiler.
ONE_OF_EACH = list({op.public: op for op in OPERATORS}.values())

# Images, boxes, height and width. Those of the first call are all different, and no number of
# columns of a box, because a compiler takes sizes that are equal then for one size.
SIZES = [(8, 7, 13, 11), (4, 9, 7, 18), (2, 6, 21, 9), (5, 17, 8, 31)]


def case_of(images: int, count: int, height: int, width: int) -> Case:
    unit = ((random_tensor((count, 4), torch.float64, f"boxes {count}") + 1) / 2).tolist()
    rows = tuple(
        (i % images, width * a, height * b, width * (a + c), height * (b + d))
        for i, (a, b, c, d) in enumerate(unit)
    )
    return Case("of sizes", rows, (images, 3, height, width))


CASES = [case_of(*sizes) for sizes in SIZES]


def inputs_of(op: Operator, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.image(F32), op.boxes(case).float()


class Call(torch.nn.Module):
    """An operator as a model: the arguments that are no tensors are those of the first case."""

    def __init__(self, op: Operator) -> None:
        super().__init__()
        self.op = op

    def forward(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return self.op.call(image, boxes, CASES[0])


def dynamic(op: Operator) -> tuple[dict[int, object], dict[int, object]]:
    """Images and sizes of images; boxes, and lists of points for each image."""
    boxes = {0: Dim.DYNAMIC} if op.rows == 0 else {0: Dim.DYNAMIC, op.rows: Dim.DYNAMIC}
    return {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, boxes


def operators_in(program: torch.export.ExportedProgram) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith("glimpse_ext.")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before, and an error where something is compiled a second time."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


# -------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("op", ONE_OF_EACH, ids=str)
def test_compile_does_not_compile_again(op, close):
    """One graph without a break for all sizes of everything, forward and backward."""

    def loss(image, boxes):
        return op.call(image.relu(), boxes, CASES[0]).square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for sizes, case in zip(SIZES, CASES, strict=True):
        results = []
        for function in (compiled, loss):
            image, boxes = inputs_of(op, case)
            named = {"image": image, "boxes": boxes}
            leaves = [named[name].requires_grad_() for name in op.gradients]
            value = function(image, boxes)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for got, expected in zip(*results, strict=True):
            size = max(1.0, float(expected.abs().max()))
            close(got / size, expected / size, "gradient", f"sizes {sizes}")
        if case is CASES[0]:
            # A second one in the same call is where the compiler first took a float for a symbol.
            assert counter.frame_count <= 2
            compiled_once = counter.frame_count
    assert counter.frame_count == compiled_once


@dataclass(frozen=True)
class Function:
    """A public function where arguments other than those of the table matter to a compiler."""

    name: str
    call: object
    calls: tuple[str, ...]
    """The operators of the graph."""

    def __str__(self) -> str:
        return self.name


def _corners(boxes):
    return boxes[:, 1:]


FUNCTIONS = [
    Function(
        "roi_align of a list",
        lambda image, boxes: glimpse_ext.roi_align(
            image, [_corners(boxes), _corners(boxes) + 1], (2, 3), 0.5
        ),
        ("roi_align",),
    ),
    Function(
        "multiscale_roi_align with levels",
        lambda image, boxes: glimpse_ext.multiscale_roi_align(
            [image, image + 1], boxes, 2, (1.0, 0.5), levels=boxes[:, 1].long() % 2
        ),
        ("multiscale_roi_align",),
    ),
    Function(
        "crop with an index",
        lambda image, boxes: glimpse_ext.crop(
            image, _corners(boxes), 3, box_format="pixels", image_index=boxes[:, 0].int()
        ),
        ("crop",),
    ),
    Function(
        "extract_glimpse of scales",
        lambda image, boxes: glimpse_ext.extract_glimpse(
            image, 3, image[:, 0, :2, 0], noise="zero", scales=(1, 2)
        ),
        ("extract_glimpse", "extract_glimpse"),
    ),
    Function(
        "extract_glimpse of subpixel scales",
        lambda image, boxes: glimpse_ext.extract_glimpse(
            image, 3, image[:, 0, :2, 0], noise="zero", scales=(1, 2), mode="subpixel"
        ),
        ("subpixel_glimpse",),
    ),
    Function(
        "paste_masks to bool",
        lambda image, boxes: glimpse_ext.paste_masks(
            image[:, 0], _corners(boxes)[:1].expand(image.shape[0], 4), image.shape[2:]
        ),
        ("paste_masks_threshold",),
    ),
    Function(
        "paste_masks to bytes",
        lambda image, boxes: glimpse_ext.paste_masks(
            image[:, :1], _corners(boxes)[:1].expand(image.shape[0], 4), (9, 8), -1, "torchvision"
        ),
        ("paste_masks_threshold",),
    ),
    Function(
        "convert_boxes",
        lambda image, boxes: glimpse_ext.convert_boxes(
            _corners(boxes), "torchvision", "tf_crop_and_resize", image.shape[2:], cells=(2, 3)
        ),
        (),
    ),
    Function(
        "a module",
        glimpse_ext.nn.RoIAlign(2, spatial_scale=0.25, sampling_ratio=2, aligned=True),
        ("roi_align",),
    ),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_compile_of_functions(function, close):
    compiled = torch.compile(function.call, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in CASES:
        image, boxes = case.image(F32), case.boxes(F32)
        got = compiled(image, boxes)
        expected = function.call(image, boxes)
        assert got.dtype == expected.dtype
        close(got.float(), expected.float(), detail=str(case.shape))


@pytest.mark.slow
def test_inductor(close):
    """The default backend between operators of its own, in both directions."""

    def loss(image, masks, boxes):
        crops = glimpse_ext.crop(image.relu(), boxes, 4, box_format="pixels").sigmoid()
        pasted = glimpse_ext.paste_masks(masks.sigmoid(), boxes[:, 1:], (9, 8), None)
        return (crops * crops.mean()).sum() + (pasted * pasted).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for case in CASES[:3]:
        count = len(case.rows)
        results = []
        for function in (compiled, loss):
            masks = random_tensor((count, 5, 6), F32, f"masks {count}")
            leaves = [t.requires_grad_() for t in (case.image(F32), masks, case.boxes(F32))]
            value = function(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for got, expected in zip(*results, strict=True):
            size = max(1.0, float(expected.abs().max()))
            close(got / size, expected / size, "gradient", str(case.shape))


def test_run_lengths_stay_outside_of_graphs():
    """Their length is data: a full graph is refused, and otherwise the call stands between two."""
    masks = random_tensor((2, 3, 3), F32, "masks")
    boxes = torch.tensor([[1.0, 1, 5, 6], [0, 2, 4, 5]])

    def encode(masks, boxes):
        return glimpse_ext.paste_masks_to_rle(masks.sigmoid(), boxes, (8, 7))

    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(encode, fullgraph=True, backend="aot_eager")(masks, boxes)
    torch._dynamo.reset()
    assert torch.compile(encode, backend="aot_eager")(masks, boxes) == encode(masks, boxes)


# --------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("op", ONE_OF_EACH, ids=str)
def test_export(op, same_bits):
    """One well-named operator, and few others around it; the numbers of an ordinary call."""
    call = Call(op)
    program = torch.export.export(call, inputs_of(op, CASES[0]), dynamic_shapes=dynamic(op))
    assert len(operators_in(program)) == 1
    assert sum(node.op == "call_function" for node in program.graph.nodes) <= 40
    # What ONNX and AOTInductor start from.
    lowered = program.run_decompositions()
    assert operators_in(lowered) == operators_in(program)
    for module in (program.module(), lowered.module()):
        for sizes, case in zip(SIZES, CASES, strict=True):
            inputs = inputs_of(op, case)
            same_bits(module(*inputs), call(*inputs), f"sizes {sizes}")


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_export_of_functions(function, close):
    class Model(torch.nn.Module):
        def forward(self, image, boxes):
            return function.call(image, boxes)

    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    first = (CASES[0].image(F32), CASES[0].boxes(F32))
    program = torch.export.export(Model(), first, dynamic_shapes=sizes)
    assert operators_in(program) == [f"glimpse_ext.{name}.default" for name in function.calls]
    module = program.module()
    for case in CASES:
        inputs = (case.image(F32), case.boxes(F32))
        got, expected = module(*inputs), function.call(*inputs)
        close(got.float(), expected.float(), detail=str(case.shape))


def test_export_takes_no_box_and_one():
    """Whatever the number of boxes it was exported with."""
    op = next(op for op in ONE_OF_EACH if op.public == "multiscale_roi_align")
    call = Call(op)
    image, boxes = inputs_of(op, CASES[0])
    program = torch.export.export(call, (image, boxes), dynamic_shapes=dynamic(op))
    for count in (0, 1, 2, 5):
        got = program.module()(image, boxes[:count])
        assert torch.equal(got, call(image, boxes[:count]))


@pytest.mark.slow
def test_aot_inductor(close, tmp_path):
    """All operators in one package, with other sizes than it was compiled for."""

    class Model(torch.nn.Module):
        def forward(self, image, boxes):
            pairs = zip(ONE_OF_EACH, boxes, strict=True)
            return [op.call(image, own, CASES[0]) for op, own in pairs]

    def inputs(case):
        return case.image(F32), [op.boxes(case).float() for op in ONE_OF_EACH]

    sizes = (
        {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
        [dynamic(op)[1] for op in ONE_OF_EACH],
    )
    program = torch.export.export(Model(), inputs(CASES[0]), dynamic_shapes=sizes)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "operators.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for case in CASES:
            results = zip(ONE_OF_EACH, package(*inputs(case)), Model()(*inputs(case)), strict=True)
            for op, got, expected in results:
                close(got, expected, "gradient", f"{op}, {case.shape}")


# ------------------------------------------------------------------------------------ ONNX


def test_the_package_does_not_need_onnx():
    """The table is asked for, not made when the package is imported."""
    assert glimpse_ext.onnx.translation_table.__doc__
    assert issubclass(glimpse_ext.onnx.NotTranslatable, RuntimeError)
