"""Is an evaluator honest? Conditions C1 to C4 of the challenge (issue #1017), checked from outside and held against its claim.

    python -m tools.audit --artifact logs/my_run/final_model.ptz                  # all evaluators of the default settings
    python -m tools.audit --artifact logs/my_run/final_model.ptz --preset pr1313 --sums 0 SLOT_LOSS=context    # another system, settings changed
    torchrun --standalone --nproc_per_node=2 -m tools.audit --artifact logs/my_run/final_model.ptz --sums 0    # on two ranks

The stream is the beginning of the validation split. Chunks and SLOT's batches are made small enough that it holds several of
each; --targets is how much of it is used. What is checked:

  C1 causal       change one token of the stream: no earlier score may move by a bit. Probes: the first tokens after window, batch,
                  chunk and rank boundaries, and random ones.
  C2 normalised   put every token of the vocabulary in turn at one place: the probabilities it gets must sum to 1. They do not if
                  p_t is no distribution, or if it was changed by a look at its token.
  C3 score first  a ledger: the window that scores a target must come before any window whose parameters were fitted to it. On one rank.
  C4 one pass     every target scored once, in order.
  floor           on uniform random tokens no causal score is below ln V; seen best with initial weights, so with those.

Exit status: 0 every claim holds, 1 an evaluator breaks other conditions than it says, 2 bad input.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.audit ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import dataclasses
import math
import os

import numpy as np
import torch
import torch.distributed as dist

import train_gpt as t


class Stream:
    """What train_gpt.score needs of validation data: tokens [n+1]."""

    def __init__(self, tokens):
        self.tokens, self.n = tokens, len(tokens) - 1


def score(run, model, tokens, label, c):
    """Nats [n] fp32 of a stream; the model's weights are as before."""
    with t.put_back(model.parameters()):
        return t.score(run, model, Stream(tokens), [(label, c)])[0][0].cpu()


