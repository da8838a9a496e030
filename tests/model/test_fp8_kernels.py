"""FP8 kernels against the reference: casts anywhere by Triton's interpreter, products on a Hopper GPU only."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout
from model.fp8 import reference
from model.fp8.forms import Columns, Recipe, Rows, Weight
from model.fp8.modules import Fp8Experts, adding_to_gradients, to_fp8
from model.moe import Experts, Routing
from tests.interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if GPU else "cpu"
casts = pytest.mark.skipif(not GPU and not INTERPRETED, reason="runs in the interpreter, started by another test")
products = pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
SIZES = [[0, 1, 127, 0, 128, 129, 0], [0, 0], [0], [300], [0, 0, 513]]  # tokens of each group
if GPU or INTERPRETED:
    from model.fp8 import kernels
    from model.fp8.tiles import largest_first


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests run here themselves")
def test_casts_run_in_the_interpreter() -> None:
    run_interpreted(__file__)


def ends_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers whose rows and columns differ in size."""
    x = torch.randn(*shape, device=DEVICE)
    return (x * torch.randn(shape[-2], 1, device=DEVICE).exp() * torch.randn(shape[-1], device=DEVICE).exp()).to(dtype)


def poison(size: int = 1 << 22) -> None:
    """Leaves NaN where the next outputs are allocated."""
    if GPU:
        torch.full((size,), float("nan"), device=DEVICE)


def assert_same(ours: tuple, theirs: tuple) -> None:
    for a, b in zip(ours, theirs, strict=True):
        a, b = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (a.contiguous(), b.contiguous()))
        assert a.shape == b.shape and torch.equal(a, b), (a.shape, int((a != b).sum()))


def assert_near(ours: Rows | Columns, theirs: Rows | Columns) -> None:
    """Equal but where another exp or sum was on the other side of a rounding."""
    assert (ours.scales / theirs.scales - 1).abs().max() < 1e-5
    assert (ours.codes.float() != theirs.codes.float()).float().mean() < 2e-3


@casts
@pytest.mark.parametrize("sizes", SIZES if GPU else SIZES[:2], ids=str)  # the first has what the others have
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_casts_write_the_reference_bytes_and_scales(sizes: list[int], ue8m0: bool, dtype: torch.dtype) -> None:
    recipe, ends = Recipe(ue8m0=ue8m0), ends_of(sizes)
    x = wide(sum(sizes), 208, dtype=dtype)
    poison()
    for ours, theirs in zip(kernels.quantize_both(x, ends, recipe), reference.quantize_both(x, ends, recipe)):
        assert_same(ours, theirs)
    assert_same(kernels.quantize_rows(x, recipe), reference.quantize_rows(x, recipe))
    for ours, theirs in zip(kernels.quantize_both(x, None, recipe), reference.quantize_both(x, None, recipe)):
        assert_same(ours, theirs)
    source, token = wide(37, 208, dtype=dtype), torch.randint(0, 37, (sum(sizes),), device=DEVICE)
    ours = kernels.permute_quantize(source, token, ends, recipe)
    for mine, theirs in zip(ours, reference.permute_quantize(source, token, ends, recipe)):
        assert_same(mine, theirs)


@casts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lines_that_do_not_begin_at_16_bytes(dtype: torch.dtype) -> None:
    """By their length, or as memory begins elsewhere: they cannot be copied by 16 bytes."""
    ends = ends_of([0, 130, 3])
    odd = wide(133, 200 if dtype == torch.bfloat16 else 202, dtype=dtype)
    elsewhere = wide(1, 133 * 208 + 2, dtype=dtype)[0, 2:].view(133, 208)
    for x in (odd, elsewhere):
        poison()
        for ours, theirs in zip(*(m.quantize_both(x, ends, Recipe()) for m in (kernels, reference))):
            assert_same(ours, theirs)


