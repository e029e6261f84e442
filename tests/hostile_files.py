"""Forge files of every kind that train_gpt.py reads, seal them again with a valid checksum, and load each as a user would.

    PYTHONPATH=. python tests/hostile_files.py --files 5000 --seed 1 | tee logs/hostile/files.txt

Kinds take turns: artifacts of both coders, the lineage's artifacts, checkpoints for RESUME and for LOAD_CHECKPOINT, progress files of an
evaluation, shards, and the log that a run goes on with. Each is loaded in a process of its own. It must be refused in one line of words, or
be an honest other file: the same shapes, finite weights, and a score or a Fault. It may take 2 s of processor time, and twice the memory of
an honest file of its size. Exit status 1 at the first file that breaks this; --only NUMBER loads that one again.
"""

import argparse
import collections
import contextlib
import ctypes
import gc
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import random
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from conftest import TINY, random_model, t, write_shard

SECONDS = 2.0  # of processor time
TURN = 10  # files of a kind, before the next one's turn
SMALL = 4 * 2**20  # bytes of memory that Python itself takes now and then
MODEL = dict(TINY, MODEL_DIM="128", BIGRAM_VOCAB_SIZE="4096", RUN_ID="hostile", EVALS="none")
ENDS = {  # numbers that end a dtype's range, or what may be counted
    "int8": (-128, -1, 0, 127),
    "uint8": (0, 255),
    "int16": (-32768, -1, 0, 16384, 32767),
    "float16": (math.nan, math.inf, -65504.0, 0.0, 6e-8),
    "float32": (math.nan, -math.inf, 3e38, -1.0, 0.0, 1e-45),
    "float64": (math.nan, math.inf, 1e300, -1.0, 0.5, 1e9, 0.0),
}


# ---- a value, a header, a file with one thing wrong


class Raw(str):
    """JSON that json.dumps() would not write."""


HOSTILE = [
    *(None, True, False, -1, 0, 1, 2, 3, 1.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *(2**16, 2**31, 2**40, 2**63, -(2**63), 10**30, Raw("1e999"), Raw("9" * 5000), Raw("1" * 4000)),
    *("", "8", "x", "nan", "float32", "int8", "codes", "tok_emb.weight", "a\n\x1b[2Jb", "\ud800"),
    *(
        "\u202ex",
        "../../x",
        "y" * 50_000,
        [],
        {},
        [[]],
        {"a": [{}]},
        [1, 2],
        [0],
        [-1],
        [2**20] * 3,
    ),
    *(Raw("[" * 5000 + "]" * 5000), Raw("[" * 900 + "]" * 900), Raw("[1" + ",1" * 30_000 + "]")),
    *(Raw('{"a":1,"a":2}'), Raw("[" + "[]," * 20_000 + "[]]")),
]


def dumps(tree):
    """JSON of a tree in which Raw strings stand for themselves."""
    raws = []

    def mark(node):
        if isinstance(node, Raw):
            raws.append(node)
            return f"@raw{len(raws) - 1}@"
        if isinstance(node, dict):
            return {k: mark(v) for k, v in node.items()}
        return [mark(v) for v in node] if isinstance(node, list) else node

    text = json.dumps(mark(tree))
    for k, raw in enumerate(raws):
        text = text.replace(f'"@raw{k}@"', raw)
    return text


def nudge(node, rng):
    """Another value of the kind."""
    if isinstance(node, bool):
        return not node
    if isinstance(node, (int, float)):
        return rng.choice((node + 1, node - 1, node * 2, node // 2, -node, node * 1000, node + 0.5))
    if isinstance(node, str) and node:
        at = rng.randrange(len(node))
        return rng.choice((node[:at], node + "x", node[:at] + "\n" + node[at:], node.upper()))
    return rng.choice(HOSTILE)


def mutate_json(tree, rng):
    """The tree with one node changed: taken away, doubled, exchanged, or put to something hostile."""
    tree = json.loads(json.dumps(tree))
    parent, key, node = None, None, tree
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
        key = rng.choice([*node]) if isinstance(node, dict) else rng.randrange(len(node))
        parent, node = node, node[key]
    if parent is None:
        return rng.choice(HOSTILE)
    kind = rng.randrange(7)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), node)
    elif kind == 1:
        parent[rng.choice(("x", "", "tensors", "MODEL_DIM", "\n"))] = node
    elif kind == 2:
        other = rng.choice([*parent]) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], node
    elif kind < 5:
        parent[key] = rng.choice(HOSTILE)
    else:
        parent[key] = nudge(node, rng)
    return tree


