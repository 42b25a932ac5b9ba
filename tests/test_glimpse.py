# SPDX-License-Identifier: BSD-3-Clause
"""Glimpses: TensorFlow's numbers to the bit, noise, sub-pixel windows and their derivatives."""

from __future__ import annotations

import doctest
import functools
import json
from pathlib import Path
from random import Random
from statistics import NormalDist

import numpy as np
import pytest
import torch
from cases import LAYOUTS, arrange, random_tensor
from conftest import CPU, _testing, compute_dtype
from torch.utils._python_dispatch import TorchDispatchMode

from glimpse_ext import crop, crop_and_resize, extract_glimpse, reference

GOLDEN = Path(__file__).parent / "golden"
F32, F64 = torch.float32, torch.float64
RULES = [
    (version, centered, normalized)
    for version in (1, 2)
    for centered in (True, False)
    for normalized in (True, False)
]


def rule_name(rule):
    version, centered, normalized = rule
    return f"v{version}{'-centered' * centered}{'-normalized' * normalized}"


def bits(tensor):
    """The numbers of a tensor as integers: NaN payloads and signs of zeros differ in them."""
    size = tensor.element_size()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(integers[size])


def assert_bits(actual, expected, label):
    assert actual.dtype == expected.dtype, f"{label}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{label}: {list(actual.shape)}, expected {list(expected.shape)}"
    )
    differ = int((bits(actual) != bits(expected)).sum())
    assert differ == 0, f"{label}: {differ} of {actual.numel()} elements have other bits"


# TensorFlow's numbers


@functools.cache
def stored(file):
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


class Stored:
    """One stored case: fields by name; images as [N, C, H, W]."""

    def __init__(self, file, index):
        self.arrays, self.prefix = stored(file), f"c{index:03d}_"
        self.tag = str(self.arrays["tags"][index])

    def __getitem__(self, field):
        array = self.arrays[self.prefix + field]
        if array.ndim == 0:
            return array.item()
        tensor = torch.from_numpy(array)
        return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor

    def call(self, device, layout="contiguous", **options):
        return extract_glimpse(
            arrange(self["image"].to(device.torch), layout),
            self["size"].tolist(),
            self["offsets"].to(device.torch),
            self["centered"],
            self["normalized"],
            version=self["version"],
            **options,
        )


def stored_cases(file):
    return [Stored(file, i) for i in range(int(stored(file)["n_cases"]))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", [1, 2])
def test_stored_windows_to_the_bit(version, layout, device):
    cases = stored_cases(f"extract_glimpse_v{version}_zero")
    assert len(cases) == 213
    for index, case in enumerate(cases):
        label = f"version {version}, case {index} ({case.tag}), {device}, {layout}"
        assert_bits(case.call(device, layout, noise="zero"), case["output"], label)


@pytest.mark.parametrize("version", [1, 2])
def test_reference_has_the_stored_windows(version):
    for index, case in enumerate(stored_cases(f"extract_glimpse_v{version}_zero")):
        got = reference.extract_glimpse(
            case["image"],
            case["size"].tolist(),
            case["offsets"],
            case["centered"],
            case["normalized"],
            version=version,
        )
        assert_bits(got, case["output"], f"version {version}, case {index} ({case.tag})")


@pytest.mark.parametrize("version", [1, 2])
def test_stored_windows_at_whole_places_by_interpolation(version, device):
    """Where nothing was truncated both modes agree, as far as float32 offsets are whole."""
    compared = 0
    for index, case in enumerate(stored_cases(f"extract_glimpse_v{version}_zero")):
        image = case["image"]
        if image.numel() == 0 or not image.isfinite().all():
            continue  # 0 * inf is NaN: interpolation may spread such a pixel by one
        aligned = case["integer_aligned"]
        got = case.call(device, noise="zero", mode="subpixel").cpu()[aligned]
        expected = case["output"][aligned]
        compared += len(got)
        torch.testing.assert_close(
            got, expected, atol=1e-4, rtol=1e-4, msg=lambda m, i=index: f"case {i}: {m}"
        )
    assert compared > 40


@pytest.mark.parametrize("index", range(8))
def test_stored_noise(index, device):
    """Copied pixels are exact, and noise lies where TensorFlow's does and in its range."""
    case = Stored("extract_glimpse_noise", index)
    noise = case.tag.split("/")[0]
    generator = torch.Generator().manual_seed(index)
    got = case.call(device, noise=noise, generator=generator).cpu()
    image, expected = case["image"], case["output"]
    copied = case["copied_mask"][:, None].expand_as(got)
    assert torch.equal(got[copied], expected[copied]), case.tag
    dims = (1, 2, 3) if noise == "uniform" else (2, 3)
    low, high = image.amin(dims, keepdim=True), image.amax(dims, keepdim=True)
    for field in (got, expected):
        assert ((field >= low) & (field <= high) | copied).all(), case.tag
    if "outside" in case.tag:
        # 4096 numbers of each channel; of theirs, only one channel is independent of the others.
        torch.testing.assert_close(got.mean((2, 3)), expected.mean((2, 3)), atol=0.15, rtol=0.05)
        torch.testing.assert_close(got.std((2, 3)), expected.std((2, 3)), atol=0.1, rtol=0.05)


def facts():
    found = json.loads((GOLDEN / "tf_unit_facts.json").read_text())["facts"]
    return [f for f in found if "limpse" in f["op"] and f.get("verified_by_run", True)]


FACTS = facts()


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["test"].split(".")[1])
def test_what_the_unit_tests_of_tensorflow_assert(fact, device):
    version = 1 if "raw V1" in fact["op"] else 2
    if "expected_row_numbers_1based" in fact:
        rows, columns = fact["image_rows_cols"]
        offsets = torch.tensor([fact["offset_row_col"]], device=device.torch)
        across = {"row": torch.arange(1.0, rows + 1)[:, None].expand(rows, columns)}
        across["col"] = torch.arange(1.0, columns + 1)[None].expand(rows, columns)
        outside = [
            torch.tensor([n is None for n in fact[f"expected_{axis}_numbers_1based"]])
            for axis in ("row", "col")
        ]
        noisy = outside[0][:, None] | outside[1][None]
        for axis, image in across.items():
            got = extract_glimpse(image[None, None].to(device.torch), fact["size"], offsets).cpu()
            numbers = torch.tensor([n or 0 for n in fact[f"expected_{axis}_numbers_1based"]])
            wanted = numbers[:, None] if axis == "row" else numbers[None]
            wanted = wanted.expand(fact["size"]).float()
            assert torch.equal(got[0, 0][~noisy], wanted[~noisy])
            assert ((got[0, 0] >= 0) & (got[0, 0] <= max(rows, columns))).all()
        return
    if fact["test"].endswith("testEmptyTensor"):
        empty = torch.zeros(0, 0, 4, 3, device=device.torch)
        got = extract_glimpse(empty, 1, torch.zeros(0, 2, device=device.torch))
        assert got.shape == (0, 0, 1, 1)
        return
    if fact["test"].endswith("testGlimpseNegativeInput"):
        with pytest.raises(ValueError, match="size must be zero or more, got -63"):
            extract_glimpse(torch.zeros(1, 1, 3, 3), fact["size"], torch.zeros(1, 2))
        return
    image = torch.arange(25.0, device=device.torch).reshape(1, 1, 5, 5)
    offsets = torch.tensor([fact["offset_row_col"]], dtype=F32, device=device.torch)
    options = {"centered": fact["centered"], "normalized": fact["normalized"], "version": version}
    got = extract_glimpse(image, fact["size"], offsets, noise=fact["noise"], **options)
    assert got[0, 0].tolist() == fact["expected"]


