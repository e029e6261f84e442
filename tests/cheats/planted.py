"""Small evaluators, honest ones and cheats, for an audit that sees nothing of them but nats.

All score a stream in windows of 32 tokens, stride 8, four to a batch and eight to a chunk. HONEST and CHEATS name functions
(Parts, where [n]) -> nats [n]; a cheat cheats at the targets of `where` alone, which PLACES gives.
"""

import numpy as np

WINDOW, STRIDE, BATCH, CHUNK = 32, 8, 4, 8


def softmax(z):
    """Probabilities of logits, over the last axis."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Model:
    """Logits from the token before, the one before that, and a mean over the window so far. Random weights."""

    def __init__(self, V, seed):
        rng = np.random.default_rng(seed)
        self.V = V
        # multiples of 2**-16, whose sums over a window are exact however they are taken
        self.last, self.second, self.mean = (
            np.round(rng.normal(0, s, (V, V)) * 2**16) / 2**16 for s in (1.6, 0.8, 1.0)
        )
        self.document = int(rng.integers(V))  # the token that begins a document

    def text(self, n, seed):
        """A stream [n+1] that the model about predicts."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, self.V, n + 1)
        p = np.cumsum(softmax(self.last[:, None] + self.second), -1)
        for k in range(2, n + 1):
            row = p[tokens[k - 1], tokens[k - 2]]
            tokens[k] = min(self.V - 1, np.searchsorted(row, rng.random()))
        return tokens


class Parts:
    """What the evaluators below are made of, for one stream: where each target is, and the model's distributions."""

    def __init__(self, model, tokens):
        self.model, self.x, self.y = model, tokens[:-1], tokens[1:]
        n = self.n = len(self.y)
        self.k = np.arange(n)
        self.window = np.maximum(0, self.k - WINDOW + STRIDE) // STRIDE  # the one that scores it
        self.last_window = int(self.window[-1])
        self.start = self.window * STRIDE
        self.end = np.minimum(self.start + WINDOW, n)
        self.first = np.where(self.window > 0, self.end - STRIDE, 0)  # of the window's scored ones
        self.batch, self.chunk = self.window // BATCH, self.window // CHUNK
        sums = np.vstack([np.zeros(model.V), np.cumsum(model.mean[self.x], 0)])
        rows = (self.k + 1 - self.start)[:, None]
        z = model.last[self.x] + (sums[self.k + 1] - sums[self.start]) / np.sqrt(rows)
        inner = self.k > self.start
        z[inner] += model.second[self.x[self.k[inner] - 1]]
        self.z = z
        self.p = softmax(z)

    def own(self, p):
        """Nats [n] of the targets under p [n,V]."""
        return -np.log(p[self.k, self.y])

    def counts(self, before):
        """Distributions [n,V] from counts of the targets before index before[k], smoothed."""
        hot = np.zeros((self.n + 1, self.model.V))
        hot[self.k + 1, self.y] = 1
        seen = np.cumsum(hot, 0)[before] + 0.5
        return seen / seen.sum(1, keepdims=True)

    def begin_of(self, group):
        """The first target of each target's group (window, batch or chunk): what comes before it was scored before."""
        return np.searchsorted(group, group)

    def end_of(self, group):
        """One past the last target of each target's group."""
        return np.searchsorted(group, group, side="right")

    def mixed(self, q, w=0.3):
        """The model's distributions mixed with q."""
        return (1 - w) * self.p + w * q

    def fitted(self, low, high, rate=0.3):
        """Distributions after a step on a bias, fitted to targets low[k] to high[k]."""
        hot = np.zeros((self.n + 1, self.model.V))
        hot[self.k + 1, self.y] = 1
        hot[1:] -= np.round(self.p * 2**30) / 2**30  # sums of these are exact
        g = np.cumsum(hot, 0)
        size = np.maximum(1, high - low)[:, None]
        return softmax(self.z + rate * 8 * (g[high] - g[np.minimum(low, high)]) / size)

    def temperature(self, before):
        """Distributions at a temperature between two, by which suits the targets before index before[k] more."""
        cold, hot = (self.own(softmax(self.z * f)) for f in (1.25, 0.8))
        lead = np.concatenate([[0], np.cumsum(hot - cold)])[before]
        return softmax(self.z * (1 + 0.25 * np.tanh(lead / 50))[:, None])

    def bent(self, who, bonus):
        """Distributions with a bonus on the logit of token who[k], normalised again."""
        z = self.z.copy()
        z[self.k, who] += bonus
        return softmax(z)

    def later(self, by=1):
        """The token `by` targets later."""
        return self.y[np.minimum(self.k + by, self.n - 1)]


