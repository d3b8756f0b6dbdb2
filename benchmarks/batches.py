"""How fast batches come from token shards to the arrays that a train step gets.

    python benchmarks/batches.py [--gigabytes 0.5] [--seconds 3] [--workers 0]

Token shards of random ids are written to a temporary folder: several sources, with documents as
long as a case says. For each case it prints tokens a second of one process, and a second of a
processor, which other work on the machine changes less: of `read`, the batches one after the other
in one thread, and of `fed`, as `braeburn train` takes them: read ahead by its thread, or by
`--workers` processes, and placed on the device.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER = hashlib.sha256(b"random ids").hexdigest()
VOCABULARY = 50_000
# Sequence length, tokens of a batch, sources, mean tokens of a document.
CASES = {
    "one document a sequence": (4096, 65_536, 1, 1_000_000),
    "8 documents a sequence": (4096, 65_536, 1, 512),
    "64 documents a sequence": (4096, 65_536, 1, 64),
    "8 sources, 8 documents": (4096, 65_536, 8, 512),
    "8 sources, short sequences": (512, 65_536, 8, 512),
    "8 sources, batch of 1M tokens": (8192, 1_048_576, 8, 512),
}


def write_shards(folder: Path, tokens: int, document: int, seed: int) -> Any:
    """Token shards of random ids in documents of random lengths.

    Args:
        folder: to write them to.
        tokens: how many.
        document: mean tokens of a document.
        seed: of the ids and lengths.

    Returns:
        The opened token shards.
    """
    from braeburn.data.manifest import TokenManifest, TokenShard, manifest_bytes
    from braeburn.data.token_shards import SHARD_TOKENS, TokenShards, shard_path

    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    lengths = 1 + generator.exponential(document, 2 + 2 * tokens // document).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < tokens]
    shards = []
    for index, first in enumerate(range(0, tokens, SHARD_TOKENS)):
        last = min(tokens, first + SHARD_TOKENS)
        ids = generator.integers(1, VOCABULARY, last - first).astype("<u2")
        own = starts[(starts >= first) & (starts < last)].astype("<i8")
        ids[own - first] = 0
        contents = {"tokens": ids.tobytes(), "documents": own.tobytes()}
        for kind, data in contents.items():
            shard_path(folder, kind, index).write_bytes(data)
        hashes = {
            f"{kind}_sha256": hashlib.sha256(data).hexdigest() for kind, data in contents.items()
        }
        shards.append(TokenShard(tokens=len(ids), documents=len(own), **hashes))
    manifest = TokenManifest(
        dtype="uint16",
        tokenizer=TOKENIZER,
        begin=0,
        shard_tokens=SHARD_TOKENS,
        tokens=tokens,
        documents=sum(shard.documents for shard in shards),
        text_bytes=4 * tokens,
        token_bytes=4 * tokens,
        shards=shards,
    )
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    return TokenShards.open(folder, TOKENIZER)


def rates(items: Iterator[int], seconds: float) -> tuple[float, float]:
    """Tokens a second, and a second of a processor, of what an iterator gives the sizes of, over so
    many seconds after its first two items.
    """
    next(items)
    next(items)
    began, busy, tokens = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        tokens += next(items)
    return tokens / elapsed, tokens / (time.process_time() - busy)


def measure(case: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The tokens a second of one case, read and fed."""
    from braeburn.config import Stage
    from braeburn.data.loader import Batches, prefetch

    length, batch_tokens, sources, document = CASES[case]
    total = int(options.gigabytes * 1e9) // 2
    shards = {
        f"source{index}": write_shards(folder / str(index), total // sources, document, index)
        for index in range(sources)
    }
    stage = Stage(
        tokens=batch_tokens * 1_000_000,
        sequence_length=length,
        batch_tokens=batch_tokens,
        mixture={name: 1.0 + index for index, name in enumerate(shards)},
        learning_rate=1e-3,
    )
    batches = Batches(stage, "core", 0, shards)

    def read() -> Iterator[int]:
        for step in range(len(batches)):
            yield batches[step]["inputs"].size

    def fed() -> Iterator[int]:
        import jax

        from braeburn import background

        stream = background.Feed(prefetch(batches, 0, options.workers, 2), "reading batches")
        device = jax.devices()[0]
        try:
            for _ in range(len(batches)):
                placed = jax.device_put(stream.next(), device)
                jax.block_until_ready(placed)
                yield placed["inputs"].size
        finally:
            stream.close(30)

    found: dict[str, Any] = {"case": case}
    for name, items in (("read", read()), ("fed", fed())):
        wall, processor = rates(items, options.seconds)
        found[f"{name}_tokens_per_second"] = wall
        found[f"{name}_tokens_per_processor_second"] = processor
        items.close()  # type: ignore[attr-defined]
    return found


def main() -> int:
    """Measures all cases; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which; all by default")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of tokens in all sources")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--workers", type=int, default=0, help="data.workers")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case is called {sorted(unknown)[0]!r}; choose from {', '.join(CASES)}")
    for case in options.cases or CASES:
        with tempfile.TemporaryDirectory() as name:
            row = measure(case, Path(name), options)
        if options.json:
            print(json.dumps(row | {"load_average": os.getloadavg()[0]}), flush=True)
            continue
        shown = (
            f"{name} {row[f'{name}_tokens_per_second'] / 1e6:6.2f}M tokens/s, "
            f"{row[f'{name}_tokens_per_processor_second'] / 1e6:6.2f}M a second of a processor"
            for name in ("read", "fed")
        )
        print(f"{case:<32} {'   '.join(shown)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
