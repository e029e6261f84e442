"""Is an evaluation honest? Conditions C1 to C4 of the challenge (issue #1017), checked from outside and held against its claim.

    python -m tools.audit --artifact logs/my_run/final_model.ptz                  # all evaluators of the default settings
    python -m tools.audit --artifact logs/my_run/final_model.ptz --preset pr1313 SLOT_LOSS=context    # another system, settings changed
    torchrun --standalone --nproc_per_node=2 -m tools.audit --artifact logs/my_run/final_model.ptz    # on two ranks
    python -m tools.audit --adapter my_eval.py                                    # anybody's: docs/honesty.md says how

The stream is the beginning of the validation split, of an adapter its own text or one that is made up. Chunks and SLOT's batches
are made small enough that it holds several of each; --targets is how much of it is used. What is checked:

  C1 causal       change tokens of the stream: no earlier score may move by a bit. Places: the ends of the stream, the tokens around
                  window, batch, chunk and rank boundaries, and others spread over all residues of 64. Where a change does not
                  reach far, a run changes many tokens.
  C2 normalised   the distribution that scores a token must not move with that token, and sum to 1. Of an adapter the sum over the
                  vocabulary is taken, by a run for each token.
  C3 score first  a ledger: the window that scores a target must come before any window whose parameters were fitted to it. Of an
                  adapter it follows from C1 and C2.
  C4 one pass     every target scored once, in order, and the nats are those of its own token.
  floor           on uniform random tokens no causal score is below ln V, with initial weights or the artifact's.

Exit status: 0 every claim holds, 1 an evaluator breaks other conditions than it says, 2 bad input.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.audit ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import os
import secrets

import torch
import torch.distributed as dist

import train_gpt as t
from tools import adapter
from tools.adapter import power
from tools.blackbox import named
from tools.evaluators import audit, shrink


def table(reports):
    """Reports as lines of text."""
    head = (
        f"{'evaluator':16} {'claim':10} {'found':10} {'C1 moved':>9} {'by nats':>9} {'C2 off':>9} {'C3 early/used':>15} "
        f"{'floor':>16} {'with weights':>16}  verdict"
    )
    lines = [head, "-" * len(head)]
    for r in reports:
        early = f"{r['early']}/{r['uses']}"
        off = "-" if r["sum_error"] is None else f"{r['sum_error']:.1e}"
        lines.append(
            f"{r['evaluator']:16} {r['claim'] or 'causal':10} {r['broken'] or 'causal':10} {r['moved']:4}/{r['probes']:<4} "
            f"{r['largest']:9.2e} {off:>9} {early:>15} {r['gap']:+8.4f}+-{r['gap_error']:.4f} "
            f"{r['gap_artifact']:+8.4f}+-{r['gap_artifact_error']:.4f}  "
            f"{'as claimed' if r['ok'] else 'NOT AS CLAIMED'}"
        )
    return lines + [note for r in reports for note in notes(r)]


def notes(r):
    """What the table has no room for, as lines."""
    found = [f"{r['evaluator']}: {r['runs']} runs; {power(r['probes'], r['n'] - 1)}"]
    if r["moved"]:
        found.append(f"{r['evaluator']}: changed {named(r['moved_at'])} moved earlier nats")
    found += [f"{r['evaluator']}: {what}" for what in r["wrong"]]
    if r["idle"]:
        found.append(
            f"{r['evaluator']}: nothing was learnt from the stream, 0 uses; is it what its name says? More --targets?"
        )
    return found


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


def judge(args):
    """The exit status of --adapter. Raises BadInput."""
    if args.settings or args.artifact or args.preset:
        raise t.BadInput(
            "--adapter: goes without --artifact, --preset and settings; give the file alone."
        )
    with t.CONSOLE.doing(f"auditing {args.adapter}"):
        return adapter.audit(
            args.adapter,
            args.targets,
            args.probes or 256,
            8 if args.sums is None else args.sums,
            args.timeout,
            args.memory,
            args.seed,
        )


@console.tool
def main(argv=None):
    """Print the table; the exit status says whether all claims hold."""
    parser = console.Parser("audit", __doc__)
    parser.add_argument("--artifact", help="final_model.ptz to evaluate")
    parser.add_argument("--adapter", metavar="FILE.py", help="somebody's evaluation: score(tokens)")
    parser.add_argument("--preset", help="settings of a published system")
    parser.add_argument(
        "--targets",
        type=console.number(int, 1, t.MAX_INT),
        help="targets of the stream (default 4096, of an adapter its max_targets or 1024)",
    )
    parser.add_argument(
        "--probes",
        type=console.number(int, 1, t.MAX_INT),
        help="runs per evaluator that change tokens (default 96, of an adapter 256)",
    )
    parser.add_argument(
        "--sums",
        type=console.number(int, 0, t.MAX_INT),
        help="places to sum probabilities at, a run per token each, where nothing else shows C2; 0: unchecked (default 2, of an adapter 8)",
    )
    parser.add_argument(
        "--seed",
        type=console.number(int, 0, 2**24 - 1),
        default=secrets.randbelow(2**24),
        help="of the places and tokens that are tried, to try the same again (default: drawn, so that nobody knows it before)",
    )
    for name, usual, what in (
        ("--timeout", 60, "seconds that an adapter may take for a stream"),
        ("--memory", 8, "GB that it may hold"),
    ):
        kind = console.number(float, 0.001, 1e6)
        parser.add_argument(name, type=kind, default=usual, help=f"{what} (default {usual})")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    if args.adapter:
        return judge(args)
    if not args.artifact:
        parser.error("the following arguments are required: --artifact, or --adapter")
    # sums by atomics come out differently in each run, and C1 compares bits
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    run, c, model, val = load(args.artifact, settings_of(args.settings, args.preset))
    if not c.evals:
        raise t.BadInput("EVALS=none: leaves nothing to audit; name evaluators.")
    run.log.line = lambda text: None  # no progress lines
    n = min(val.n, max(args.targets or 4096, 2 * c.eval_seq_len) // c.eval_seq_len * c.eval_seq_len)
    c = shrink(c, n)
    sums = 2 if args.sums is None else args.sums
    own = torch.tensor(float(args.seed if run.ranks.rank == 0 else 0), device=run.ranks.device)
    seed = int(run.ranks.sum(own))  # that of the first rank
    reports = []
    for label in c.evals:
        with t.CONSOLE.doing(f"auditing {label}"):
            reports.append(
                audit(run, model, val.tokens[: n + 1], label, c, args.probes or 96, sums, seed)
            )
    if run.ranks.rank == 0:
        print(
            f"{n} targets, {run.ranks.world} rank(s), chunks of {c.ttt_chunk_tokens}, SLOT_BATCH_SEQS {c.slot_batch_seqs}, --seed {seed}"
        )
        print("\n".join(table(reports)), flush=True)
    return int(not all(r["ok"] for r in reports))


if __name__ == "__main__":
    console.run(main)