@casts
def test_every_quotient_of_two_bf16_numbers() -> None:
    # A tile's scale follows from its largest number, so this is all there is but for powers of two: 128 significands
    # of the largest by 128 of each other number, of every exponent down to those that become zero.
    significands = torch.arange(128, 256, device=DEVICE, dtype=torch.float32)
    other = torch.cat([significands * 2.0**-shift for shift in range(1, 20)])  # [2432], below the largest
    tiles = torch.nn.functional.pad(other, (0, -len(other) % 127)).view(-1, 127)  # [20, 127]
    same = torch.where(significands <= significands[:, None], significands, 0)[:, :127]  # of the largest's exponent
    tiles = torch.cat([tiles.expand(128, -1, -1), same[:, None]], 1)  # [128, 21, 127]
    x = torch.cat([significands[:, None, None].expand(-1, tiles.shape[1], 1), tiles], 2).flatten(0, 1).bfloat16()
    rows, columns = kernels.quantize_rows(x, Recipe()), kernels.quantize_both(x.t().contiguous(), None, Recipe())[1]
    theirs = reference.quantize_rows(x, Recipe())
    assert_same(rows, theirs)
    assert_same((columns.codes.t(), columns.scales.t()), (theirs.codes.t(), theirs.scales))


@casts
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_cast(ue8m0: bool, dtype: torch.dtype) -> None:
    w = wide(3, 208, 144, dtype=dtype)
    ours, theirs = kernels.quantize_weight(w, Recipe(ue8m0=ue8m0)), reference.quantize_weight(w, Recipe(ue8m0=ue8m0))
    assert_same(ours, theirs)
    assert ours.codes_t.is_contiguous()


@casts
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(weighted: bool) -> None:
    sizes, inner, recipe = [0, 1, 127, 0, 129], 256 if weighted else 128, Recipe()
    rows, ends = sum(sizes), ends_of(sizes)
    gate_up = torch.randn(rows, 2 * inner, device=DEVICE).bfloat16()
    weight = torch.rand(rows, device=DEVICE) if weighted else None
    poison()
    (act, saved), (act_, saved_) = (m.swiglu_quantize(gate_up, recipe, weight) for m in (kernels, reference))
    assert_near(act, act_)
    assert_same(saved, saved_)
    grad = torch.randn(rows, inner, device=DEVICE).bfloat16()
    ours, theirs = (m.swiglu_backward(saved_, grad, ends, recipe, weight) for m in (kernels, reference))
    for mine, other in zip(ours[:3], theirs[:3]):
        assert_near(mine, other)
    if weighted:
        torch.testing.assert_close(ours[3], theirs[3], rtol=1e-4, atol=1e-4)


@casts
def test_tiles_are_made_once() -> None:
    ends = ends_of([5, 0, 300, 130])
    first = kernels.tiles(ends, 435, ends.device)
    assert kernels.tiles(ends, 435, ends.device) is first and kernels.tiles(None, 435, ends.device).most == 4
    assert first.starts.tolist() == [0, 128, 128, 512, 768] and first.count.tolist() == [6]
    rows = [[0, 0, 5], [2, 5, 305], [2, 133, 305], [2, 261, 305], [3, 305, 435], [3, 433, 435]]
    assert first.table[:6, :3].tolist() == rows
    assert largest_first(first.starts).tolist() == [2, 3, 0, 1]
    assert largest_first(first.starts.clone()).tolist() == [2, 3, 0, 1]  # made again where it is not known


@casts
def test_combine() -> None:
    y, inverse = torch.randn(60, 96, device=DEVICE).bfloat16(), torch.randint(0, 60, (20, 3), device=DEVICE)
    torch.testing.assert_close(kernels.combine(y, inverse), reference.combine(y, inverse), rtol=8e-3, atol=1e-6)


@casts
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tile_with_a_bad_number_is_bad_as_a_whole(bad: float) -> None:
    x = torch.randn(200, 256, device=DEVICE)
    x[5, 130] = bad
    rows, columns = kernels.quantize_both(x, None, Recipe())
    values = rows.codes.float().view(200, 2, 128) * rows.scales[..., None]
    assert values[5, 1].isnan().all() and values.isnan().sum() == 128
    values = columns.codes.float().view(256, 2, 128) * columns.scales.t()[..., None]
    assert values[130, 0].isnan().all() and values.isnan().sum() == 128


