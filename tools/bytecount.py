"""Are the bytes of text, by which bits are divided, counted well? A byte counted twice makes a score look better by as much.

Two faults were found in the challenge's submissions:

    #897    a tokenizer without a standalone U+2581 writes a space as three byte tokens, and each is counted: three bytes
    #1719   the table of bytes has the leading space in it already, and the loop adds it again: 17 % more bytes

Where the shards and the tokenizer are here, the text is decoded and counted anew, in another way than the script's. Where only
a log is here, nats a token over bits a byte say how many bytes a token was taken for. That shows a fault on the challenge's
validation text, whose bytes are the same for every tokenizer; on other text a log alone shows nothing.
"""

import functools
import itertools
import math
import re
from pathlib import Path

import numpy as np

SPACE = "\u2581"  # SentencePiece's sign for a space
# Bytes of the first 50,000 documents of FineWeb's validation split, as 43 folders of the challenge's records count them with eight
# tokenizers and their windows: 151.02 to 151.09 million. The split of before 18 March 2026 (NaiveBaseline) was larger.
TEXT_BYTES = 151_080_363
OLD_TEXT = {63_779_840: 155_769_746}  # targets -> bytes
PER_TOKEN = {1024: 2.4359, 4096: 3.3197, 8192: 3.7266}  # pieces -> bytes a token, by the same logs
FOLDED = 3.1574  # 8,192 pieces of text in small letters, with signs for capitals ("CaseOps")
TARGETS = (
    40_540_160,
    45_508_608,
    47_851_520,
    62_021_632,
)  # of that text, with the challenge's tokenizers
SLACK = 0.001  # windows that are left out make 0.04 %; a fault makes 4 % or more


def found(log, name):
    """Path that a setting of a run names, from here or from the folder that holds its logs; None if it is not there."""
    told = Path(log.settings.get(name) or "-")
    above = [folder.parent for folder in log.path.resolve().parents if folder.name == "logs"]
    return next((base / told for base in (Path(), *above) if (base / told).exists()), None)


def data_of(log):
    """(validation shards, tokenizer) of a run of this script, or None if they are not here."""
    folder, tokenizer = found(log, "DATA_PATH"), found(log, "TOKENIZER_PATH")
    shards = sorted(folder.glob("fineweb_val_*.bin")) if folder and folder.is_dir() else []
    return (tuple(shards), tokenizer) if shards and tokenizer and tokenizer.is_file() else None


