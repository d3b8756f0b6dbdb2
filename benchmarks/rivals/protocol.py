"""What the runner and the programs that it compares say to each other.

A program is a process of its own, in the environment of the library that it runs. It gets the work
as JSON in its one argument, compiles and makes a first step, and says so. Then it makes as many
steps as it is told, whenever it is told. Only the standard library is used, since each environment
has other packages.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """A model like Qwen3 and its batches. The same for all programs of a comparison.

    Attributes:
        vocab: entries of the vocabulary, whose embedding is the head too.
        width: of the hidden states.
        layers: attention with a feed-forward layer each.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: numbers in a head.
        ffn: hidden units of a feed-forward layer (SwiGLU).
        sequences: in a batch.
        length: tokens in a sequence, which is one document.
        setting: options of the program itself, by name.
    """

    vocab: int = 8192
    width: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 1024
    sequences: int = 8
    length: int = 512
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    @property
    def parameters(self) -> int:
        """All of them; the embedding, which is the head too, counts once."""
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        attention = self.width * (2 * queries + 2 * keys) + 2 * self.head_dim
        layer = attention + 3 * self.width * self.ffn + 2 * self.width
        return self.vocab * self.width + self.layers * layer + self.width

    @property
    def flops(self) -> float:
        """Of the products of a step, forwards and backwards: six for each parameter of a matrix and
        token, and attention without what a causal mask leaves out.
        """
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        matrices = self.width * (2 * queries + 2 * keys + 3 * self.ffn) * self.layers
        products = 6 * (matrices + self.vocab * self.width) * self.tokens
        # Two products of queries x keys x head_dim, three times, of which causality leaves half.
        attention = 6 * self.layers * queries * self.length * self.tokens
        return float(products + attention)


def work() -> Work:
    """The work that this process was started for."""
    return Work(**json.loads(sys.argv[1]))


# The optimizer of all programs.
LEARNING_RATE = 3e-4
BETA1 = 0.9
BETA2 = 0.95
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
CLIP = 1.0

BATCHES = 4


def tokens_of(work: Work, batch: int) -> Any:
    """Random tokens of one of the BATCHES batches, one more than a sequence has.

    Returns:
        int32 [sequences, length + 1].
    """
    import numpy as np

    generator = np.random.default_rng(batch)
    shape = (work.sequences, work.length + 1)
    return generator.integers(0, work.vocab, shape, np.int32)


def processor_seconds() -> float:
    """Of this process so far, all threads together."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    """The most memory that this process had at once."""
    with Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; this runs on Linux alone")


def own_output() -> Any:
    """A file that only the runner reads. What libraries print goes to standard error from now
    on.
    """
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return said


class Serving:
    """A program's side: it says what it is after its first step, then makes steps as it is told.

    `began` is `time.perf_counter()` at the program's very start.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self.work = work()
        self.out = own_output()
        self.left = 0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.processor = 0.0

    def say(self, **facts: Any) -> None:
        """One line of JSON to the runner."""
        print(json.dumps(facts), file=self.out, flush=True)

    def ready(self, loss: float, **facts: Any) -> None:
        """The first step is over.

        Args:
            loss: of that step.
            **facts: versions and settings, and `parameters` if the library counts them.
        """
        self.say(
            first_step_seconds=time.perf_counter() - self.began,
            first_step_processor_seconds=processor_seconds(),
            loss=loss,
            **facts,
        )

    def wait(self) -> None:
        """Returns once another step is wanted. What the last ones took is said first."""
        if self.left == 0:
            if self.seconds:
                self.say(
                    seconds=self.seconds,
                    processor_seconds=processor_seconds() - self.processor,
                    losses=self.losses,
                    peak_bytes=peak_bytes(),
                )
            self.seconds, self.losses = [], []
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # the runner is done
            self.left = int(line)
            self.processor = processor_seconds()
        self.left -= 1

    def made(self, seconds: float, loss: float) -> None:
        """A step is over."""
        self.seconds.append(seconds)
        self.losses.append(loss)

    def serve(self, step: Callable[[int], float]) -> None:
        """Makes steps as the runner asks, for programs that are called a step at a time.

        Args:
            step: makes a step on a batch with that number and returns its loss, once all of the
                step is over.
        """
        count = 0
        while True:
            self.wait()
            began = time.perf_counter()
            loss = step(count % BATCHES)
            self.made(time.perf_counter() - began, loss)
            count += 1
