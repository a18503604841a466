"""What is chosen on which graphics card, told by compute capability alone: P100 6.0, V100 7.0, T4 7.5, A100 8.0, H100 9.0."""

import importlib.util

import pytest
import torch

from stretches import HEADS, WIDTH, laid_out, one_by_one, variable_length_kernel
from tiny_runs import tiny_config
from tunesmith import device as machine
from tunesmith.device import card_precision, resolve_compile
from tunesmith.errors import UserError
from tunesmith.models import attention as module
from tunesmith.models.attention import (
    Documents,
    attend_documents,
    attention_path,
    flash_capability,
    has_flash_kernel,
)
from tunesmith.train import resolve

CARDS = {"P100": (6, 0), "GTX 1080": (6, 1), "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "L4": (8, 9), "H100": (9, 0)}
CUDA = torch.device("cuda", 0)
PATHS = [(card, dtype) for card in CARDS for dtype in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("card", "dtype"), PATHS, ids=str)
def test_the_flash_kernel_is_for_half_precision_from_the_a100_on(monkeypatch, card, dtype):
    monkeypatch.setattr(module, "flash_capability", lambda device: CARDS[card])
    expected = "varlen" if card in ("A100", "L4", "H100") and dtype != torch.float32 else "stretches"
    assert attention_path(has_flash_kernel(CUDA), dtype, 64) == expected


@pytest.mark.parametrize(
    "case",
    [
        (False, torch.bfloat16, 64),
        (True, torch.float64, 64),
        (True, torch.bfloat16, 12),
        (True, torch.bfloat16, 256),
        (True, torch.bfloat16, 64, 0.1),
    ],
    ids=["no card or no kernel", "float64", "width no multiple of 8", "too wide", "dropout"],
)
def test_what_the_flash_kernel_cannot_do_goes_stretch_by_stretch(case):
    assert attention_path(*case) == "stretches"


def test_a_processor_has_no_flash_kernel(monkeypatch):
    cpu = torch.device("cpu")
    assert (flash_capability(cpu), has_flash_kernel(cpu)) == (None, False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert (flash_capability(CUDA), has_flash_kernel(CUDA)) == (None, False)


@pytest.mark.parametrize("card", ["P100", "V100", "T4", "H100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_takes_the_chosen_path_and_gives_the_same(monkeypatch, card, dtype):
    """The card is simulated: its kernel is the same in plain torch, and counted."""
    from torch.nn.attention import varlen

    calls = []

    def kernel(q, k, v, cu_q, cu_k, longest_q, longest_k, *, window_size):
        calls.append((longest_q, longest_k, window_size))
        assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
        scaled = q.double() * (WIDTH / q.shape[-1]) ** 0.5  # its heads are WIDTH wide
        return variable_length_kernel(scaled[None], k.double()[None], v.double()[None], gathered).to(q.dtype)

    lengths, parents = laid_out([[(5, 3, 4), (2, 1, 5)], [(20,)]])
    documents = Documents.from_rows(lengths, parents=parents)
    gathered = module.replace(documents, key_index=None)  # the kernel is given gathered keys
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(module, "flash_capability", lambda device: CARDS[card])
    exact = torch.randn(3, 2, 20, HEADS, 8, dtype=torch.float64)
    q, k, v = (z.to(dtype) for z in exact)
    expected = one_by_one(*(z.double() for z in (q, k, v)), lengths, parents)
    found = attend_documents(q, k, v, documents)
    near = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=0, atol=near)
    assert found.dtype == dtype
    flash = card == "H100" and dtype != torch.float32
    assert calls == ([(20, 20, (-1, 0))] if flash else [])


@pytest.mark.parametrize(
    ("card", "precision"),
    [("P100", "fp16"), ("GTX 1080", "fp32"), ("V100", "fp16"), ("T4", "fp16"), ("A100", "bf16"), ("H100", "bf16")],
)
def test_precision_is_the_one_that_the_card_is_fast_in(card, precision):
    assert card_precision(CARDS[card]) == precision


@pytest.fixture
def on_card(monkeypatch):
    """A machine with this card and Triton, as far as anybody can tell by asking."""

    def pretend(card, triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CARDS[card])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"Tesla {card}")
        monkeypatch.setattr(
            machine, "find_spec", lambda name: importlib.util.find_spec("json" if triton else "no such")
        )
        monkeypatch.setattr(resolve, "resolve_device", lambda name: CUDA)

    return pretend


@pytest.mark.parametrize("card", CARDS)
def test_blocks_are_compiled_by_themselves_only_where_triton_knows_the_card(on_card, card):
    on_card(card)
    config = resolve.resolve_machine(tiny_config("m", "r", train__precision="auto"), 64, 1e-4)
    old = card in ("P100", "GTX 1080")
    assert (config.train.compile, config.train.precision) == (not old, card_precision(CARDS[card]))


def test_without_triton_auto_does_not_compile(on_card):
    on_card("H100", triton=False)
    assert resolve_compile("auto", CUDA) is False
    assert resolve_compile(True, CUDA) is True, "who asks for it is told by torch what is missing"
    assert resolve_compile(False, CUDA) is False


def test_compiling_for_a_card_that_is_too_old_is_a_users_error_with_the_way_out(on_card):
    on_card("P100")
    with pytest.raises(
        UserError, match=r"--train.compile true: Tesla P100 has compute capability 6\.0.*needs 7\.0\. Use false"
    ):
        resolve.resolve_machine(tiny_config("m", "r", train__compile=True), 64, 1e-4)


def test_on_a_processor_compiling_is_what_was_asked_for():
    cpu = torch.device("cpu")
    assert [resolve_compile(asked, cpu) for asked in ("auto", True, False)] == [False, True, False]
