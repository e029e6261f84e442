"""The script that made a run: a log opens with its source, a record ships a copy of it. Nothing here runs it."""

import ast
import base64
import functools
import lzma

from tools.logs import LogError

HEAD = 1 << 21  # bytes of a log in which its source ends
UNPACKED = 1 << 24  # bytes that a packed copy may unpack to
SEPARATOR = b"\n" + b"=" * 100 + b"\n"  # after the source that a log opens with


def source_of(log):
    """The source that a log opens with, or None."""
    with open(log.path, "rb") as file:
        head = file.read(HEAD)
    return head[: head.index(SEPARATOR)].decode(errors="replace") if SEPARATOR in head else None


def readable(data):
    """Source of a script's bytes, unpacked if it is a packed copy. Raises ValueError."""
    from train_gpt import PACKED_END, PACKED_START, is_packed

    if not is_packed(data):
        return data.decode(errors="replace")
    reader = lzma.LZMADecompressor(memlimit=1 << 28)
    try:
        body = base64.b85decode(data[len(PACKED_START) : -len(PACKED_END)])
        text = reader.decompress(body, UNPACKED)
    except lzma.LZMAError as why:
        raise ValueError(f"the packed script is damaged: {why}") from None
    if not reader.eof and len(text) < UNPACKED:
        raise ValueError("the packed script is damaged: it ends too early")
    return text.decode(errors="replace")


@functools.lru_cache(maxsize=8)
def meaning(source):
    """What a source does: equal for sources that differ in comments, docstrings, annotations and layout. Raises SyntaxError."""
    from train_gpt import strip_source

    return ast.dump(ast.parse(strip_source(source)))


def same_code(a, b):
    """Whether two sources do the same; None if one cannot be read with this version of Python."""
    if a == b:
        return True
    try:
        return meaning(a) == meaning(b)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def shipped_script(logs):
    """(bytes, what they are) of the script that these logs counted as code. Raises LogError unless they open with one script.

    Packed by the run, packed here, or readable where that was counted: whichever has as many bytes as the logs say.
    """
    from train_gpt import is_packed, pack_source, strip_source

    sources = [source_of(log) for log in logs]
    for log, source in zip(logs, sources):
        if source is None:
            raise LogError(f"{log.path}: does not open with its source, which a record ships")
        if not same_code(source, sources[0]):
            raise LogError(
                f"not one script: {logs[0].path.name} and {log.path.name} open with others"
            )
    told = logs[0].code_bytes
    beside = [log.path.with_suffix("") / "train_gpt.py" for log in logs]
    for path in beside:
        data = path.read_bytes() if path.is_file() else b""
        if is_packed(data) and len(data) == told and same_code(readable(data), sources[0]):
            return data, "the packed copy that the runs wrote"
    packed = pack_source(strip_source(sources[0]))
    if len(packed) == told:
        return packed, "packed from the source that the logs open with"
    if len(sources[0].encode()) == told:
        return sources[
            0
        ].encode(), "the readable source that the logs open with, which they count as code"
    raise LogError(
        f"{logs[0].path}: counts {told} bytes of code; its source has {len(sources[0].encode())}, packed here {len(packed)}. "
        f"Put the packed copy that the run wrote at {beside[0]}"
    )
