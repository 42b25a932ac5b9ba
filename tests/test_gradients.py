# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of every order, in both modes and under every transform, to images and to boxes."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import CASES, MODES, PYRAMIDS, SMOOTH_CASES, SMOOTH_PYRAMID, Mode, arrange, random_tensor
from conftest import compute_dtype
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import glimpse_ext
from glimpse_ext import reference

F32, F64 = torch.float32, torch.float64

SMOOTH = SMOOTH_CASES[0]


def pooler(case, mode, function=glimpse_ext.roi_align):
    """(image, boxes) -> pooled, for one case and mode."""

    def pool(image, boxes):
        return function(
            image, boxes, case.output_size, case.spatial_scale, mode.sampling_ratio, mode.aligned
        )

    return pool


def multiscale_pooler(pyramid, function=glimpse_ext.multiscale_roi_align, **options):
    """(boxes, *features) -> pooled."""

    def pool(boxes, *features):
        return function(
            features, boxes, pyramid.output_size, pyramid.scales, **pyramid.rule, **options
        )

    return pool


def like(tensor, seed):
    return random_tensor(tuple(tensor.shape), tensor.dtype, seed).to(tensor.device)


def smooth_inputs(device, case=SMOOTH):
    return case.image().to(device.torch), case.boxes().to(device.torch)


# --------------------------------------------------------------------- first order, reverse mode


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_is_the_adjoint(case, mode, device, close):
    """<A x, g> = <x, A^T g>: pooling is linear in the image, whatever the boxes are."""
    image = case.image().to(device.torch).requires_grad_()
    boxes, g = case.boxes().to(device.torch), case.grad().to(device.torch)
    pooled = pooler(case, mode)(image, boxes)
    (to_image,) = torch.autograd.grad(pooled, image, g)
    probe = like(image, "probe")
    close((pooler(case, mode)(probe, boxes) * g).sum(), (probe * to_image).sum(), "gradient")


@functools.cache
def expected_gradients(case, mode, dtype):
    wide = compute_dtype(dtype)
    image = case.image(dtype).to(wide).requires_grad_()
    boxes = case.boxes(wide).requires_grad_()
    function = functools.partial(reference.roi_align, dtype=wide)
    pooled = pooler(case, mode, function)(image, boxes)
    return torch.autograd.grad(pooled, (image, boxes), case.grad(dtype).to(wide))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_reference(case, mode, device, dtype, layout, close):
    image = arrange(case.image(dtype).to(device.torch), layout).requires_grad_()
    boxes = case.boxes(compute_dtype(dtype)).to(device.torch).requires_grad_()
    pooled = pooler(case, mode)(image, boxes)
    g = arrange(case.grad(dtype).to(device.torch), layout)
    to_image, to_boxes = torch.autograd.grad(pooled, (image, boxes), g)
    expected_image, expected_boxes = expected_gradients(case, mode, dtype)
    assert (to_image.dtype, to_boxes.dtype) == (dtype, boxes.dtype)
    close(to_image, expected_image, "gradient", "to the image")
    close(to_boxes, expected_boxes, "gradient", "to the boxes")
    assert not to_boxes[:, 0].any(), "nothing depends on a fraction of an image index"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_box_gradient_on_a_uint8_image(case, mode, device, close):
    image = case.image(torch.uint8).to(device.torch)
    boxes = case.boxes(F32).to(device.torch).requires_grad_()
    g = case.grad(F32).to(device.torch)
    (to_boxes,) = torch.autograd.grad(pooler(case, mode)(image, boxes), boxes, g)
    (expected,) = expected_uint8_box_gradient(case, mode)
    # Pixels go up to 255, and so do the terms of the sum whose rounding is compared.
    close(to_boxes / 255, expected / 255, "gradient")


@functools.cache
def expected_uint8_box_gradient(case, mode):
    boxes = case.boxes(F32).requires_grad_()
    function = functools.partial(reference.roi_align, dtype=F32)
    pooled = pooler(case, mode, function)(case.image(torch.uint8), boxes)
    return torch.autograd.grad(pooled, boxes, case.grad(F32))