def mutate_bytes(data, rng):
    """The bytes with one thing wrong: bits, bytes, a hole, a repeat, an end, a piece of something else."""
    data, at = bytearray(data), rng.randrange(len(data))
    n = rng.choice((1, 1, 2, 4, 16, 300))
    kind = rng.randrange(7)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + n] = rng.randbytes(n)
    elif kind == 2:
        del data[at : at + n]
    elif kind == 3:
        data[at:at] = data[max(0, at - n) : at] or b"\0"
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        data += rng.randbytes(n)
    else:
        data[at : at + n] = rng.choice((b"\xff", b"\0", b"9", b"]")) * len(data[at : at + n])
    return bytes(data)


def pack(raw):
    """LZMA as an artifact's."""
    return lzma.compress(raw, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=t.LZMA_FILTERS)


def resealed(raw, packed):
    """A file with a right checksum over these raw bytes."""
    body = pack(raw) if packed else raw
    return t.MAGIC + hashlib.sha256(body).digest() + body


def parts_of(raw):
    """(header, {name: array}) of a body."""
    at = 4 + int.from_bytes(raw[:4], "little")
    header, tensors = json.loads(raw[4:at]), {}
    for name, dtype, shape in header["tensors"]:
        tensors[name] = np.frombuffer(raw, dtype, math.prod(shape), at).reshape(shape).copy()
        at += tensors[name].nbytes
    return header, tensors


def body(header, tensors):
    """A body of a header, of which "tensors" is made here, and arrays."""
    table = [[name, a.dtype.name, list(a.shape)] for name, a in tensors.items()]
    head = dumps({**header, "tensors": table}).encode()
    return len(head).to_bytes(4, "little") + head + b"".join(a.tobytes() for a in tensors.values())


def forge_tensors(header, tensors, rng):
    """(how, body) in which header and tensors agree, and are not what they should be."""
    special = [n for n in ("counters", "nats", "table", "rows", "codes", "spreads") if n in tensors]
    name = rng.choice(special if special and rng.random() < 0.4 else [*tensors])
    array = tensors[name]
    kind = rng.choice(
        ("value", "value", "fill", "noise", "resize", "dtype", "drop", "rename", "add")
    )
    if kind in ("value", "fill"):
        value = rng.choice(ENDS[array.dtype.name])
        if kind == "value":
            array.flat[rng.randrange(array.size)] = value
        else:
            array[...] = value
    elif kind == "noise":
        start = rng.randrange(array.nbytes)
        flat = array.reshape(-1).view(np.uint8)
        n = min(rng.choice((1, 16, 10**6)), array.nbytes - start)
        flat[start : start + n] = np.frombuffer(rng.randbytes(n), np.uint8)
    elif kind == "resize":
        shape = list(array.shape) or [1]
        k = rng.randrange(len(shape))
        shape[k] = rng.choice((shape[k] + 1, max(1, shape[k] - 1), 2 * shape[k], 1, 2**18))
        shape = rng.choice((shape, shape[::-1], [math.prod(shape)], [1, *shape], shape[:1] * 9))
        if math.prod(shape) < 2**21:
            tensors[name] = np.resize(array, shape)
    elif kind == "dtype":
        tensors[name] = array.astype(rng.choice([*ENDS]), casting="unsafe")
    elif kind == "drop":
        del tensors[name]
    else:
        new = rng.choice(("x", "levels", "codes", "rows", "blocks.9.attn_scale", "\n", "a b", ""))
        tensors[new] = tensors.pop(name) if kind == "rename" else array
    return f"{kind} of {name}", body(header, tensors)


