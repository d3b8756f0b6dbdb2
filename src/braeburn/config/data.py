"""Where text comes from and how it becomes batches."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from braeburn.config.base import Fraction, Frozen, Name, OneOrMore, Size


class Source(Frozen):
    """Documents from files: globs, local or of any fsspec file system, compressed or not.

    `text` takes a file as one document, or splits it at `separator`; `jsonl` and `parquet` take
    `field` of each row; `auto` decides by the file's name, and refuses what its first bytes do not
    agree with. `python-code`, `python-prose` (docstrings) and `python-long` read Python files,
    those of the running Python's standard library unless `paths` names others.
    """

    paths: Annotated[tuple[str, ...], OneOrMore] = ()
    format: Literal[
        "auto", "text", "jsonl", "parquet", "python-code", "python-prose", "python-long"
    ] = "auto"
    field: str = "text"
    separator: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Source":
        if not self.paths and not self.format.startswith("python-"):
            raise ValueError(
                f"paths is empty with format={self.format!r}; name at least one file or glob in "
                f"paths"
            )
        return self


class Data(Frozen):
    """Where text comes from and how it is turned into batches.

    `tokenizer` is the path or URL of a `tokenizer.json`; with none, a byte-level BPE of
    `model.vocab_size` entries is trained on the sources. `held_out` is the fraction of documents,
    chosen by hash, that training never sees; with 0 none is held out, and nothing is evaluated.
    `cache` holds the tokenised shards; with none, they are kept below the user's cache folder. It
    may be a URL of any fsspec file system, of whose tokens this machine keeps `local_cache_bytes`.
    `accept` is the fingerprint of text that has changed since the run's last checkpoint, to go on
    with it all the same.
    """

    sources: dict[Name, Source] = Field(default_factory=dict)
    tokenizer: str | None = None
    held_out: Fraction = 0.02
    cache: str | None = None
    local_cache_bytes: Size = 16 * 2**30
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    prefetch: Annotated[int, Field(gt=0, le=2**16)] = 4
    accept: str | None = None