@functools.cache
def expected_multiscale_gradients(name, aligned, dtype):
    pyramid = next(p for p in PYRAMIDS if p.name == name)
    wide = compute_dtype(dtype)
    boxes = pyramid.boxes(wide).requires_grad_()
    features = [f.to(wide).requires_grad_() for f in pyramid.features(dtype)]
    function = functools.partial(reference.multiscale_roi_align, dtype=wide, aligned=aligned)
    pooled = multiscale_pooler(pyramid, function)(boxes, *features)
    return torch.autograd.grad(
        pooled, (boxes, *features), pyramid.grad(dtype).to(wide), materialize_grads=True
    )


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("pyramid", PYRAMIDS, ids=str)
def test_multiscale_gradients_equal_reference(pyramid, aligned, device, dtype, layout, close):
    boxes = pyramid.boxes(compute_dtype(dtype)).to(device.torch).requires_grad_()
    features = [
        arrange(f.to(device.torch), layout).requires_grad_() for f in pyramid.features(dtype)
    ]
    pooled = multiscale_pooler(pyramid, aligned=aligned)(boxes, *features)
    got = torch.autograd.grad(pooled, (boxes, *features), pyramid.grad(dtype).to(device.torch))
    expected = expected_multiscale_gradients(pyramid.name, aligned, dtype)
    close(got[0], expected[0], "gradient", "to the boxes")
    for level, (a, b) in enumerate(zip(got[1:], expected[1:], strict=True)):
        close(a, b, "gradient", f"to level {level}")


def test_a_level_without_boxes_gets_a_gradient_of_zeros(device):
    pyramid = PYRAMIDS[0]
    features = [f.to(device.torch).requires_grad_() for f in pyramid.features()]
    boxes = pyramid.boxes().to(device.torch)
    levels = torch.ones(len(boxes), dtype=torch.int64, device=device.torch)
    pooled = glimpse_ext.multiscale_roi_align(features, boxes, 2, pyramid.scales, levels=levels)
    got = torch.autograd.grad(pooled.sum(), features)
    assert not got[0].any()
    assert got[1].any()
    assert not got[2].any()


def test_gradients_only_where_asked_for(device, same_bits):
    """Each gradient has the same bits whether or not others are computed with it."""
    case, mode = CASES[0], MODES[0]
    image, boxes = case.image(F32).to(device.torch), case.boxes(F32).to(device.torch)
    g = case.grad(F32).to(device.torch)
    both = [image.clone().requires_grad_(), boxes.clone().requires_grad_()]
    expected = torch.autograd.grad(pooler(case, mode)(*both), both, g)
    pooled = pooler(case, mode)(both[0], boxes)
    same_bits(torch.autograd.grad(pooled, both[0], g)[0], expected[0])
    pooled = pooler(case, mode)(image, both[1])
    same_bits(torch.autograd.grad(pooled, both[1], g)[0], expected[1])
    assert not pooler(case, mode)(image, boxes).requires_grad
    with torch.no_grad():
        assert not pooler(case, mode)(*both).requires_grad


def test_boxes_as_a_list_get_their_gradients(device, close):
    case, mode = SMOOTH, MODES[1]
    image, boxes = smooth_inputs(device)
    matrix = boxes.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pooler(case, mode)(image, matrix).sum(), matrix)
    per_image = [boxes[i : i + 1, 1:].clone().requires_grad_() for i in range(2)]
    got = torch.autograd.grad(pooler(case, mode)(image, per_image).sum(), per_image)
    close(torch.cat(got), expected[:, 1:], "gradient")


def test_the_gradient_of_a_gradient_that_is_not_contiguous(device, close):
    """sum() hands back a gradient with strides of zero."""
    case, mode = CASES[0], MODES[0]
    image = case.image().to(device.torch).requires_grad_()
    boxes = case.boxes().to(device.torch).requires_grad_()
    got = torch.autograd.grad(pooler(case, mode)(image, boxes).sum(), (image, boxes))
    pooled = pooler(case, mode)(image, boxes)
    expected = torch.autograd.grad(pooled, (image, boxes), torch.ones_like(pooled))
    for a, b in zip(got, expected, strict=True):
        close(a, b, "gradient")