def test_every_fact_is_used():
    assert len(FACTS) == 18


# Copies


def place(offset, size, extent, rule, number=np.float32):
    """The whole place of a window along one axis, from the formulas of the documentation."""
    version, centered, normalized = rule
    v = number(offset)
    if normalized:
        v = v * number(size)
    if centered:
        if normalized or version == 1:
            v = v / number(2)
        v = v + number(size) / number(2)
    if version == 1 or (centered and normalized):
        v = v - number(extent) / number(2)
    assert v.dtype == number
    return int(v) if np.isfinite(v) else None


def windows(image, size, offsets, rule):
    """Windows one pixel at a time, with zeros outside."""
    number = np.float64 if offsets.dtype == F64 else np.float32
    out = image.new_zeros(*image.shape[:2], *size)
    for n, offset in enumerate(offsets.to(F64).tolist()):
        first = [place(o, image.shape[2 + i], size[i], rule, number) for i, o in enumerate(offset)]
        if None in first:
            continue
        for i in range(size[0]):
            for j in range(size[1]):
                y, x = first[0] + i, first[1] + j
                if 0 <= y < image.shape[2] and 0 <= x < image.shape[3]:
                    out[n, :, i, j] = image[n, :, y, x]
    return out


EVERY_DTYPE = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn),
]


