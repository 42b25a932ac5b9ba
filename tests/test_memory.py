# SPDX-License-Identifier: BSD-3-Clause
"""Where results lie in memory changes no number, and huge pages come where they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glimpse_ext
from glimpse_ext import _memory

SMAPS = Path("/proc/self/smaps")


@pytest.fixture(params=[False, True], ids=["small pages", "huge pages"])
def advised(request):
    before = glimpse_ext.set_huge_pages(request.param)
    yield request.param
    glimpse_ext.set_huge_pages(before)


def results():
    """Results of each way to make one, of a few megabytes and more."""
    torch.manual_seed(0)
    image = torch.randn(2, 8, 300, 400, requires_grad=True)
    boxes = torch.tensor([[0, 10, 20, 300, 200], [1, -5, 3.5, 700, 280]])
    boxes = boxes.repeat(8, 1).requires_grad_()
    pooled = glimpse_ext.roi_align(image, boxes, 140, aligned=True)
    gradients = torch.autograd.grad(pooled.square().sum(), [image, boxes])
    rotated = torch.tensor([[0, 100.0, 80, 220, 120, 30], [1, 200, 150, 90, 300, -70]])
    turned = glimpse_ext.roi_align_rotated(image.detach(), rotated, 280)
    glimpse = glimpse_ext.extract_glimpse(
        image.detach(), (310, 290), torch.tensor([[0.1, 0.7], [-0.5, 0]]), noise="zero"
    )
    masks = torch.rand(4, 28, 28)
    places = boxes.detach()[:4, 1:]
    pasted = [
        glimpse_ext.paste_masks(masks, places / shrink, (1000, 1200), threshold)
        for shrink in (1, 3, 10)
        for threshold in (0.5, 0.0, None)
    ]
    return [pooled.detach(), *gradients, turned, glimpse, *pasted]


def test_results_are_the_same():
    before = glimpse_ext.set_huge_pages(False)
    try:
        plain = results()
        glimpse_ext.set_huge_pages(True)
        for number, (one, other) in enumerate(zip(plain, results(), strict=True)):
            assert torch.equal(one, other), f"result {number} differs with huge pages"
    finally:
        glimpse_ext.set_huge_pages(before)


def test_every_thread_count_gives_the_same(advised):
    plain = results()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for number, (one, other) in enumerate(zip(plain, results(), strict=True)):
            assert torch.equal(one, other), f"result {number} differs with three threads"
    finally:
        torch.set_num_threads(before)


# A process of its own: memory that was used before keeps the pages it has.
HUGE_PAGES_OF_RESULTS = """
import re
import torch
import glimpse_ext

def huge_share(tensor):
    middle = tensor.data_ptr() + tensor.nbytes // 2
    for line in open("/proc/self/smaps"):
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024 / tensor.nbytes

image = torch.randn(1, 64, 40, 40)
boxes = torch.tensor([[0, 1.0, 2, 30, 35]]).repeat(16, 1)
wide = torch.zeros(16, 64, 100, 100, requires_grad=True)
corner = torch.tensor([[0, 1.0, 1, 9, 9]])
mask, place = torch.rand(40, 9, 9), torch.tensor([[0.0, 0, 1000, 1000]]).repeat(40, 1)
centre = torch.zeros(1, 2)
for advise in (False, True):
    glimpse_ext.set_huge_pages(advise)
    made = [
        glimpse_ext.roi_align(image, boxes, 100),
        torch.autograd.grad(glimpse_ext.roi_align(wide, corner, 3).sum(), wide)[0],
        glimpse_ext.roi_align_rotated(image, torch.tensor([[0, 9.0, 9, 8, 8, 3]]), 400),
        glimpse_ext.extract_glimpse(image, 400, centre, noise="zero"),
        glimpse_ext.paste_masks(mask, place, (1000, 1000)),
    ]
    print(*(huge_share(result) for result in made))
    del made
"""


def run_alone(program, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "GLIMPSE_HUGE_PAGES"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**environment, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells which pages a process has")
@pytest.mark.skipif(
    _memory.system_huge_pages() in (None, "never"), reason="this system has no huge pages to give"
)
def test_huge_pages_come_where_they_are_asked_for():
    unasked, asked = (line.split() for line in run_alone(HUGE_PAGES_OF_RESULTS).splitlines())
    names = ("roi_align", "gradient", "rotated", "glimpse", "paste_masks")
    for name, before, after in zip(names, unasked, asked, strict=True):
        if _memory.system_huge_pages() == "madvise":
            assert float(before) == 0, f"{name}: huge pages, unasked"
        assert float(after) > 0.5, f"{name}: only {after} of the result is in huge pages"


def test_the_setting_is_returned():
    before = glimpse_ext.set_huge_pages(True)
    try:
        assert _memory.huge_pages() is True
        assert glimpse_ext.set_huge_pages(False) is True, "the previous setting is returned"
        assert glimpse_ext.set_huge_pages(False) is False, "the previous setting is returned"
        assert _memory.huge_pages() is False
    finally:
        glimpse_ext.set_huge_pages(before)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_sets_it(value, on):
    variables = {} if value is None else {"GLIMPSE_HUGE_PAGES": value}
    program = "import glimpse_ext; print(glimpse_ext.set_huge_pages(False))"
    assert run_alone(program, **variables).split() == [str(on)]


def test_doctor_says_so(advised):
    from glimpse_ext import doctor

    said = doctor.huge_pages()
    assert said.startswith("on (" if advised else "off ("), said
    assert (_memory.system_huge_pages() or "unknown") in said
