"""The faster matrix products equal the plain ones for models of each kind, and change nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from stillhouse.extract import cpu_matmul as products
from stillhouse.extract.cpu_matmul import CpuMatmul, apply_linear, bfloat16_products
from stillhouse.extract.teacher.model import Teacher, load_teacher

TEACHERS = ["minilm", "bert", "gpt2", "llama"]
IDS = torch.tensor([[5, 7, 6, 8, 5, 11, 9], [9, 9, 5, 6, 7, 8, 30]])


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that float32 is faster with oneDNN."""
    if not products._has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_is_onednn_faster", lambda: True)


def plain(teacher: Teacher) -> list[torch.Tensor]:
    with torch.inference_mode():
        return list(teacher.model(input_ids=IDS, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("which", TEACHERS)
def test_float32_is_float32(which: str, onednn: None, request: pytest.FixtureRequest) -> None:
    teacher = load_teacher(str(request.getfixturevalue(which)), device="cpu")
    assert teacher._products is not None
    for a, b in zip(teacher._plain(IDS), plain(teacher), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 3e-6 * b.norm()


@pytest.mark.parametrize("which", TEACHERS)
def test_bfloat16_rounds_products_alone(which: str, request: pytest.FixtureRequest) -> None:
    teacher = load_teacher(str(request.getfixturevalue(which)), device="cpu", dtype="bfloat16")
    assert teacher._autocast
    if bfloat16_products() is not None:
        assert teacher._products is not None
    exact = plain(teacher)
    for layer, (a, b) in enumerate(zip(teacher._plain(IDS), exact, strict=True)):
        off = float((a.float() - b).norm() / b.norm())
        assert off <= 0.02 and (off > 1e-4) == (layer > 0), (layer, off)
    assert [torch.equal(a, b) for a, b in zip(plain(teacher), exact)] == [True] * len(exact)  # the model is as it was


@pytest.mark.parametrize(
    ("vendor", "vectors", "times_as_fast", "chosen"),
    [
        ("AuthenticAMD", "AVX512", 2.1, True),
        ("AuthenticAMD", "AVX512", 0.9, True),  # as fast, within what measurements differ by
        ("AuthenticAMD", "AVX512", 0.6, False),
        ("AuthenticAMD", "AVX2", 1.1, False),
        ("GenuineIntel", "AVX512", 1.1, False),
        ("GenuineIntel", "AVX512", 1.6, True),
        ("", "DEFAULT", 1.6, True),
    ],
)
def test_a_clear_measurement_overrules_the_processor(
    vendor: str, vectors: str, times_as_fast: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(products, "_times_as_fast", lambda *_: times_as_fast)
    assert products._is_onednn_faster.__wrapped__() == chosen


def test_one_disturbed_measurement_overrules_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    measured = iter([0.3, 0.3, 1.0])
    monkeypatch.setattr(products, "_times_as_fast", lambda *_: next(measured))
    assert products._is_onednn_faster.__wrapped__()


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("shape", [(2, 7), (9,)])
def test_gradients_are_those_of_linear(
    inputs: int, outputs: int, shape: tuple[int, ...], onednn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a bias, of rows in any order, and of some of the operands."""
    monkeypatch.setattr(products, "SMALLEST", 0)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*s, generator=generator) for s in ((*shape, inputs), (outputs, inputs), (outputs,))]
    grad = torch.randn(*shape, outputs, generator=generator)
    mode = products.float32_products()
    assert mode is not None
    for wanted in ((0, 1, 2), (0, 1), (1,), (0,)):
        found = []
        for context in (mode, contextlib.nullcontext()):
            x, weight, bias = (a.clone().requires_grad_(k in wanted) for k, a in enumerate(made))
            with context:
                y = functional.linear(x, weight, bias if len(wanted) != 2 else None)
            y.backward(grad.transpose(0, -1).contiguous().transpose(0, -1))
            found.append((y, *(t.grad for k, t in enumerate((x, weight, bias)) if k in wanted and t.grad is not None)))
        assert len(found[0]) == len(found[1]) > 1
        assert "WithGradients" in repr(found[0][0].grad_fn)
        for a, b in zip(*found, strict=True):
            assert a.dtype == torch.float32 and a.shape == b.shape
            assert (a - b).norm() <= 1e-6 * b.norm()


def test_small_and_lower_products_are_torchs_own(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = products.float32_products()
    assert mode is not None
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    with mode:
        assert "WithGradients" not in repr(functional.linear(x, weight).grad_fn)
        monkeypatch.setattr(products, "SMALLEST", 0)
        assert "WithGradients" in repr(functional.linear(x, weight).grad_fn)
        assert functional.linear(x.double(), weight.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "total", "used"), [(7, 1 << 20, True), (9, 1 << 20, True), (7, 1 << 10, False)])
def test_pieces_of_a_layer(rows: int, total: int, used: bool, onednn: None) -> None:
    """Pieces of the announced size, here 7, are oneDNN's, if there are many. All equal the plain products."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)
    x, grad = torch.randn(rows, 40, generator=generator), torch.randn(rows, 24, generator=generator)
    layer = products.ManyPieces(weight, bias, 7, total)
    assert bool(layer.rows) == used
    added = torch.ones(24, 40)
    layer.add_grad_weight(grad, x, added)
    pairs = [
        (layer.outputs(x, torch.empty(rows, 24)), functional.linear(x, weight, bias)),
        (layer.grad_inputs(grad, torch.empty(rows, 40)), grad @ weight),
        (added, 1 + grad.t() @ x),
    ]
    for a, b in pairs:
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_what_is_measured() -> None:
    def slow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        for _ in range(20):
            functional.linear(x, weight, bias)
        return functional.linear(x, weight, bias)

    assert products._times_as_fast(slow, functional.linear) > 2
    assert products._times_as_fast(functional.linear, slow) < 0.5


def test_a_model_that_does_not_run_with_them_runs_without(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.extract.teacher import model as module

    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(module, "float32_products", lambda **_: CpuMatmul(refuse))
    monkeypatch.setattr(module, "bfloat16_products", lambda: CpuMatmul(refuse))
    for dtype in ("float32", "bfloat16"):
        teacher = load_teacher(str(bert), device="cpu", dtype=dtype)
        assert teacher._products is None and teacher._blocks is not None


def test_what_is_intercepted() -> None:
    """Linear layers and GPT-2's addmm by the product, attention in float32, nothing else."""
    seen: list[str] = []

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(f"{tuple(x.shape)}{tuple(weight.shape)}")
        return functional.linear(x, weight, bias).bfloat16()

    x, w, b = torch.ones(2, 3), torch.arange(12.0).reshape(4, 3), torch.ones(4)
    with CpuMatmul(product):
        assert functional.linear(x, w, b).tolist() == [[4.0, 13.0, 22.0, 31.0]] * 2
        assert functional.linear(x, w, bias=b).dtype == torch.bfloat16
        assert torch.addmm(b, x, w.t()).tolist() == [[4.0, 13.0, 22.0, 31.0]] * 2
        assert torch.addmm(b, x, w.t(), beta=2).tolist() == [[5.0, 14.0, 23.0, 32.0]] * 2
        assert torch.matmul(x, w.t()).dtype == torch.float32
        q = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
        mask = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
        assert functional.scaled_dot_product_attention(q, q.float(), q, attn_mask=mask).dtype == torch.float32
    assert seen == ["(2, 3)(4, 3)"] * 3


@pytest.mark.parametrize("bias", [True, False])
def test_inference_follows_the_weights_and_training_keeps_its_gradients(onednn: None, bias: bool) -> None:
    torch.manual_seed(0)
    layer, other = (torch.nn.Linear(96, 700, bias=bias) for _ in range(2))
    x, known = torch.randn(2, 90, 96), len(products._laid_out)
    # What happens to weights: a step of training, a checkpoint, an exchange
    changes = [
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: setattr(layer.weight, "data", torch.randn(700, 96)),
    ]
    apply_linear(layer, x).sum().backward()
    assert layer.weight.grad is not None and len(products._laid_out) == known
    with torch.no_grad():
        for change in changes:
            change()
            torch.testing.assert_close(apply_linear(layer, x), layer(x), atol=1e-5, rtol=1e-5)
            expected = functional.silu(layer(x))
            torch.testing.assert_close(apply_linear(layer, x, "swish"), expected, atol=1e-5, rtol=1e-5)
            assert len(products._laid_out) == known + 1
        low, few = layer.bfloat16(), x.bfloat16()
        assert apply_linear(low, few).equal(low(few))
        spare = torch.nn.Linear(96, 700)
        apply_linear(spare, x)
        assert len(products._laid_out) == known + 2
    del spare
    assert len(products._laid_out) == known + 1


@pytest.mark.parametrize(
    "activation", [functional.gelu, lambda y: functional.gelu(y, approximate="tanh"), functional.silu]
)
def test_an_activation_is_computed_with_its_product(activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From the second call on: once the output goes elsewhere, it is the plain output again, and stays that."""
    if not products._has_onednn():
        pytest.skip("this torch has no oneDNN")
    product, applied = products._LaidOut(torch.float32), []

    def activated(*operands: Any) -> torch.Tensor:
        applied.append(operands[3])
        return product(*operands)

    x, linear = torch.linspace(-3, 3, 12).reshape(2, 6), torch.nn.Linear(6, 5)
    with torch.inference_mode():
        plain = functional.linear(x, linear.weight, linear.bias)
        wanted, mode = activation(plain), CpuMatmul(product, activated)
        with mode:
            for _ in range(3):
                assert torch.allclose(activation(linear(x)), wanted, rtol=1e-6, atol=1e-6)
        assert len(applied) == 2
        with mode:
            kept = linear(x)
        assert torch.allclose(kept, plain, rtol=1e-6, atol=1e-6) and len(applied) == 3
        with mode:
            assert torch.allclose(activation(linear(x)), wanted, rtol=1e-6, atol=1e-6)
        assert len(applied) == 3


def test_an_activation_of_something_else_is_not_skipped() -> None:
    """The next call may be another activation, may take the output apart, or may take another tensor."""
    if not products._has_onednn():
        pytest.skip("this torch has no oneDNN")
    x, uses = (
        torch.linspace(-3, 3, 12).reshape(2, 6),
        [
            lambda y: functional.gelu(y, approximate="tanh"),
            functional.silu,
            lambda y: functional.gelu(y[:, 1:]),
            lambda y: functional.gelu(x) + y.sum(),
            lambda y: functional.linear(y, torch.eye(5)),
        ],
    )
    for use in uses:
        product, linear = products._LaidOut(torch.float32), torch.nn.Linear(6, 5)
        with torch.inference_mode(), CpuMatmul(product, product):
            for _ in range(2):
                functional.gelu(linear(x))
            got = use(linear(x))
        with torch.inference_mode():
            assert torch.allclose(got, use(linear(x)), rtol=1e-6, atol=1e-6)


def test_weights_laid_out_give_the_same_bits(onednn: None, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(str(minilm), device="cpu")
    assert teacher._products is not None and teacher._products._activated is not None
    laid_out = teacher._plain(IDS)
    monkeypatch.setattr(products, "MOST_LAID_OUT", 0)
    for a, b in zip(load_teacher(str(minilm), device="cpu")._plain(IDS), laid_out, strict=True):
        assert torch.equal(a, b)