def shrink(c, targets):
    """Settings with chunks and batches of which `targets` holds several; a batch of one window stays one."""
    windows = max(2, targets // c.eval_stride // 8)
    return dataclasses.replace(
        c,
        ttt_chunk_tokens=min(c.ttt_chunk_tokens, max(c.eval_seq_len, targets // 4)),
        slot_batch_seqs=min(c.slot_batch_seqs, windows),
        ttt_lora_chunk=min(c.ttt_lora_chunk, max(1, targets // 16)),
    )


def boundaries(c, run, label, n):
    """Indices of tokens that are the first to be scored after a window, batch (so rank) or chunk boundary."""
    T = c.eval_seq_len
    starts, firsts = t.plan_windows(n, T, T if label == "roundtrip" else c.eval_stride)
    heads = starts + firsts + 1
    size = (
        c.slot_batch_seqs
        if label.endswith("slot")
        else max(1, c.val_batch_size // (T * run.ranks.world))
    )
    chunks = [int(np.searchsorted(heads, k + 1)) for k in range(0, n, c.ttt_chunk_tokens)]
    picked = [
        1,
        2,
        chunks[-1] + size,
        *chunks,
        *(k + size for k in chunks),
        *(k + 1 for k in chunks),
        len(heads) - 1,
    ]
    return sorted(
        {int(heads[k]) for k in picked if 0 < k < len(heads)} | {int(heads[1]) + 1}
        if len(heads) > 1
        else set()
    )


def document_probes(c, tokens, count, rng):
    """Token indices for TTT_PARAMS=lora: documents' first tokens, the tokens around their chunks' ends, and any."""
    n = len(tokens) - 1
    begins = [0, *np.flatnonzero(tokens[:n].cpu().numpy() == t.DOCUMENT_START).tolist()]
    found = {*begins}
    for begin, end in zip(begins, [*begins[1:], n], strict=True):
        found |= {k + near for k in range(begin, end, c.ttt_lora_chunk) for near in (0, 1)}
    found = rng.permutation(sorted(k for k in found if k > 1))[: count // 2].tolist()
    return found + rng.integers(2, n + 1, count - len(found)).tolist()


def probes(c, run, label, n, count, rng):
    """Token indices to change: boundaries first, then random ones; every index leaves an earlier score that could move."""
    found = boundaries(c, run, label, n)[: max(1, count // 2)]
    return found + rng.integers(2, n + 1, max(0, count - len(found))).tolist()


def flip(run, model, tokens, label, c, where):
    """(probes that moved an earlier score, largest move in nats, of the same stream twice)."""
    base, moved, largest = score(run, model, tokens, label, c), 0, 0.0
    if not torch.equal(base, score(run, model, tokens, label, c)):
        return len(where), math.nan
    for k, p in enumerate(where):
        changed = tokens.clone()
        changed[p] = (changed[p] + 1 + p % (c.vocab_size - 1)) % c.vocab_size
        if k % 4 == 3 and tokens[p] != t.DOCUMENT_START:  # where documents begin and end counts too
            changed[p] = t.DOCUMENT_START
        before, after = (
            base[: p - 1],
            score(run, model, changed, label, c)[: p - 1],
        )  # token p is target p - 1
        moved += not torch.equal(before, after)
        largest = max(largest, (before - after).abs().max().item() if p > 1 else 0.0)
    return moved, largest


def sums(run, model, tokens, label, c, where):
    """Largest distance from 1 of the sum, over all tokens put at p, of the probability that it gets there."""
    worst = 0.0
    for p in where:
        total, changed = 0.0, tokens.clone()
        for token in range(c.vocab_size):
            changed[p] = token
            total += math.exp(-score(run, model, changed, label, c)[p - 1].item())
        worst = max(worst, abs(total - 1))
    return worst


class Ledger(t.Observer):
    """Which window scores each target, and which windows' parameters were fitted to it."""

    def __init__(self, c, label, n):
        self.c, self.label = c, label
        self.next, self.early, self.uses = 0, 0, 0
        self.scored_by = np.full(n, t.MAX_INT)  # none yet
        self.count = np.zeros(n, int)

    def scoring(self, starts, firsts, ends):
        """Count the targets that these windows score."""
        for start, first, end in zip(starts, firsts, ends, strict=True):
            self.count[start + first : end] += 1
            self.scored_by[start + first : end] = self.next
            self.next += 1

    def learned(self, begin, end):
        """All windows that are not yet scored depend on these targets."""
        self.fitted(np.arange(begin, end), self.next)

    def fitted(self, targets, window):
        """Note that what `window` and later ones are scored with was fitted to these targets."""
        self.uses += len(targets)
        self.early += int((self.scored_by[targets] >= window).sum())

    def watch(self, run, model, tokens):
        """Run the evaluator with the ledger open; returns itself."""
        with t.put_back(model.parameters()):
            t.score(run, model, Stream(tokens), [(self.label, self.c)], observer=self)
        if self.c.prequant_ttt_enabled:  # the artifact itself was trained on all of them
            self.fitted(np.arange(len(self.count)), 0)
        return self


def floor(run, model, c, label, n, rng):
    """(mean nats on uniform random tokens less ln V, its standard error)."""
    nats = score(
        run,
        model,
        torch.from_numpy(rng.integers(0, c.vocab_size, n + 1)).to(run.ranks.device),
        label,
        c,
    ).double()
    return nats.mean().item() - math.log(c.vocab_size), nats.std().item() / math.sqrt(n)


def audit(run, model, tokens, label, c, count=24, sum_count=1, seed=0):
    """Report of an evaluator as a dict; broken is what was found in the form of train_gpt.broken_conditions."""
    rng, n = np.random.default_rng(seed), len(tokens) - 1
    if label == "ttt" and c.ttt_params == "lora":
        where = document_probes(c, tokens, count, rng)
    else:
        where = probes(c, run, label, n, count, rng)
    moved, largest = flip(run, model, tokens, label, c, where)
    # A sum takes a run for every token, so on two windows' worth, with places in the second and a chunk boundary between them:
    # what is learnt from the past has been learnt by then, and later windows of a batch have the place as context.
    T = c.eval_seq_len
    places = [min(n, T + 1 + c.eval_stride // 2 + k) for k in range(sum_count)]
    off = (
        sums(
            run,
            model,
            tokens[: min(n, 2 * T) + 1],
            label,
            dataclasses.replace(c, ttt_chunk_tokens=T),
            places,
        )
        if places
        else None
    )
    ledger = Ledger(c, label, n).watch(run, model, tokens) if run.ranks.world == 1 else None
    gap, error = floor(
        run, t.GPT(c, model.dtype, model.attend).to(run.ranks.device), c, label, n, rng
    )
    broken = ["C1"] * (moved > 0) + ["C2"] * (off is not None and off > 2e-5)
    if ledger:
        broken += ["C3"] * (ledger.early > 0) + ["C4"] * bool((ledger.count != 1).any())
    claim = t.broken_conditions(c, label)
    compared = [
        w for w in claim.split(",") if w and (ledger or w != "C3") and (sum_count or w != "C2")
    ]  # what was checked
    return dict(
        evaluator=label,
        claim=claim,
        broken=",".join(broken),
        probes=len(where),
        moved=moved,
        largest=largest,
        sum_error=off,
        early=ledger.early if ledger else None,
        uses=ledger.uses if ledger else None,
        gap=gap,
        gap_error=error,
        below=gap < -4 * error,
        ok=compared == broken and not (gap < -4 * error and not claim),
    )


def table(reports):
    """Reports as lines of text."""
    head = f"{'evaluator':16} {'claim':10} {'found':10} {'C1 moved':>9} {'by nats':>9} {'C2 sum-1':>9} {'C3 early/used':>15} {'floor':>16}  verdict"
    lines = [head, "-" * len(head)]
    for r in reports:
        early, off = (
            "-" if r["early"] is None else f"{r['early']}/{r['uses']}",
            "-" if r["sum_error"] is None else f"{r['sum_error']:.1e}",
        )
        lines.append(
            f"{r['evaluator']:16} {r['claim'] or 'causal':10} {r['broken'] or 'causal':10} {r['moved']:4}/{r['probes']:<4} "
            f"{r['largest']:9.2e} {off:>9} {early:>15} {r['gap']:+8.4f}+-{r['gap_error']:.4f}  "
            f"{'as claimed' if r['ok'] else 'NOT AS CLAIMED'}"
        )
    return lines


def load(artifact, env):
    """(Run, Config, model, tokens of the validation stream) of an artifact under these settings. Raises BadInput."""
    c, state = t.read_artifact(t.load_config({**env, "LOAD_ARTIFACT": str(artifact)}))
    run = t.Run(c)
    val, model = (
        t.ValData(c, run.ranks),
        t.GPT(c, run.ranks.dtype, t.choose_attention(c.attention, run.ranks)[1]),
    )
    t.load_state(model, state, f"LOAD_ARTIFACT={artifact}")
    if run.ranks.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if run.ranks.cuda else "gloo")
    return run, c, model.to(run.ranks.device), val


def settings_of(words, preset):
    """Environment with NAME=VALUE words and a preset on top. Raises BadInput for a word of another form."""
    wrong = [w for w in words if "=" not in w]
    if wrong:
        raise t.BadInput(f"{wrong[0]}: not a setting; write NAME=VALUE.")
    given = t.settings_from_arguments(words)
    return {**os.environ, **({"PRESET": preset} if preset else {}), **given}


@console.tool
def main(argv=None):
    """Print the table; the exit status says whether all claims hold."""
    parser = console.Parser("audit", __doc__)
    parser.add_argument("--artifact", required=True, help="final_model.ptz to evaluate")
    parser.add_argument("--preset", help="settings of a published system")
    parser.add_argument(
        "--targets",
        type=console.number(int, 1, t.MAX_INT),
        default=4096,
        help="targets of the stream (default 4096)",
    )
    parser.add_argument(
        "--probes",
        type=console.number(int, 1, t.MAX_INT),
        default=24,
        help="flips per evaluator (default 24)",
    )
    parser.add_argument(
        "--sums",
        type=console.number(int, 0, t.MAX_INT),
        default=1,
        help="places to sum probabilities at, a run per token each; 0: C2 unchecked (default 1)",
    )
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    # sums by atomics come out differently in each run, and C1 compares bits
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    t.torch.use_deterministic_algorithms(t.torch.cuda.is_available())
    run, c, model, val = load(args.artifact, settings_of(args.settings, args.preset))
    if not c.evals:
        raise t.BadInput("EVALS=none: leaves nothing to audit; name evaluators.")
    run.log.line = lambda text: None  # no progress lines
    n = min(val.n, max(args.targets, 2 * c.eval_seq_len) // c.eval_seq_len * c.eval_seq_len)
    c = shrink(c, n)
    reports = []
    for label in c.evals:
        with t.CONSOLE.doing(f"auditing {label}"):
            reports.append(audit(run, model, val.tokens[: n + 1], label, c, args.probes, args.sums))
    if run.ranks.rank == 0:
        print(
            f"{n} targets, {run.ranks.world} rank(s), chunks of {c.ttt_chunk_tokens}, SLOT_BATCH_SEQS {c.slot_batch_seqs}"
        )
        print("\n".join(table(reports)), flush=True)
    return int(not all(r["ok"] for r in reports))


if __name__ == "__main__":
    console.run(main)
