"""Shared pieces: the script as a module, a tiny data set, tiny runs in this process and as separate processes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # processes that tests start find train_gpt and tools as well
# A tiny tensor needs one thread, and threads of several processes on few cores wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import train_gpt as t

# A step that is slow gets a line of its own, and how slow it is must not show in what tests compare.
t.CONSOLE.PAUSE = math.inf
# The official tokenizer, real text and the lineage's own artifacts are not part of the repository.
PARITY = Path(os.environ.get("PARITY_DATA", ROOT.parent / "shared" / "data"))
TINY = dict(
    VOCAB_SIZE="384",
    NUM_LAYERS="3",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    VE_LAYERS="1,2",
    VE_DIM="8",
    XSA_LAST_N="1",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    ROPE_DIMS="4",
    TRAIN_SEQ_LEN="32",
    EVAL_SEQ_LEN="32",
    EVAL_STRIDE="8",
    TRAIN_BATCH_TOKENS="384",
    VAL_BATCH_SIZE="256",
    ITERATIONS="12",
    WARMDOWN_ITERS="12",
    MAX_WALLCLOCK_SECONDS="0",
    VAL_LOSS_EVERY="3",
    CALIBRATION_TOKENS="128",
    TTT_CHUNK_TOKENS="128",
    TTT_LR="0.05",
    SLOT_LR="0.01",
    SLOT_BATCH_SEQS="4",
    MUON_MOMENTUM_WARMUP_STEPS="4",
    SWA_EVERY="1",
    DEVICE="cpu",
)


def tiny_settings(*changes):
    """TINY with changes, later ones winning; WARMDOWN_FRAC among them takes its WARMDOWN_ITERS' place."""
    changed = {name: value for values in changes for name, value in values.items()}
    base = {
        k: v for k, v in TINY.items() if k != "WARMDOWN_ITERS" or "WARMDOWN_FRAC" not in changed
    }
    return {**base, **changed}


def write_shard(path, tokens):
    """A shard file as the format says, independent of data/prepare.py."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def make_tiny_data(folder, targets=600):
    """Settings of a tiny data set made there: two training shards and a validation shard of Python's own source text."""
    texts = [
        Path(sys.modules[m].__file__).read_text()
        for m in ("argparse", "json.decoder", "subprocess", "pathlib")
    ]
    (folder / "text").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tiny"),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tiny.model"))
    ids = [[1, *sp.encode(text)] for text in texts]
    write_shard(folder / "fineweb_train_000000.bin", ids[0])
    write_shard(folder / "fineweb_train_000001.bin", ids[2])
    write_shard(folder / "fineweb_val_000000.bin", (ids[1] + ids[3])[: 1 + targets])
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(folder / "tiny.model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Settings of a tiny data set that tests share and do not change."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_data, tmp_path, monkeypatch):
    """A function (changes) -> metrics by label of a tiny run in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    count = iter(range(1000))

    def run(**changes):
        name = changes.pop("RUN_ID", f"run{next(count)}")
        t.run_all(t.load_config(tiny_settings(tiny_data, {"RUN_ID": name}, changes)))
        return read_metrics(tmp_path / "logs" / name)

    return run


@pytest.fixture
def every_core():
    """For timings: as many threads as a run of the script has."""
    threads = t.torch.get_num_threads()
    t.torch.set_num_threads(os.cpu_count())
    yield
    t.torch.set_num_threads(threads)


def read_metrics(folder):
    """Lines of metrics.jsonl as a dict; a label that has a training and a validation line is merged."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row.pop("label"), {}).update(row)
    return found


def timeless(metrics):
    """Metrics without settings and times, for comparisons of runs."""
    times = ("train_time", "eval_time", "step_avg", "seconds")
    return {
        label: {k: v for k, v in row.items() if k not in times}
        for label, row in metrics.items()
        if label != "settings"
    }


def config(tiny_data=None, **changes):
    """Config of a tiny model."""
    return t.load_config(tiny_settings(tiny_data or {}, changes))


def process(env, cwd, ranks=0, script=ROOT / "train_gpt.py", timeout=240):
    """The finished process of the script, plain or under torchrun with so many ranks."""
    clean = {k: v for k, v in os.environ.items() if k not in set(t.SETTINGS)}
    command = (
        [sys.executable, str(script)]
        if not ranks
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            str(script),
        ]
    )
    done = subprocess.run(
        command, env={**clean, **env}, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    return without_pauses(done)


def without_pauses(done):
    """A finished process, without what it said meanwhile on standard error: only a slow machine's does."""
    done.stderr = re.sub(r"^\.\.\. .* s\n", "", done.stderr, flags=re.M)
    return done


def runs(envs, cwd, ranks):
    """Run these one after another on so many ranks, which start and meet once."""
    script = cwd / "runs.py"
    script.write_text(
        f"import os, train_gpt as t\nfor env in {envs!r}:\n    t.run_all(t.load_config(env))\n"
        "os._exit(0)\n"  # as the script does: taking gloo down aborts some ranks
    )
    done = process({}, cwd, ranks, script)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def stream(tiny_data):
    """A function (config, n targets, seed) -> (Run, ValData-like stream of random tokens)."""

    def make(c, n=256, seed=0, tokens=None):
        run = t.Run(c)
        val = t.ValData.__new__(t.ValData)
        rng = np.random.default_rng(seed)
        val.n, val.dropped = n, 0
        val.tokens = (
            t.torch.from_numpy(rng.integers(4, c.vocab_size, n + 1)) if tokens is None else tokens
        )
        val.bytes, val.total_bytes = np.ones(n, np.uint8), n
        return run, val

    return make


def random_model(c, seed=0, scale=0.3):
    """A model with random weights everywhere, so that no output is zero by initialisation."""
    model, g = t.GPT(c), t.torch.Generator().manual_seed(seed)
    with t.torch.no_grad():
        for p in model.parameters():
            p.add_(t.torch.randn(p.shape, generator=g) * scale * (0.3 if p.ndim > 1 else 1))
    return model