def test_a_clamped_or_dropped_sample_does_not_move_with_the_box(device):
    image = random_tensor((1, 1, 4, 4), F64, "clamped").to(device.torch)
    rows = [
        (0.0, -0.4, -0.4, -0.1, -0.1),  # clamped to the first pixel
        (0.0, 4.1, 4.1, 4.4, 4.4),  # clamped to the last one
        (0.0, 9.0, 9.0, 12.0, 12.0),  # dropped
    ]
    boxes = torch.tensor(rows, dtype=F64, device=device.torch, requires_grad=True)
    pooled = glimpse_ext.roi_align(image, boxes, 2, 1.0, 1, aligned=True)
    assert pooled[:2].all()
    (to_boxes,) = torch.autograd.grad(pooled.sum(), boxes)
    assert not to_boxes.any()


def test_on_a_pixel_the_slope_is_that_of_the_right_hand_cell(device):
    """One sample exactly on pixel 1 of 0, 1, 4, 9: the slope is 3, not 1 and not their mean."""
    image = torch.tensor([0.0, 1, 4, 9], dtype=F64, device=device.torch).expand(1, 1, 3, 4)
    boxes = torch.tensor(
        [[0.0, 1.0, 1.0, 2.0, 2.0]], dtype=F64, device=device.torch, requires_grad=True
    )
    pooled = glimpse_ext.roi_align(image, boxes, 1, 1.0, 1, aligned=True)
    assert pooled.item() == 1
    (to_boxes,) = torch.autograd.grad(pooled, boxes)
    assert to_boxes.tolist() == [[0, 1.5, 0, 1.5, 0]]