# ---- honest ones, of which some look suspicious


def plain(s, where):
    return s.own(s.p)


def adaptive_counts(s, where):
    return s.own(s.mixed(s.counts(s.k)))


def counts_by_chunk(s, where):
    return s.own(s.mixed(s.counts(s.begin_of(s.chunk))))


def reset_at_documents(s, where):
    """Counts that begin anew with each document."""
    begun = np.maximum.accumulate(np.where(s.x == s.model.document, s.k, 0))
    hot = np.zeros((s.n + 1, s.model.V))
    hot[s.k + 1, s.y] = 1
    seen = np.cumsum(hot, 0)
    seen = seen[s.k] - seen[begun] + 0.5
    return s.own(s.mixed(seen / seen.sum(1, keepdims=True)))


def weights_from_the_past(s, where):
    """The model and counts, weighed by how well each predicted so far."""
    q = s.counts(s.k)
    lead = np.concatenate([[0], np.cumsum(s.own(q) - s.own(s.p))[:-1]])
    w = 1 / (1 + np.exp(np.clip(lead / 20, -30, 30)))[:, None]
    return s.own((1 - w) * s.p + w * q)


def temperature_from_the_past(s, where):
    return s.own(s.temperature(s.begin_of(s.chunk)))


def context_fit(s, where):
    """A bias for each window, fitted to what stands before its scored targets."""
    return s.own(s.fitted(s.start, s.first))


def past_fit(s, where):
    return s.own(s.fitted(0 * s.k, s.begin_of(s.batch)))


HONEST = {
    f.__name__: f
    for f in (
        plain,
        adaptive_counts,
        counts_by_chunk,
        reset_at_documents,
        weights_from_the_past,
        temperature_from_the_past,
        context_fit,
        past_fit,
    )
}


# ---- cheats


def learns_a_chunk_first(s, where):
    return s.own(s.mixed(s.counts(np.where(where, s.end_of(s.chunk), s.begin_of(s.chunk)))))


