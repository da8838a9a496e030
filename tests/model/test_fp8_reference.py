"""The FP8 recipe against float64: errors within the format's bound, ragged groups, outliers, NaN, MXFP8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.fp8 import reference as fp8
from model.fp8.forms import ALIGN, MXFP8, Columns, Recipe, Rows
from model.fp8.quantize import dequantize_blocks, quantize_blocks

SIZES = {
    "ragged": [0, 1, 127, 128, 129, 0],
    "one full": [0, 0, 300, 0],
    "nothing": [0, 0, 0],
    "equal": [64, 64],
}
RECIPES = [Recipe(), Recipe(ue8m0=True), MXFP8]


def make(sizes: list[int], n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x # [M, k], w # [E, n, k], g # [M, n] random normal, and ends."""
    rows = sum(sizes)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return torch.randn(rows, k), torch.randn(len(sizes), n, k) * 0.02, torch.randn(rows, n) * 1e-6, ends


def exact(x: Tensor, w: Tensor, g: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The three products in float64."""
    parts = list(zip(x.double().split(sizes), w.double(), g.double().split(sizes)))
    forward = torch.cat([rows @ matrix.t() for rows, matrix, _ in parts])
    dgrad = torch.cat([grad @ matrix for _, matrix, grad in parts])
    return forward, dgrad, torch.stack([grad.t() @ rows for rows, _, grad in parts])


def products(x: Tensor, w: Tensor, g: Tensor, ends: Tensor | None, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    weight = fp8.quantize_weight(w, recipe)
    rows, columns = fp8.quantize_both(x, ends, recipe)
    grad_rows, grad_columns = fp8.quantize_gradient(g, ends, recipe)
    return (
        fp8.grouped_linear(rows, weight, ends, torch.float32),
        fp8.grouped_dgrad(grad_rows, weight, ends, torch.float32),
        fp8.grouped_wgrad(grad_columns, columns, torch.float32),
    )


def error(got: Tensor, want: Tensor) -> float:
    """Relative, by the Frobenius norm."""
    return float((got.double() - want).norm() / want.norm())


def distance(got: Tensor, want: Tensor) -> float:
    """DeepGEMM's 1 - 2xy / (x^2 + y^2)."""
    got = got.double()
    return float(1 - 2 * (got * want).sum() / ((got * got).sum() + (want * want).sum()))


@pytest.mark.parametrize("recipe", RECIPES, ids=["float", "ue8m0", "mxfp8"])
@pytest.mark.parametrize("widths", [(256, 384), (192, 576), (48, 80)], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_products(name: str, widths: tuple[int, int], recipe: Recipe) -> None:
    """Two operands of 2.6 % each: 3.7 % of a product, whatever the groups, whether or not a width is whole tiles."""
    sizes = SIZES[name]
    x, w, g, ends = make(sizes, *widths)
    for got, want in zip(products(x, w, g, ends, recipe), exact(x, w, g, sizes), strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32
        if sum(sizes):
            assert 0.030 < error(got, want) < 0.041 and distance(got, want) < 1e-3
    assert not products(x, w, g, ends, recipe)[2][torch.tensor(sizes) == 0].any()


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 500])
def test_one_group(rows: int) -> None:
    """ends None is one group of all rows, to the last bit."""
    x, w, g, ends = make([rows], 160, 200)
    for dense, grouped in zip(products(x, w, g, None, Recipe()), products(x, w, g, ends, Recipe()), strict=True):
        torch.testing.assert_close(dense, grouped, rtol=1e-6, atol=1e-12)


def test_sums_over_slabs() -> None:
    """What the hardware does: a product of codes for each 128 of K, times both scales, added up in FP32."""
    x, w, _, ends = make([70, 130], 256, 320)
    rows, weight = fp8.quantize_rows(x, Recipe()), fp8.quantize_weight(w, Recipe())
    want = torch.zeros(200, 256)
    for group, (a, b) in enumerate([(0, 70), (70, 200)]):
        for slab in range(3):
            part = slice(128 * slab, 128 * slab + 128)
            product = rows.codes[a:b, part].float() @ weight.codes[group, :, part].float().t()
            by_column = weight.scales[group, :, slab].repeat_interleave(128)
            want[a:b] += product * rows.scales[a:b, slab, None] * by_column
    bound = fp8.dequantize_rows(rows).norm(dim=1)[:, None] * fp8.dequantize_weight(weight).norm(dim=2).max()
    assert ((fp8.grouped_linear(rows, weight, ends, torch.float32) - want).abs() / bound).max() < 1e-6
    assert fp8.grouped_linear(rows, weight, ends, torch.bfloat16).dtype == torch.bfloat16


def test_columns() -> None:
    """Groups begin at multiples of 128, nothing is between them, and each token's numbers are where they belong."""
    sizes = [0, 1, 127, 128, 129, 0]
    x, _, _, ends = make(sizes, 16, 40)
    columns = fp8.quantize_columns(x, ends, Recipe())
    assert columns.starts.tolist() == [0, 0, 128, 256, 384, 640, 640]
    places = (sum(sizes) + 127 * len(sizes)) // ALIGN * ALIGN  # by shapes alone
    assert columns.codes.shape == (40, places) and columns.scales.shape == (places // 128, 40)
    values, rest = fp8.dequantize_columns(columns), torch.ones(places, dtype=torch.bool)
    for group, rows in enumerate(x.split(sizes)):
        start = int(columns.starts[group])
        torch.testing.assert_close(values[start : start + len(rows)], rows, rtol=0.0625, atol=1e-2)
        rest[start : start + len(rows)] = False
    assert not values[rest].any()
    # a tile's scale knows nothing of another group
    assert torch.equal(columns.scales[0], x[0].abs() / 448)
    assert torch.equal(columns.scales[1], x[1:128].abs().amax(0) / 448)


@pytest.mark.parametrize(("block", "low", "high"), [((1, 128), 0.02, 0.03), ((128, 128), 0.3, 0.45)], ids=str)
def test_outlier(block: tuple[int, int], low: float, high: float) -> None:
    """One token in 128 is 1e5 times as large: a scale for each token leaves the others alone, one for all does not."""
    x = torch.randn(512, 512)
    x[::128] *= 1e5
    got = dequantize_blocks(*quantize_blocks(x, block), block)
    if block == (1, 128):
        assert torch.equal(got, fp8.dequantize_rows(fp8.quantize_rows(x, Recipe())))
    others = torch.arange(512) % 128 != 0
    assert low < error(got[others], x[others].double()) < high


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("recipe", RECIPES, ids=["float", "ue8m0", "mxfp8"])
def test_not_finite(bad: float, recipe: Recipe) -> None:
    """A token's NaN reaches its own row and its expert's gradient, and no others."""
    x, w, g, ends = make([40, 60], 64, 256)
    x[50, 7] = bad
    forward, _, wgrad = products(x, w, g, ends, recipe)
    rows = torch.arange(100) == 50
    assert forward[rows].isnan().all() and forward[~rows].isfinite().all()
    assert wgrad[1, :, 7].isnan().all() and wgrad[0].isfinite().all() and wgrad[1, :, 8:].isfinite().all()
    w[1, 3, 200] = bad
    forward = products(torch.randn(100, 256), w, g, ends, recipe)[0]
    assert forward[40:, 3].isnan().all() and forward[:40].isfinite().all()


def test_small_gradients() -> None:
    """Of a mean over many tokens: a floor under the largest value of a tile, as some have, would round them to 0."""
    g = torch.randn(256, 256) * 1e-12
    assert error(fp8.dequantize_rows(fp8.quantize_rows(g, Recipe())), g.double()) < 0.03


def test_permute() -> None:
    """The same bytes as of rows that are gathered first."""
    x, token = torch.randn(50, 200), torch.randint(50, (120,))
    ends = torch.tensor([30, 30, 120], dtype=torch.int32)
    got, want = (
        fp8.permute_quantize(x, token, ends, Recipe()),
        fp8.quantize_both(x[token], ends, Recipe()),
    )
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_swiglu() -> None:
    """Activations and gradients against autograd in float64 on what was kept, weights of rows included."""
    gate_up, weight, grad = torch.randn(130, 512), torch.rand(130), torch.randn(130, 256)
    act, kept = fp8.swiglu_quantize(gate_up, Recipe(), weight)
    values = fp8.dequantize_rows(kept).double().requires_grad_()
    share = weight.double().requires_grad_()
    gate, up = values.chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * up * share[:, None]
    want.backward(grad.double())
    assert values.grad is not None and share.grad is not None
    assert error(fp8.dequantize_rows(act), want.detach()) < 0.05  # of two casts: gate_up's and its own
    columns, rows, grad_columns, grad_weight = fp8.swiglu_backward(kept, grad, None, Recipe(), weight)
    assert error(fp8.dequantize_columns(columns)[:130], want.detach()) < 0.03
    assert error(fp8.dequantize_rows(rows), values.grad) < 0.03
    assert error(fp8.dequantize_columns(grad_columns)[:130], values.grad) < 0.03
    assert grad_weight is not None and error(grad_weight, share.grad) < 1e-6
    assert fp8.swiglu_backward(kept, grad, None, Recipe())[3] is None


def test_combine() -> None:
    y, inverse = torch.randn(6, 4).bfloat16(), torch.tensor([[0, 5], [2, 1], [4, 3]])
    want = (y[inverse[:, 0]].float() + y[inverse[:, 1]].float()).bfloat16()
    assert torch.equal(fp8.combine(y, inverse), want)


def test_mxfp8() -> None:
    """OCP microscaling: 32 numbers a scale, which is the least power of two that keeps them within 448."""
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([448.0, 1.0, -0.01])
    x[0, 32:34] = torch.tensor([449.0, 2.0**-9])
    rows = fp8.quantize_rows(x, MXFP8)
    assert rows.scales.tolist() == [[1.0, 2.0]]
    assert fp8.dequantize_rows(rows)[0, [0, 1, 2, 32, 33]].tolist() == [448.0, 1.0, -0.009765625, 448.0, 0.0]
    weight = fp8.quantize_weight(torch.randn(2, 96, 64), MXFP8)
    assert weight.scales.shape == (2, 96, 2) and weight.scales_t.shape == (2, 64, 3)  # one for each direction
    assert (weight.scales.log2() % 1 == 0).all()


def test_weight() -> None:
    """One set of bytes for both directions: those of a published checkpoint."""
    w = torch.randn(2, 300, 200)
    weight = fp8.quantize_weight(w, Recipe())
    codes, scales = quantize_blocks(w)
    assert torch.equal(weight.codes.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(weight.scales, scales)
    assert torch.equal(weight.codes_t.view(torch.uint8), codes.view(torch.uint8).transpose(1, 2))
    assert torch.equal(fp8.dequantize_weight(weight), dequantize_blocks(codes, scales))
    assert torch.equal(fp8.dequantize_weight(weight, True), dequantize_blocks(codes, scales).transpose(1, 2))


def test_all_codes() -> None:
    """The fast way from codes to numbers, for each of them but NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    want = codes.float()
    got = fp8.dequantize_rows(Rows(codes, torch.ones(256, 1)))
    assert torch.equal(got[want.isfinite()], want[want.isfinite()]) and int(want.isnan().sum()) == 2
    columns = Columns(codes[:128].t(), torch.ones(1, 1), torch.tensor([0, 128], dtype=torch.int32))
    assert torch.equal(fp8.dequantize_columns(columns)[:127], want[:127])


def test_two_weight_gradients_at_a_time() -> None:
    """The bits of one after the other; in BF16 rounded once."""
    pairs: list[tuple[Columns, Columns]] = []
    for sizes in ([0, 130, 5], [200, 0, 1]):
        ends = torch.tensor(sizes).cumsum(0).int()
        g, x = (fp8.quantize_columns(torch.randn(sum(sizes), n), ends, Recipe()) for n in (48, 80))
        pairs.append((g, x))
    (g, x), earlier = pairs
    one, other = fp8.grouped_wgrad(*earlier, torch.float32), fp8.grouped_wgrad(g, x, torch.float32)
    both = fp8.grouped_wgrad(g, x, torch.float32, also=earlier)
    assert both.shape == (3, 48, 80) and torch.equal(both, one + other) and one[0].any() != one[1].any()
    assert torch.equal(fp8.grouped_wgrad(g, x, torch.bfloat16, also=earlier), both.bfloat16())
    into = torch.randn_like(both)
    want = into + one + other
    assert fp8.grouped_wgrad(g, x, torch.float32, into, earlier) is into and torch.equal(into, want)
