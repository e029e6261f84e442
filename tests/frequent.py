"""Say what errors in the embeddings of frequent tokens cost, against those of the rest: what QUANT=rd and gptq weigh by.

    PYTHONPATH=. python tests/frequent.py PRESET=demo,best_demo LOAD_ARTIFACT=logs/mine/final_model.ptz

Tokens are counted in the training split, on which costs are measured too. A row's step goes with its cost to the power -1/2,
in quarters of octaves, so the steps tell the costs.
"""

import sys

import numpy as np

import train_gpt as t

SHARE = 0.1  # of the vocabulary


def main():
    """Run the command line."""
    given = t.load_config(t.settings_from_arguments(sys.argv[1:]))
    c, state = t.read_artifact(given)
    run, model = t.Run(c), t.GPT(c)
    t.load_state(model, state, c.load_artifact)
    found = t.calibrate(c, run.ranks, model, t.TrainData(c, run.ranks))
    steps = found.grid["tok_emb.weight"][: c.vocab_size].double().exp2().pow(0.25).numpy()
    counts = sum(np.bincount(shard, minlength=c.vocab_size) for shard in t.open_split(c, "train"))
    order = np.argsort(-counts, kind="stable")
    first = round(SHARE * c.vocab_size)
    cost = steps**-2
    often, seldom = order[:first], order[first:]
    print(
        f"tokens:{c.vocab_size} frequent:{first} of_text:{counts[often].sum() / counts.sum():.3f}"
        f" cost_ratio:{cost[often].mean() / cost[seldom].mean():.2f}"
        f" step_ratio:{np.exp(np.log(steps[often]).mean() - np.log(steps[seldom]).mean()):.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
