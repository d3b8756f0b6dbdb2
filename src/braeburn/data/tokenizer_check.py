"""Whether the tokenizers library survives a `tokenizer.json`, found out in a process of its own.

The library is native code. On some files it panics, which Python sees as a BaseException, and on
others (a damaged `precompiled_charsmap`, for one) it ends the whole process. A child of 40
milliseconds takes the blow.
"""

import hashlib
import subprocess
import sys

SECONDS = 120.0
LONGEST_REASON = 200  # characters; the library repeats what it cannot read
MEMORY_BYTES = 16 * 2**30
LARGEST_VOCABULARY = 2**24  # the largest that is published has 262,144 entries

# Only what its standard input holds, and what this process goes on to do with it.
_PROGRAM = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
except (ImportError, ValueError, OSError):
    pass
import tokenizers
tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode("utf-8"))
# Some of the library's functions count from 0 to the largest id, others make a list as long.
largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
if largest >= {LARGEST_VOCABULARY}:
    sys.exit(f"error: a token has the id {{largest}}, and ids are below {LARGEST_VOCABULARY}")
tokenizer.no_truncation()
tokenizer.no_padding()
for text in ("The cat, 3 mats.\\n", "caf\\u00e9 \\u4e00", ""):
    ids = tokenizer.encode(text).ids
    tokenizer.decode(ids)
    tokenizer.encode_batch_fast([text], add_special_tokens=False)
tokenizer.to_str()
"""

_sound: set[bytes] = set()


def check_tokenizer(text: str) -> None:
    """Refuses a `tokenizer.json` that the tokenizers library cannot work with; each text is tried
    once in a process.

    Raises:
        ValueError: saying what the library says, or that it crashes, hangs or needs too much
            memory.
    """
    data = text.encode("utf-8")
    digest = hashlib.sha256(data).digest()
    if digest in _sound:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=data,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the tokenizers library does not finish reading it within {SECONDS:.0f} s"
        ) from None
    if done.returncode:
        raise ValueError(_reason(done.returncode, done.stderr.decode("utf-8", "replace")))
    _sound.add(digest)


def _reason(code: int, errors: str) -> str:
    last = (errors.strip().splitlines() or [""])[-1]
    if code < 0 or not last:
        return "the tokenizers library crashes on it"
    # "Exception: text", "pyo3_runtime.PanicException: text"
    reason = last.partition(": ")[2] or last
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