def stream(shards, window):
    """Tokens [N+1] of a validation split cut to whole windows, as the challenge cuts it."""
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in shards])
    return tokens[: (len(tokens) - 1) // window * window + 1]


def text_bytes(sp, tokens):
    """UTF-8 bytes of the text that tokens[1:] stand for, decoded by SentencePiece; tokens[0] is context."""
    ids = range(sp.vocab_size())
    boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    cuts = np.flatnonzero(boundary[tokens]).tolist()
    inside, begin, end = not boundary[tokens[0]], 1, len(tokens)
    # the stream may begin and end inside a character
    while begin < end and sp.is_byte(int(tokens[end - 1])):
        end -= 1
    while inside and begin < end and sp.is_byte(int(tokens[begin])):
        begin += 1
    total = len(tokens) - end + begin - 1
    if inside:  # there the space before a word counts, which decode() takes away
        letter = next(i for i in ids if re.fullmatch("[a-z]", sp.id_to_piece(i)))
        first = tokens[begin : min([*cuts, end])].tolist()
        total += decoded_bytes(sp, [letter, *first]) - 1
    for a, b in itertools.pairwise([*cuts, end]):
        total += decoded_bytes(sp, tokens[a + 1 : b].tolist())
    return total


def decoded_bytes(sp, ids):
    """Bytes of the text of ids. A space that was written in bytes is a space (#897)."""
    return len(sp.decode(ids).replace(SPACE, " ").encode())


def by_pieces(sp, tokens):
    """Bytes of tokens[1:] by the challenge's rule, and in the two ways to count a leading space twice, as {what: bytes}."""
    ids = range(sp.vocab_size())
    pieces = [sp.id_to_piece(i).replace(SPACE, " ") for i in ids]
    boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    space = np.array([piece.startswith(" ") for piece in pieces]) & ~boundary
    size = [1 if sp.is_byte(i) else len(pieces[i].encode()) - int(space[i]) for i in ids]
    bare = int(np.where(boundary, 0, size)[tokens[1:]].sum(dtype=np.int64))
    within, after = (
        int(x.sum()) for x in (space[tokens[1:]], space[tokens[1:]] & ~boundary[tokens[:-1]])
    )
    return {"rule": bare + after, "twice": bare + within + after, "twice inside": bare + 2 * after}


@functools.cache
def recount(shards, tokenizer, window):
    """(targets, bytes of the decoded text, by_pieces()) of validation shards. Raises OSError, ValueError and others."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = stream(shards, window)
    return len(tokens) - 1, text_bytes(sp, tokens), by_pieces(sp, tokens)


def scored(log, result):
    """(targets, bytes a target) that a result stands for; None where a log does not say it."""
    told = result.tokens or log.settings.get("val_tokens") or log.settings.get("tokens") or ""
    targets = int(told) if str(told).isdecimal() else None
    if result.tokens and result.bytes:
        return targets, result.bytes / result.tokens
    whole = math.isfinite(result.val_loss) and math.isfinite(result.val_bpb) and result.val_bpb > 0
    return targets, result.val_loss / math.log(2) / result.val_bpb if whole else None


def vocabulary(log):
    """Pieces of a log's tokenizer, or None."""
    told = {name.lower(): str(value) for name, value in log.settings.items()}
    names = [told.get(name, "") for name in ("tokenizer_path", "train_loader", "pattern")]
    number = told.get("vocab_size") or re.search(r"(?:sp|fineweb_)(\d{3,5})(?!\d)", " ".join(names))
    number = number[1] if isinstance(number, re.Match) else number
    return int(number) if number and number.isdecimal() else None


def check_bytes(log, result):
    """(what, verdict True, False or None for unknown, detail): whether a result's bytes of text are those of the text."""
    what = f"{log.path.name}: bytes of text"
    if result is None:
        return what, None, "no score"
    targets, each = scored(log, result)
    if each is None:
        return what, None, "not said"
    data = data_of(log)
    if data and result.bytes:
        try:
            there, true, ways = recount(*data, int(log.settings["EVAL_SEQ_LEN"]))
        except (OSError, ValueError, RuntimeError, IndexError, StopIteration) as why:
            return what, None, f"{result.bytes:,}, cannot be counted anew: {str(why)[:80]}"
        if there == result.tokens:
            return what, *against_text(result.bytes, true, ways)
    return what, *against_challenge(log, targets, each)


def against_text(counted, true, ways):
    """(verdict, detail) of bytes that a log counted against those of the decoded text here; ways: by_pieces()."""
    if counted == true:
        return True, f"{counted:,}, as many as the decoded text has"
    detail = f"{counted:,}, the decoded text has {true:,} ({100 * (counted / true - 1):+.2f} %)"
    if counted == ways["rule"]:
        why = "a space counts as three bytes, the tokenizer having no standalone U+2581 (#897)"
        return (
            False if counted > true else None,
            f"{detail}: {why if counted > true else 'too few'}",
        )
    if counted in ways.values():
        return False, f"{detail}: a space is counted twice (#1719)"
    return (
        None,
        f"{detail}: the shards here are others than the run's, or it counts in a way of its own",
    )


def against_challenge(log, targets, each):
    """(verdict, detail) of bytes a token against those of the challenge's validation text."""
    detail, pieces = f"{each:.4f} a token", vocabulary(log)
    if targets and of_challenge(log, targets):
        true = OLD_TEXT.get(targets, TEXT_BYTES)
        excess = targets * each / true - 1
        detail += f", {targets * each / 1e6:.2f} million; the challenge's text has {true / 1e6:.2f}"
    elif targets or log.style == "this script":
        return None, f"{detail}; its text is not here to be counted, and not the challenge's"
    elif any(abs(each / known - 1) < SLACK for known in (*PER_TOKEN.values(), FOLDED)):
        return True, f"{detail}, as the challenge's text has with one of its tokenizers"
    elif pieces in PER_TOKEN:
        excess = each / PER_TOKEN[pieces] - 1
        detail += f"; the challenge's text has {PER_TOKEN[pieces]} with {pieces:,} pieces"
    else:
        return None, f"{detail}; the log says neither how many tokens nor which tokenizer"
    if excess > SLACK:
        return False, f"{detail} ({100 * excess:+.1f} %): is a byte counted twice (#1719, #897)?"
    return (True if excess > -SLACK else None), detail


def of_challenge(log, targets):
    """Whether a log scores the challenge's validation text, by its number of targets or the name of its data."""
    near = any(abs(targets / n - 1) < SLACK for n in (*TARGETS, *OLD_TEXT))
    return near or "fineweb10B" in " ".join(map(str, log.settings.values()))