def every_bit(shape, dtype, seed):
    """Numbers of any bits: NaN of every payload, infinities, subnormals, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).to(torch.bool)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(256, (*shape[:-1], shape[-1] * size), generator=generator)
    return raw.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(4, 16), (3, 5), (9, 1), (1, 32)], ids=str)
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_copies_every_bit(dtype, size, layout, device):
    """Widths that move 16 bytes at once and such that do not, at places aligned and not."""
    image = every_bit((4, 3, 7, 35), dtype, 3)
    storage = torch.zeros(4, 8, 4, 72, dtype=torch.uint8).to(dtype)  # for strides of its own
    offsets = torch.tensor([[0.0, -0.5], [0.3, 0.1], [-1.2, 0.9], [0.1, 7.0]])
    rule = (2, True, True)
    expected = windows(image, size, offsets, rule)
    if layout == "strided":
        view = storage[:, 1:, 1:, 1:71:2].permute(0, 2, 1, 3)
        given = view.copy_(image)
    else:
        given = arrange(image, layout)
    got = extract_glimpse(
        given.to(device.torch), size, offsets.to(device.torch), noise="zero", version=2
    )
    assert_bits(got.cpu(), expected, f"{dtype}, {size}, {layout}, {device}")


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@pytest.mark.parametrize("number", [F32, F64, torch.float16, torch.bfloat16], ids=str)
def test_places_windows_in_the_order_of_the_original(rule, number, device):
    """float32 arithmetic for offsets up to float32, float64 for float64, whatever the image."""
    generator = torch.Generator().manual_seed(5)
    count = 150
    offsets = (torch.rand(count, 2, generator=generator, dtype=F64) * 2.4 - 1.2).to(number)
    if not rule[2]:
        offsets = (offsets.to(F64) * 15).to(number)
    image = torch.arange(1.0, 12 * 13 + 1).reshape(1, 1, 12, 13).expand(count, 1, 12, 13)
    expected = windows(image, (4, 3), offsets, rule)
    version, centered, normalized = rule
    for dtype in (F32, F64):
        got = extract_glimpse(
            image.to(device.torch, dtype),
            (4, 3),
            offsets.to(device.torch),
            *(centered, normalized, "zero"),
            version=version,
        )
        assert torch.equal(got.cpu(), expected.to(dtype)), f"image of {dtype}"


def test_memory_format_is_kept(device):
    image = torch.rand(2, 3, 6, 5, device=device.torch)
    offsets = torch.zeros(2, 2, device=device.torch)
    for mode in ("exact", "subpixel"):
        for scales in ((1,), (1, 2)):
            for layout in (torch.contiguous_format, torch.channels_last):
                got = extract_glimpse(
                    image.contiguous(memory_format=layout),
                    (3, 4),
                    offsets,
                    noise="zero",
                    mode=mode,
                    scales=scales,
                )
                assert got.is_contiguous(memory_format=layout), f"{mode}, {scales}, {layout}"


EMPTY = [
    ((0, 3, 6, 5), (2, 4)),
    ((2, 0, 6, 5), (2, 4)),
    ((2, 3, 0, 5), (2, 4)),
    ((2, 3, 6, 0), (2, 4)),
    ((2, 3, 6, 5), (0, 4)),
    ((2, 3, 6, 5), (2, 0)),
]


@pytest.mark.parametrize("mode", ["exact", "subpixel"])
@pytest.mark.parametrize("noise", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize(("shape", "size"), EMPTY, ids=str)
def test_empty(shape, size, noise, mode, device):
    """An image without pixels gives what TensorFlow gives: zeros, or noise of nothing, NaN."""
    got = extract_glimpse(
        torch.zeros(shape, device=device.torch),
        size,
        torch.zeros(shape[0], 2, device=device.torch),
        noise=noise,
        mode=mode,
        scales=(1, 3),
    )
    assert got.shape == (shape[0], 2 * shape[1], *size)
    assert torch.equal(got.isnan().cpu(), torch.full_like(got, noise != "zero").bool().cpu())


NOWHERE = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e19, -1e19, 1e9, -1e9]


@pytest.mark.parametrize("mode", ["exact", "subpixel"])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_windows_that_are_nowhere(rule, mode, device):
    version, centered, normalized = rule
    offsets = torch.tensor([[a, b] for o in NOWHERE for a, b in ((o, 0.0), (0.0, o), (o, o))])
    image = torch.ones(len(offsets), 2, 5, 4, device=device.torch)
    for number in (F32, F64):
        got = extract_glimpse(
            image,
            (3, 2),
            offsets.to(device.torch, number),
            *(centered, normalized, "zero"),
            version=version,
            mode=mode,
        )
        assert not got.any(), f"offsets of {number}"


def test_what_is_often_written_of_the_offsets_is_wrong(device):
    """Not scaled with (w - 1), not at the centre in every mode, not padded with zeros."""
    image = torch.arange(5.0, device=device.torch).reshape(1, 1, 1, 5)

    def pixel(offset, **options):
        offsets = torch.tensor([[0.0, offset]], device=device.torch)
        return extract_glimpse(image, 1, offsets, **options).item()

    # (0.8 + 1) * (5 - 1) / 2 is 3.6, but the offset counts in widths: ((0.8 + 1) * 5 - 1) / 2 = 4.
    assert pixel(0.8) == 4
    # 1 is the outer edge of the last pixel and not its centre: half of a window around it is
    # inside. Around the centre of pixel 4, a window of four would begin at 4 - 3/2 = 2.5.
    right = torch.tensor([[0.0, 1.0]], device=device.torch)
    assert extract_glimpse(image, (1, 4), right, noise="zero").tolist() == [[[[3, 4, 0, 0]]]]
    # Pixels are never interpolated: the place is truncated, toward zero on both sides of it.
    assert pixel(0.99, centered=False, normalized=False) == 0
    assert pixel(-0.99, centered=False, normalized=False, noise="zero") == 0
    # Without `normalized` the offset is the first pixel and not the centre.
    two = torch.tensor([[0.0, 0.0]], device=device.torch)
    assert extract_glimpse(image, (1, 2), two, True, False).tolist() == [[[[2, 3]]]]
    # What lies outside is noise in the range of the image, unless zeros are asked for.
    outside = torch.tensor([[9.0, 9.0]], device=device.torch)
    noise = extract_glimpse(image + 100, 8, outside)
    assert ((noise >= 100) & (noise <= 104)).all()
    assert len(noise.unique()) > 32
    assert not extract_glimpse(image + 100, 8, outside, noise="zero").any()


# Noise


def philox(seed, *counter):
    """Philox4x32-10 from the paper, in Python integers."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    c = list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (b >> 32) ^ c[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ c[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


needs_testing = pytest.mark.skipif(_testing is None, reason="the test module is not in a wheel")