def products_of(
    sizes: list[int], n: int, k: int, gradient: bool = False
) -> tuple[Rows, Columns, Columns, Weight, torch.Tensor]:
    ends, recipe = ends_of(sizes), Recipe()
    x, g = (torch.randn(sum(sizes), width, device=DEVICE) for width in (k, n))
    (rows, columns), (rows_g, columns_g) = (kernels.quantize_both(y, ends, recipe) for y in (x, g))
    weight = kernels.quantize_weight(torch.randn(len(sizes), n, k, device=DEVICE), recipe)
    return (rows_g, columns_g, columns, weight, ends) if gradient else (rows, columns, columns_g, weight, ends)


def assert_bound(ours: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    assert ours.shape == exact.shape
    assert not ours.isnan().any()
    assert ((ours.double() - exact).abs() <= bound).all(), ((ours.double() - exact).abs() / bound).max()


# Hopper's tensor cores keep about 14 bits of a sum of FP8 products. In units of |a| |b|; torch's own product has the
# same error, 1.8e-4 at K = 128 and 2e-5 at 2048.
KEPT = 3e-4


def rounding(bound: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return KEPT * bound + (exact.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0) + 1e-30


@products
@pytest.mark.parametrize("sizes", [*SIZES, [1000, 30, 0, 700]], ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (208, 144), (384, 1408)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(sizes: list[int], shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    x, _, _, w, ends = products_of(sizes, n, k)
    starts = [0, *ends.tolist()]
    a, b = reference.dequantize_rows(x).double(), reference.dequantize_weight(w).double()
    poison()
    y = kernels.grouped_linear(x, w, ends, dtype)
    for e in range(len(sizes)):
        rows = slice(starts[e], starts[e + 1])
        exact, bound = a[rows] @ b[e].t(), a[rows].norm(dim=1)[:, None] * b[e].norm(dim=1)
        assert_bound(y[rows], exact, rounding(bound, exact, dtype))
    g, columns, other, w, ends = products_of(sizes, n, k, gradient=True)
    a, b = reference.dequantize_rows(g).double(), reference.dequantize_weight(w, transposed=True).double()
    poison()
    dx = kernels.grouped_dgrad(g, w, ends, dtype)
    for e in range(len(sizes)):
        rows = slice(starts[e], starts[e + 1])
        exact, bound = a[rows] @ b[e].t(), a[rows].norm(dim=1)[:, None] * b[e].norm(dim=1)
        assert_bound(dx[rows], exact, rounding(bound, exact, dtype))
    poison()
    dw = kernels.grouped_wgrad(columns, other, dtype)
    if not len(columns.scales):
        assert dw.shape == (len(sizes), n, k) and not dw.any()
        return
    a, b = reference.dequantize_columns(columns).double(), reference.dequantize_columns(other).double()
    starts = columns.starts.tolist()
    for e in range(len(sizes)):
        rows = slice(starts[e], starts[e + 1])
        exact, bound = a[rows].t() @ b[rows], a[rows].norm(dim=0)[:, None] * b[rows].norm(dim=0)
        assert_bound(dw[e], exact, rounding(bound, exact, dtype))
    if dtype == torch.float32:
        before = torch.randn_like(dw)
        into = before.clone()
        assert kernels.grouped_wgrad(columns, other, dtype, into) is into
        torch.testing.assert_close(into, before + dw, rtol=1e-5, atol=2e-5)


@products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (208, 144), (384, 1408)], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        ([0, 1, 127, 0, 128, 129, 0], [5, 0, 300, 0, 0, 700, 1]),
        ([0, 0], [0, 130]),
        ([3, 513], [0, 0]),
        ([0], [0]),
        ([300], [1000]),
        ([64 * e for e in range(16)], [1000 - 60 * e for e in range(16)]),  # several tiles a program
    ],
    ids=str,
)
def test_two_weight_gradients_at_a_time(
    sizes: tuple[list[int], list[int]], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of pairs with groups of other sizes: within FP32's rounding of their own products' sum."""
    (n, k), E = shape, len(sizes[0])
    pairs = [products_of(part, n, k, gradient=True)[1:3] for part in sizes]
    (g, x), earlier = pairs
    parts = [kernels.grouped_wgrad(*pair, torch.float32) for pair in pairs]
    exact = reference.grouped_wgrad(g, x, torch.float32, also=earlier)
    poison()
    dw = kernels.grouped_wgrad(g, x, dtype, also=earlier)
    assert dw.shape == (E, n, k) and dw.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(dw.float(), parts[0] + parts[1], rtol=rtol, atol=1e-4)
    assert_product(dw, exact.to(dtype))
    if dtype == torch.float32:
        before = torch.randn_like(dw)
        into = before.clone()
        assert kernels.grouped_wgrad(g, x, dtype, into, earlier) is into
        torch.testing.assert_close(into, before + dw, rtol=1e-5, atol=2e-5)


@products
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
def test_gradients_of_experts(microbatches: int, make_config: Callable[..., DeepseekV3Config]) -> None:
    """Added in products for two micro-batches at a time, against those that autograd adds up."""
    plain = Experts(make_config(hidden_size=256, moe_intermediate_size=128, n_routed_experts=8)).to(DEVICE)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    experts = Fp8Experts(plain, kernels, Recipe())
    batches = []
    for n in range(microbatches):
        choice = torch.randn(300 + 50 * n, 7, device=DEVICE).topk(2).indices  # the last expert has no tokens
        routing = Routing(
            choice,
            torch.rand(choice.shape, device=DEVICE),
            torch.empty(0),
            torch.bincount(choice.flatten(), minlength=8),
        )
        batches.append((torch.randn(len(choice), 256, device=DEVICE).bfloat16().requires_grad_(), routing))
    found = []
    for context in (nullcontext, adding_to_gradients):
        experts.zero_grad()
        with context(experts):
            for x, routing in batches:
                experts(x, routing).float().square().sum().backward()
        found.append([parameter.grad for parameter in experts.parameters()])
    for want, got in zip(*found, strict=True):
        assert want is not None and got is not None and want.any() and not want[7].any()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@products
def test_a_bad_row_stays_in_its_group() -> None:
    sizes = [5, 130]
    ends = ends_of(sizes)
    x = torch.randn(135, 256, device=DEVICE)
    x[7, 3] = float("nan")
    w = torch.randn(2, 384, 256, device=DEVICE)
    rows, columns = kernels.quantize_both(x, ends, Recipe())
    weight = kernels.quantize_weight(w, Recipe())
    y = kernels.grouped_linear(rows, weight, ends, torch.float32)
    assert y[7].isnan().all() and y.isnan().sum() == 384
    g = kernels.quantize_both(torch.randn(135, 384, device=DEVICE), ends, Recipe())[1]
    dw = kernels.grouped_wgrad(g, columns, torch.float32)
    assert dw[1, :, 3].isnan().all() and dw.isnan().sum() == 384


def assert_product(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of the same operands: each row as near as the tensor cores' sums and BF16 allow."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    apart, size = (ours.float() - theirs.float()).norm(dim=-1), theirs.float().norm(dim=-1)
    worst = ((apart - 1e-30) / size.clamp(min=1e-30)).max()
    assert worst < (4e-3 if ours.dtype == torch.bfloat16 else 2e-3), worst


def checked(calls: Counter[str], kernels: Any) -> Any:
    """The kernels, each result held against the reference's of the same operands."""

    def forms(ours: Any, theirs: Any, compare: Callable[[Any, Any], None]) -> None:
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, Rows | Columns):
                compare(a, b)
            elif a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    def casts(ours: Any, theirs: Any) -> None:
        if isinstance(ours, Rows | Weight):
            assert_same(ours, theirs)
        else:
            forms(ours, theirs, assert_same)

    def both(name: str, compare: Callable[[Any, Any], None]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            poison()
            ours, theirs = getattr(kernels, name)(*args), getattr(reference, name)(*args)
            compare(ours, theirs)
            calls[name] += 1
            return ours

        return call

    quantised = ("rows", "both", "weight", "gradient")
    compared = {f"quantize_{kind}": casts for kind in quantised} | dict.fromkeys(
        ("permute_quantize", "permute_gradient"), casts
    )
    compared |= dict.fromkeys(("grouped_linear", "grouped_dgrad", "grouped_wgrad", "combine"), assert_product)
    compared |= dict.fromkeys(
        ("swiglu_quantize", "swiglu_backward"), lambda ours, theirs: forms(ours, theirs, assert_near)
    )
    return SimpleNamespace(**{name: both(name, compare) for name, compare in compared.items()})


@products
@pytest.mark.parametrize("inner", [128, 80])  # of an expert: SwiGLU's kernels, and the reference where they do not fit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_model(dtype: torch.dtype, inner: int, make_model: Callable[..., DeepseekV3ForCausalLM]) -> None:
    """With FP32 parameters: every cast and product of two updates, on the numbers that come up there."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "kv_lora_rank": 64, "q_lora_rank": 144}
    heads = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48, "initializer_range": 0.1}
    model = make_model(moe_intermediate_size=inner, **sizes, **heads).to(dtype).to(DEVICE)
    calls: Counter[str] = Counter()
    to_fp8(model, "on", ops=checked(calls, kernels))
    masters = [p for name, p in model.named_parameters() if ".experts." in name]
    assert len(masters) == 4 and {p.dtype for p in masters} == {torch.float32}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(40, (400,), device=DEVICE)
    layout = SequenceLayout.from_segments([0, 130, 259, 400]).to(DEVICE)
    losses = []
    for _ in range(3):
        logits = model.forward_packed(ids, layout).hidden @ model.head.weight.t()
        loss = torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    products = 5 * 3 + 2 * (1 + 2 + 2)  # of attention in three layers; dense, shared and routed MLPs
    assert {calls[f"grouped_{kind}"] for kind in ("linear", "dgrad", "wgrad")} == {3 * products}
    assert calls["quantize_weight"] == 3 * products  # anew after each update
    assert calls["combine"] == 3 * 2 * 2 and calls["swiglu_backward"] == 3 * 5


@products
@pytest.mark.parametrize("rows", [4, 1000, 1001])
@pytest.mark.parametrize("shape", [(256, 512), (208, 144), (576, 2048), (2048, 2816)], ids=str)
def test_products_of_one_group(rows: int, shape: tuple[int, int]) -> None:
    # By another library where it takes the shape, by the grouped kernels elsewhere.
    (n, k), recipe = shape, Recipe()
    (x, columns), (g, columns_g) = (
        kernels.quantize_both(torch.randn(rows, width, device=DEVICE), None, recipe) for width in (k, n)
    )
    w = kernels.quantize_weight(torch.randn(1, n, k, device=DEVICE), recipe)
    a, b = reference.dequantize_columns(columns_g).double(), reference.dequantize_columns(columns).double()
    values = reference.dequantize_weight(w)[0].double()
    cases = (
        (kernels.grouped_linear, x, reference.dequantize_rows(x).double(), values.t()),
        (kernels.grouped_dgrad, g, reference.dequantize_rows(g).double(), values),
    )
    for dtype in (torch.bfloat16, torch.float32):
        for product, operand, left, right in cases:
            poison()
            exact, bound = left @ right, left.norm(dim=1)[:, None] * right.norm(dim=0)
            assert_bound(product(operand, w, None, dtype), exact, rounding(bound, exact, dtype))
        poison()
        exact, bound = a.t() @ b, a.norm(dim=0)[:, None] * b.norm(dim=0)
        assert_bound(kernels.grouped_wgrad(columns_g, columns, dtype)[0], exact, rounding(bound, exact, dtype))
