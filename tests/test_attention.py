"""FlashAttention, which needs a GPU, played by plain products: how it is chosen and called."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import config, t

MODULE = "flash_attn_interface"
BF16 = torch.bfloat16


def ranks(compiled=False, dtype=BF16, cuda=True):
    """What choose_attention() asks of the ranks."""
    return SimpleNamespace(cuda=cuda, compile=compiled, dtype=dtype)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **others):
    """(attention [B,R,H,d], log-sum-exp [B,H,R]) as FlashAttention-3 has it.

    q is [B,R,H,d], k and v are [B,T,K,d], query head h reads key/value head h // (H / K); the causal
    mask is aligned to the bottom right, so that the last row sees all keys.
    """
    if others:
        raise TypeError(f"not played: {others}")
    if {x.dtype for x in (q, k, v)} not in ({torch.half}, {BF16}):
        raise RuntimeError("FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    heads, rows, length = q.size(2), q.size(1), k.size(1)
    scale = softmax_scale or 1 / math.sqrt(q.size(3))
    k, v = (x.repeat_interleave(heads // x.size(2), 2).float() for x in (k, v))
    scores = torch.einsum("brhd,bthd->bhrt", q.float(), k) * scale
    if causal:
        row = torch.arange(rows)[:, None] + length - rows
        scores = scores.masked_fill(torch.arange(length) > row, -math.inf)
    out = torch.einsum("bhrt,bthd->brhd", scores.softmax(-1), v)
    return out.to(q.dtype), scores.logsumexp(-1)


def play(monkeypatch, name, function=None):
    """Let a module of this name be there."""
    module = ModuleType(name)
    if function:
        module.flash_attn_func = function
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["pair", "alone"])
def fa3(request, monkeypatch):
    """FlashAttention-3, of a version that returns the log-sum-exp too or of one that does not."""

    def alone(*args, **kwargs):
        return flash_attn_func(*args, **kwargs)[0]

    play(monkeypatch, MODULE, flash_attn_func if request.param == "pair" else alone)


@pytest.mark.parametrize("wanted", ["auto", "fa3"])
@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attention_is_taken_where_it_is(wanted, compiled, fa3):
    name, attend, note = t.choose_attention(wanted, ranks(compiled))
    assert name == "fa3" and attend is not t.sdpa_attention and not note


@pytest.mark.parametrize("rows", [24, 8, 1])
@pytest.mark.parametrize("heads", [2, 4])
def test_its_numbers_are_sdpas_for_the_last_rows_too(rows, heads, fa3):
    g = torch.Generator().manual_seed(rows)
    q = torch.randn(3, rows, 4, 16, generator=g).to(BF16)
    k, v = (torch.randn(3, 24, heads, 16, generator=g).to(BF16) for _ in range(2))
    _, attend, _ = t.choose_attention("auto", ranks())
    ours, theirs = attend(q, k, v), t.sdpa_attention(q.float(), k.float(), v.float())
    assert ours.shape == theirs.shape and ours.dtype == BF16
    assert torch.allclose(ours.float(), theirs, atol=1e-2, rtol=1e-2)


def test_a_mask_aligned_to_the_top_left_would_be_seen():
    """The comparison above tells the two alignments apart."""
    q, k = torch.randn(1, 4, 2, 16, dtype=BF16), torch.randn(1, 24, 2, 16, dtype=BF16)
    right, _ = flash_attn_func(q, k, k, causal=True)
    wrong, _ = flash_attn_func(q, k[:, :4], k[:, :4], causal=True)
    assert not torch.allclose(right.float(), wrong.float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("changes", [{}, dict(RECUR_LAYERS="1", RECUR_START="0", VRL_ENABLED="1")])
def test_a_model_with_it_is_the_model_with_sdpa(changes, fa3):
    torch.manual_seed(0)
    c = config(**changes)
    _, attend, _ = t.choose_attention("auto", ranks())
    ours, theirs = t.GPT(c, BF16, attend), t.GPT(c, BF16)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p += 0.1 * torch.randn_like(p)
            q.copy_(p)
    ids = torch.randint(0, c.vocab_size, (2, 33))
    for tail in (None, 8):
        a, b = (model.hidden(ids[:, :-1], tail).float() for model in (ours, theirs))
        assert (a - b).norm() < 0.02 * b.norm(), tail
    for model in (ours, theirs):
        model(ids[:, :-1], ids[:, 1:]).backward()
    for bank in t.BANKS:
        a, b = (getattr(model, bank).grad for model in (ours, theirs))
        assert (a - b).norm() < 0.02 * b.norm(), bank


BROKEN = {
    "another torch's": "raise RuntimeError('undefined symbol: _ZN3c105')",
    "another CUDA's": "raise OSError('libcudart.so.11: cannot open shared object file')",
    "of no use": "raise ImportError('flash_attn_3 is not built')",
    "a placeholder": "",
}


@pytest.mark.parametrize("why", BROKEN)
def test_one_that_cannot_be_used_is_passed_over_and_said(why, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    (tmp_path / f"{MODULE}.py").write_text(BROKEN[why])
    monkeypatch.syspath_prepend(tmp_path)
    name, attend, note = t.choose_attention("auto", ranks())
    sys.modules.pop(MODULE, None)
    assert (name, attend) == ("sdpa", t.sdpa_attention)
    message = BROKEN[why].partition("'")[2].rstrip("')") or "flash_attn_func"
    assert f"ATTENTION=auto: {MODULE} cannot be used" in note and message in note
    with pytest.raises(t.BadInput, match="ATTENTION=fa3: .*allowed here: auto or sdpa"):
        t.choose_attention("fa3", ranks())
    sys.modules.pop(MODULE, None)


def test_without_one_nothing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)  # as if it were not installed
    for dtype in (BF16, torch.float32):
        assert t.choose_attention("auto", ranks(dtype=dtype)) == ("sdpa", t.sdpa_attention, "")


def test_without_a_gpu_it_is_not_asked_for(fa3):
    assert t.choose_attention("auto", ranks(cuda=False)) == ("sdpa", t.sdpa_attention, "")


def test_products_in_fp32_are_sdpas(fa3):
    """FlashAttention has none."""
    name, _, note = t.choose_attention("auto", ranks(dtype=torch.float32))
    assert name == "sdpa" and "fp32" in note
    with pytest.raises(t.BadInput, match="ATTENTION=fa3: .*fp32"):
        t.choose_attention("fa3", ranks(dtype=torch.float32))


def test_flash_attention_4_is_taken_by_name_alone_and_not_compiled(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute"):
        play(monkeypatch, name, flash_attn_func)
    assert t.choose_attention("auto", ranks())[0] == "sdpa"
    assert t.choose_attention("fa4", ranks())[0] == "fa4"
    with pytest.raises(t.BadInput, match="ATTENTION=fa4: .*cannot be compiled"):
        t.choose_attention("fa4", ranks(compiled=True))
