"""Make or fetch the token shards and the tokenizer that train_gpt.py reads.

    python data/prepare.py demo                         Python's own standard library as text; no network, some seconds
    python data/prepare.py fineweb --train-shards 1     the challenge's shards and tokenizer, from the Hugging Face hub
    python data/prepare.py fineweb --variant sp8192 --repo OWNER/NAME      the same text with another vocabulary
    python data/prepare.py text FILES... --name mine    your own .txt, .py, .jsonl or .jsonl.zst files

Shards go to data/datasets/NAME/fineweb_{train,val}_%06d.bin, tokenizers to data/tokenizers/. A file has its name only when
it is whole, so a command can be stopped at any time; started again, it continues. Exit status: 0 done, 2 bad input or no
room (one line on stderr), 130 interrupted.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while numpy is imported

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import re
import shutil
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tools import documents

SHARD_MAGIC, SHARD_VERSION, BOS = 20240520, 1, 1
DATASET, TOKENIZER = "fineweb10B_sp1024", "fineweb_1024_bpe.model"  # the challenge's own
TOKENIZER_SHA256, TOKENIZER_BYTES, LOOKALIKE_BYTES = "4f5e8adb", 254483, 253847
# Tests, tables, and what differs between two installations of one Python version are no text to learn from.
DEMO_SKIP = re.compile(
    r"(^|/)((tests?|idlelib|idle_test|site-packages|dist-packages|lib2to3|ensurepip|__pycache__|encodings|"
    r"turtledemo|config-[^/]*|lib-dynload)/|_sysconfigdata[^/]*$)"
)
DEMO_FILE_BYTES, DEMO_VAL_FILE, DEMO_VAL = (
    400_000,
    range(2_000, 20_000),
    170_000,
)  # validation: characters of a file, of all
SAMPLE_BYTES, BLOCK, PART = (
    2**24,
    2000,
    2**20,
)  # bytes a tokenizer learns from; characters of its sentences, of an encoding
SUFFIXES = (".txt", ".py", ".jsonl", ".jsonl.zst")
COUNTS = ("documents", "tokens", "bytes", "changed", "dropped")  # of a shard, in prepare.json


class BadInput(Exception):
    """Something the user can put right; told in one line, exit status 2."""


class Status:
    """A line of progress, printed every few seconds by a thread, so that a long library call is not silent either."""

    text = "starting"

    def show(self, stop, start):
        while not stop.wait(3.5):
            print(f"[{time.monotonic() - start:4.0f} s] {self.text}", flush=True)


STATUS = Status()


# ------------------------------------------------------------------------------------------------------- files and shards


@contextlib.contextmanager
def replacing(path):
    """A binary file that becomes `path`, whole and on disk, if the block ends well; otherwise `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_shard(path, arrays):
    """Write arrays of token ids (0 to 65,535) as one shard file; returns its number of tokens. Raises BadInput if that is 0."""
    header, n = np.zeros(256, "<i4"), 0
    with replacing(path) as f:
        f.write(header.tobytes())
        for ids in arrays:
            f.write(np.asarray(ids, "<u2").tobytes())
            n += len(ids)
        if not n:
            raise BadInput(
                f"{path.name}: no document for this split; give more text, another --val-fraction, or --val."
            )
        header[:3] = SHARD_MAGIC, SHARD_VERSION, n  # last: how many there are shows only at the end
        f.seek(0)
        f.write(header.tobytes())
    return n


def check_shard(path):
    """Number of tokens of a whole shard file. Raises BadInput if it is missing, truncated or something else."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file.")
    size, header = path.stat().st_size, np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise BadInput(
            f"{path}: {size} bytes without a shard's header (magic {SHARD_MAGIC}, version {SHARD_VERSION})."
        )
    n = int(header[2])
    if n < 1 or size != 1024 + 2 * n:
        raise BadInput(
            f"{path}: {size} bytes, but its header says {n} tokens, which take {1024 + 2 * n}."
        )
    return n


# -------------------------------------------------------------------------------------------------- tokenizer and encoding


def train_tokenizer(texts, text_bytes, vocab_size):
    """Serialised SentencePiece BPE model from every k-th block of the texts, about SAMPLE_BYTES at most.

    Byte fallback and the identity normaliser make it lossless: newlines, tabs and runs of spaces come back. Ids are like
    the official ones: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, 256 bytes, pieces. Raises BadInput if the text does not suffice.
    """
    blocks = (text[i : i + BLOCK] for text in texts for i in range(0, len(text), BLOCK))
    STATUS.text = "reading text for the tokenizer"
    sample = list(
        itertools.islice(blocks, 0, None, 1 + text_bytes // SAMPLE_BYTES)
    )  # SentencePiece would wrap our BadInput
    STATUS.text, model = f"training a tokenizer of {vocab_size} pieces", io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.999,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            max_sentence_length=4 * BLOCK,
            num_threads=1,
            minloglevel=3,
        )  # one thread: the same bytes on every run
    except RuntimeError as why:
        raise BadInput(
            f"the training text does not make a tokenizer of {vocab_size} pieces; give more text or another "
            f"--vocab-size ({' '.join(str(why).split())[-120:]})"
        ) from None
    return model.getvalue()


def load_tokenizer(path):
    """The SentencePiece model at path. Raises BadInput if it is none, has no BOS, or ids above 65,535."""
    if not path.is_file():
        raise BadInput(f"{path}: no such tokenizer.")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as why:
        raise BadInput(f"{path}: not a SentencePiece model ({str(why)[:80]}).") from None
    if sp.vocab_size() > 65536 or sp.bos_id() < 0:
        raise BadInput(
            f"{path}: {sp.vocab_size()} pieces, BOS id {sp.bos_id()}; ids must fit 16 bits and BOS starts documents."
        )
    return sp


def cut(text, joins):
    """Yields the parts of a text, cut at single spaces if it is longer than PART: the ids of a part are a Python list.

    joins: the tokenizer itself puts a space before each part, so the one at the cut is left out.
    """
    start = 0
    while space := re.compile("(?<=[^ ]) (?=[^ ])").search(text, start + PART):
        yield text[start : space.start()]
        start = space.end() if joins else space.start()
    yield text[start:]


def encode(sp, documents, split="text"):
    """Yields (ids [n] uint16 with BOS first, UTF-8 bytes, changed) of each document; n = 0 if it cannot be encoded.

    Bits per byte are right only if decode(ids) == text. U+2581 in a text, and a tokenizer that normalises, break that;
    then the document is encoded as the text that it decodes to, and is `changed`.
    """
    joins, total = sp.id_to_piece(sp.encode("a")[0]).startswith("\u2581"), 0
    for text in documents:
        arrays, size, changed = [np.array([sp.bos_id()], np.uint16)], -int(joins), False
        for part in cut(text, joins):
            ids = sp.encode(part)
            back = sp.decode(ids)
            if back != part:
                changed, ids = True, sp.encode(back)
                if not ids or sp.decode(ids) != back:
                    arrays, size, changed = [arrays[0][:0]], 0, False
                    break
            arrays.append(np.array(ids, np.uint16))
            size += int(joins) + len(back.encode())
            total += len(ids)
            STATUS.text = f"encoding {split}: {total:,} tokens"
        yield np.concatenate(arrays), size, changed


# ----------------------------------------------------------------------------------------------------- making a data set
# demo and text make datasets/NAME.part and rename it when all is there; its prepare.json says how far it is.


def write_split(folder, split, stream, rows, save, shard_tokens, max_tokens):
    """Write the rest of a split from stream (of `encode`); after each shard append its counts to rows and save them.

    A shard ends with the document that reaches shard_tokens, so that a later run can continue at a document.
    """
    total = sum(row["tokens"] for row in rows)

    def fill(row):
        for ids, size, changed in stream:
            ids = ids[: max_tokens - total - row["tokens"]]
            counts = dict(
                documents=1,
                tokens=len(ids),
                bytes=size,
                changed=int(changed),
                dropped=int(not len(ids)),
            )
            row.update({name: row[name] + n for name, n in counts.items()})
            yield ids
            if row["tokens"] >= min(shard_tokens, max_tokens - total):
                return

    while total < max_tokens:
        first = []  # documents up to one with tokens: a shard is not begun for nothing
        while not any(len(ids) for ids, *_ in first) and (document := next(stream, None)):
            first.append(document)
        if rows and not any(len(ids) for ids, *_ in first):
            break
        stream, row = (itertools.chain(first, stream), dict.fromkeys(COUNTS, 0))
        total += write_shard(folder / f"fineweb_{split}_{len(rows):06d}.bin", fill(row))
        rows.append(row)
        save()


def summary(record):
    """The counts of a data set in words."""
    text = []
    for split in ("train", "val"):
        n = {key: sum(row[key] for row in record[split]) for key in COUNTS}
        text.append(
            f"{split} {len(record[split])} files, {n['tokens']:,} tokens, {n['documents']:,} documents"
            + f", {n['bytes'] / max(1, n['tokens']):.3f} bytes a token" * (split == "val")
            + f", {n['changed']:,} changed by the tokenizer's normalisation" * (n["changed"] > 0)
            + f", {n['dropped']:,} dropped, having no encoding" * (n["dropped"] > 0)
        )
    return "; ".join(text)


def read_json(path):
    """The object in a JSON file, {} if there is none."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_record(path):
    """What an earlier command wrote to a prepare.json, {} if there is nothing of the kind."""
    found = read_json(path)
    splits = [found.get(split) for split in ("val", "train")]
    whole = all(
        isinstance(rows, list)
        and all(isinstance(row, dict) and set(COUNTS) <= set(row) for row in rows)
        for rows in splits
    )
    return found if whole and "settings" in found else {}


def build(args, name, model, splits, settings, text_bytes, keep=False):
    """Make or finish the data set `name`: its shards, and its tokenizer if settings have a vocab_size.

    splits: {"val": f, "train": f}, f() yields the documents. settings: all that decides the content. What was made from
    others is refused without --force, or left as it is with keep. Raises BadInput.
    """
    folder, trains = args.out / "datasets" / name, "vocab_size" in settings
    work = folder.with_name(name + ".part")
    done, record = read_record(folder / "prepare.json"), read_record(work / "prepare.json")
    if done and (keep or done["settings"] == settings) and model.is_file() and not args.force:
        with contextlib.suppress(BadInput):
            for split in splits:
                for i in range(len(done[split])):
                    check_shard(folder / f"fineweb_{split}_{i:06d}.bin")
            print(f"{name}: complete, nothing to do ({summary(done)})")
            return
    if record.get("settings") != settings:
        if not args.force and (folder.exists() or (trains and model.exists())):
            raise BadInput(
                f"{folder if folder.exists() else model} is there, but damaged or made from other text or settings; "
                "--force replaces it."
            )
        shutil.rmtree(work, ignore_errors=True)
        record = dict(settings=settings, val=[], train=[])

    def save():
        with replacing(work / "prepare.json") as f:
            f.write(json.dumps(record, indent=1).encode())

    draft = work / "tokenizer.model"
    if trains and not draft.is_file():
        trained = train_tokenizer(splits["train"](), text_bytes, settings["vocab_size"])
        save()
        with replacing(draft) as f:
            f.write(trained)
    sp = load_tokenizer(draft if trains else model)
    for split, texts in splits.items():
        rest = itertools.islice(texts(), sum(row["documents"] for row in record[split]), None)
        most = (
            settings["max_tokens"]
            if split == "train" and settings.get("max_tokens")
            else sys.maxsize
        )
        write_split(
            work,
            split,
            encode(sp, rest, split),
            record[split],
            save,
            settings.get("shard_tokens", 10**8),
            most,
        )
    refuse_shared_documents(work)
    if trains:
        model.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(model)
    shutil.rmtree(folder, ignore_errors=True)
    work.replace(folder)
    print(f"{name}: wrote {folder} with tokenizer {model} ({summary(record)})")


def refuse_shared_documents(folder):
    """Raises BadInput if the training shards have more of the validation text than chance puts there, which is told."""
    splits = (documents.shards(folder, split) for split in ("train", "val"))
    found = documents.compare(*splits, progress=lambda told: setattr(STATUS, "text", told))
    if found.too_much():
        raise BadInput(f"{folder}: training text has {found.told()}; take them out of one split.")
    if len(found.both):
        print(f"note: training text has {found.told()}")


def fraction_of(text):
    """A number in [0, 1) that only the text decides; copies of a document therefore land in the same split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def demo(args, _):
    """The demo data set: Python's standard library. Every file is a document; some of middling size are for validation."""
    root, texts = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not DEMO_SKIP.search(name) and (
            path.stat().st_size <= DEMO_FILE_BYTES or name == "pydoc_data/topics.py"
        ):
            with contextlib.suppress(UnicodeDecodeError):
                texts[name] = path.read_bytes().decode()
    val, size = set(), 0
    for name in sorted(
        texts, key=fraction_of
    ):  # of the names: spread over the library, nearly the same for all versions
        if size < DEMO_VAL and len(texts[name]) in DEMO_VAL_FILE:
            val.add(name)
            size += len(texts[name])
    splits = {
        split: lambda held=split == "val": (
            t for name, t in texts.items() if t and (name in val) == held
        )
        for split in ("val", "train")
    }
    settings = dict(vocab_size=1024, text=hashlib.sha256(json.dumps(texts).encode()).hexdigest())
    model = args.out / "tokenizers" / "demo_1024_bpe.model"
    build(args, "demo_sp1024", model, splits, settings, sum(map(len, texts.values())), keep=True)


# --------------------------------------------------------------------------------------------------------------- your text


def text_files(paths):
    """The files among paths and in the folders among them, sorted within a folder. Raises BadInput for what is no text."""
    files = []
    for path in paths:
        found = (
            sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES))
            if path.is_dir()
            else [path]
        )
        if not path.exists() or not found or not found[0].name.endswith(SUFFIXES):
            raise BadInput(
                f"{path}: {'no ' + ', '.join(SUFFIXES) + ' file' if path.exists() else 'no such file or folder'}."
            )
        files += found
    return list(dict.fromkeys(f.resolve() for f in files))


def open_lines(path):
    """A .jsonl or .jsonl.zst file, open for reading lines of text. Raises BadInput if zstandard is needed and missing."""
    if path.suffix != ".zst":
        return path.open(encoding="utf-8", newline="\n")
    try:
        import zstandard
    except ImportError:
        raise BadInput(f"{path}: needs pip install zstandard; or unpack it with zstd -d.") from None
    return zstandard.open(path, "rt", encoding="utf-8", newline="\n")


def read_documents(files):
    """Yields the non-empty documents: a .txt or .py file each, or a .jsonl line each: a string, or an object with `text`."""
    for path in files:
        number = 0
        try:
            if path.suffix in (".txt", ".py"):
                yield from filter(None, [path.read_bytes().decode()])
                continue
            with open_lines(path) as lines:
                for number, line in enumerate(lines, 1):
                    text = json.loads(line) if line.strip() else ""
                    text = text.get("text") if isinstance(text, dict) else text
                    if not isinstance(text, str):
                        raise ValueError('neither a string nor an object with a string "text"')
                    text.encode()  # half a surrogate pair is JSON but no text
                    if text:
                        yield text
        except (BadInput, MemoryError):
            raise
        except Exception as why:  # UnicodeError, JSONDecodeError, OSError, and the base of zstandard's own is Exception
            raise BadInput(
                f"{path}, line {number}: {why}" if number else f"{path}: {why}"
            ) from None


def text(args, _):
    """A data set from your files. Without --val, documents go to validation by a hash of their content."""
    files, held = text_files(args.paths), text_files(args.val or [])
    if not re.fullmatch(r"[\w-][\w.-]*", args.name) or args.name.endswith(".part"):
        raise BadInput(
            f"--name {args.name}: it names a folder; letters, digits, '_', '-' and '.' only."
        )
    if both := set(files) & set(held):
        raise BadInput(
            f"{min(both)}: in --val and in the training text; validation text must be new to the model."
        )
    settings = dict(
        val=args.val_fraction,
        shard_tokens=args.shard_tokens,
        max_tokens=args.max_tokens,
        files=[[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files + held],
        held=len(held),
    )
    if args.tokenizer:
        load_tokenizer(args.tokenizer)
        settings["tokenizer"] = hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()
    else:
        settings["vocab_size"] = args.vocab_size
    splits = {"val": lambda: read_documents(held), "train": lambda: read_documents(files)}
    if not held:
        STATUS.text = "reading the text"
        limit = max(
            args.val_fraction, min(map(fraction_of, read_documents(files)), default=0) + 2**-48
        )  # one at least
        splits = {
            split: lambda want=split == "val": (
                t for t in read_documents(files) if want == (fraction_of(t) < limit)
            )
            for split in splits
        }
    model = args.tokenizer or args.out / "tokenizers" / f"{args.name}.model"
    build(args, args.name, model, splits, settings, sum(f.stat().st_size for f in files))


# ----------------------------------------------------------------------------------------------------- the official shards


def fetch_from_hub(repo):
    """A function that fetches a file of a Hugging Face data set repository into a folder and returns its path."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise BadInput(
            "fineweb needs the package huggingface_hub: pip install huggingface_hub"
        ) from None

    def fetch(repo_path, folder):
        try:
            return Path(hf_hub_download(repo, repo_path, repo_type="dataset", local_dir=folder))
        except (
            Exception
        ) as why:  # its HTTP library's errors share no base and change with its version
            raise BadInput(
                f"{repo}/{repo_path}: {type(why).__name__}: {' '.join(str(why).split())[:300]}"
            ) from None

    return fetch


def check_tokenizer(path):
    """Raises BadInput if the file is not the official tokenizer."""
    size = path.stat().st_size if path.is_file() else 0
    if size == LOOKALIKE_BYTES:
        raise BadInput(
            f"{path}: 253,847 bytes is another model that circulates as {TOKENIZER} and decodes the official shards "
            "to garbage; the official one has 254,483 bytes."
        )
    if size != TOKENIZER_BYTES or not hashlib.sha256(path.read_bytes()).hexdigest().startswith(
        TOKENIZER_SHA256
    ):
        raise BadInput(
            f"{path}: {size} bytes; the official tokenizer has {TOKENIZER_BYTES} and sha256 {TOKENIZER_SHA256}..."
        )
    return 0, 0  # tokens and documents


def read_manifest(path, name):
    """What the hub's manifest says of a data set; tokens_val is None if it does not say. Raises BadInput."""
    try:
        manifest = json.loads(path.read_bytes())
        entries = {d["name"]: d for d in manifest["datasets"]}
        if name not in entries:
            raise BadInput(f"manifest.json: no {name} there; it has {', '.join(sorted(entries))}.")
        entry, stats = entries[name], entries[name]["stats"]
        models = {t.get("name"): t.get("model_path") for t in manifest.get("tokenizers", [])}
        model = entry.get("model_path") or models.get(entry.get("tokenizer_name"))
        if not model and name != DATASET:
            raise KeyError("model_path")
        found = dict(tokenizer=Path(model or TOKENIZER).name, tokens_val=stats.get("tokens_val"))
        found |= {key: int(stats[key]) for key in ("files_train", "files_val")}
    except (ValueError, KeyError, TypeError, AttributeError) as why:
        raise BadInput(
            f"manifest.json: no complete entry for {name} ({type(why).__name__} {why}); has it changed?"
        ) from None
    if name == DATASET and found["tokenizer"] != TOKENIZER:
        raise BadInput(f"manifest.json: {name} has the tokenizer {model}, not {TOKENIZER}.")
    return found


def check_pieces(path, pieces):
    """Raises BadInput unless the file is a tokenizer of so many pieces whose documents begin as everywhere here."""
    sp = load_tokenizer(path)
    if sp.vocab_size() != pieces or sp.bos_id() != BOS:
        raise BadInput(
            f"{path}: {sp.vocab_size()} pieces, BOS id {sp.bos_id()}; sp{pieces} has {pieces} and {BOS}."
        )
    return 0, 0  # tokens and documents


def count_shard(path, pieces):
    """(tokens, documents) of a whole shard file of a vocabulary. Raises BadInput."""
    n, ids = check_shard(path), np.memmap(path, "<u2", "r", 1024)
    if ids.max() >= pieces:
        raise BadInput(
            f"{path}: token id {ids.max()}; a vocabulary of {pieces} ends at {pieces - 1}."
        )
    return n, int(np.count_nonzero(ids == BOS))


def refuse_other_source(folder, repo, model):
    """Raises BadInput if what is there is not known to be of one repository: shards, or the tokenizer of that name.

    source.json, in the folder of the shards, says whose they are, and the digest of their tokenizer.
    """
    known = read_json(folder / "source.json")
    shards = any(folder.glob("fineweb_*.bin"))
    if shards and known.get("repo") != repo:
        raise BadInput(
            f"--repo {repo}: the shards in {folder} are of {known.get('repo', 'an unknown origin')}; move that "
            "folder, or give another --out."
        )
    if model.is_file() and hashlib.sha256(model.read_bytes()).hexdigest() != known.get("tokenizer"):
        raise BadInput(
            f"{model}: is there, and is not known to be that of {repo}; move it, or give another --out."
        )


def note_source(folder, repo, tokenizer):
    """Write source.json for refuse_other_source()."""
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    with replacing(folder / "source.json") as f:
        f.write(json.dumps({"repo": repo, "tokenizer": digest}).encode())


def fetch_files(fetch, out, names, check, count):
    """What count(path) gives of each file that was fetched; those that are there, and pass check(path), are left alone."""
    found = []
    for i, name in enumerate(names, 1):
        target = out / name
        with contextlib.suppress(BadInput):
            check(target)
            continue
        STATUS.text = f"fetching {name} ({i} of {len(names)})"
        source = fetch(f"datasets/{name}", out / "datasets" / ".fetch")
        try:
            found.append(count(source))
        except BadInput:
            source.unlink(missing_ok=True)  # the next run must not take it for fetched
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    return found


def fineweb(args, fetch):
    """The challenge's text in shards, with their tokenizer, from the Hugging Face hub. Files that are there and whole stay."""
    fetch, temporary = fetch or fetch_from_hub(args.repo), args.out / "datasets" / ".fetch"
    dataset, pieces = f"fineweb10B_{args.variant}", int(args.variant[2:])
    STATUS.text = "fetching the manifest"
    offer = read_manifest(fetch("datasets/manifest.json", temporary), dataset)
    if args.train_shards > offer["files_train"]:
        raise BadInput(
            f"--train-shards {args.train_shards}: the manifest offers {offer['files_train']}."
        )
    folder, model = args.out / "datasets" / dataset, args.out / "tokenizers" / offer["tokenizer"]
    official, check = dataset == DATASET, check_tokenizer
    if not official:  # its tokenizer is not known beforehand
        refuse_other_source(folder, args.repo, model)
        check = functools.partial(check_pieces, pieces=pieces)
    done = fetch_files(fetch, args.out, [f"tokenizers/{model.name}"], check, check)
    if not official:
        note_source(folder, args.repo, model)
    count = functools.partial(count_shard, pieces=pieces)
    for split, n in (("val", offer["files_val"]), ("train", args.train_shards)):
        names = [f"datasets/{dataset}/fineweb_{split}_{i:06d}.bin" for i in range(n)]
        done += fetch_files(fetch, args.out, names, check_shard, count)
        tokens = sum(check_shard(args.out / name) for name in names)
        if split == "val" and offer["tokens_val"] not in (None, tokens):
            raise BadInput(
                f"{folder}: {tokens} validation tokens, {offer['tokens_val']} in the manifest; remove its"
                " fineweb_val_*.bin and fetch again."
            )
    shutil.rmtree(temporary, ignore_errors=True)
    if done and args.train_shards:
        refuse_shared_documents(folder)
    if not official:
        print(f"to train with: DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE={pieces}")
    files = 1 + offer["files_val"] + args.train_shards
    tokens, documents = map(sum, zip(*done, (0, 0), strict=True))
    print(
        f"{dataset}: wrote {len(done)} files, {tokens:,} tokens, {documents:,} documents; {files - len(done)} were there"
    )


# -------------------------------------------------------------------------------------------------------------------- main


def number(kind, low, high):
    """A parser of command-line numbers from low to high."""

    def amount(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: allowed are {low} to {high}")

    return amount


class Parser(argparse.ArgumentParser):
    """A command line; what is wrong with it is told in one line."""

    def error(self, message):
        raise BadInput(f"{message}; see {self.prog} --help")


def variant(text):
    """The name of a vocabulary of SentencePiece's: sp and its size, which the command line says."""
    size = re.fullmatch(r"sp([1-9]\d*)", text)
    if not size or not 261 <= int(size[1]) <= 65536:
        raise argparse.ArgumentTypeError(f"{text}: allowed are sp261 to sp65536, such as sp4096")
    return text


def parser():
    """The command line."""
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, made = top.add_subparsers(required=True, metavar="COMMAND"), {}
    for run in (demo, fineweb, text):
        p = made[run] = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        p.set_defaults(run=run)
        p.add_argument(
            "--out",
            type=Path,
            default=Path("data"),
            help="folder of datasets/ and tokenizers/ (default data)",
        )
        if run is not fineweb:
            p.add_argument("--force", action="store_true", help="replace what is there")
    add = made[fineweb].add_argument
    add(
        "--train-shards",
        type=number(int, 0, 10**6),
        default=80,
        metavar="N",
        help="200 MB, 100 M tokens each (default 80)",
    )
    add(
        "--variant",
        type=variant,
        default="sp1024",
        metavar="spN",
        help="size of the vocabulary, up to sp65536 (default %(default)s, the challenge's)",
    )
    add(
        "--repo",
        default="willdepueoai/parameter-golf",
        help="data set repository (default %(default)s)",
    )
    add = made[text].add_argument
    add(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files or folders of " + ", ".join(SUFFIXES),
    )
    add("--name", required=True, help="name of the data set")
    add("--max-tokens", type=number(int, 1, 2**62), metavar="N", help="training tokens at most")
    add(
        "--shard-tokens",
        type=number(int, 1, 10**9),
        default=10**8,
        metavar="N",
        help="tokens that end a shard (default 100 M)",
    )
    add = made[text].add_mutually_exclusive_group().add_argument
    add("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use")
    add(
        "--vocab-size",
        type=number(int, 261, 65536),
        default=1024,
        metavar="N",
        help="pieces of a new one (default 1024)",
    )
    add = made[text].add_mutually_exclusive_group().add_argument
    add(
        "--val-fraction",
        type=number(float, 0, 1),
        default=0.01,
        metavar="F",
        help="validation documents (default 0.01)",
    )
    add("--val", type=Path, nargs="+", metavar="PATH", help="validation text")
    return top


def main(argv=None, fetch=None):
    """Run the command line; returns the exit status. fetch(repo path, folder) -> local path stands in for the hub in tests."""
    stop = threading.Event()
    threading.Thread(target=STATUS.show, args=(stop, time.monotonic()), daemon=True).start()
    try:
        with contextlib.suppress(SystemExit):  # --help
            args = parser().parse_args(argv)
            args.run(args, fetch)
        sys.stdout.flush()
        return 0
    except BadInput as why:
        told = f"prepare.py: {why}"  # over 160 characters in two lines: what is wrong, what to do
        print(re.sub(r"(?m)^(?=.{161})(.*?[.;]) ", r"\1\n  ", told), file=sys.stderr)
    except BrokenPipeError:  # who read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as why:
        print(f"prepare.py: {why.filename or args.out}: {why.strerror or why}", file=sys.stderr)
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    finally:
        stop.set()
    return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
