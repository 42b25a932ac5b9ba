# SPDX-License-Identifier: BSD-3-Clause
"""Operators as ONNX models, run by ONNX Runtime, against the operators themselves."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import CASES, PYRAMIDS, Case, random_tensor
from conftest import Tolerance, assert_within
from operators import OPERATORS

import glimpse_ext

pytest.importorskip("onnx", reason="pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")

from glimpse_ext import _onnx  # noqa: E402  after what it needs

F32, F64 = torch.float32, torch.float64
TOLERANCE = Tolerance(1e-5, 1e-5, "sums in another order, by another compiler")
ops = torch.ops.glimpse_ext


def export(model, inputs, dynamic_shapes):
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


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


# ------------------------------------------------------------------------------ every operator

NO_EQUIVALENT = {
    "roi_align legacy adaptive max",
    "roi_align_rotated aligned adaptive",
    "paste_masks torchvision",
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


def dynamic(op):
    return {op.rows: "boxes"} if op.rows == 0 else {0: "images", op.rows: "points"}


@pytest.fixture(scope="module")
def everything():
    from torch.export import Dim

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
