"""Plain PyTorch versions of what train_gpt.py does fast: the baselines of tools/bench.py and references of the tests.

The same arithmetic, written the usual way: an nn.Linear and a Muon step for each matrix, an average updated tensor by tensor, windows put
together one by one and scored in batches with the logits of all their rows, SLOT by autograd and torch.optim.AdamW, TTT with a gradient for
each parameter. Parameter names are those of an artifact: PlainGPT(c).load_state_dict(split_banks(model.state_dict(), c.num_layers)).
Recurrence, gates and VALUE_RESIDUAL are left out. Shapes as in train_gpt.py.
"""

import io
import lzma
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt as t


class Linear(nn.Linear):
    """Without bias; the fp32 weight is cast where it is used."""

    def __init__(self, inner, outer):
        super().__init__(inner, outer, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Table(nn.Module):
    """Embedding [num,dim], linear to out, learned scalar."""

    def __init__(self, num, dim, out):
        super().__init__()
        self.embed, self.proj, self.scale = (
            nn.Embedding(num, dim),
            Linear(dim, out) if dim != out else nn.Identity(),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, ids, dtype):
        return self.proj(self.embed(ids).to(dtype)) * self.scale.to(dtype)


def rotary(x, cos, sin):
    """RoPE of the first dimensions of x [B,heads,T,d]."""
    x, rest = x[..., : 2 * cos.size(-1)], x[..., 2 * cos.size(-1) :]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm, partial RoPE, XSA and a value residual."""

    def __init__(self, c, index):
        super().__init__()
        D, self.heads, self.kv_heads = c.model_dim, c.num_heads, c.num_kv_heads
        kv = D // c.num_heads * c.num_kv_heads
        self.c_q, self.c_k, self.c_v, self.proj = (
            Linear(D, D),
            Linear(D, kv),
            Linear(D, kv),
            Linear(D, D),
        )
        self.q_gain = nn.Parameter(torch.ones(c.num_heads))
        self.vrl_gate = nn.Parameter(torch.zeros(())) if c.vrl_enabled and index else None
        self.exclusive = index >= c.num_layers - c.xsa_last_n

    def forward(self, x, extra, v_first, cos, sin):
        B, T, D = x.shape
        q, k = (
            y.view(B, T, -1, D // self.heads).transpose(1, 2) for y in (self.c_q(x), self.c_k(x))
        )
        raw = v = self.c_v(x) if extra is None else self.c_v(x) + extra
        if self.vrl_gate is not None:
            gate = self.vrl_gate.sigmoid().to(x.dtype)
            v = (1 - gate) * v + gate * v_first
        v = v.view(B, T, self.kv_heads, -1).transpose(1, 2)
        q = rotary(F.rms_norm(q, (q.size(-1),)), cos, sin) * self.q_gain.to(x.dtype)[:, None, None]
        k = rotary(F.rms_norm(k, (k.size(-1),)), cos, sin)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        if self.exclusive:
            unit = F.normalize(v, dim=-1).repeat_interleave(self.heads // self.kv_heads, 1)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        return self.proj(y.transpose(1, 2).reshape(B, T, D)), raw


class Block(nn.Module):
    """A layer."""

    def __init__(self, c, index):
        super().__init__()
        D, wide = c.model_dim, int(c.model_dim * c.mlp_mult)
        self.attn, self.mlp = (
            Attention(c, index),
            nn.ModuleDict({"fc": Linear(D, wide), "proj": Linear(wide, D)}),
        )
        self.attn_scale, self.mlp_scale, self.resid_mix = (
            nn.Parameter(torch.ones(*shape)) for shape in ((D,), (D,), (2, D))
        )
        self.norm_scale = 1 / math.sqrt(index + 1) if c.ln_scale else 1.0

    def forward(self, x, x0, extra, v_first, cos, sin):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y, v = self.attn(F.rms_norm(x, (x.size(-1),)) * self.norm_scale, extra, v_first, cos, sin)
        x = x + self.attn_scale.to(x.dtype) * y
        h = self.mlp["fc"](F.rms_norm(x, (x.size(-1),)) * self.norm_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp["proj"](F.leaky_relu(h, 0.5).square()), v


class PlainGPT(nn.Module):
    """The model of #549, #1084 and #1313."""

    def __init__(self, c, dtype=torch.float32):
        super().__init__()
        D, kv = c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads
        self.c, self.dtype, self.tok_emb, self.smear = (
            c,
            dtype,
            nn.Embedding(c.vocab_size, D),
            nn.Module(),
        )
        self.smear.gate = nn.Parameter(torch.zeros(D))
        self.bigram = Table(c.bigram_vocab_size, c.bigram_dim, D) if c.bigram_vocab_size else None
        self.ve_shared = Table(c.vocab_size, c.ve_dim, kv) if c.ve_enabled else None
        self.ve_layer_scales = nn.ParameterList(
            nn.Parameter(torch.ones(1)) for _ in c.ve_layers if c.ve_enabled
        )
        self.skip_weights = nn.Parameter(torch.ones(c.num_layers // 2, D))
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.lm_head = None if c.tie_embeddings else Linear(D, c.vocab_size)
        for name in ("cos", "sin"):
            self.register_buffer(
                name, getattr(t.GPT(c, dtype), name).transpose(0, 1), persistent=False
            )  # [1,T,rot/2]

    def hidden(self, ids):
        """[B,T] ids -> final normalised hidden states [B,T,D]."""
        c, T, x = self.c, ids.size(1), self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            pairs = torch.full_like(ids, c.bigram_vocab_size - 1)
            pairs[:, 1:] = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (
                c.bigram_vocab_size - 1
            )
            x = x + self.bigram(pairs, self.dtype)
        x, gate = F.rms_norm(x, (x.size(-1),)), self.smear.gate.sigmoid().to(self.dtype)
        x = x0 = (1 - gate) * x + gate * torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
        extra = self.ve_shared(ids, self.dtype) if self.ve_shared is not None else None
        skips, first, half = [], None, c.num_layers // 2
        for i, block in enumerate(self.blocks):
            if i >= half and skips:
                x = x + self.skip_weights[i - half].to(self.dtype) * skips.pop()
            scaled = (
                extra * self.ve_layer_scales[c.ve_layers.index(i)].to(self.dtype)
                if c.ve_enabled and i in c.ve_layers
                else None
            )
            x, v = block(x, x0, scaled, first, self.cos[:, :T], self.sin[:, :T])
            first = v if first is None else first
            if i < half:
                skips.append(x)
        return F.rms_norm(x, (x.size(-1),))

    def head_weight(self):
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def cap(self, z):
        return self.c.logit_softcap * torch.tanh(z / self.c.logit_softcap)

    def logits(self, ids):
        """[B,T] ids -> logits [B,T,V], fp32."""
        return self.cap(F.linear(self.hidden(ids), self.head_weight().to(self.dtype)).float())

    def forward(self, ids, targets, reduction="mean"):
        return F.cross_entropy(
            self.logits(ids).flatten(0, 1), targets.flatten(), reduction=reduction
        )


def plain_model(c, model, device, compile=False):
    """A PlainGPT with the weights of a GPT."""
    plain = PlainGPT(c, model.dtype)
    plain.load_state_dict(t.split_banks(model.state_dict(), c.num_layers))
    plain = plain.to(device)
    if compile:
        plain.hidden = torch.compile(plain.hidden, dynamic=False)
    return plain


class PlainTrainer:
    """Muon matrix by matrix, AdamW, clipping, and an average of the state dict tensor by tensor; without MUON_PROJECTIONS."""

    def __init__(self, c, model):
        self.c, self.model, self.steps = c, model, 0
        groups, rates = (
            {},
            {
                "embed": c.tied_embed_lr if c.tie_embeddings else c.embed_lr,
                "head": c.head_lr,
                "scalar": c.scalar_lr,
            },
        )
        for name, p in model.named_parameters():
            group = t.parameter_rule(name).group
            groups.setdefault("scalar" if group == "proj" else group, []).append(p)
        self.matrices = groups.pop("muon")
        self.adam = torch.optim.AdamW(
            [dict(params=params, rate=rates[kind]) for kind, params in groups.items()],
            lr=1.0,
            betas=(c.beta1, c.beta2),
            eps=c.adam_eps,
            weight_decay=c.adam_wd,
        )
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.ema = {name: x.detach().clone().float() for name, x in model.state_dict().items()}

    def orthogonal(self, g):
        """Newton-Schulz, in bf16 on a GPU."""
        x = g.bfloat16() if g.is_cuda else g
        x = x / (x.norm() + 1e-7)
        tall = x.size(0) > x.size(1)
        x = x.T if tall else x
        for _ in range(self.c.muon_backend_steps):
            a = x @ x.T
            b = -4.7750 * a + 2.0315 * a @ a
            x = 3.4445 * x + b @ x
        return x.T if tall else x

    def step(self, inputs, targets, step, scale):
        """Loss, as a number, of a training step on micro-batches, lists of [B,T]."""
        c, momentum, total = self.c, t.muon_momentum(self.c, step), 0.0
        for ids, goal in zip(inputs, targets):
            loss = self.model(ids, goal) / len(inputs)
            loss.backward()
            total += loss.item()
        if c.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip_norm)
        with torch.no_grad():
            for p, buffer in zip(self.matrices, self.momentum):
                buffer.mul_(momentum).add_(p.grad)
                update = self.orthogonal(p.grad.add(buffer, alpha=momentum))
                rate = scale * c.matrix_lr
                p.mul_(1 - rate * c.muon_wd).add_(
                    update, alpha=-rate * math.sqrt(max(1, p.size(0) / p.size(1)))
                )
            for group in self.adam.param_groups:
                group["lr"] = group["rate"] * scale
            self.adam.step()
            self.model.zero_grad(set_to_none=True)
            self.steps += 1
            decay = min(c.ema_decay, (1 + self.steps) / (10 + self.steps))
            for name, x in self.model.state_dict().items():
                self.ema[name].mul_(decay).add_(x.float(), alpha=1 - decay)
        return total


def autograd_slot(c, model, h, targets, firsts, carry=None):
    """Nats [B,T] of a batch of windows under SLOT, as published: at every step the logits of all positions, a mask on their loss,
    autograd through the head and torch's AdamW.

    carry: a dict that keeps delta, bias and optimiser between batches (SLOT_LOSS=past or recent, which score first).
    """
    T, weight, window = (
        h.size(1),
        model.head_weight().detach().to(h.dtype),
        c.slot_delta == "window",
    )
    columns = torch.arange(T, device=h.device)
    first = torch.from_numpy(firsts).to(h.device)[:, None]
    mask = {
        "all": (columns < T - 1).expand(len(h), T),
        "recent": (columns < T).expand(len(h), T),
        "context": columns < first,
    }.get(c.slot_loss, columns >= first)
    usual = {"all": T - 1, "recent": T, "context": T - c.eval_stride}.get(
        c.slot_loss, c.eval_stride
    )
    share = 1 / (32 * usual) if window else 1 / max(1, int(mask.sum()))
    state = carry if carry else {}
    if not state:
        groups = len(h) if window and c.slot_loss not in t.CARRIED else 1
        state["params"] = [
            torch.zeros(groups, 1, n, dtype=h.dtype, device=h.device, requires_grad=True)
            for n in (h.size(2), len(weight))[: 1 + c.slot_bias]
        ]
        state["adam"] = torch.optim.AdamW(
            state["params"], lr=c.slot_lr, weight_decay=1e-8, eps=1e-5
        )
        if carry is not None:
            carry.update(state)

    def nats():
        z = F.linear(h + state["params"][0], weight) + (state["params"][1] if c.slot_bias else 0)
        return F.cross_entropy(
            model.cap(z.float() if h.is_cuda else z).flatten(0, 1),
            targets.flatten(),
            reduction="none",
        ).view(len(h), T)

    before = None
    if c.slot_loss in t.CARRIED:
        with torch.no_grad():
            before = nats()
    low, moved, last = c.slot_lr if c.slot_lr_min < 0 else c.slot_lr_min, 0.0, None
    for step in range(c.slot_steps):
        with torch.enable_grad():
            state["adam"].zero_grad()
            ((nats() * mask).sum() * share).backward()
        if c.slot_hyper_lr:
            grad = torch.cat([p.grad.flatten() for p in state["params"]])
            moved, last = moved + (c.slot_hyper_lr * (grad @ last).item() if step else 0), grad
        for group in state["adam"].param_groups:
            group["lr"] = t.cosine(c.slot_lr, low, step, c.slot_steps) + moved
        state["adam"].step()
    with torch.no_grad():
        return nats() if before is None else before


class PlainEvaluation:
    """Sliding windows over tokens [n+1], with label "ttt" or "ttt_slot" over chunks that are trained on once they are scored."""

    def __init__(self, c, model, tokens, label="sliding_window", batch=32):
        self.c, self.model, self.tokens, self.label, self.batch = c, model, tokens, label, batch
        self.nats, self.n = torch.zeros(len(tokens) - 1), len(tokens) - 1
        self.starts, self.firsts = t.plan_windows(self.n, c.eval_seq_len, c.eval_stride)
        self.sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=c.ttt_momentum)
        self.carry = {} if c.slot_loss in t.CARRIED else None

    def score(self, windows):
        """Nats of the targets of these windows (indices)."""
        c, T = self.c, self.c.eval_seq_len
        for i in range(0, len(windows), self.batch):
            some = windows[i : i + self.batch]
            ids, targets = (
                torch.zeros(len(some), T, dtype=torch.long, device=self.tokens.device)
                for _ in range(2)
            )
            for row, w in enumerate(some):
                ids[row], targets[row] = (
                    self.tokens[self.starts[w] :][:T],
                    self.tokens[self.starts[w] + 1 :][:T],
                )
            with torch.no_grad():
                if self.label.endswith("slot"):
                    nats = autograd_slot(
                        c,
                        self.model,
                        self.model.hidden(ids),
                        targets,
                        self.firsts[some],
                        self.carry,
                    )
                else:
                    logits = self.model.logits(ids)
                    nats = F.cross_entropy(
                        logits.flatten(0, 1), targets.flatten(), reduction="none"
                    ).view(len(some), T)
            for row, w in enumerate(some):
                self.nats[self.starts[w] + self.firsts[w] : self.starts[w] + T] = nats[
                    row, self.firsts[w] :
                ].cpu()

    def train(self, begin, end, rate):
        """TTT_EPOCHS passes over the scored targets begin to end, which sequences of EVAL_SEQ_LEN tile."""
        c, T = self.c, self.c.eval_seq_len
        for group in self.sgd.param_groups:
            group["lr"] = rate
        for _ in range(c.ttt_epochs):
            for i in range(begin, end, T * c.ttt_batch_seqs):
                starts = range(i, min(end, i + T * c.ttt_batch_seqs), T)
                rows = torch.stack([self.tokens[s : s + T + 1] for s in starts])
                self.sgd.zero_grad()
                self.model(rows[:, :-1], rows[:, 1:]).backward()
                if c.ttt_grad_clip:
                    nn.utils.clip_grad_norm_(self.model.parameters(), c.ttt_grad_clip)
                self.sgd.step()

    def run(self):
        """Nats [n]; the weights stay as TTT leaves them."""
        c, windows = self.c, np.arange(len(self.starts))
        if not self.label.startswith("ttt"):
            self.score(windows)
            return self.nats
        chunk = (self.starts + self.firsts) // c.ttt_chunk_tokens
        for k in range(chunk[-1] + 1):
            self.score(windows[chunk == k])
            if k < chunk[-1]:
                self.train(
                    k * c.ttt_chunk_tokens,
                    (k + 1) * c.ttt_chunk_tokens,
                    t.cosine(c.ttt_lr, 0, k, chunk[-1] + 1),
                )
        return self.nats


def plain_quantize(c, state):
    """(artifact bytes, state dict) of GPTQ-lite as the lineage does it: a pass over each matrix, on one core, for each of five quantiles,
    then LZMA's preset 6 over torch.save."""
    out = {}
    for name, w in t.split_banks(state, c.num_layers).items():
        kind = t.parameter_rule(name).export
        if kind not in t.LEVELS:
            out[name] = w.half() if kind == "fp16" else w
            continue
        w, best = w.float(), None
        for p in t.PERCENTILES:
            clip = torch.quantile(w.abs(), p, dim=1)
            scale = (clip / t.LEVELS[kind]).clamp(2.0**-24, 65504.0).half()
            q = torch.clamp(
                torch.round(w / scale.float()[:, None]), -t.LEVELS[kind], t.LEVELS[kind]
            )
            error = (w - q * scale.float()[:, None]).square().sum(1)
            if best is None:
                best = [error, q, scale]
            else:
                better = error < best[0]
                best = [
                    torch.where(better, error, best[0]),
                    torch.where(better[:, None], q, best[1]),
                    torch.where(better, scale, best[2]),
                ]
        out[name + ".q"], out[name + ".scale"] = best[1].to(torch.int8), best[2]
    file = io.BytesIO()
    torch.save(out, file)
    return lzma.compress(file.getvalue(), preset=6), out
