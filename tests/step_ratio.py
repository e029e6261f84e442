"""Say how many CPU seconds a training step of PRESET=demo,best_demo takes with other settings, against it, in turn.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/step_ratio.py ROUNDS "NAME: SETTING=VALUE ..." ...

The ratio is the median over rounds; seconds of the process, so that a busy machine does not tell. Recurrence runs in all steps.
"""

import statistics
import sys
import time

import torch

import train_gpt as t


class Side:
    """One model, with its optimiser and what its steps took."""

    def __init__(self, settings):
        changes = t.settings_from_arguments(settings.split())
        c = t.load_config({"PRESET": "demo,best_demo", "DEVICE": "cpu", **changes})
        run, self.model, self.c, self.seconds = t.Run(c), t.GPT(c), c, []
        self.ranks, self.optimizer = run.ranks, t.Optimizer(c, run.ranks, self.model)
        if c.recur_layers:
            with torch.no_grad():
                self.model.start_recurrence()

    def step(self, ids):
        """Take a training step on ids [B,T+1]."""
        began = time.process_time()
        batch = ids[:, :-1], ids[:, 1:]
        t.train_step(self.c, self.ranks, self.model, self.optimizer, batch, step=0, lr_factor=0.1)
        self.seconds.append(time.process_time() - began)


def main():
    """Run the command line."""
    rounds, *words = sys.argv[1:]
    sides = {"nothing": Side("")}
    for word in words:
        name, _, settings = word.partition(":")
        sides[name] = Side(settings)
    base, generator = sides["nothing"], torch.Generator().manual_seed(1)
    rows = base.c.train_batch_tokens // base.c.train_seq_len
    for _ in range(2 + int(rounds)):  # the first two warm up
        ids = torch.randint(
            0, base.c.vocab_size, (rows, base.c.train_seq_len + 1), generator=generator
        )
        for side in sides.values():
            side.step(ids)
    for name, side in sides.items():
        pairs = zip(side.seconds[2:], base.seconds[2:], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"{name} seconds:{statistics.median(side.seconds[2:]):.4f} ratio:{ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
