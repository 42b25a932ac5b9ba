# SPDX-License-Identifier: BSD-3-Clause
"""Operators as ONNX models, run by ONNX Runtime, against the operators themselves."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import CASES, PYRAMIDS, random_tensor
from conftest import Tolerance, assert_within
from operators import OPERATORS
from torch.export import Dim

import glimpse_ext

pytest.importorskip("onnx", reason="pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")

from glimpse_ext import _onnx  # noqa: E402  after what it needs

F32, F64 = torch.float32, torch.float64
TOLERANCE = Tolerance(1e-5, 1e-5, "sums in another order, by another compiler")
ops = torch.ops.glimpse_ext


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def export(model, inputs, dynamic_shapes):
    if isinstance(model, Function) and dynamic_shapes is not None:
        dynamic_shapes = (dynamic_shapes,)  # of its one argument, *inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        return torch.onnx.export(
            model.eval(),
            inputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=glimpse_ext.onnx.translation_table(),
        )


class Session:
    """A model in ONNX Runtime, which knows nothing of this package."""

    def __init__(self, model, inputs, dynamic_shapes):
        self.program = export(model, inputs, dynamic_shapes)
        domains = {node.domain for node in self.program.model.graph}
        assert domains <= {""}, "only standard operators"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            self.program.model_proto.SerializeToString(), options, ["CPUExecutionProvider"]
        )

    def __call__(self, *inputs):
        flat = torch.utils._pytree.tree_leaves(inputs)
        names = [i.name for i in self.session.get_inputs()]
        feed = dict(zip(names, (t.numpy() for t in flat), strict=True))
        return [torch.from_numpy(out) for out in self.session.run(None, feed)]

    @property
    def nodes(self):
        return [node.op_type for node in self.program.model.graph]


# ------------------------------------------------------------------------------ every operator

NO_EQUIVALENT = {
    "roi_align legacy adaptive max",
    "roi_align_rotated aligned adaptive",
    "paste_masks torchvision",
    *(op.name for op in OPERATORS if op.public == "crop_batch"),
}
TRANSLATED = [op for op in OPERATORS if op.name not in NO_EQUIVALENT]

FIRST = CASES[0]
# Boxes of every kind, with the arguments of the first case. Runtimes allocate each sample of a
# cell, so that boxes of 1e9 pixels are for fixed numbers of them.
SAME = [
    case
    for case in CASES
    if case.output_size == FIRST.output_size and case.spatial_scale == FIRST.spatial_scale
    if case.shape[1] == FIRST.shape[1]
]


class Everything(torch.nn.Module):
    """All operators in one model, because an export takes seconds."""

    def forward(self, image, boxes):
        return [op.call(image, own, FIRST) for op, own in zip(TRANSLATED, boxes, strict=True)]


def inputs_of(case):
    return case.image(F32), [op.boxes(case).float() for op in TRANSLATED]


@pytest.fixture(scope="module")
def everything():
    boxes = [dict.fromkeys({0, op.rows}, Dim.DYNAMIC) for op in TRANSLATED]
    sizes = (dict.fromkeys((0, 2, 3), Dim.DYNAMIC), boxes)
    return Session(Everything(), inputs_of(FIRST), sizes)


@pytest.mark.parametrize("case", SAME, ids=str)
def test_every_operator(everything, case):
    image, boxes = inputs_of(case)
    if case.name == "enormous":
        # Not for adaptive sampling, by a runtime.
        boxes = [
            own[:0] if "adaptive" in op.name else own
            for op, own in zip(TRANSLATED, boxes, strict=True)
        ]
    results = everything(image, boxes)
    for op, own, got in zip(TRANSLATED, boxes, results, strict=True):
        expected = op.call(image, own, FIRST)
        assert got.dtype == expected.dtype
        assert_within(got, expected, TOLERANCE, f"{op}, {case}")


def test_standard_operators(everything):
    """What the documentation says that a graph holds."""
    nodes = everything.nodes
    # Two of roi_align, one for each level of the pyramid, one of the maximum.
    assert nodes.count("RoiAlign") == 5
    assert nodes.count("MaxPool") == 1
    assert not {"If", "Loop", "Scan", "GridSample"} & set(nodes)


# ------------------------------------------------------------------------------------- details


def boxes_of(count, height, width):
    unit = (random_tensor((count, 5), F64, f"boxes {count}") + 1) / 2
    low = unit[:, 1:3] * torch.tensor([width, height]) * 1.2 - 2
    high = low + unit[:, 3:] * torch.tensor([width, height])
    return torch.cat([(unit[:, :1] * 1.99).floor(), low, high], 1)


@pytest.mark.parametrize("dtype", [F64, torch.float16, torch.uint8], ids=str)
def test_dtypes(dtype):
    """float64 is read as it is, all others in float32, as the operators do; results as theirs."""

    def call(image, boxes):
        return (
            glimpse_ext.roi_align(image, boxes, 3, 1 / 3, -1, True),
            glimpse_ext.crop(image, boxes, (3, 2), box_format="pixels"),
            glimpse_ext.extract_glimpse(image, 4, boxes[:2, 1:3], False, False, "zero"),
            glimpse_ext.paste_masks(image[:, :1], boxes[:2, 1:], (8, 9), None),
        )

    image = random_tensor((2, 3, 13, 11), dtype, "image")
    boxes = boxes_of(7, 13, 11).to(F64 if dtype == F64 else F32)
    run = Session(Function(call), (image, boxes), ({}, {0: Dim.DYNAMIC}))
    for count in (7, 2, 5):
        inputs = (image, boxes[:count])
        for got, expected in zip(run(*inputs), call(*inputs), strict=True):
            assert got.dtype == expected.dtype
            one = 2**-10 if dtype == torch.float16 else 1e-12 if dtype == F64 else 1e-5
            scale = 255 if dtype == torch.uint8 else 1
            bound = Tolerance(one * scale, one, "a rounding, or sums in another order")
            assert_within(got, expected, bound, str(dtype))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("assign", ["torchvision", "detectron2"])
def test_levels_of_a_pyramid(assign, dtype):
    """Every box on the level where the operator has it, those just at and beside a limit too."""
    pyramid = PYRAMIDS[1]
    sides = torch.tensor([8.0, 16.0, 32.0, 48.0], dtype=dtype)
    areas = torch.tensor(_onnx._level_areas(pyramid.scales, 32, 4, 0, dtype), dtype=dtype)
    sides = torch.cat([sides, areas.sqrt(), areas.nextafter(areas * 0).sqrt()])
    up, down = sides.nextafter(sides * 2), sides.nextafter(sides * 0)
    sides = torch.cat([sides, up, down])
    zero = torch.zeros_like(sides)
    square = torch.stack([zero, zero, zero, sides, sides], 1)
    long = torch.stack([zero, zero, zero, sides * 2, sides / 2], 1)
    boxes = torch.cat([square, long, *(p.boxes(dtype) for p in PYRAMIDS[:3])])
    # Maps of one number each: what is read says where it was read.
    maps = [torch.full_like(f, i + 1.0) for i, f in enumerate(pyramid.features(dtype))]

    def call(first, second, third, boxes):
        return glimpse_ext.multiscale_roi_align(
            [first, second, third], boxes, 2, pyramid.scales, 2, False, 32, 4, assign
        )

    run = Session(Function(call), (*maps, boxes[:9]), ({}, {}, {}, {0: Dim.DYNAMIC}))
    (got,) = run(*maps, boxes)
    assert_within(got, call(*maps, boxes), Tolerance(1e-6, 0, "a mean of equal numbers"), assign)


def test_areas_of_levels_are_the_smallest():
    for dtype in (F32, F64):
        for assign in (0, 1):
            areas = _onnx._level_areas((1 / 4, 1 / 8, 1 / 16, 1 / 32), 224, 4, assign, dtype)
            assert areas == pytest.approx([112**2, 224**2, 448**2], rel=1e-5)


def test_given_levels():
    def call(image, boxes, levels):
        maps = [image, image[:, :, ::2, ::2]]
        return glimpse_ext.multiscale_roi_align(maps, boxes, 2, (1.0, 0.5), levels=levels)

    image, boxes = random_tensor((2, 3, 16, 12), F32, "image"), boxes_of(6, 16, 12).float()
    levels = torch.tensor([0, 1, 1, 0, 5, -1])
    run = Session(Function(call), (image, boxes, levels), None)
    (got,) = run(image, boxes, levels)
    assert_within(got, call(image, boxes, levels), TOLERANCE, "levels")
    assert not got[4:].any()


def test_one_map_of_a_pyramid():
    """With one level every box belongs to it, those with a negative side, too."""

    def call(image, boxes):
        return glimpse_ext.multiscale_roi_align([image], boxes, 2, (0.25,), aligned=True)

    image = random_tensor((2, 3, 16, 14), F32, "image")
    boxes = torch.cat([p.boxes(F32) for p in PYRAMIDS[1:]])
    run = Session(Function(call), (image, boxes), None)
    assert_within(run(image, boxes)[0], call(image, boxes), TOLERANCE, "one map")


def test_masks_meet_their_threshold_by_the_same_bits():
    def call(masks, boxes, image):
        size = image.shape[2:]
        return (
            glimpse_ext.paste_masks(masks, boxes, size),
            glimpse_ext.paste_masks(masks, boxes, size, 0.0),
            glimpse_ext.paste_masks(masks, boxes, (9, 8), -1),
        )

    masks = (random_tensor((5, 1, 4, 4), F32, "masks") + 1) / 2
    boxes = torch.tensor(
        [[1.0, 2, 9, 10], [-3, 0.5, 2, 4], [4, 4, 4, 9], [7, 3, 2, 9], [0, 0, 4, 4]]
    )
    images = [torch.zeros(1, 1, 12, 14), torch.zeros(1, 1, 9, 31)]
    sizes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {2: Dim.DYNAMIC, 3: Dim.DYNAMIC})
    run = Session(Function(call), (masks, boxes, images[0]), sizes)
    for image in images:
        for got, expected in zip(run(masks, boxes, image), call(masks, boxes, image), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


def test_images_that_are_not_there():
    """Zeros, as on CUDA: a runtime would read other memory, or another image."""

    def call(image, boxes):
        index = boxes[:, 0].long()
        return (
            glimpse_ext.roi_align(image, boxes, 2, aligned=True),
            glimpse_ext.crop(image, boxes, 2, box_format="pixels"),
            glimpse_ext.crop_and_resize(image, boxes[:, 1:] / 9, index, 2, extrapolation_value=7.0),
        )

    image = random_tensor((2, 3, 9, 7), F32, "image")
    boxes = torch.tensor([[1.0, 1, 2, 5, 6], [0, 1, 2, 5, 6], [1, 3, 1, 6, 5], [1, 0, 0, 3, 3]])
    run = Session(Function(call), (image, boxes), None)
    bad = boxes.clone()
    bad[0, 0], bad[1, 0], bad[3, 0] = -1, 2, 99
    for got, expected, fill in zip(run(image, bad), call(image, boxes), (0, 0, 7), strict=True):
        assert (got[[0, 1, 3]] == fill).all()
        assert_within(got[2], expected[2], TOLERANCE, "the box that is there")


def test_a_detector():
    """Layers, a pyramid, a head: any size of image and any number of boxes, also none."""

    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 4, 3, 4, 1)
            self.down = torch.nn.Conv2d(4, 4, 3, 2, 1)
            self.head = torch.nn.Linear(4 * 9, 5)

        def forward(self, image, boxes):
            fine = self.stem(image).relu()
            maps = [fine, self.down(fine)]
            pooled = glimpse_ext.multiscale_roi_align(
                maps, boxes, 3, (1 / 4, 1 / 8), canonical_size=24, canonical_level=3
            )
            return self.head(pooled.flatten(1))

    torch.manual_seed(0)
    model = Detector().eval()
    sizes = ({0: "n", 2: "h", 3: "w"}, {0: "k"})
    first = (random_tensor((2, 3, 64, 56), F32, "image"), boxes_of(5, 64, 56).float())
    run = Session(model, first, sizes)
    for count, height, width in ((5, 64, 56), (0, 64, 56), (1, 33, 47), (40, 80, 96)):
        image = random_tensor((2, 3, height, width), F32, "image")
        boxes = boxes_of(count, height, width).float()
        with torch.no_grad():
            expected = model(image, boxes)
        assert_within(run(image, boxes)[0], expected, TOLERANCE, f"{count} boxes")


# ----------------------------------------------------------------------------------- refusals

REFUSED = {
    "adaptive maximum": (
        lambda i, b: glimpse_ext.roi_align(i, b, 2, mode="max"),
        r'roi_align\(mode="max"\): .*positive sampling_ratio',
    ),
    "adaptive rotated": (
        lambda i, b: glimpse_ext.roi_align_rotated(i, torch.cat([b, b[:, :1]], 1), 2),
        r"roi_align_rotated: .*positive sampling_ratio",
    ),
    "noise": (
        lambda i, b: glimpse_ext.extract_glimpse(i, 2, b[:2, 1:3]),
        r'extract_glimpse.*noise="zero"',
    ),
    "noise with a seed": (
        lambda i, b: ops.extract_glimpse(
            i, b[:2, 1:3], i[0, 0, 0, :1].long(), 2, 2, 2, True, True, 1
        ),
        r'extract_glimpse: .*noise="zero"',
    ),
    "scales": (
        lambda i, b: glimpse_ext.extract_glimpse(
            i, 2, b[:2, 1:3], noise="zero", mode="subpixel", scales=(1, 2)
        ),
        r"once for each scale",
    ),
    "snapped masks": (
        lambda i, b: glimpse_ext.paste_masks(i[:, :1], b[:2, 1:], (8, 9), None, "torchvision"),
        r'paste_masks\(method="torchvision"\): .*detectron2',
    ),
    "size of the output": (
        lambda i, b: glimpse_ext.crop(i, b, i.shape[2:]),
        r"crop: .*output size must be known",
    ),
    "derivative": (
        lambda i, b: ops._sample([i], b, None, None, b, 3, [2, 2], 0, [2.0, 1.0], [1.0], [], 0.0),
        r"_sample: .*derivative",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    """The error of torch says what the operator said, and has it as a cause."""
    function, message = REFUSED[name]
    image, boxes = random_tensor((2, 3, 9, 7), F32, "image"), boxes_of(3, 9, 7).float()
    sizes = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {})
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=message) as raised:
        export(Function(function), (image, boxes), sizes)
    causes = []
    error = raised.value
    while error is not None:
        causes.append(type(error))
        error = error.__cause__
    assert glimpse_ext.onnx.NotTranslatable in causes


def test_the_table_has_every_operator():
    registered = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("glimpse_ext::")
    }
    translated = {op.name().split(".")[0] for op in glimpse_ext.onnx.translation_table()}
    assert translated - {"aten::randint"} == registered


def test_the_maximum_of_onnx_is_another():
    """Why roi_align(mode="max") is not RoiAlign(mode="max"): docs/exporting.md."""
    from onnx import TensorProto, helper

    node = helper.make_node(
        "RoiAlign", ["x", "b", "i"], ["y"], mode="max", output_height=1, output_width=1,
        sampling_ratio=1,
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(name, dtype, shape)
        for name, dtype, shape in (
            ("x", TensorProto.FLOAT, [1, 1, 4, 4]),
            ("b", TensorProto.FLOAT, [1, 4]),
            ("i", TensorProto.INT64, [1]),
        )
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, 1])
    graph = helper.make_graph([node], "maximum", inputs, [output])
    opset = helper.make_opsetid("", 16)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    ones, box = torch.ones(1, 1, 4, 4), torch.tensor([[1.0, 1, 3, 3]])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = {"x": ones.numpy(), "b": box.numpy(), "i": torch.zeros(1, dtype=torch.int64).numpy()}
    assert session.run(None, feed)[0].item() == 0.25
    boxes = torch.nn.functional.pad(box, (1, 0))
    assert glimpse_ext.roi_align(ones, boxes, 1, 1.0, 1, True, mode="max").item() == 1