def forge_matrices(header, tensors, rng):
    """(how, body) whose matrices are others, of the same sums where that can be."""
    rows = header.get("matrices", [])
    if not rows:
        return forge_tensors(header, tensors, rng)
    a, b = rng.choice(rows), rng.choice(rows)
    kind = rng.choice(("turn", "move", "exchange", "all"))
    if kind == "turn":
        a[1].reverse()
    elif kind == "move":  # as many rows and columns in all, but more levels
        k = rng.randrange(2)
        n = rng.randrange(1, a[1][k] + 1)
        a[1][k], b[1][k] = a[1][k] - n, b[1][k] + n
    elif kind == "exchange":
        a[1], b[1] = b[1], a[1]
    else:
        header["matrices"] = [["a", [sum(s[0] for _, s in rows), sum(s[1] for _, s in rows)]]]
    return f"{kind} matrices", body(header, tensors)


def forge_settings(header, tensors, rng):
    """(how, body) with settings of the model that are allowed, and not what the tensors are of."""
    model = header.get("model") or header["settings"]
    for name in rng.sample([n for n in model if n in t.SETTINGS], rng.choice((1, 1, 2, 4))):
        s, value = t.SETTINGS[name], model[name]
        ends = (
            [s.low, s.high, value, s.low + 1] if s.kind in ("int", "float") else [nudge(value, rng)]
        )
        model[name] = float(rng.choice(ends)) if s.kind == "float" else rng.choice(ends)
        if s.kind == "ints":
            model[name] = rng.choice(([], [0], [1, 2], [0] * 1000, [10**9], list(range(1000))))
    return "settings", body(header, tensors)


def forge_lzma(raw, rng):
    """(how, packed bytes) of LZMA that is not one plain stream."""
    kind = rng.choice(("streams", "empty", "junk", "bomb", "cut", "dictionary"))
    if kind == "streams":
        n = rng.choice((2, 8, 9, 50))
        size = len(raw) // n + 1
        return kind, b"".join(pack(raw[k * size : (k + 1) * size]) for k in range(n))
    if kind == "empty":
        return kind, pack(b"") * rng.choice((1, 7, 8, 1000)) + pack(raw)
    if kind == "bomb":
        return kind, pack(rng.choice((b"", raw)) + bytes(2**26))
    if kind == "dictionary":
        filters = [dict(id=lzma.FILTER_LZMA2, preset=0, dict_size=rng.choice((2**27, 2**29)))]
        return kind, lzma.compress(raw, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)
    packed = pack(raw)
    return kind, packed + rng.randbytes(9) if kind == "junk" else packed[
        : rng.randrange(len(packed))
    ]


def forge_container(raw, rng, packed):
    """(how, file) of an honest body: its header, its tensors, or both are changed, and it is sealed."""
    header, tensors = parts_of(raw)
    start = 4 + int.from_bytes(raw[:4], "little")
    kind = rng.random()
    if kind < 0.5:
        for _ in range(rng.choice((1, 1, 2))):
            if isinstance(header, dict):
                header = mutate_json(header, rng)
        head = dumps(header).encode()
        return "header", resealed(len(head).to_bytes(4, "little") + head + raw[start:], packed)
    if kind < 0.56:
        return "bytes of the header", resealed(mutate_bytes(raw[:start], rng) + raw[start:], packed)
    if kind < 0.6:
        length = rng.choice((0, 1, start - 5, start, len(raw), 2**20, 2**31, 2**32 - 1))
        return "length of the header", resealed(length.to_bytes(4, "little") + raw[4:], packed)
    if kind < 0.66 and packed:
        how, data = forge_lzma(raw, rng)
        return f"LZMA: {how}", t.MAGIC + hashlib.sha256(data).digest() + data
    forge = forge_settings if kind < 0.74 else forge_matrices if kind < 0.8 else forge_tensors
    how, forged = forge(header, tensors, rng)
    return how, resealed(forged, packed)


# ---- the kinds


def quiet(run):
    """The lines that a run would have logged."""
    lines = []
    run.log.line = lines.append
    return lines


class Stream:
    """What score() needs of a validation stream."""

    def __init__(self, c, n):
        self.n, self.dropped, self.total_bytes = n, 0, n
        self.bytes = np.ones(n, np.uint8)
        g = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(4, c.vocab_size, (n + 1,), generator=g)


def finite(tensors):
    return all(bool(x.isfinite().all()) for x in tensors)


