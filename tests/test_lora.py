"""TTT_PARAMS=lora: low-rank factors for each document, against plain autograd, causal, resumable, the same on any ranks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import config, random_model, runs, t, tiny_settings
from test_resume import same, stopped
from tools import audit

LORA = dict(
    TTT_PARAMS="lora", TTT_LORA_CHUNK="8", TTT_OPTIMIZER="adamw", TTT_LR="0.01", SLOT_ENABLED="0"
)


def documents(n, lengths, seed=0, vocab=384):
    """n+1 random tokens, of which those after these lengths begin documents; the first is in the middle of one."""
    tokens = np.random.default_rng(seed).integers(4, vocab, n + 1)
    tokens[np.cumsum(lengths)] = t.DOCUMENT_START
    return torch.from_numpy(tokens)


LENGTHS = (5, 100, 1, 8, 16, 41, 33, 2)


class Adapted(torch.nn.Module):
    """A bank, with b a of an own leaf a and b for each matrix added: for torch's parametrisations."""

    def __init__(self, c, pairs):
        super().__init__()
        self.a = torch.nn.ParameterList(a for a, _ in pairs)
        self.b = torch.nn.ParameterList(b for _, b in pairs)
        self.scale = c.ttt_lora_alpha / c.ttt_lora_rank

    def forward(self, bank):
        """[matrices,out,in]."""
        added = [self.scale * b @ a for a, b in zip(self.a, self.b, strict=True)]
        return bank + torch.stack(added)


def first_pairs(c, model):
    """[(a, b)] of each bank's matrices as a document begins, by the order in which the script draws them."""
    g, L, r = torch.Generator().manual_seed(c.seed), c.num_layers, c.ttt_lora_rank
    pairs = {bank: [None] * len(getattr(model, bank)) for bank in t.BANKS}
    for i in range(c.ttt_freeze_blocks, L):
        for bank, k in (
            ("qo_bank", i),
            ("qo_bank", L + i),
            ("kv_bank", i),
            ("kv_bank", L + i),
            ("mlp_up_bank", i),
            ("mlp_down_bank", i),
        ):
            outs, ins = getattr(model, bank)[k].shape
            a = torch.randn(r, ins, generator=g) / math.sqrt(ins)
            pairs[bank][k] = (a, torch.zeros(outs, r))
    return pairs


OPTIMISERS = {
    "adamw": lambda c, p: torch.optim.AdamW(p, lr=c.ttt_lr, weight_decay=c.ttt_lora_wd),
    "sgd": lambda c, p: torch.optim.SGD(p, lr=c.ttt_lr, momentum=c.ttt_momentum),
    "rmsprop": lambda c, p: torch.optim.RMSprop(p, lr=c.ttt_lr),
}


def plain_lora(c, tokens, n):
    """Nats of every target, one document at a time, with copies of the weights that torch makes and optimises."""
    out = torch.zeros(n)
    begins = sorted({0, *(p for p in range(n) if tokens[p] == t.DOCUMENT_START)})
    for begin, end in zip(begins, [*begins[1:], n], strict=True):
        model = random_model(c).requires_grad_(False)
        for bank, pairs in first_pairs(c, model).items():
            torch.nn.utils.parametrize.register_parametrization(model, bank, Adapted(c, pairs))
        params = [p for name, p in model.named_parameters() if ".a." in name or ".b." in name]
        for p in params:
            p.requires_grad_(True)
        optimizer = OPTIMISERS[c.ttt_optimizer](c, params)
        for first in range(begin, end, c.ttt_lora_chunk):
            start = max(begin, first + c.ttt_lora_chunk - c.eval_seq_len)
            stop = min(first + c.ttt_lora_chunk, end)

            def nats():
                logits = model.cap(model.project(model.hidden(tokens[None, start:stop])))[0]
                every = F.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="none")
                return every[first - start :]

            with torch.no_grad():
                out[first:stop] = nats()
            for _ in range(c.ttt_epochs):
                optimizer.zero_grad()
                nats().mean().backward()
                torch.nn.utils.clip_grad_norm_(params, c.ttt_grad_clip or math.inf)
                optimizer.step()
    return out


@pytest.mark.parametrize(
    "changes",
    [
        dict(TTT_LORA_WD="2"),
        dict(TTT_OPTIMIZER="sgd", TTT_LR="0.1", TTT_EPOCHS="2", TTT_LORA_CHUNK="5"),
        dict(TTT_OPTIMIZER="rmsprop", TTT_LR="0.001", TTT_GRAD_CLIP="0", TTT_LORA_CHUNK="32"),
        dict(RECUR_LAYERS="1", RECUR_START="0", TTT_LORA_RANK="1", TTT_LORA_ALPHA="3"),
    ],
)
def test_equals_plain_autograd_with_copied_weights(changes, stream):
    c = config(**{**LORA, **changes})
    tokens = documents(256, LENGTHS)
    (run, val), model = stream(c, 256, tokens=tokens), random_model(c)
    before = [p.detach().clone() for p in model.parameters()]
    with t.put_back(model.parameters()):
        nats = t.score(run, model, val, [("ttt", c)])[0][0]
        torch.testing.assert_close(nats, plain_lora(c, tokens, 256), rtol=0, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
