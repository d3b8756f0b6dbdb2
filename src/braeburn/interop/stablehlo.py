"""A model as programs that plain JAX runs on any platform, without Braeburn.

`jax.export` lowers each program once for all platforms, to StableHLO. The weights are arguments and
stand beside the programs in a safetensors file, a layer by itself. Batches and lengths are not
fixed: a program takes any number of sequences, and prompts of any multiple of `MULTIPLE` tokens.

Attention is the back end in plain XLA, so that no kernel of one maker gets in. What a program calls
outside of StableHLO is looked up all the same, and refused by its name.

Shapes are named by letters, as in `models/decoder.py`; S is the slots of a cache.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from braeburn.config import Execution, ModelConfig, Precision, WeightType
from braeburn.data.tokenizer import Tokenizer
from braeburn.disk import check_new, explaining, scratch
from braeburn.errors import UserError
from braeburn.extras import how_to_install
from braeburn.interop.tensor_file import Entry, write_file
from braeburn.interop.tensors import checked
from braeburn.layers.attention.backend import BLOCK
from braeburn.layers.platform import portable
from braeburn.layers.spec import ParamSpec, Tree
from braeburn.models import cached, decoder
from braeburn.train.progress import tracked
from braeburn.train.trained import Trained

# Prompts are padded to a multiple of it, in which attention works through their tokens.
MULTIPLE = BLOCK
# To be raised when what `program.json` says changes its meaning.
FORMAT = 2
WEIGHTS, DESCRIPTION, EXAMPLE = "model.safetensors", "program.json", "generate.py"
# What programs call outside of StableHLO that every platform has: JAX carries assertions about
# sizes out itself, as it is told the sizes, and leaves none of them to a compiler.
PORTABLE_CALLS = ("shape_assertion",)
_CALL = re.compile(r'custom_call[^\n]*?(?:@([\w.$]+)|call_target_name = "([^"]*)")')


@dataclass(frozen=True)
class Program:
    """A program of a model.

    Attributes:
        name: of its file.
        function: of whole arrays.
        arguments: their shapes and types by their names, in order; "weights" is the first.
        results: their names.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    results: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.jax_export"


@dataclass(frozen=True)
class _Part:
    """A parameter, or that of one layer of a stack."""

    parameter: Any
    layer: int | None = None

    def values(self) -> np.ndarray:
        return np.asarray(self.parameter if self.layer is None else self.parameter[self.layer])


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths, as "layers/3/query"."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, _Part))
    return {
        "/".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path): leaf
        for path, leaf in leaves
    }


def programs(model: ModelConfig, compute: WeightType) -> list[Program]:
    """The programs of a model, of sizes that are not known yet.

    Args:
        model: sizes.
        compute: the type of matrices, activations and caches; logits are float32.
    """
    execution = replace(Execution(precision=Precision(compute=compute)), split_tokens=False)
    specs = cached.apart_specs(model)
    structure = jax.tree.structure(specs)
    names = list(_named(specs))
    weights = {
        name: jax.ShapeDtypeStruct(spec.shape, spec.held_in(compute))
        for name, spec in _named(specs).items()
    }
    # Of one scope, so that equal letters are equal sizes.
    b, n, s = export.symbolic_shape("b, n, s")

    def integers(*shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def params_of(weights: dict[str, Any]) -> Tree:
        return jax.tree.unflatten(structure, [weights[name] for name in names])

    def logits_of(hidden: Any, params: Tree) -> Any:
        head = decoder.head_matrix(params).astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)

    def drawn(hidden: Any, params: Tree, cache: Any) -> tuple[Any, Any, list[Any]]:
        logits = logits_of(hidden, params)
        return jnp.argmax(logits, -1).astype(jnp.int32), logits, jax.tree.leaves(cache)

    def forward(weights: dict[str, Any], tokens: Any) -> Any:
        params = params_of(weights)
        return logits_of(cached.read_all(params, tokens, model, execution)[0], params)

    def prefill(weights: dict[str, Any], tokens: Any, lengths: Any) -> Any:
        params = params_of(weights)
        hidden, cache = cached.read_all(params, tokens, model, execution)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return drawn(last, params, cached.in_windows(cache, lengths, model))

    # As prompts leave it: with a slot for each position, or for those of the layer's window.
    shapes = jax.eval_shape(
        lambda: cached.read_all(
            jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.held_in(compute)), specs),
            jnp.zeros((1, 1), jnp.int32),
            model,
            execution,
        )[1]
    )
    found, cache_structure = jax.tree.flatten(shapes)
    windows = [kept.window for kept in jax.tree.leaves(cached.kept_by_layer(model))]
    cache = [
        jax.ShapeDtypeStruct((b, *leaf.shape[1:-2], window or s, leaf.shape[-1]), leaf.dtype)
        for leaf, window in zip(found, windows, strict=True)
    ]

    def step(weights: dict[str, Any], tokens: Any, positions: Any, cache: list[Any]) -> Any:
        params = params_of(weights)
        hidden, kept = cached.forward_cached(
            params,
            (tokens[:, None], positions[:, None]),
            jax.tree.unflatten(cache_structure, cache),
            model,
            execution,
        )
        return drawn(hidden[:, 0], params, kept)

    text = {"weights": weights, "tokens": integers(b, MULTIPLE * n)}
    newest = {"tokens": integers(b), "positions": integers(b), "cache": cache}
    after = ("tokens", "logits", "cache")
    return [
        Program("forward", forward, text, ("logits",)),
        Program("prefill", prefill, {**text, "lengths": integers(b)}, after),
        Program("step", step, {"weights": weights, **newest}, after),
    ]