# ------------------------------------------------------------- against finite differences


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", SMOOTH_CASES, ids=str)
def test_gradcheck(case, mode, device):
    inputs = [t.requires_grad_() for t in smooth_inputs(device, case)]
    # Emulated threads cost more than arithmetic: one random direction instead of each input there.
    fast = device.name == "emulated"
    assert torch.autograd.gradcheck(
        pooler(case, mode), inputs, check_forward_ad=True, fast_mode=fast
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", SMOOTH_CASES, ids=str)
def test_gradgradcheck(case, mode, device):
    inputs = [t.requires_grad_() for t in smooth_inputs(device, case)]
    fast = device.name == "emulated"
    assert torch.autograd.gradgradcheck(
        pooler(case, mode), inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast
    )


@pytest.mark.parametrize("aligned", [False, True])
def test_multiscale_gradcheck(aligned, device):
    boxes = SMOOTH_PYRAMID.boxes()
    levels = reference.assign_levels(boxes, SMOOTH_PYRAMID.scales, **SMOOTH_PYRAMID.rule)
    assert set(levels.tolist()) == {0, 1, 2}
    # The image index jumps at whole numbers, so it stands in the middle between two.
    boxes[:, 0] += 0.5
    inputs = [boxes, *SMOOTH_PYRAMID.features()]
    inputs = [t.to(device.torch).requires_grad_() for t in inputs]
    pool = multiscale_pooler(SMOOTH_PYRAMID, aligned=aligned)
    assert torch.autograd.gradcheck(pool, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(pool, inputs, check_fwd_over_rev=True, fast_mode=True)


# ------------------------------------------------------------------------------- higher orders


def hessian_vector_products(pool, image, boxes, g):
    """Gradients of <gradient, v> to image, boxes and the incoming gradient."""
    image, boxes, g = (t.detach().clone().requires_grad_() for t in (image, boxes, g))
    first = torch.autograd.grad(pool(image, boxes), (image, boxes), g, create_graph=True)
    dot = sum((f * like(f, f"v {i}")).sum() for i, f in enumerate(first))
    return torch.autograd.grad(dot, (image, boxes, g))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives_equal_reference(case, mode, device, close):
    image, boxes, g = (t.to(device.torch) for t in (case.image(), case.boxes(), case.grad()))
    got = hessian_vector_products(pooler(case, mode), image, boxes, g)
    for name, a, b in zip(
        ("image", "boxes", "gradient"), got, expected_hessian_vector(case, mode), strict=True
    ):
        close(a, b, "gradient", f"to {name}")


@functools.cache
def expected_hessian_vector(case, mode):
    pool = pooler(case, mode, reference.roi_align)
    return hessian_vector_products(pool, case.image(), case.boxes(), case.grad())


def third_derivative(pool, image, boxes):
    boxes = boxes.detach().clone().requires_grad_()
    image = image.detach().clone().requires_grad_()
    value = (pool(image, boxes) ** 2).sum()
    for order in range(2):
        (gradient,) = torch.autograd.grad(value, boxes, create_graph=True)
        value = (gradient * like(gradient, f"direction {order}")).sum()
    return torch.autograd.grad(value, (image, boxes))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_third_derivatives_equal_reference(mode, device, close):
    image, boxes = smooth_inputs(device)
    got = third_derivative(pooler(SMOOTH, mode), image, boxes)
    expected = third_derivative(
        pooler(SMOOTH, mode, reference.roi_align), SMOOTH.image(), SMOOTH.boxes()
    )
    for a, b in zip(got, expected, strict=True):
        close(a, b, "gradient")


# ------------------------------------------------------------------------------- forward mode


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_mode_is_the_transpose_of_reverse_mode(case, mode, device, close):
    """<J t, g> = <t, J^T g>, with dual numbers, for image and boxes at once."""
    image, boxes, g = (t.to(device.torch) for t in (case.image(), case.boxes(), case.grad()))
    tangents = like(image, "ti"), like(boxes, "tb")
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip((image, boxes), tangents, strict=True)]
        value, tangent = forward_ad.unpack_dual(pooler(case, mode)(*duals))
    assert tangent is not None
    close(value, pooler(case, mode)(image, boxes))
    image, boxes = image.requires_grad_(), boxes.requires_grad_()
    gradients = torch.autograd.grad(pooler(case, mode)(image, boxes), (image, boxes), g)
    expected = sum((a * b).sum() for a, b in zip(tangents, gradients, strict=True))
    close((tangent * g).sum(), expected, "gradient")


@pytest.mark.parametrize("of", ["image", "boxes"])
def test_forward_mode_of_one_argument(of, device, close):
    image, boxes = smooth_inputs(device)
    pool = pooler(SMOOTH, MODES[1])
    chosen = {"image": image, "boxes": boxes}
    tangent = like(chosen[of], "tangent")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(chosen[of], tangent)
        got = forward_ad.unpack_dual(pool(**{**chosen, of: dual})).tangent
    # Along a straight line pooling is a polynomial of degree 2 between kinks, so central
    # differences are exact but for the rounding of a step that is not small.
    step = 2.0**-12
    ahead = pool(**{**chosen, of: chosen[of] + step * tangent})
    behind = pool(**{**chosen, of: chosen[of] - step * tangent})
    assert got.any()
    close(got, (ahead - behind) / (2 * step), "gradient")


def test_forward_mode_of_a_pyramid(device, close):
    boxes = SMOOTH_PYRAMID.boxes().to(device.torch)
    features = [f.to(device.torch) for f in SMOOTH_PYRAMID.features()]
    pool = multiscale_pooler(SMOOTH_PYRAMID)
    primals = (boxes, *features)
    tangents = tuple(like(p, f"t{i}") for i, p in enumerate(primals))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        got = forward_ad.unpack_dual(pool(*duals)).tangent
    primals = tuple(p.requires_grad_() for p in primals)
    g = SMOOTH_PYRAMID.grad().to(device.torch)
    gradients = torch.autograd.grad(pool(*primals), primals, g)
    expected = sum((a * b).sum() for a, b in zip(tangents, gradients, strict=True))
    close((got * g).sum(), expected, "gradient")


def test_forward_over_reverse_is_reverse_over_reverse(device, close):
    image, boxes = smooth_inputs(device)
    pool = pooler(SMOOTH, MODES[1])
    g = SMOOTH.grad().to(device.torch)
    direction = like(boxes, "direction")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(boxes.requires_grad_(), direction)
        (gradient,) = torch.autograd.grad((pool(image, dual) ** 2 * g).sum(), dual)
        got = forward_ad.unpack_dual(gradient).tangent
    (gradient,) = torch.autograd.grad((pool(image, boxes) ** 2 * g).sum(), boxes, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * direction).sum(), boxes)
    close(got, expected, "gradient")


# --------------------------------------------------------------------------------- torch.func


