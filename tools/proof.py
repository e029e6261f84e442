"""Does the script of a record score its artifact as the log says? It is run on it: all of a short validation split, or a few windows.

The script is the one that the run's log opens with, so this runs nothing but what was run before.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tools.bytecount import data_of, stream
from tools.logs import STAGES, LogError, read_log
from tools.scripts import source_of
from tools.significance import nats
from tools.tables import NAMES

SHARD_START = [20240520, 1]
ELSEWHERE = 0.002  # nats by which another machine, or another batch, may differ
NOT_OURS = ("RECUR_START", "LOAD_CHECKPOINT", "RUN_ID", "RESUME", "SAVE_NLL", "EVALS")


def artifact_of(log):
    """Path of the artifact that a run wrote, or None."""
    path = log.path.with_suffix("") / "final_model.ptz"
    return path if path.is_file() else None


def score(log, script, folder, *, shards, labels):
    """The Log of a script's evaluation of a run's artifact, in a folder of its own. Raises LogError with what it said."""
    artifact, (_, tokenizer) = artifact_of(log), data_of(log)
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(script)
    told = {name: value for name, value in log.settings.items() if name not in NOT_OURS}
    told |= dict(LOAD_ARTIFACT=artifact.resolve(), DATA_PATH=shards, EVALS=",".join(labels))
    told |= dict(TOKENIZER_PATH=tokenizer.resolve(), RUN_ID="proof")
    if (log.hardware or "").startswith("cpu"):
        told |= {"DEVICE": "cpu", "OMP_NUM_THREADS": log.hardware.partition("threads:")[2] or 1}
    names = {*log.settings, "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=folder,
        env=env | {name: str(value) for name, value in told.items()},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise LogError(said[-1])
    return read_log(folder / "logs" / "proof.txt")


def cut(log, windows, folder):
    """Path of a folder with the first windows of a run's validation split as a shard."""
    shards, _ = data_of(log)
    window = int(log.settings["EVAL_SEQ_LEN"])
    tokens = stream(shards, window)[: windows * window + 1]
    folder.mkdir()
    header = np.zeros(256, "<i4")
    header[:3] = *SHARD_START, len(tokens)
    (folder / "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    return folder.resolve()


def prove(log, script, stage, *, targets, windows):
    """(what, verdict, detail) of scoring the artifact of a run with a record's script (bytes).

    A validation split of so many targets or fewer is scored whole, by the roundtrip and the record's stage, and must give the
    log's figures. Of a longer one the first windows are scored, and must give what the source that the log opens with gives.
    """
    what = f"artifact of seed {log.seed}, scored by the script"
    artifact, data = artifact_of(log), data_of(log)
    if artifact is None:
        return what, None, f"not done, there is no {log.path.with_suffix('')}/final_model.ptz"
    if data is None:
        return what, None, "not done, its validation shards or tokenizer are not here"
    try:
        with tempfile.TemporaryDirectory() as made:
            if (log.results[stage].tokens or targets + 1) <= targets:
                return what, *prove_whole(log, script, stage, Path(made))
            return what, *prove_windows(log, script, windows, Path(made))
    except (LogError, OSError, ValueError) as why:
        return what, False, str(why)


def prove_whole(log, script, stage, made):
    """(verdict, detail) of scoring the whole split in a folder made for it."""
    labels = [label for label in STAGES if label in {"roundtrip", stage} & {*log.results}]
    shards = data_of(log)[0][0].parent.resolve()
    again = score(log, script, made / "packed", shards=shards, labels=labels)
    pairs = [(log.results[label], again.results[label]) for label in labels]
    if any((there.tokens, there.bytes) != (here.tokens, here.bytes) for there, here in pairs):
        return None, "not done, the shards here are others than the run's"
    told = ", ".join(f"{NAMES[s]} {here.val_loss:.8f}" for s, (_, here) in zip(labels, pairs))
    apart = max(abs(there.val_loss - here.val_loss) for there, here in pairs)
    if not apart:
        return True, f"{told} nats of {pairs[0][1].tokens:,} targets, as the log says to 8 decimals"
    machines = [(x.hardware, x.world_size, x.torch) for x in (log, again)]
    detail = f"{told} nats, {apart:.8f} from the log"
    if machines[0] == machines[1]:
        return False, detail
    there, here = (
        f"{hardware}, {ranks} ranks, torch {torch}" for hardware, ranks, torch in machines
    )
    return None if apart < ELSEWHERE else False, f"{detail}, which is of {there}; this is {here}"


def prove_windows(log, script, windows, made):
    """(verdict, detail) of scoring the first windows in a folder made for it, with the script and with the log's source."""
    shards = cut(log, windows, made / "data")
    sources = {"packed": script, "readable": source_of(log).encode()}
    both = [
        score(log, source, made / name, shards=shards, labels=["roundtrip"]).results["roundtrip"]
        for name, source in sources.items()
    ]
    packed, source = (result.val_loss for result in both)
    detail = f"roundtrip {packed:.8f} nats of the first {both[0].tokens:,} targets"
    if packed != source:
        return False, f"{detail}, the source that the log opens with {source:.8f}"
    detail += ", as the source that the log opens with to 8 decimals"
    saved = nats(log, "roundtrip")
    if saved is None:
        return True, f"{detail}; whether the run scored the same is not shown: it saved no nats"
    apart = abs(float(saved[: both[0].tokens].mean()) - packed)
    return apart < ELSEWHERE, f"{detail}; the nats that the run saved are {apart:.8f} from it"