class Artifact:
    """LOAD_ARTIFACT of our own format."""

    def __init__(self, env, folder, coder):
        self.name, self.path = f"artifact, CODER={coder}", folder / f"{coder}.ptz"
        c = t.load_config({**env, "CODER": coder})
        model = random_model(c)
        self.honest = t.GptqLite(c, model.state_dict()).pack(0.0)[0]
        if coder == "rans":  # rate-distortion's: int8 rows
            state = t.split_banks(model.state_dict(), c.num_layers)
            names = [n for n in state if t.parameter_rule(n).export in t.LEVELS]
            grid = {n: torch.zeros(sum(state[n].shape), dtype=torch.int8) for n in names}
            self.honest = t.RateDistortion(c, state, t.Calibration(grid, {})).pack(0.02)[0]
        self.raw = lzma.decompress(self.honest[40:])
        gone = (*t.MODEL_SETTINGS, "TRAIN_BATCH_TOKENS")  # those are the file's
        self.env = {n: v for n, v in env.items() if n not in gone} | {
            "LOAD_ARTIFACT": str(self.path)
        }
        own = t.split_banks(model.state_dict(), c.num_layers)
        self.shapes, self.val = t.shapes_of(own), Stream(c, 64)

    def forge(self, rng):
        return forge_container(self.raw, rng, True)

    def load(self):
        c, state = t.read_artifact(t.load_config(self.env))
        run, model = t.Run(c), t.GPT(c)
        quiet(run)
        t.load_state(model, state, "it")
        assert t.shapes_of(state) == self.shapes, "other shapes"
        assert finite(state.values()), "a weight is not finite"
        nats, _ = t.score(run, model, self.val, [("roundtrip", c)])[0]
        loss, _ = t.mean_and_bpb(self.val, nats, "it")
        assert math.isfinite(loss), "a score that is not finite"


