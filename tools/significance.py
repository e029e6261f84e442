"""Is one set of seeds better than another? A one-sided Welch test, seeds that would be needed, and a paired test where nats were saved."""

import math
import statistics

import numpy as np
from scipy import stats

from tools.logs import STAGES, LogError
from tools.tables import NAMES, read_nats

MARGIN = 0.005  # nats by which a record must beat the last one


def common_stage(logs):
    """The last stage that all logs have. Raises LogError."""
    shared = [s for s in STAGES if all(s in log.results for log in logs)]
    scores = {log.score.stage for log in logs if log.score}
    if not shared:
        raise LogError("the logs have no score in common")
    return scores.pop() if len(scores) == 1 else shared[-1]


def welch(ours, theirs, margin):
    """(t, degrees of freedom, one-sided p) that ours [n] are lower than theirs [m] by more than margin; nan where a side has one value."""
    if min(len(ours), len(theirs)) < 2:
        return math.nan, math.nan, math.nan
    if not np.ptp(ours) and not np.ptp(theirs):
        gain = theirs[0] - margin - ours[0]
        return (
            math.copysign(math.inf, gain) if gain else 0.0,
            len(ours) + len(theirs) - 2,
            0.0 if gain > 0 else 1.0,
        )
    found = stats.ttest_ind(
        np.asarray(theirs) - margin, ours, equal_var=False, alternative="greater"
    )
    return float(found.statistic), float(found.df), float(found.pvalue)


def needed(ours, theirs, margin, level=0.01):
    """Seeds a side with which these means and deviations would give p < level; None if the means never do."""
    gain = statistics.mean(theirs) - statistics.mean(ours) - margin
    if gain <= 0 or min(len(ours), len(theirs)) < 2:
        return None
    variance = [statistics.variance(x) for x in (ours, theirs)]
    if not sum(variance):
        return 2

    def enough(n):
        freedom = (n - 1) * sum(variance) ** 2 / sum(v * v for v in variance)
        return stats.t.sf(gain / math.sqrt(sum(variance) / n), freedom) < level

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def nats(log, stage):
    """Nats of each target that a run saved with SAVE_NLL=1, or None."""
    path = log.path.with_suffix("") / f"nll_{stage}.npy"
    return read_nats(path) if path.is_file() else None


def against(ours, theirs, stage=None):
    """Lines that compare two sets of logs."""
    of_ours, of_theirs = (stage or common_stage(group) for group in (ours, theirs))
    a, b = (
        [log.results[s].val_loss for log in group if s in log.results]
        for group, s in ((ours, of_ours), (theirs, of_theirs))
    )
    if not a or not b:
        raise LogError(f"no {of_ours} score on the one side, or no {of_theirs} score on the other")
    lines = [
        f"{NAMES[of_ours]}: {len(a)} seeds, mean {statistics.mean(a):.6f} nats; against {NAMES[of_theirs]}: {len(b)} seeds, mean "
        f"{statistics.mean(b):.6f}; difference {statistics.mean(a) - statistics.mean(b):+.6f}"
    ]
    for margin in (MARGIN, 0.0):
        t, freedom, p = welch(a, b, margin)
        enough = needed(a, b, margin)
        many = (
            f"{enough} seeds a side would give p < 0.01"
            if enough
            else "no number of seeds would show it"
        )
        lines.append(
            f"better by more than {margin:g} nats: "
            + (
                f"t {t:.2f}, {freedom:.1f} degrees of freedom, p {p:.2g} (Welch, one-sided); {many}"
                if not math.isnan(t)
                else "needs two seeds on each side"
            )
        )
    texts = [
        {(r.tokens, r.bytes) for log in group if (r := log.results.get(s))}
        for group, s in ((ours, of_ours), (theirs, of_theirs))
    ]
    if texts[0] != texts[1]:
        lines.append("The logs do not say that both sides scored the same text.")
    causal = [
        {log.results[s].causal for log in group}
        for group, s in ((ours, of_ours), (theirs, of_theirs))
    ]
    if causal[0] != causal[1]:
        lines.append(
            "Only one side is causal: the difference says nothing about which model compresses better."
        )
    return lines + paired(ours, theirs, of_ours, of_theirs)


def paired(ours, theirs, of_ours, of_theirs):
    """Lines of paired tests, seed by seed, over blocks of 1,024 targets, whose means are nearly independent."""
    lines = []
    for log in ours:
        other = next((o for o in theirs if o.seed == log.seed), None)
        a, b = nats(log, of_ours), nats(other, of_theirs) if other else None
        if a is None or b is None or len(a) != len(b):
            continue
        size = max(1, min(1024, len(a) // 8))
        d = (b - a)[: len(a) // size * size].reshape(-1, size).mean(1)
        error = d.std(ddof=1) / math.sqrt(len(d))
        p = float(stats.ttest_1samp(d, 0, alternative="greater").pvalue)
        lines.append(
            f"seed {log.seed}, paired over {len(d)} blocks of {size} targets: {-d.mean():+.6f} +- {error:.6f} nats, p {p:.2g}"
        )
    return lines
