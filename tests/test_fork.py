# SPDX-License-Identifier: BSD-3-Clause
"""Processes that were forked or spawned compute the same bits and end.

OpenMP waits forever where a process has used several threads and a fork of it does again. So does
torch, but not this package: see Note [After fork] in csrc/cpu/parallel.cpp. Each case runs in an
interpreter of its own, with a time limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import glimpse_ext

LOADER = """
import sys
import torch
import glimpse_ext

def compute(seed, threads):
    torch.set_num_threads(1)  # for what torch does here
    image = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(seed))
    image.requires_grad_()
    boxes = torch.tensor([[0.0, 3, 5, 50, 60], [0, 10, 2, 40, 33]]).repeat(40, 1)
    weight = torch.randn(80, 32, 14, 14, generator=torch.Generator().manual_seed(seed))
    masks = torch.rand(32, 28, 28, generator=torch.Generator().manual_seed(seed))
    torch.set_num_threads(threads)
    pooled = glimpse_ext.roi_align(image, boxes, 14, aligned=True)
    (gradient,) = torch.autograd.grad(pooled, image, weight)
    pasted = glimpse_ext.paste_masks(masks, boxes[:32, 1:], (300, 400))
    torch.set_num_threads(1)
    return [pooled.detach(), gradient, pasted]

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, seed):
        return compute(seed, 2)

if __name__ == "__main__":
    expected = [compute(seed, 2) for seed in range(4)]
    loader = torch.utils.data.DataLoader(
        Samples(), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1]
    )
    for found, wanted in zip(loader, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    # And once more where the workers came from.
    again = compute(0, 2)
    assert all(torch.equal(a, b) for a, b in zip(again, expected[0], strict=True))
    print("the same bits")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(LOADER)
    package = Path(glimpse_ext.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), method],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the same bits" in done.stdout