def lowered(program: Program, platforms: Sequence[str]) -> export.Exported:
    """A program that is the same for some platforms.

    Raises:
        UserError: it would call something that not every platform has.
    """
    with portable():
        try:
            found = export.export(jax.jit(program.function), platforms=platforms)(
                *program.arguments.values()
            )
        except ValueError as error:
            # JAX exports no calls that it does not know, and quotes them.
            if quoted := calls(str(error)):
                raise _not_portable(program, quoted) from None
            raise
    if strange := [name for name in calls(found.mlir_module()) if name not in PORTABLE_CALLS]:
        raise _not_portable(program, strange)
    return found


def calls(module: str) -> list[str]:
    """What the text of StableHLO calls outside of it, each name once."""
    return sorted({one or other for one, other in _CALL.findall(module)})


def _not_portable(program: Program, names: Sequence[str]) -> UserError:
    return UserError(
        f"--format stablehlo: the program {program.name!r} would call {', '.join(names)}, which "
        f"not every platform has; export with --format hf, and report the model"
    )


def write(
    out: Path, trained: Trained, platforms: Sequence[str], compute: WeightType
) -> dict[str, Any]:
    """Makes a folder of programs, weights, tokenizer, their description, and an example.

    It is made beside its place and renamed when it is complete.

    Args:
        out: the folder, new or empty.
        trained: the model; its parameters are copied one after the other.
        platforms: that the programs are for, by JAX's names.
        compute: the type of matrices, activations and caches.

    Returns:
        The description, as `program.json` holds it.

    Raises:
        UserError: the folder is in use or cannot be written, a package is missing, or a program
            would not run on all platforms.
    """
    if find_spec("flatbuffers") is None:  # which jax.export writes its files with
        raise UserError(
            f"--format stablehlo needs the flatbuffers package; {how_to_install('stablehlo')}"
        )
    out = out.expanduser().absolute()
    check_new(out)
    model = trained.model
    checked(trained.params, model, trained.tokenizer)
    found = programs(model, compute)
    with explaining(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch(out.parent, out.name) as hidden:
            folder = hidden / out.name
            folder.mkdir()
            for program in tracked(found, "writing programs"):
                (folder / program.file).write_bytes(lowered(program, platforms).serialize())
            entries = list(_entries(trained.params, model, compute))
            for _ in tracked(
                write_file(folder / WEIGHTS, entries), "writing weights", len(entries)
            ):
                pass
            about = {
                **_about(trained, platforms, compute),
                "programs": {program.name: _described(program) for program in found},
                "weights": {
                    entry.name: {"shape": list(entry.shape), "dtype": entry.dtype}
                    for entry in entries
                },
            }
            (folder / DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
            trained.tokenizer.save(folder / "tokenizer.json")
            example = Path(__file__).with_name("portable_example.py").read_text("utf-8")
            (folder / EXAMPLE).write_text(example, "utf-8")
            if out.exists():
                out.rmdir()
            folder.rename(out)
    return about


def _entries(params: Tree, model: ModelConfig, compute: WeightType) -> Iterator[Entry]:
    """The tensors of the file of weights, a layer's by themselves."""
    specs = _named(cached.apart_specs(model))
    whole = jax.tree.map(_Part, params)
    apart = cached.apart(model, whole, lambda part, layer: _Part(part.parameter, layer))
    for name, part in _named(apart).items():
        spec: ParamSpec = specs[name]
        dtype: Any = spec.held_in(compute).name
        yield Entry(name, spec.shape, dtype, part.values)


def _about(trained: Trained, platforms: Sequence[str], compute: str) -> dict[str, Any]:
    tokenizer: Tokenizer = trained.tokenizer
    return {
        "format": FORMAT,
        "name": trained.run.name,
        "step": trained.step,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "dtype": compute,
        "vocab_size": trained.model.vocab_size,
        "sequence_length": trained.sequence_length or None,
        "weights_file": WEIGHTS,
        "tokenizer_file": "tokenizer.json",
        "prompt": {
            "before": list(tokenizer.prefix),
            "after": list(tokenizer.suffix),
            "multiple_of": MULTIPLE,
        },
        "stop_ids": list(tokenizer.stops),
    }


def _described(program: Program) -> dict[str, Any]:
    def one(argument: Any) -> Any:
        return {"shape": [_size(each) for each in argument.shape], "dtype": argument.dtype.name}

    return {
        "file": program.file,
        "arguments": {
            name: "a dict of the tensors of weights_file by their names"
            if name == "weights"
            else jax.tree.map(one, argument)
            for name, argument in program.arguments.items()
        },
        "results": list(program.results),
    }


def _size(size: Any) -> int | str:
    """A size, or the letters that stand for one which is not fixed."""
    return size if isinstance(size, int) else str(size)