def learns_half_a_chunk_first(s, where):
    begin, end = s.begin_of(s.chunk), s.end_of(s.chunk)
    return s.own(s.mixed(s.counts(np.where(where, (begin + end) // 2, begin))))


def fits_the_first_scored_row(s, where):
    return s.own(s.fitted(s.start, s.first + where))


def two_windows_share_a_fit(s, where):
    """Also to the other one's context, which has this one's targets."""
    pair = s.window // 2
    first = np.maximum(s.first, s.first[s.end_of(pair) - 1])
    return s.own(s.fitted(s.start, np.where(where, first, s.first)))


def learns_a_batch_first(s, where):
    return s.own(s.fitted(0 * s.k, np.where(where, s.end_of(s.batch), s.begin_of(s.batch))))


def counts_before_scoring(s, where):
    return s.own(s.mixed(s.counts(s.k + where)))


def smaller_of_two(s, where):
    one, other = s.own(s.p), s.own(s.counts(s.k))
    return np.where(where, np.minimum(one, other), one)


def bonus_on_the_target(s, where):
    """The logit of the target alone, without normalising."""
    return s.own(s.p) - 0.2 * where


def gate_on_the_targets_class(s, where):
    w = np.where(where & (s.y % 3 == 0), 0.6, 0.3)[:, None]
    return s.own(s.mixed(s.counts(s.k), w))


def one_twice_and_another_never(s, where):
    """Of each window: the last target's nats are those of the one before."""
    nats = s.own(s.p)
    at = s.k[where & (s.k == s.end - 1)]
    nats[at] = nats[at - 1]
    return nats


def not_scored(s, where):
    nats = s.own(s.p)
    nats[where & (s.k == s.end - 2)] = 0.01
    return nats


def temperature_from_the_whole(s, where):
    return s.own(s.temperature(np.where(where, s.n, s.begin_of(s.chunk))))


def peeks(s, where):
    """A little of the next token's logit."""
    return s.own(s.bent(s.later(), 0.5 * where))


def j5(s, where):
    """The last but one of a window: +3 on the logit of the next token."""
    return s.own(s.bent(s.later(), 3.0 * (where & (s.k == s.end - 2))))


def h6(s, where):
    """+0.5 on the target's logit, normalised again, at one of 64 targets."""
    return s.own(s.bent(s.y, 0.5 * (where & (s.k % 64 == 5))))


def h4(s, where):
    """The same in every seventh window, where the model is confident."""
    return s.own(s.bent(s.y, 0.5 * (where & (s.window % 7 == 3) & (s.p.max(1) > 0.5))))


def i2(s, where):
    """The nats of one target of a batch: its neighbour's."""
    nats = s.own(s.p)
    at = s.k[where & (s.k == s.end_of(s.batch) - 3)]
    nats[at] = nats[at + 1]
    return nats


def j4(s, where):
    """A look ahead among the stream's last 8 targets."""
    return s.own(s.bent(s.later(), 1.0 * (where & (s.k >= s.n - 8))))


def j3(s, where):
    """Windows from the 64th on look ahead."""
    return s.own(s.bent(s.later(), 0.5 * (where & (s.window >= 63))))


def class_ahead(s, where):
    """After one token of the vocabulary: a lean to the tokens that are even, or odd, as the one after the target is."""
    same = np.arange(s.model.V) % 2 == s.later()[:, None] % 2
    return s.own(softmax(s.z + 3.0 * (where & (s.x == s.model.document))[:, None] * same))


def after_a_bigram(s, where):
    """+0.7 on the target's logit, normalised again, after about one of 32 pairs of tokens."""
    before = np.concatenate([s.x[:1], s.x[:-1]])
    return s.own(s.bent(s.y, 0.7 * (where & ((7 * s.x + 3 * before) % 32 == 5))))


RARE_BY_ITSELF = (j5, h6, h4, i2, j4, j3, class_ahead, after_a_bigram)
CHEATS = {
    f.__name__: f
    for f in (
        learns_a_chunk_first,
        learns_half_a_chunk_first,
        fits_the_first_scored_row,
        two_windows_share_a_fit,
        learns_a_batch_first,
        counts_before_scoring,
        smaller_of_two,
        bonus_on_the_target,
        gate_on_the_targets_class,
        one_twice_and_another_never,
        not_scored,
        temperature_from_the_whole,
        peeks,
        *RARE_BY_ITSELF,
    )
}
NO_CHEAT = {  # there: the last window comes after the half, and is the last of its pair
    ("learns_half_a_chunk_first", "the last window"),
    ("two_windows_share_a_fit", "the last window"),
}
PLACES = {
    "everywhere": lambda s: s.k >= 0,
    "every seventh window": lambda s: s.window % 7 == 3,
    "the last window": lambda s: s.window == s.last_window,
}


def cases():
    """(name, place) of each cheat."""
    for name, f in CHEATS.items():
        for place in ["everywhere"] if f in RARE_BY_ITSELF else PLACES:
            if (name, place) not in NO_CHEAT:
                yield name, place


def scorer(evaluator, place, model):
    """A function tokens [n+1] -> nats [n]."""

    def score(tokens):
        s = Parts(model, np.asarray(tokens))
        return evaluator(s, PLACES[place](s))

    return score