def plain_gradients(pool, image, boxes, g):
    image, boxes = image.detach().requires_grad_(), boxes.detach().requires_grad_()
    return torch.autograd.grad(pool(image, boxes), (image, boxes), g)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_func_grad_and_vjp(mode, device, close):
    image, boxes = smooth_inputs(device)
    g = SMOOTH.grad().to(device.torch)
    pool = pooler(SMOOTH, mode)
    expected = plain_gradients(pool, image, boxes, g)
    got = grad(lambda i, b: (pool(i, b) * g).sum(), argnums=(0, 1))(image, boxes)
    pooled, pull_back = vjp(pool, image, boxes)
    close(pooled, pool(image, boxes))
    for a, b, c in zip(got, pull_back(g), expected, strict=True):
        close(a, c, "gradient", "grad")
        close(b, c, "gradient", "vjp")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_func_jvp(mode, device, close):
    image, boxes = smooth_inputs(device)
    g = SMOOTH.grad().to(device.torch)
    pool = pooler(SMOOTH, mode)
    tangents = like(image, "ti"), like(boxes, "tb")
    pooled, tangent = jvp(pool, (image, boxes), tangents)
    close(pooled, pool(image, boxes))
    gradients = plain_gradients(pool, image, boxes, g)
    expected = sum((a * b).sum() for a, b in zip(tangents, gradients, strict=True))
    assert expected.abs() > 1e-3, "a tangent of zero would pass"
    close((tangent * g).sum(), expected, "gradient")


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=str)
def test_vmap_is_a_loop(mode, in_dims, device, close):
    count = 3
    pool = pooler(SMOOTH, mode)
    image, boxes = smooth_inputs(device)
    images = torch.stack([like(image, f"image {i}") for i in range(count)])
    moved = boxes + 0.01 * torch.arange(count, dtype=F64, device=device.torch)[:, None, None]
    looped = torch.stack(
        [
            pool(
                image if in_dims[0] is None else images[i],
                boxes if in_dims[1] is None else moved[i],
            )
            for i in range(count)
        ]
    )
    batched = (
        image if in_dims[0] is None else images.movedim(0, in_dims[0]),
        boxes if in_dims[1] is None else moved.movedim(0, in_dims[1]),
    )
    close(vmap(pool, in_dims=in_dims)(*batched), looped)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_of_gradients_is_a_loop(in_dims, device, close):
    """Gradients of single examples."""
    count, mode = 3, MODES[1]
    pool = pooler(SMOOTH, mode)
    image, boxes = smooth_inputs(device)
    g = SMOOTH.grad().to(device.torch)
    images = torch.stack([like(image, f"image {i}") for i in range(count)])
    moved = boxes + 0.01 * torch.arange(count, dtype=F64, device=device.torch)[:, None, None]
    batched = (image if in_dims[0] is None else images, boxes if in_dims[1] is None else moved)
    of_one = grad(lambda i, b: (pool(i, b) ** 2 * g).sum(), argnums=(0, 1))
    got = vmap(of_one, in_dims=in_dims)(*batched)
    for k in range(count):
        one = [t if dim is None else t[k] for t, dim in zip(batched, in_dims, strict=True)]
        for a, b in zip(got, of_one(*one), strict=True):
            close(a[k], b, "gradient", f"example {k}")


def test_vmap_in_vmap(device, close):
    pool = pooler(SMOOTH, MODES[1])
    image, boxes = smooth_inputs(device)
    images = torch.stack([like(image, f"image {i}") for i in range(2)])
    moved = torch.stack([boxes, boxes + 0.01, boxes + 0.02])
    got = vmap(vmap(pool, in_dims=(None, 0)), in_dims=(0, None))(images, moved)
    for i in range(2):
        for j in range(3):
            close(got[i, j], pool(images[i], moved[j]), detail=f"{i}, {j}")


