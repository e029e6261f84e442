"""Take one training step of every preset at its full size on a CPU, and say what it took.

    PYTHONPATH=. python tests/full_size.py            all presets but the demo's, a process each
    PYTHONPATH=. python tests/full_size.py pr1042     one, in this process

Presets that differ in evaluation alone share a step. It is of one sequence of 2,048 random tokens, with recurrence running where
the preset has it. Peak memory is the process's largest resident set, with torch itself.
"""

import resource
import subprocess
import sys
import time

import torch

import train_gpt as t

DEMOS = ("demo", "best_demo")
EVALUATION = ("preset", "eval", "ttt", "slot", "prequant", "calibration")  # settings begin so


def config(names):
    """Config of the first of these presets, a comma list."""
    small = dict(DEVICE="cpu", TRAIN_BATCH_TOKENS="2048")
    return t.load_config(dict(PRESET=names.partition(",")[0], **small))


def groups():
    """Comma lists of presets that train alike."""
    found = {}
    for name in t.PRESETS:
        values = vars(config(name)).items()
        training = tuple(value for key, value in values if not key.startswith(EVALUATION))
        if name not in DEMOS:
            found.setdefault(training, []).append(name)
    return map(",".join, found.values())


def line_of(names):
    """A line about one step of presets that train alike."""
    c = config(names)
    run = t.Run(c)
    model = t.GPT(c)
    if c.recur_layers:
        with torch.no_grad():
            model.start_recurrence()
    optimizer = t.Optimizer(c, run.ranks, model)
    generator = torch.Generator().manual_seed(c.seed)
    ids = torch.randint(0, c.vocab_size, (1, c.train_seq_len + 1), generator=generator)
    began = time.process_time()
    loss, norm = t.train_step(
        c, run.ranks, model, optimizer, (ids[:, :-1], ids[:, 1:]), step=0, lr_factor=1.0
    )
    seconds = time.process_time() - began
    count = sum(p.numel() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"{names} parameters:{count} loss:{loss:.4f} gradient_norm:{norm:.4f}"
        f" cpu_seconds:{seconds:.1f} peak_gib:{peak:.2f}"
    )


def main():
    """Run the command line."""
    if sys.argv[1:]:
        print(line_of(sys.argv[1]), flush=True)
        return
    for names in groups():
        subprocess.run([sys.executable, __file__, names], check=True)


if __name__ == "__main__":
    main()
