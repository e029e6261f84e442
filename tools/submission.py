"""submission.json from seed logs: only what the logs bear out."""

import math
import statistics

from tools.logs import STAGES, LogError

LIMIT, SECONDS = 16_000_000, 600


def differing(logs):
    """Settings that differ between logs, but for seed and name."""
    free = {
        "SEED",
        "RUN_ID",
        "RESUME",
        "seed",
        "train_time",
        "step_avg",
        "val_loss",
        "val_bpb",
        "time",
        "elapsed",
        "loss",
        "epoch",
    }
    names = {n for log in logs for n in log.settings} - free
    found = sorted(n for n in names if len({log.settings.get(n) for log in logs}) > 1)
    others = {
        "bytes of code": lambda log: log.code_bytes,
        "parameters": lambda log: log.parameters,
        "number of ranks": lambda log: log.world_size,
        "hardware": lambda log: log.hardware,
        "stages": lambda log: tuple(log.results),
        "scored text": lambda log: tuple(
            sorted({(r.tokens, r.bytes) for r in log.results.values() if r.tokens})
        ),
    }
    return found + [name for name, value in others.items() if len({value(log) for log in logs}) > 1]


def one_configuration(logs):
    """Raises LogError where the logs are not seeds of one configuration."""
    differ = differing(logs)
    if differ:
        names = ", ".join(log.path.name for log in logs)
        raise LogError(f"not one configuration: {', '.join(differ)} differ between {names}")
    seeds = [log.seed for log in logs]
    if None in seeds or len(set(seeds)) < len(seeds):
        raise LogError(f"seeds must be known and different, they are {', '.join(map(str, seeds))}")


def best_stage(logs):
    """The causal stage with the lowest mean of bits a byte. Raises LogError where there is none."""
    stages = [s for s in STAGES if all(s in log.results and log.results[s].causal for log in logs)]
    if not stages:
        raise LogError("no causal score that all logs have")
    if not all(math.isfinite(log.results[s].val_bpb) for log in logs for s in stages):
        raise LogError("a score is not finite")
    return min(stages, key=lambda s: statistics.mean(log.results[s].val_bpb for log in logs))


WORDS = ("name", "author", "github_id", "date", "track", "blurb")  # what only people know


def submission(logs, *, stage=None, **words):
    """The fields of submission.json that the logs bear out, None where they do not say.

    words are WORDS. The score is that of a stage, by default the best that is causal. Raises LogError.
    """
    one_configuration(logs)
    stage = stage or best_stage(logs)
    values = {
        key: [getattr(log.results[stage], key) for log in logs] for key in ("val_loss", "val_bpb")
    }

    machines = {
        log.hardware
        and f"{log.hardware}, {log.world_size} process{'es' * ((log.world_size or 1) > 1)}"
        for log in logs
    }
    versions = {log.torch for log in logs}
    return {
        **{word: words.get(word) for word in WORDS},
        **{key: round(statistics.mean(v), 8) for key, v in values.items()},
        **{
            key + "_std": round(statistics.stdev(v), 8) if len(v) > 1 else None
            for key, v in values.items()
        },
        "std_ddof": 1,
        "metric": logs[0].results[stage].label,
        "causal": causal(logs, stage),
        "seeds": [log.seed for log in logs],
        "seed_results": {
            str(log.seed): {key: getattr(log.results[stage], key) for key in values} for log in logs
        },
        **{
            f"bytes_{key}": max(found)
            if all(found := [getattr(log, f"{key}_bytes") for log in logs])
            else None
            for key in ("total", "code")
        },
        "hardware": machines.pop() if len(machines) == 1 else None,
        "pytorch_version": versions.pop() if len(versions) == 1 else None,
        "compliance": compliance(logs, stage),
    }


def causal(logs, stage):
    """Whether a stage's scores are causal; None where a log does not say it."""
    found = {log.results[stage].causal for log in logs}
    return False if False in found else None if None in found else True


def compliance(logs, stage):
    """What the challenge asks of a record, as far as the logs say it."""

    def every(value, test):
        found = [value(log) for log in logs]
        return None if any(x is None for x in found) else all(map(test, found))

    late = any("C3" in log.results[stage].breaks for log in logs)
    return {
        "train_under_600s": every(lambda log: log.train_seconds, lambda s: s <= SECONDS + 1),
        "eval_under_600s": every(lambda log: log.eval_seconds, lambda s: s <= SECONDS),
        "artifact_under_16mb": every(lambda log: log.total_bytes, lambda n: n < LIMIT),
        "score_first": False if late else stage.startswith("ttt") or None,
        "causal": causal(logs, stage),
        "three_seeds": len({log.seed for log in logs}) >= 3,
        "one_configuration": True,
    }