def test_philox_in_python_is_that_of_the_paper():
    """Known answers of Random123."""
    assert philox(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    got = philox(ones << 32 | ones, ones, ones, ones, ones)
    assert got == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = philox(0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert pi == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@needs_testing
def test_philox():
    numbers = Random(1)
    for _ in range(50):
        seed, counter = numbers.getrandbits(64), [numbers.getrandbits(32) for _ in range(4)]
        assert _testing.philox(seed, *counter) == philox(seed, *counter)


@needs_testing
def test_normal_quantile():
    """Python's own quantile, which is the same approximation with another logarithm."""
    numbers = Random(2)
    tails = [2.0**-k for k in range(2, 53)]
    levels = [numbers.random() for _ in range(2000)] + tails + [1 - t for t in tails]
    for p in [*levels, 0.5, 0.075, 0.925, 0.075 - 1e-9, 0.925 + 1e-9]:
        if 0 < p < 1:
            expected = NormalDist().inv_cdf(p)
            assert abs(_testing.normal_quantile(p) - expected) <= 4e-15 * max(1, abs(expected)), p


def expected_noise(image, size, noise, seed):
    """What stands in a window of nothing but noise, one element at a time."""
    out = torch.empty(*image.shape[:2], *size, dtype=F64)
    for n, pixels in enumerate(image.to(F64)):
        for c, channel in enumerate(pixels):
            known = pixels if noise == "uniform" else channel
            low, high = known.min().item(), known.max().item()
            mean, deviation = channel.mean().item(), channel.std(correction=0).item()
            for y in range(size[0]):
                for x in range(size[1]):
                    words = philox(seed, x, y, c, n)
                    if noise == "uniform":
                        value = low + words[0] / 2**32 * (high - low)
                    else:
                        p = ((words[0] << 20 | words[1] >> 12) + 0.5) / 2**52
                        value = mean + deviation * NormalDist().inv_cdf(p)
                    out[n, c, y, x] = min(max(value, low), high)
    return out.to(image.dtype)


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_is_a_function_of_seed_and_place(noise, layout, device, dtype, close):
    image = random_tensor((2, 3, 19, 17), dtype, "noise")
    generator = torch.Generator().manual_seed(11)
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
    offsets = torch.full((2, 2), 5.0)
    got = extract_glimpse(
        arrange(image, layout).to(device.torch),
        (5, 4),
        offsets.to(device.torch),
        noise=noise,
        generator=torch.Generator().manual_seed(11),
    )
    close(got, expected_noise(image, (5, 4), noise, seed))


class Draw:
    """Noise of one seed, on every device, layout and number of threads."""

    def __init__(self, noise, dtype, shape=(3, 5, 23, 29), size=(9, 8)):
        self.image = random_tensor(shape, dtype, "draw")
        self.noise, self.size = noise, size
        # Inside, partly and wholly outside.
        self.offsets = torch.tensor([[0.0, 0.1], [0.9, -0.8], [4.0, 0.0]])

    def __call__(self, device, layout="contiguous", seed=3):
        return extract_glimpse(
            arrange(self.image, layout).to(device.torch),
            self.size,
            self.offsets.to(device.torch),
            noise=self.noise,
            generator=torch.Generator().manual_seed(seed),
        ).cpu()


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_has_the_same_bits_everywhere(noise, layout, device, dtype):
    draw = Draw(noise, dtype)
    assert_bits(draw(device, layout), draw(CPU), f"{device}, {layout}")


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("noise", ["zero", "uniform", "gaussian"])
def test_any_number_of_threads(noise, threads):
    draw = Draw(noise, F32, shape=(3, 40, 33, 29), size=(60, 70))
    got = draw(CPU, "channels_last"), draw(CPU)
    torch.set_num_threads(1)
    assert_bits(got[0], draw(CPU), f"channels_last, {threads} threads")
    assert_bits(got[1], draw(CPU), f"{threads} threads")


def test_seeds(device):
    image, offsets = torch.rand(2, 3, 8, 8, device=device.torch), torch.full((2, 2), 9.0)
    offsets = offsets.to(device.torch)

    def noise(generator=None):
        return extract_glimpse(image, 16, offsets, generator=generator)

    generator = torch.Generator(device.torch).manual_seed(1)
    first, second = noise(generator), noise(generator)
    assert not torch.equal(first, second)
    generator.manual_seed(1)
    assert torch.equal(noise(generator), first)
    torch.manual_seed(7)
    first, second = noise(), noise()
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(noise(), first)
    # Every image and channel has noise of its own; TensorFlow repeats one.
    flat = torch.nn.functional.normalize(first.flatten(0, 1).flatten(1) - first.mean(), dim=1)
    alike = (flat @ flat.T - torch.eye(6, device=device.torch)).abs().max()
    assert alike < 5 / 16  # five standard deviations of the correlation of 256 numbers


def test_a_window_inside_draws_too():
    """What is drawn next must not depend on where windows lie: telling would wait for the GPU."""
    image = torch.rand(1, 1, 8, 8)
    after = []
    for offset in (0.0, 9.0):
        torch.manual_seed(3)
        extract_glimpse(image, 4, torch.full((1, 2), offset))
        after.append(torch.rand(1))
    assert after[0] == after[1]


def largest_gap(values, distribution):
    """Kolmogorov and Smirnov's distance times the square root of the number of values."""
    ordered = values.double().sort().values
    expected = distribution(ordered)
    count = len(ordered)
    above = torch.arange(1, count + 1) / count - expected
    below = expected - torch.arange(count) / count
    return max(above.max().item(), below.max().item()) * count**0.5


# The distance of a true sample exceeds this once in a million; seeds are fixed.
KOLMOGOROV = 2.7


@pytest.mark.parametrize("seed", range(3))
def test_uniform_noise_is_uniform(seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 2, 12, 10) * 4 + 3
    field = extract_glimpse(image, 150, torch.full((3, 2), 9.0), generator=generator)
    for n in range(3):
        low, high = image[n].min().double(), image[n].max().double()
        for c in range(2):
            values = field[n, c].flatten()
            assert values.min() >= low
            assert values.max() <= high
            assert largest_gap(values, lambda v, a=low, b=high: (v - a) / (b - a)) < KOLMOGOROV


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_noise_is_normal_and_clipped(seed):
    """Between the ends it is normal; at the ends lies what is cut off, as often as it should."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 2, 6, 5) * torch.tensor([4.0, 0.1])[:, None, None] + 3
    field = extract_glimpse(
        image, 150, torch.full((3, 2), 9.0), noise="gaussian", generator=generator
    )
    for n in range(3):
        for c in range(2):
            channel, values = image[n, c].double(), field[n, c].flatten()
            normal = torch.distributions.Normal(channel.mean(), channel.std(correction=0))
            low, high = channel.min(), channel.max()
            count = len(values)
            for end, share in ((low, normal.cdf(low)), (high, 1 - normal.cdf(high))):
                clipped = (values.double() == end).double().mean()
                assert (clipped - share).abs() < 5 * (share * (1 - share) / count).sqrt()
            inside = values[(values > low) & (values < high)]
            span = normal.cdf(high) - normal.cdf(low)
            gap = largest_gap(inside, lambda v, d=normal, a=low, s=span: (d.cdf(v) - d.cdf(a)) / s)
            assert gap < KOLMOGOROV


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_of_special_images(noise, device):
    outside = torch.full((1, 2), 9.0, device=device.torch)

    def field(image):
        return extract_glimpse(image.to(device.torch), 4, outside, noise=noise).cpu()

    constant = torch.full((1, 2, 5, 5), 0.1)
    assert (field(constant) == 0.1).all()
    assert (field(constant.double() * 1e300) == (constant.double() * 1e300)[0, 0, 0, 0]).all()
    poisoned = torch.rand(1, 2, 5, 5)
    poisoned[0, 1, 2, 3] = torch.nan
    got = field(poisoned)
    assert got[0, 1].isnan().all()
    assert got[0, 0].isnan().all() == (noise == "uniform")  # of all channels together
    infinite = torch.rand(1, 1, 5, 5)
    infinite[0, 0, 2, 3] = torch.inf
    assert not field(infinite).isfinite().any()
    wide = torch.tensor([-1.0, 1.0], dtype=F64).mul(1.7e308).reshape(1, 1, 1, 2)
    if noise == "uniform":
        assert field(wide).isfinite().all()


def test_pixels_do_not_feel_the_noise_of_their_image(device):
    """NaN elsewhere in the image: what a window covers stays as it is."""
    image = torch.rand(1, 1, 9, 9)
    image[0, 0, 8, 8] = torch.nan
    offsets = torch.tensor([[-1.5, -1.5]], device=device.torch)
    for mode in ("exact", "subpixel"):
        got = extract_glimpse(
            image.to(device.torch), 4, offsets, False, False, "gaussian", mode=mode
        ).cpu()
        covered = got[0, 0, 2:, 2:]
        assert covered.isfinite().all(), mode
        assert got[0, 0, 0].isnan().all(), mode
    exact = extract_glimpse(image.to(device.torch), 4, offsets, False, False, "gaussian")
    assert torch.equal(exact.cpu()[0, 0, 1:, 1:], image[0, 0, :3, :3])


# Sub-pixel windows and scales


def random_offsets(count, rule, seed, dtype=F64, size=12):
    """Around the image and beyond, in the units of the rule."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(count, 2, generator=generator, dtype=F64) * 2.6 - 1.3
    return (unit if rule[2] else unit * size).to(dtype)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@pytest.mark.parametrize("scales", [(1,), (3,), (1, 2, 5)], ids=str)
def test_subpixel_is_the_reference(rule, scales, layout, device, close):
    version, centered, normalized = rule
    image = random_tensor((6, 3, 12, 11), F64, "subpixel")
    offsets = random_offsets(6, rule, 1)
    options = {"version": version, "mode": "subpixel", "scales": scales}
    expected = reference.extract_glimpse(image, (4, 3), offsets, centered, normalized, **options)
    got = extract_glimpse(
        arrange(image, layout).to(device.torch),
        (4, 3),
        offsets.to(device.torch),
        *(centered, normalized, "zero"),
        **options,
    )
    close(got, expected)


def test_subpixel_dtypes(device, dtype, close):
    image = random_tensor((3, 3, 9, 10), dtype, "subpixel")
    offsets = random_offsets(3, RULES[0], 2, F32)
    expected = reference.extract_glimpse(
        image, 4, offsets, mode="subpixel", scales=(1, 2), dtype=compute_dtype(dtype)
    )
    options = {"noise": "zero", "mode": "subpixel", "scales": (1, 2)}
    got = extract_glimpse(image.to(device.torch), 4, offsets.to(device.torch), **options)
    assert got.dtype == dtype
    close(got, expected)


@pytest.mark.parametrize("scales", [(1,), (2, 1), (3,)], ids=str)
def test_exact_scales_are_means_of_larger_windows(scales, device, close):
    image = random_tensor((3, 2, 14, 13), F32, "scales").to(device.torch)
    offsets = random_offsets(3, RULES[0], 3, F32).to(device.torch)
    got = extract_glimpse(image, (4, 3), offsets, noise="zero", scales=scales)
    close(got, reference.extract_glimpse(image.cpu(), (4, 3), offsets.cpu(), scales=scales))
    parts = got.unflatten(1, (len(scales), 2))
    for i, s in enumerate(scales):
        window = extract_glimpse(image, (4 * s, 3 * s), offsets, noise="zero")
        close(parts[:, i], torch.nn.functional.avg_pool2d(window, s))


@pytest.mark.parametrize("noise", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_modes_agree_at_whole_places(rule, noise, device):
    """Also in the noise, if both draw the same seed."""
    version, centered, normalized = rule
    slope = (8 if normalized else 1) * (0.5 if centered and (normalized or version == 1) else 1)
    steps = torch.tensor([[-7.0, 2.0], [1.0, -1.0], [5.0, 5.0], [0.0, 7.0]], dtype=F64)
    image = random_tensor((4, 2, 8, 8), F64, "whole").to(device.torch)
    # Offset 0 is a whole place for these sizes, so multiples of 1 / slope are too.
    offsets = (steps / slope).to(device.torch)

    def window(mode):
        return extract_glimpse(
            image,
            4,
            offsets,
            *(centered, normalized, noise),
            version=version,
            mode=mode,
            generator=torch.Generator().manual_seed(5),
        )

    torch.testing.assert_close(window("subpixel"), window("exact"), rtol=0, atol=1e-14)


def test_subpixel_is_grid_sample(close):
    """Centered and normalized, it is affine_grid and grid_sample with zeros outside."""
    image = random_tensor((5, 2, 9, 7), F64, "grid")
    offsets = random_offsets(5, RULES[0], 4)
    theta = torch.zeros(5, 2, 3, dtype=F64)
    theta[:, 0, 0], theta[:, 1, 1] = 4 / 7, 3 / 9
    theta[:, 0, 2], theta[:, 1, 2] = offsets[:, 1], offsets[:, 0]
    grid = torch.nn.functional.affine_grid(theta, (5, 2, 3, 4), align_corners=False)
    expected = torch.nn.functional.grid_sample(image, grid, align_corners=False)
    close(extract_glimpse(image, (3, 4), offsets, noise="zero", mode="subpixel"), expected)


def test_windows_inside_are_crops(close):
    """With crop in edge units, and with TensorFlow's crop_and_resize in its corner units."""
    image = random_tensor((4, 2, 11, 9), F32, "crops")
    places = torch.tensor([[0, 0], [3, 2], [6, 5], [1, 4]])
    glimpse = extract_glimpse(image, (5, 4), places.float(), False, False)
    index = torch.arange(4)
    ends = places + torch.tensor([5, 4])
    boxes = torch.cat([places.flip(1), ends.flip(1)], 1).float()
    close(crop(image, boxes, (5, 4), box_format="pixels", image_index=index), glimpse)
    corners = torch.cat([places, ends - 1], 1) / torch.tensor([10.0, 8, 10, 8])
    torch.testing.assert_close(
        crop_and_resize(image, corners, index, (5, 4)), glimpse, rtol=0, atol=5e-6
    )


def test_subpixel_noise_fills_up_to_full_coverage(device):
    """Noise stands in for what is missing of a cell: half of it at a place of one half."""
    image = torch.full((1, 1, 3, 3), 2.0, device=device.torch)
    offsets = torch.tensor([[-1.5, 0.0]], device=device.torch)
    options = {"centered": False, "normalized": False, "mode": "subpixel"}
    bare = extract_glimpse(image, 3, offsets, noise="zero", **options)
    assert bare[0, 0, :, 0].tolist() == [0, 1, 2]
    # The noise of a constant image is that constant.
    filled = extract_glimpse(image, 3, offsets, noise="uniform", **options)
    assert filled[0, 0, :, 0].tolist() == [2, 2, 2]


def test_zero_noise_is_a_single_operator():
    image, offsets = torch.rand(2, 3, 8, 8), torch.zeros(2, 2)
    for mode, name in (("exact", "extract_glimpse"), ("subpixel", "subpixel_glimpse")):
        with TraceOperators() as trace:
            extract_glimpse(image, 4, offsets, noise="zero", mode=mode)
        assert trace.names == [f"glimpse_ext.{name}.default"]
    with TraceOperators() as trace:
        extract_glimpse(image, 4, offsets, noise="zero", mode="subpixel", scales=(1, 2, 4))
    assert trace.names.count("glimpse_ext.subpixel_glimpse.default") == 1


class TraceOperators(TorchDispatchMode):
    """The operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# Derivatives


@pytest.mark.parametrize("noise", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("scales", [(1,), (2,), (1, 3)], ids=str)
@pytest.mark.parametrize("rule", [RULES[0], RULES[-1]], ids=rule_name)
def test_subpixel_derivatives(rule, scales, noise, device):
    """gradcheck and gradgradcheck in the offsets, and in the image where noise does not move."""
    version, centered, normalized = rule
    image = random_tensor((2, 2, 5, 6), F64, "derivatives").to(device.torch)
    offsets = random_offsets(2, rule, 8, size=4).to(device.torch).requires_grad_()

    def glimpse(image, offsets):
        return extract_glimpse(
            image,
            (3, 2),
            offsets,
            *(centered, normalized, noise),
            version=version,
            mode="subpixel",
            scales=scales,
            generator=torch.Generator().manual_seed(1),
        )

    if noise == "zero":
        image.requires_grad_()
        assert torch.autograd.gradgradcheck(glimpse, (image, offsets), fast_mode=True)
    # Every element of the Jacobian once; other kernels show a wrong one in a random direction too.
    fast = device is not CPU
    inputs = (image, offsets)
    assert torch.autograd.gradcheck(
        glimpse, inputs, check_forward_ad=noise == "zero", fast_mode=fast
    )


@pytest.mark.parametrize("scales", [(1,), (1, 2)], ids=str)
@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=rule_name)
def test_exact_derivatives_in_the_image(rule, scales, device):
    version, centered, normalized = rule
    image = random_tensor((3, 2, 5, 6), F64, "derivatives").to(device.torch).requires_grad_()
    offsets = random_offsets(3, rule, 8, size=5).to(device.torch)

    def glimpse(image):
        return extract_glimpse(
            image,
            (3, 4),
            offsets,
            *(centered, normalized, "zero"),
            version=version,
            scales=scales,
        )

    fast = device is not CPU
    assert torch.autograd.gradcheck(glimpse, (image,), check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(glimpse, (image,), fast_mode=True)


@pytest.mark.parametrize("noise", ["zero", "uniform"])
@pytest.mark.parametrize("number", [F32, F64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_exact_gradient_is_the_transposed_copy(rule, number, noise, layout, device, dtype):
    """Each pixel of a window gets its gradient, to the bit and nothing else; noise counts for
    nothing. Infinite gradients do not touch their neighbours."""
    version, centered, normalized = rule
    count = 8
    image = random_tensor((count, 2, 7, 9), dtype, "transposed")
    offsets = random_offsets(count, rule, 9, number, size=8)
    given = arrange(image, layout).to(device.torch).requires_grad_()
    glimpse = extract_glimpse(
        given,
        (4, 5),
        offsets.to(device.torch),
        *(centered, normalized, noise),
        version=version,
    )
    grad = random_tensor((count, 2, 4, 5), dtype, "grad")
    grad[:, :, 1, 2] = torch.inf
    (got,) = torch.autograd.grad(glimpse, given, grad.to(device.torch))
    expected = torch.zeros_like(image)
    places = torch.arange(1, 64).reshape(1, 1, 7, 9).expand(count, 1, 7, 9)
    found = windows(places, (4, 5), offsets, rule).expand_as(grad)
    for n in range(count):
        for c in range(2):
            inside = found[n, c] > 0
            expected[n, c].view(-1)[found[n, c][inside] - 1] = grad[n, c][inside]
    assert torch.equal(got.cpu(), expected)


def test_offsets_of_whole_windows_have_no_gradient(device):
    image = torch.rand(1, 1, 4, 4, device=device.torch)
    offsets = torch.zeros(1, 2, device=device.torch, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'mode="subpixel".*detach'):
        extract_glimpse(image, 2, offsets)
    with pytest.raises(RuntimeError, match=r'mode="subpixel".*detach'):
        torch.ops.glimpse_ext.extract_glimpse(image, offsets, None, 2, 2, 2, True, True, 0)
    with pytest.raises(RuntimeError, match=r'mode="subpixel".*detach'):
        torch.func.grad(lambda o: extract_glimpse(image, 2, o, noise="zero").sum())(
            offsets.detach()
        )
    with pytest.raises(RuntimeError, match=r'mode="subpixel".*detach'):
        torch.func.jvp(
            lambda o: extract_glimpse(image, 2, o, noise="zero"),
            (offsets.detach(),),
            (torch.ones_like(offsets),),
        )
    with torch.no_grad():
        extract_glimpse(image, 2, offsets)
    extract_glimpse(image, 2, offsets.detach())


def test_transforms_of_torch_func(device):
    """jacrev, jacfwd, hessians and vmap over images, offsets or both."""
    image = random_tensor((2, 2, 5, 6), F64, "func").to(device.torch)
    offsets = random_offsets(2, RULES[0], 12).to(device.torch)
    for mode in ("exact", "subpixel"):

        def glimpse(image, offsets, mode=mode):
            return extract_glimpse(image, 3, offsets, noise="zero", mode=mode, scales=(1, 2))

        torch.testing.assert_close(
            torch.func.jacrev(glimpse)(image, offsets), torch.func.jacfwd(glimpse)(image, offsets)
        )
        images, places = torch.stack([image, image.flip(3), -image]), torch.stack([offsets] * 3)
        places = places * torch.tensor([1.0, 0.7, -1.0], device=device.torch)[:, None, None]
        for dims, args in (
            ((0, None), (images, offsets)),
            ((None, 0), (image, places)),
            ((0, 0), (images, places)),
            ((1, 2), (images.movedim(0, 1), places.movedim(0, 2))),
        ):
            got = torch.func.vmap(glimpse, dims)(*args)
            expected = [
                glimpse(
                    *(
                        a if dim is None else a.select(dim, i)
                        for a, dim in zip(args, dims, strict=True)
                    )
                )
                for i in range(3)
            ]
            torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-14)

    def loss(offsets):
        return extract_glimpse(image, 3, offsets, noise="zero", mode="subpixel").square().sum()

    hessian = torch.func.hessian(loss)(offsets)
    assert hessian.shape == (2, 2, 2, 2)
    assert hessian.abs().max() > 0.1


def test_exact_jvp_and_infinite_pixels_under_transforms(device):
    """Copies stay copies inside torch.func: no zero weight meets an infinite pixel."""
    image = torch.full((1, 1, 3, 3), torch.inf, device=device.torch)
    image[0, 0, 1, 1] = 1.0
    offsets = torch.zeros(1, 2, device=device.torch)
    got, tangent = torch.func.jvp(
        lambda x: extract_glimpse(x, 1, offsets, noise="zero"), (image,), (image,)
    )
    assert (got.item(), tangent.item()) == (1, 1)


def test_vmap_with_noise():
    image, offsets = torch.rand(3, 2, 1, 4, 4), torch.full((3, 2, 2), 9.0)

    def glimpse(image, offsets):
        return extract_glimpse(image, 4, offsets)

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(glimpse)(image, offsets)
    torch.manual_seed(1)
    same = torch.func.vmap(glimpse, randomness="same")(image[:1].expand(3, -1, -1, -1, -1), offsets)
    torch.manual_seed(1)
    assert torch.equal(same[0], glimpse(image[0], offsets[0]))
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(glimpse, randomness="different")(
        image[:1].expand(3, -1, -1, -1, -1), offsets
    )
    assert not torch.equal(different[0], different[1])


# As PyTorch sees it


def op_arguments():
    image = random_tensor((2, 3, 7, 6), F64, "op")
    offsets = random_offsets(2, RULES[0], 3)
    seed = torch.tensor([5])
    last = image.contiguous(memory_format=torch.channels_last).requires_grad_()
    grads = image.clone().requires_grad_()
    exact = torch.ops.glimpse_ext.extract_glimpse.default
    subpixel = torch.ops.glimpse_ext.subpixel_glimpse.default
    rows = torch.nn.functional.pad(offsets, (0, 1), value=2.0)
    return {
        "exact": (exact, (image, offsets, None, 4, 3, 2, True, True, 0)),
        "exact gradients": (exact, (grads, offsets, None, 4, 3, 1, True, False, 0)),
        "exact channels_last": (exact, (last, offsets, None, 4, 3, 2, False, True, 0)),
        "exact uniform": (exact, (grads, offsets, seed, 4, 3, 2, True, True, 1)),
        "exact gaussian": (exact, (last, offsets, seed, 4, 3, 2, True, True, 2)),
        "exact uint8": (exact, (image.byte(), offsets, None, 4, 3, 2, True, True, 0)),
        "exact bool": (exact, (image > 0, offsets, None, 4, 3, 2, True, True, 0)),
        "subpixel": (subpixel, (grads, offsets.clone().requires_grad_(), 4, 3, 2, True, True, 1)),
        "subpixel scales": (subpixel, (grads, rows.requires_grad_(), 4, 3, 2, True, True, 0)),
    }


@pytest.mark.parametrize("name", op_arguments())
def test_opcheck(name):
    op, args = op_arguments()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("mode", ["exact", "subpixel"])
@pytest.mark.parametrize("noise", ["zero", "gaussian"])
def test_compiles_whole(mode, noise):
    image = random_tensor((2, 3, 9, 8), F32, "compile").requires_grad_()
    offsets = random_offsets(2, RULES[0], 3, F32)
    offsets.requires_grad_(mode == "subpixel")

    def glimpse(image, offsets):
        return extract_glimpse(image, (4, 3), offsets, noise=noise, mode=mode, scales=(1, 2))

    compiled = torch.compile(glimpse, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = glimpse(image, offsets)
    torch.manual_seed(2)
    got = compiled(image, offsets)
    torch.testing.assert_close(got, expected)
    leaves = (image, offsets) if mode == "subpixel" else (image,)
    weights = torch.rand_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# Errors


def good():
    return {"input": torch.rand(2, 3, 8, 8), "size": 4, "offsets": torch.zeros(2, 2)}


WRONG = {
    "input without batch": (
        {"input": torch.rand(3, 8, 8)},
        RuntimeError,
        r"\[N, C, H, W\], got \[3, 8, 8\]",
    ),
    "complex128": (
        {"input": torch.zeros(2, 3, 8, 8, dtype=torch.complex128), "noise": "zero"},
        RuntimeError,
        "1, 2, 4 or 8 bytes",
    ),
    "offsets of another batch": (
        {"offsets": torch.zeros(3, 2)},
        RuntimeError,
        r"\[2, 2\] \(y, x\), got \[3, 2\]",
    ),
    "offsets of three numbers": (
        {"offsets": torch.zeros(2, 3)},
        RuntimeError,
        r"\[2, 2\] \(y, x\), got \[2, 3\]",
    ),
    "offsets without batch": ({"offsets": torch.zeros(2)}, RuntimeError, r"got \[2\]"),
    "offsets of integers": (
        {"offsets": torch.zeros(2, 2, dtype=torch.int64)},
        RuntimeError,
        "int64",
    ),
    "size of three": ({"size": (1, 2, 3)}, ValueError, "size must be an int or .* got 3 numbers"),
    "size of one list": ({"size": [[4, 4]]}, ValueError, "got 1 numbers"),
    "negative size": ({"size": (4, -1)}, ValueError, "size must be zero or more, got -1"),
    "size of floats": ({"size": (4.0, 4)}, TypeError, "size must be int, got float"),
    "unknown noise": ({"noise": "ZERO"}, ValueError, "uniform, gaussian, zero, got 'ZERO'"),
    "empty noise": ({"noise": ""}, ValueError, "got ''"),
    "unknown version": ({"version": 3}, ValueError, "1 or 2, got 3"),
    "unknown mode": ({"mode": "bilinear"}, ValueError, "exact, subpixel, got 'bilinear'"),
    "no scale": ({"scales": ()}, ValueError, "positive"),
    "scale of zero": ({"scales": (1, 0)}, ValueError, "positive"),
    "scale of a half": ({"scales": (0.5,)}, TypeError, "tuple of int"),
    "scales of one number": ({"scales": 2}, TypeError, "tuple of int, got 2"),
    "noise for integers": (
        {"input": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
        RuntimeError,
        'float image.*noise="zero"',
    ),
    "means of integers": (
        {"input": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "noise": "zero", "scales": (2,)},
        RuntimeError,
        "float image",
    ),
    "subpixel windows of integers": (
        {"input": torch.zeros(2, 3, 8, 8, dtype=torch.int64), "noise": "zero", "mode": "subpixel"},
        RuntimeError,
        "int64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    changes, error, text = WRONG[name]
    with pytest.raises(error, match=text) as raised:
        extract_glimpse(**(good() | changes))
    assert str(raised.value).startswith("extract_glimpse: ")


OP_WRONG = {
    "seed is missing": ((None, 4, 4, 2, True, True, 1), "needs a seed"),
    "seed of two": ((torch.tensor([1, 2]), 4, 4, 2, True, True, 1), "needs a seed"),
    "unknown noise": ((None, 4, 4, 2, True, True, 3), "does not know noise 3"),
    "unknown version": ((None, 4, 4, 0, True, True, 0), "1 or 2, got 0"),
    "negative size": ((None, 4, -1, 2, True, True, 0), "zero or more"),
}


@pytest.mark.parametrize("name", OP_WRONG)
def test_errors_of_the_operator(name):
    rest, text = OP_WRONG[name]
    arguments = good()
    with pytest.raises(RuntimeError, match=text):
        torch.ops.glimpse_ext.extract_glimpse(arguments["input"], arguments["offsets"], *rest)


def test_examples_in_the_docstring():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for test in finder.find(extract_glimpse, "extract_glimpse"):
        runner.run(test)
    assert runner.summarize().attempted >= 4
    assert runner.summarize().failed == 0