def test_vmap_of_a_pyramid(device, close):
    pyramid = SMOOTH_PYRAMID
    pool = multiscale_pooler(pyramid)
    boxes = torch.stack([pyramid.boxes(), pyramid.boxes() + 0.01]).to(device.torch)
    features = [torch.stack([f, like(f, "second")]).to(device.torch) for f in pyramid.features()]
    looped = torch.stack([pool(boxes[i], *[f[i] for f in features]) for i in range(2)])
    close(vmap(pool)(boxes, *features), looped)
    shared = [f[0] for f in features]
    looped = torch.stack([pool(boxes[i], *shared) for i in range(2)])
    close(vmap(pool, in_dims=(0, None, None, None))(boxes, *shared), looped)
    looped = torch.stack([pool(boxes[0], features[0][i], *shared[1:]) for i in range(2)])
    got = vmap(pool, in_dims=(None, 0, None, None))(boxes[0], features[0], *shared[1:])
    close(got, looped)


def test_jacfwd_is_jacrev(device, close):
    image, boxes = smooth_inputs(device)
    pool = pooler(SMOOTH, MODES[1])
    for argument in (0, 1):
        forward = jacfwd(pool, argnums=argument)(image, boxes)
        reverse = jacrev(pool, argnums=argument)(image, boxes)
        assert forward.any()
        close(forward, reverse, "gradient", f"argument {argument}")


def test_hessian_of_boxes(device, close):
    """hessian is jacfwd of jacrev: both modes, nested, under vmap."""
    image, boxes = smooth_inputs(device)

    def loss(pool):
        return lambda corners: (pool(image, torch.cat([boxes[:, :1], corners], 1)) ** 2).sum()

    corners = boxes[:, 1:]
    got = hessian(loss(pooler(SMOOTH, MODES[1])))(corners)
    expected = torch.autograd.functional.hessian(
        loss(pooler(SMOOTH, MODES[1], reference.roi_align)), corners
    )
    assert got.any()
    close(got, expected, "gradient")


def test_grad_of_jvp_and_jvp_of_grad(device, close):
    image, boxes = smooth_inputs(device)
    g = SMOOTH.grad().to(device.torch)
    pool = pooler(SMOOTH, Mode(2, True))
    direction = like(boxes, "direction")

    def loss(b):
        return (pool(image, b) ** 2 * g).sum()

    forward_over_reverse = jvp(grad(loss), (boxes,), (direction,))[1]
    reverse_over_forward = grad(lambda b: jvp(loss, (b,), (direction,))[1])(boxes)
    leaf = boxes.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((first * direction).sum(), leaf)
    close(forward_over_reverse, expected, "gradient", "jvp of grad")
    close(reverse_over_forward, expected, "gradient", "grad of jvp")


def test_a_module_under_functional_call(device, close):
    """The usual way to meet torch.func: a gradient to the weights of a layer before the pooling."""
    case = SMOOTH
    layer = torch.nn.Conv2d(case.shape[1], 2, 3, padding=1).double().to(device.torch)
    image, boxes = smooth_inputs(device)
    weights = dict(layer.named_parameters())

    def loss(weights):
        pooled = pooler(case, MODES[1])(functional_call(layer, weights, image), boxes)
        return (pooled**2).sum()

    got = grad(loss)(weights)
    expected = torch.autograd.grad(
        (pooler(case, MODES[1])(layer(image), boxes) ** 2).sum(), tuple(weights.values())
    )
    for a, b in zip(got.values(), expected, strict=True):
        close(a, b, "gradient")


# --------------------------------------------------------------------------------------- training


def test_a_box_is_learned_by_its_gradient(device):
    """Gradient descent finds the box that a crop was cut from."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    image = torch.stack([torch.sin(x / 3), torch.cos(y / 3), torch.sin((x + y) / 4)])[None]
    image = image.to(device.torch)
    truth = torch.tensor([[0.0, 4.0, 5.0, 11.0, 12.0]], device=device.torch)
    target = glimpse_ext.roi_align(image, truth, 6, aligned=True, sampling_ratio=2)
    corners = torch.tensor([[3.0, 6.5, 12.5, 11.0]], device=device.torch, requires_grad=True)
    optimizer = torch.optim.Adam([corners], lr=0.15)
    steps = 60 if device.name == "emulated" else 120
    for _ in range(steps):
        optimizer.zero_grad()
        pooled = glimpse_ext.roi_align(image, [corners], 6, aligned=True, sampling_ratio=2)
        ((pooled - target) ** 2).sum().backward()
        optimizer.step()
    assert (corners - truth[:, 1:]).abs().max() < 0.1