class Lineage(Artifact):
    """LOAD_ARTIFACT of the lineage's format."""

    def __init__(self, env, folder):
        super().__init__(env, folder, "lzma")
        self.name, self.path = "the lineage's artifact", folder / "lineage.ptz"
        self.env = {**env, "LOAD_ARTIFACT": str(self.path)}
        c = t.load_config(env)
        self.weights = {}
        for name, w in t.split_banks(random_model(c).state_dict(), c.num_layers).items():
            if t.parameter_rule(name).export in t.LEVELS:
                self.weights[f"{name}.q"] = torch.randint(-31, 32, w.shape).to(torch.int8)
                self.weights[f"{name}.scale"] = torch.full((len(w),), 0.01).half()
            else:
                self.weights[name] = w.half()
        self.saved = self.save({"w": self.weights, "m": {}})
        self.honest = lzma.compress(self.saved)

    @staticmethod
    def save(what, **options):
        buffer = io.BytesIO()
        torch.save(what, buffer, **options)
        return buffer.getvalue()

    def odd_weights(self, rng):
        """(how, what is saved) with something odd among the weights."""
        weights = dict(self.weights)
        name = rng.choice([*weights])
        w = weights[name]
        odd = dict(
            nan=lambda: torch.full_like(w.float(), math.nan),
            infinite=lambda: torch.full_like(w.float(), math.inf),
            large=lambda: torch.full_like(w.float(), 3e38),
            double=lambda: torch.full_like(w.double(), 1e300),
            expand=lambda: torch.zeros(1).expand(10**9),
            shared=lambda: torch.zeros((), dtype=w.dtype).expand(w.shape),
            shape=lambda: torch.zeros(rng.choice(([3], [1, 1], [])), dtype=w.dtype),
            empty=lambda: torch.zeros(0, 5),
            number=lambda: rng.choice((1, 1.5, None, "x", [1], {"a": 1})),
            sparse=lambda: torch.eye(4).to_sparse(),
            complex=lambda: torch.zeros(4, dtype=torch.complex64),
            parameter=lambda: torch.nn.Parameter(w.float()),
            meta=lambda: torch.empty(10**12, device="meta"),
            boolean=lambda: torch.ones(4, dtype=torch.bool),
        )
        how = rng.choice((*odd, "drop", "names", "no w", "views"))
        if how == "drop":
            del weights[name]
        elif how == "names":
            weights[rng.choice((1, None, ("a",), "", "\n", "\ud800x", "a b", "x" * 300))] = w
        elif how == "views":  # many tensors of one storage
            whole = torch.zeros(10**5)
            weights |= {f"x{k}": whole for k in range(300)}
        elif how == "no w":
            return how, rng.choice(({"m": {}}, [1], {"w": []}, {"w": None}, 3, {"w": w}))
        else:
            weights[name] = odd[how]()
        return how, {"w": weights, "m": {}}

    def odd_archive(self, rng):
        """(how, archive) of the honest one with other parts."""
        with zipfile.ZipFile(io.BytesIO(self.saved)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        pickled = next(name for name in files if name.endswith("data.pkl"))
        largest = max(files, key=lambda name: len(files[name]))
        how, method = (
            rng.choice(("deflate", "pickle", "words", "memo", "size", "count", "legacy")),
            0,
        )
        if how == "deflate":
            method = zipfile.ZIP_DEFLATED
            files[largest] = bytes(2**28)
        elif how == "pickle":
            files[pickled] = mutate_bytes(files[pickled], rng)
        elif how == "words":
            files[pickled] = files[pickled].replace(
                b"ccollections\nOrderedDict\n",
                rng.choice(
                    (
                        b"cbuiltins\nbytearray\n",
                        b"ctorch\nTensor\n",
                        b"cos\nsystem\n",
                        b"ctorch\nSize\n",
                    )
                ),
            )
        elif how == "memo":
            more = rng.choice(
                (b"r\xff\xff\xff\xff", b"\x8d" + struct.pack("<Q", 2**40), b"\x85" * 9**5)
            )
            files[pickled] = files[pickled][:-1] + more + b"."
        elif how == "size":
            files[largest] = files[largest][: rng.choice((0, 1, -1))] or b"\0" * 2**24
        elif how == "count":
            files |= {f"archive/data/x{k}": b"" for k in range(30_000)}
        else:
            return how, self.save({"w": self.weights}, _use_new_zipfile_serialization=False)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return how, buffer.getvalue()

    def forge(self, rng):
        kind = rng.random()
        if kind < 0.5:
            how, what = self.odd_weights(rng)
            raw = self.save(what)
        elif kind < 0.8:
            how, raw = self.odd_archive(rng)
        elif kind < 0.9:
            how, raw = "bytes", mutate_bytes(self.saved, rng)
        else:
            raw = rng.choice((pickle.dumps({"w": {}}), bytes(2**27), b"PK\3\4", b"\x80\x02."))
            how = "no archive"
        return how, lzma.compress(raw, preset=0)


class Resume:
    """A checkpoint that RESUME=1 finds."""

    def __init__(self, env, folder):
        self.name, self.c = "checkpoint, RESUME=1", t.load_config(env)
        (folder / "resume").mkdir(exist_ok=True)
        self.path = folder / "resume" / "checkpoint.000000003.ckpt"
        self.run, self.model = t.Run(self.c), random_model(self.c)
        self.run.store.folder, self.lines = self.path.parent, quiet(self.run)
        self.run.log.settings = json.loads(json.dumps(self.run.log.settings))
        self.state = t.TrainingState(self.c, self.run.ranks, self.model)
        self.feed = torch.randint(4, self.c.vocab_size, (2, 4, 32))
        self.train(self.state, 0)
        tensors = {n: x.detach() for n, x in self.state.tensors(3, 1.0).items()}
        sealed = t.seal({"settings": self.run.log.settings}, tensors)
        self.honest = b"".join(bytes(part) for part in sealed)

    def train(self, state, step):
        optimizer, qat = state.optimizer, state.qat
        work = self.c, self.run.ranks, self.model, optimizer, (*self.feed,)
        t.train_step(*work, step=step, lr_factor=1.0, qat=qat)
        state.averages.update(1.0)

    def forge(self, rng):
        return forge_container(self.honest[40:], rng, False)

    def resume(self):
        return self.state.resume(self.run)

    def load(self):
        self.lines.clear()
        try:
            step, ms = self.resume()
        except t.BadInput as why:
            damaged = [line for line in self.lines if "damaged" in line]
            raise t.BadInput(": ".join([str(why), *damaged])) from None
        assert 0 <= step <= self.c.iterations and ms >= 0, "counters of no training"
        assert finite(self.model.parameters()), "a weight is not finite"
        self.train(self.state, step)


class Load(Resume):
    """A checkpoint that LOAD_CHECKPOINT names."""

    def __init__(self, env, folder):
        super().__init__(env, folder)
        self.name, self.path = "checkpoint, LOAD_CHECKPOINT", folder / "loaded.ckpt"
        self.c = t.load_config({**env, "LOAD_CHECKPOINT": str(self.path)})
        self.state = t.TrainingState(self.c, self.run.ranks, self.model)
        self.run.store.folder = folder / "nothing"

    def resume(self):
        t.refuse_checkpoint(self.c)
        t.refuse_checkpoint(self.c, self.model)
        return self.state.resume(self.run)


class Progress:
    """What an evaluation, TTT with a carried SLOT delta, goes on from."""

    def __init__(self, env, folder):
        self.name = "progress of an evaluation"
        self.c = t.load_config(
            {**env, "SLOT_LOSS": "past", "SAVE_EVERY": "0", "TTT_CHUNK_TOKENS": "64"}
        )
        (folder / "progress").mkdir()
        self.path = folder / "progress" / "progress_it.000000009.ckpt"
        self.run, self.model = t.Run(self.c), random_model(self.c)
        self.run.store.folder, self.lines = self.path.parent, quiet(self.run)
        self.run.log.settings = json.loads(json.dumps(self.run.log.settings))
        self.val = Stream(self.c, 128)
        work = self.work()
        live, before = work.live_tensors(), work.starts + work.firsts
        watch = t.Stopwatch(self.run.ranks, 1)
        figures = [9, 1.0, 0.0, *watch.by_method()]
        tensors = {
            **live,
            "counters": torch.tensor(figures, dtype=torch.double),
            "nats": work.out[:, : before[9]].clone() + 1,
        }
        sealed = t.seal(
            {"settings": self.run.log.settings}, {n: x.detach() for n, x in tensors.items()}
        )
        self.honest = b"".join(bytes(part) for part in sealed)

    def work(self):
        jobs = [("ttt_slot", self.c)]
        return t.Pass(self.run, self.model, self.val, jobs, t.SILENT)

    def forge(self, rng):
        return forge_container(self.honest[40:], rng, False)

    def load(self):
        self.lines.clear()
        checkpoint = t.PassCheckpoint(self.c, self.run, "progress_it")
        work, watch = self.work(), t.Stopwatch(self.run.ranks, 1)
        before = work.starts + work.firsts
        checkpoint.resume(work.out, before, work.live_tensors(), watch)
        damaged = [line for line in self.lines if "damaged" in line]
        if damaged:  # the pass begins anew
            raise t.BadInput(damaged[0])
        jobs = [("ttt_slot", self.c)]
        nats, seconds = t.score(self.run, self.model, self.val, jobs, checkpoint=checkpoint)[0]
        assert seconds >= 0, "a time before it began"
        t.mean_and_bpb(self.val, nats, "it")
        assert finite(self.model.parameters()), "a weight is not finite"


class Shard:
    """A shard of the validation split."""

    def __init__(self, env, folder):
        self.name, self.folder = "shard", folder / "data"
        self.folder.mkdir()
        self.path = self.folder / "fineweb_val_000000.bin"
        self.c = t.load_config({**env, "DATA_PATH": str(self.folder)})
        write_shard(self.path, np.arange(300_000) % self.c.vocab_size)
        self.honest = self.path.read_bytes()

    def forge(self, rng):
        header = np.frombuffer(self.honest[:1024], "<i4").copy()
        tokens = np.frombuffer(self.honest[1024:], "<u2").copy()
        kind = rng.choice(("header", "bytes", "ids", "one id", "length"))
        if kind == "header":
            header[rng.randrange(3)] = rng.choice((0, 1, -1, 2, 2**31 - 1, -(2**31), 300_001))
        elif kind == "bytes":
            return kind, mutate_bytes(self.honest, rng)
        elif kind == "ids":
            tokens[...] = rng.choice((self.c.vocab_size, 65535))
        elif kind == "one id":
            tokens[rng.randrange(len(tokens))] = rng.choice((self.c.vocab_size, 65535))
        else:
            tokens = tokens[: rng.choice((0, 1, 299_999))]
        return kind, header.tobytes() + tokens.tobytes()

    def load(self):
        (tokens,) = t.open_split(self.c, "val")
        assert int(tokens.max()) < self.c.vocab_size, "an id outside"


class Metrics:
    """metrics.jsonl of a run that goes on."""

    def __init__(self, env, folder):
        self.name, self.folder = "metrics.jsonl", folder
        self.c = t.load_config({**env, "RESUME": "1"})
        self.path = folder / "logs" / self.c.run_id / "metrics.jsonl"
        self.path.parent.mkdir(parents=True)
        self.model, self.val = t.GPT(self.c), Stream(self.c, 64)
        self.rows = [
            {"label": "settings", **t.Run(self.c).log.settings},
            {"label": "step:1/12", "train_loss": 5.5, "train_time": 1.5},
            {"label": "pass_artifact_roundtrip", "eval_time": 10.5, "compile_time": 1.5},
            {"label": "final_artifact_roundtrip", "val_loss": 1.5, "val_bpb": 1.5, "causal": True},
        ]
        self.honest = self.text(self.rows)

    @staticmethod
    def text(rows):
        return "".join(dumps(row) + "\n" for row in rows).encode()

    def forge(self, rng):
        if rng.random() < 0.2:
            return "bytes", mutate_bytes(self.honest, rng)
        rows = mutate_json(self.rows, rng)
        return "JSON", self.text(rows if isinstance(rows, list) else [rows])

    def load(self):
        run = t.Run(self.c)
        run.log.folder = self.path.parent
        with contextlib.redirect_stdout(io.StringIO()):
            run.log.open(True)
            t.carry_out(self.c, run, self.model, None, self.val)
        total = run.log.rows["eval_total"]["eval_time"]
        assert 0 <= total < math.inf, "a time that is none"


def all_kinds(env, folder):
    """One of each."""
    artifacts = [Artifact(env, folder, coder) for coder in ("rans", "lzma")]
    return [
        *artifacts,
        *(kind(env, folder) for kind in (Lineage, Resume, Load, Progress, Shard, Metrics)),
    ]


# ---- loading


def outcome(load):
    """(verdict, words) of a load: accepted, refused, stopped (a Fault), or WRONG."""
    try:
        load()
    except (t.BadInput, t.Fault) as why:
        said = str(why)
        plain = said.isprintable() and 10 < len(said) < 1500
        if not plain or re.search(r"alloc|MemoryError|out of memory", said):
            return "WRONG", f"not one line of words: {said!r}"
        return "refused" if isinstance(why, t.BadInput) else "stopped", said
    except BaseException as why:
        return "WRONG", f"{type(why).__name__}: {str(why)[:500]}"
    return "accepted", ""


def status(name):
    """A size of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1])


def measured(load):
    """(verdict, words, most memory beyond the start in bytes, seconds of processor time) of a load."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what is free already would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, began = status("VmRSS"), time.process_time()
    verdict, said = outcome(load)
    return verdict, said, status("VmHWM") - before, time.process_time() - began


def in_child(rows, timeout=120):
    """What rows() yields, as JSON, from a process of its own; None if it ends or hangs before they do."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        gc.freeze()  # torch's many objects: collecting is quick without them
        with os.fdopen(write, "w") as file:
            try:
                torch.set_num_threads(1)  # threads do not outlive a fork
                for row in rows():
                    print(json.dumps(row), file=file, flush=True)
                print(json.dumps("end"), file=file, flush=True)
            except BaseException as why:
                print(f"{type(why).__name__}: {why}", file=sys.stderr, flush=True)
            finally:
                file.flush()
                os._exit(0)
    os.close(write)
    row = None
    with os.fdopen(read) as file:
        # in parts: of a pause of the whole machine one alone is used up
        while (
            any(select.select([file], [], [], timeout / 12)[0] for _ in range(12)) and row != "end"
        ):
            row = json.loads(file.readline() or "null")
            if row in (None, "end"):
                break
            yield row
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if row != "end":
        yield None


def load_all(kind, seed, numbers):
    """(how, verdict, words, memory, seconds, an honest file's memory) of forged files of a kind, after the honest one."""
    kind.path.write_bytes(kind.honest)
    for _ in range(2):  # the first time what torch takes once is counted too
        verdict, said, honest, seconds = measured(kind.load)
        assert verdict == "accepted", (kind.name, said)
    yield "honest", verdict, said, honest, seconds, honest
    for number in numbers:
        how, data = kind.forge(random.Random(f"{seed}/{number}"))
        kind.path.write_bytes(data)
        usual = int(honest * max(1, len(data) / len(kind.honest)))  # of an honest file as large
        del data
        verdict, said, most, seconds = measured(kind.load)
        if verdict != "WRONG" and seconds > SECONDS:
            verdict, said = "WRONG", f"{seconds:.2f} s of processor time; {said}"
        if verdict != "WRONG" and most > 2 * usual + SMALL:
            verdict, said = "WRONG", f"{most} bytes of memory, an honest file {usual}; {said}"
        yield how, verdict, said, most, seconds, usual


def forged(kind, seed, numbers):
    """Rows of load_all() from a process of its own; the last one is WRONG if that dies."""
    for row in in_child(lambda: load_all(kind, seed, numbers)):
        yield row or ("?", "WRONG", "the process died or hung", 0, 0.0, 0)


def kind_of_message(said):
    """What messages have in common: no names, numbers or values."""
    said = re.sub(
        r"^.*?(damaged(, or no artifact)?: |does not fit|LOAD_CHECKPOINT=\S*: )", r"\1", said
    )
    said = re.sub(r"(?<![a-z])'.*?'|\[.*|\S*[\d_/.]+\S*|\b[A-Z][A-Z_]+\b", "#", said)
    return re.sub(r"(# ?)+", "# ", said)[:60].strip()


def report(rows):
    """Lines of the end, for rows by kind."""
    for name, found in rows.items():
        verdicts = collections.Counter(verdict for _, verdict, *_ in found)
        words = collections.Counter(
            kind_of_message(said) or verdict for _, verdict, said, *_ in found
        )
        seconds = max(seconds for *_, seconds, _ in found)
        memory, honest = max((most / max(honest, 1), honest) for *_, most, _, honest in found)
        yield (
            f"{name}: {' '.join(f'{verdict}:{n}' for verdict, n in sorted(verdicts.items()))}"
            f" longest:{seconds:.2f}s most_memory:{memory:.2f} times {honest / 2**20:.1f}MiB"
        )
        for text, n in words.most_common(12):
            yield f"    {n:4d} {text}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="load this file alone")
    args = parser.parse_args(argv)
    print(f"$ python {' '.join(sys.argv)}", flush=True)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="hostile"))
    kinds = all_kinds(MODEL, folder)
    rows, shown, done = {kind.name: [] for kind in kinds}, time.monotonic(), 0
    for first in range(0, args.files, TURN):
        kind = kinds[first // TURN % len(kinds)]
        numbers = range(first, min(first + TURN, args.files))
        if args.only is not None:
            numbers = [args.only] if args.only in numbers else []
        for number, row in zip(
            [None, *numbers], forged(kind, args.seed, numbers) if numbers else ()
        ):
            how, verdict, said, *_ = row
            if args.only is not None or verdict == "WRONG":
                print(f"file {number}, {kind.name}, {how}: {verdict}: {said}", flush=True)
            if verdict == "WRONG":
                print(f"kept as {kind.path}; --seed {args.seed} --only {number}", flush=True)
                return 1
            if number is not None:
                done += 1
                rows[kind.name].append(row)
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                all_rows = [r for found in rows.values() for r in found]
                verdicts = collections.Counter(r[1] for r in all_rows)
                counts = " ".join(f"{v}:{verdicts[v]}" for v in ("refused", "stopped", "accepted"))
                print(f"{done}/{args.files} {counts}", flush=True)
    print("\n".join(report({name: found for name, found in rows.items() if found})))
    print(f"files:{done} seed:{args.seed} wrong:0", flush=True)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
