"""The fused attention of cuDNN, with documents kept apart by their lengths and offsets.

cuDNN reads a batch of B sequences as B x M spans of tokens, each of which attends to itself alone:
"packed" layout. No mask exists, and memory is linear in the length of the sequences. M is fixed
when the program is compiled, so sequences with more than M documents are worked through in several
calls, of which each takes the next M.

Where sequences are split over context shards, a shard holds the queries of two chunks
(`braeburn.parallel.sequence`). Within a chunk documents attend as above, clipped at its borders.
What is left are the earlier tokens of the one document that a chunk begins in the middle of: one
more call for each chunk, without causality. Partial results are merged by their log-sum-exp, as in
ring attention.

JAX's public functions take no spans. This module binds the primitives behind them,
`_dot_product_attention_fwd_p` and `_dot_product_attention_bwd_p` of `jax._src.cudnn`, and works out
their operands itself: the function that does so in JAX before 0.11.1 gives wrong offsets where
several query heads share a key head.
"""

import functools
import inspect
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from braeburn.config import MeshConfig
from braeburn.layers.attention.backend import ATTENTION, sink_gradients, with_sinks
from braeburn.parallel.collectives import CONTEXT, axis_index
from braeburn.parallel.sequence import gather_sequence

# Documents of a sequence that one call takes. Each costs a call about 0.1 ms at 65,536 tokens, used
# or not, and each further call about 0.9 ms (H200, docs/log/gpus.md).
SPANS = 8
# The scope of the calls for documents beyond these, which are as many as the data ask for. What
# reads a compiled program counts none: it takes a sequence for one document.
FURTHER_DOCUMENTS = "further_documents"
# cuDNN is given offsets in elements, as int32.
MAX_ELEMENTS = 2**31 - 1
# Either makes XLA leave out what gives other bits from run to run.
DETERMINISTIC = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")


class Spans(NamedTuple):
    """M runs of neighbouring tokens in each of B sequences; runs that are absent have length 0.

    Starts do not decrease along M, also those of absent runs, and are at most the sequence's
    length.
    """

    start: Int[Array, "B M"]
    length: Int[Array, "B M"]


class Heads(NamedTuple):
    """What attention is computed of; N is a multiple of K."""

    query: Float[Array, "B t N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]


class Pairs(NamedTuple):
    """Spans of queries, and the span of keys that each of them attends to.

    Attributes:
        queries: M spans in each sequence.
        keys: as many.
        causal: whether a query sees only the keys of its span that are not behind it, both counted
            from the start of their spans; otherwise it sees all.
    """

    queries: Spans
    keys: Spans
    causal: bool


class Result(NamedTuple):
    """What a forward pass gave, and the gradient of its output.

    Attributes:
        output: [B, t, N, H].
        log_z: the log-sum-exp of each query's scores, float32 [B, t, N].
        output_gradient: in the shape and type of `output`.
    """

    output: Float[Array, "B t N H"]
    log_z: Float[Array, "B t N"]
    output_gradient: Float[Array, "B t N H"]


class Operands(NamedTuple):
    """The spans of one call as cuDNN reads them, int32.

    Attributes:
        query_lengths: tokens of each span of queries, [B, M].
        key_lengths: tokens of each span of keys, [B, M].
        query_offsets: elements from the first of the batch to each span, [B, M + 1].
        key_offsets: the same of keys.
    """

    query_lengths: Int[Array, "B M"]
    key_lengths: Int[Array, "B M"]
    query_offsets: Int[Array, "B edges"]
    key_offsets: Int[Array, "B edges"]


def packed_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K H"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B t N H"]:
    """Causal attention within segments, in float16 or bfloat16, scaled by 1/sqrt(H).

    Args:
        query: this context shard's queries; N is a multiple of K.
        key: its keys.
        value: its values.
        segment_ids: its tokens' segments, each of which is one run of neighbouring tokens in the
            whole sequence.
        mesh: resolved sizes; with several context shards the call is inside a `shard_map` over it.
        sinks: as of `Scope`.

    Returns:
        The attended values, in the type of `query`.
    """
    gathered: tuple[Array, ...] = ()
    if mesh.context > 1:
        gathered = tuple(gather_sequence(x, mesh) for x in (key, value, segment_ids))
    longest = (
        max(mesh.context * key.shape[1] * key.shape[2], query.shape[1] * query.shape[2])
        * query.shape[3]
    )
    rows = max(1, MAX_ELEMENTS // longest)
    outputs = []
    for first in range(0, query.shape[0], rows):
        *heads, ids = (x[first : first + rows] for x in (query, key, value, segment_ids))
        all_keys = tuple(x[first : first + rows] for x in gathered)
        outputs.append(_attention(Heads(*heads), sinks, ids, all_keys, mesh))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


def too_long(length: int, heads: int, head_dim: int) -> bool:
    """Whether offsets within one sequence of `length` tokens do not fit cuDNN's int32."""
    return length * heads * head_dim > MAX_ELEMENTS


def masked_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    visible: Bool[Array, "B t T"],
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B t N H"]:
    """Attention through cuDNN under a mask, for GPUs whose cuDNN takes no packed layout: a sequence
    at a time.

    The mask of one sequence takes 2 t T bytes; it has no gradient, which spares the backward pass
    as much again.

    Args:
        query: float16 or bfloat16; N is a multiple of K.
        key: of the same type.
        value: of the same type.
        visible: whether a query sees a key; each query sees at least one.
        sinks: as of `Scope`.

    Returns:
        The attended values, in the type of `query`.
    """

    def one_sequence(row: tuple[Array, ...]) -> Array:
        *heads, seen = (x[None] for x in row)
        return _masked(Heads(*heads), seen, sinks)[0]

    return lax.map(one_sequence, (query, key, value, visible))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    heads: Heads,
    sinks: Array | None,
    segment_ids: Array,
    gathered: tuple[Array, ...],
    mesh: MeshConfig,
) -> Array:
    """`packed_attention`, given the keys, values and segments of all context shards, or () where
    there is one.
    """
    return _attention_forward(heads, sinks, segment_ids, gathered, mesh)[0]


def _attention_forward(
    heads: Heads,
    sinks: Array | None,
    segment_ids: Array,
    gathered: tuple[Array, ...],
    mesh: MeshConfig,
) -> tuple[Array, tuple[Any, ...]]:
    query = heads.query
    documents = find_documents(segment_ids, halves=mesh.context > 1)

    def attend(call: Array | int) -> tuple[Array, Array]:
        spans = documents.spans(call)
        return _forward(heads, Pairs(spans, spans, causal=True))

    def one_more(call: Array, result: tuple[Array, Array]) -> tuple[Array, Array]:
        (output, log_z), own = attend(call), documents.tokens(call)
        return jnp.where(own[..., None, None], output, result[0]), jnp.where(
            own[..., None], log_z, result[1]
        )

    # What a call leaves at the tokens of no span is undefined; each token is of one call's spans.
    first = attend(0)
    with jax.named_scope(FURTHER_DOCUMENTS):
        output, log_z = lax.fori_loop(1, documents.calls, one_more, first)
    for pairs in _earlier_spans(segment_ids, gathered, mesh):
        more = _forward(Heads(query, *gathered[:2]), pairs)
        output, log_z = _merge((output, log_z), more, _inside(pairs.queries, query.shape[1]))
    if sinks is not None:
        output, log_z = with_sinks(output, log_z, sinks.astype(log_z.dtype))
    # Named here, so that a backward pass that keeps the result need not attend again for what
    # belongs to it.
    output, log_z = checkpoint_name(output, ATTENTION), checkpoint_name(log_z, ATTENTION)
    return output, (heads, sinks, segment_ids, gathered, output, log_z)


def _attention_backward(
    mesh: MeshConfig, residuals: tuple[Any, ...], output_gradient: Array
) -> tuple[Any, ...]:
    heads, sinks, segment_ids, gathered, output, log_z = residuals
    query, key, _ = heads
    result = Result(output, log_z, output_gradient)
    documents = find_documents(segment_ids, halves=mesh.context > 1)

    def differentiate(call: Array | int) -> tuple[Array, Array, Array]:
        spans = documents.spans(call)
        return _backward(heads, Pairs(spans, spans, causal=True), result)

    def one_more(call: Array, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        new, own = differentiate(call), documents.tokens(call)
        return tuple(
            jnp.where(own[..., None, None], x, y) for x, y in zip(new, gradients, strict=True)
        )

    gradients = differentiate(0)
    with jax.named_scope(FURTHER_DOCUMENTS):
        gradients = lax.fori_loop(1, documents.calls, one_more, gradients)
    of_sinks = None if sinks is None else _of_sinks(sinks, result)
    if not gathered:
        return Heads(*gradients), of_sinks, None, ()

    query_gradient = gradients[0].astype(jnp.float32)
    sums = [jnp.zeros(x.shape, jnp.float32) for x in gathered[:2]]
    for pairs in _earlier_spans(segment_ids, gathered, mesh):
        new = _backward(Heads(query, *gathered[:2]), pairs, result)
        is_own = _inside(pairs.queries, query.shape[1])
        visible = _inside(pairs.keys, gathered[0].shape[1])
        query_gradient += jnp.where(is_own[..., None, None], new[0], 0)
        sums = [
            total + jnp.where(visible[..., None, None], x, 0)
            for total, x in zip(sums, new[1:], strict=True)
        ]
    further = tuple(total.astype(key.dtype) for total in sums)
    own = Heads(query_gradient.astype(query.dtype), *gradients[1:])
    return own, of_sinks, None, (*further, None)


def _of_sinks(sinks: Float[Array, " N"], result: Result) -> Float[Array, " N"]:
    """The gradient of the sinks, given what an attention that has them gave."""
    output, log_z, output_gradient = result
    mean = jnp.sum(output.astype(jnp.float32) * output_gradient, axis=-1)
    each = sink_gradients(sinks.astype(jnp.float32), log_z, mean)
    return jnp.sum(each, axis=(0, 1)).astype(sinks.dtype)


_attention.defvjp(_attention_forward, _attention_backward)


class Documents(NamedTuple):
    """Where the documents of B sequences begin.

    Attributes:
        number: which of its sequence's documents a token is of, int32 [B, t], from 0.
        first: the first token of each document, int32 [B, t + SPANS + 1]; t where there is none.
        calls: how many calls take the documents of every sequence, int32.
    """

    number: Array
    first: Array
    calls: Array

    def spans(self, call: Array | int) -> Spans:
        """The documents that a call takes."""
        edges = lax.dynamic_slice_in_dim(self.first, call * SPANS, SPANS + 1, axis=1)
        return Spans(edges[:, :-1], jnp.diff(edges))

    def tokens(self, call: Array | int) -> Bool[Array, "B t"]:
        """Which tokens are of the documents that a call takes."""
        return self.number // SPANS == call


def find_documents(segment_ids: Int[Array, "B t"], *, halves: bool = False) -> Documents:
    """The documents of sequences; with `halves`, one that crosses the middle counts as two."""
    batch, length = segment_ids.shape
    begins = jnp.concatenate(
        [jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    if halves:
        begins = begins.at[:, length // 2].set(True)
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    rows = jnp.arange(batch)[:, None]
    first = jnp.full((batch, length + SPANS + 1), length, jnp.int32)
    first = first.at[rows, number].min(jnp.arange(length, dtype=jnp.int32))
    return Documents(number, first, jnp.max(number) // SPANS + 1)


def _earlier_spans(
    segment_ids: Int[Array, "B t"], gathered: tuple[Array, ...], mesh: MeshConfig
) -> list[Pairs]:
    """For each chunk of this context shard, the queries that see keys before it, and those keys in
    the whole sequence.

    They are of one document. A call for each chunk: the spans of keys of two chunks overlap where
    one document reaches over both, and cuDNN writes the gradients of a span without regard to other
    spans.
    """
    if not gathered:
        return []
    batch, length = segment_ids.shape
    half, shard = length // 2, axis_index(CONTEXT, mesh)
    positions = jnp.arange(gathered[2].shape[1])
    found = []
    for start, chunk in ((0, shard), (half, 2 * mesh.context - 1 - shard)):
        first = segment_ids[:, start : start + 1]
        earlier = jnp.sum(
            (gathered[2] == first) & (positions < chunk * half), axis=1, dtype=jnp.int32
        )
        continued = jnp.sum(segment_ids[:, start : start + half] == first, axis=1, dtype=jnp.int32)
        queries = _one_span(
            jnp.full(batch, start, jnp.int32), jnp.where(earlier > 0, continued, 0), length
        )
        keys = _one_span(chunk * half - earlier, earlier, positions.size)
        found.append(Pairs(queries, keys, causal=False))
    return found


def _one_span(start: Int[Array, " B"], length: Int[Array, " B"], end: int) -> Spans:
    """A single span of each sequence, and an absent one: packed layout needs two."""
    absent = jnp.full_like(start, end)
    return Spans(
        jnp.stack([start, absent], axis=1), jnp.stack([length, jnp.zeros_like(length)], axis=1)
    )


def _inside(spans: Spans, length: int) -> Bool[Array, "B T"]:
    """Which of a sequence's `length` tokens are in one of its spans."""
    positions = jnp.arange(length)[:, None]
    starts, stops = spans.start[:, None], (spans.start + spans.length)[:, None]
    return jnp.any((positions >= starts) & (positions < stops), axis=2)


def _merge(
    old: tuple[Array, Array], new: tuple[Array, Array], present: Bool[Array, "B t"]
) -> tuple[Float[Array, "B t N H"], Float[Array, "B t N"]]:
    """Attention over two sets of keys from that over each: results and log-sum-exps; `new` counts
    where `present`.
    """
    (output, log_z), (more, more_log_z) = old, new
    more_log_z = jnp.where(present[..., None], more_log_z, -jnp.inf)
    joint = jnp.logaddexp(log_z, more_log_z)
    more = jnp.where(present[..., None, None], more, 0)
    wide = (
        output * jnp.exp(log_z - joint)[..., None] + more * jnp.exp(more_log_z - joint)[..., None]
    )
    return wide.astype(output.dtype), joint


def operands(query: Array, key: Array, queries: Spans, keys: Spans) -> Operands:
    """Lengths, and offsets in elements from the first of the batch, as cuDNN reads them.

    Of the [B, M + 1] offsets it reads the first B M + 1, row after row: one for each span, and the
    end.

    Args:
        query: [B, t, N, H], of which only the shape matters.
        key: [B, T, K, H], of which only the shape matters.
        queries: M spans of each sequence.
        keys: those of the keys that each of them attends to.

    Returns:
        What a call is given beside the arrays.
    """

    def offsets(array: Array, spans: Spans) -> Int[Array, "B edges"]:
        batch, length, heads, head_dim = array.shape
        tokens = spans.start + jnp.arange(batch, dtype=jnp.int32)[:, None] * length
        flat = jnp.concatenate([tokens.reshape(-1), jnp.full(batch, batch * length, jnp.int32)])
        return flat.reshape(batch, -1) * (heads * head_dim)

    return Operands(queries.length, keys.length, offsets(query, queries), offsets(key, keys))


def _forward(heads: Heads, pairs: Pairs) -> tuple[Float[Array, "B t N H"], Float[Array, "B t N"]]:
    """Each span of queries attends to its span of keys: the result and the log-sum-exp, undefined
    outside spans.
    """
    queries = pairs.queries
    given = operands(heads.query, heads.key, queries, pairs.keys)
    output, statistics = forward_call(heads, given, pairs.causal)
    batch, length, num_heads, _ = heads.query.shape
    # [B M, N, t] for the tokens of each span, counted from its first.
    statistics = statistics.reshape(batch, -1, num_heads, length)
    positions = jnp.arange(length)
    span = jnp.sum(positions[:, None] >= (queries.start + queries.length)[:, None, :-1], axis=2)
    place = positions - jnp.take_along_axis(queries.start, span, axis=1)
    log_z = statistics[jnp.arange(batch)[:, None], span, :, jnp.clip(place, 0, length - 1)]
    return output, log_z


def _backward(heads: Heads, pairs: Pairs, result: Result) -> tuple[Array, Array, Array]:
    """Gradients for queries, keys and values of what the spans contribute, undefined outside them.

    Args:
        heads: queries, keys and values.
        pairs: the spans.
        result: of the attention over all keys, not over those of the spans alone.
    """
    output, log_z, output_gradient = result
    batch, length, num_heads, _ = heads.query.shape
    starts = pairs.queries.start[..., None]
    tokens = jnp.clip(starts + jnp.arange(length), 0, length - 1)  # [B, M, t]
    statistics = jnp.moveaxis(log_z[jnp.arange(batch)[:, None, None], tokens], 3, 2)
    statistics = statistics.reshape(-1, num_heads, length)
    given = operands(heads.query, heads.key, pairs.queries, pairs.keys)
    return backward_call(heads, given, pairs.causal, statistics, output, output_gradient)


def forward_call(
    heads: Heads, given: Operands, causal: bool
) -> tuple[Float[Array, "B t N H"], Float[Array, "spans N t"]]:
    """One call of cuDNN: its output, and the log-sum-exp of each span's queries, float32."""
    fused = _fused()
    unused = jnp.zeros(0, heads.query.dtype)
    mask = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    settings = _settings(heads.query, mask, bias=False, forward=True)
    arrays = (*heads, unused, *given, unused, unused)
    return tuple(fused._dot_product_attention_fwd_p.bind(*arrays, **settings))


def backward_call(
    heads: Heads,
    given: Operands,
    causal: bool,
    statistics: Float[Array, "spans N t"],
    output: Float[Array, "B t N H"],
    output_gradient: Float[Array, "B t N H"],
) -> tuple[Float[Array, "B t N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """The call for the gradients of what `forward_call` computes.

    Args:
        heads: what the forward call was given.
        given: what it was given.
        causal: as it was given.
        statistics: the log-sum-exp of each span's queries, float32, over all keys that they see.
        output: of the forward pass.
        output_gradient: its gradient, in the same type.

    Returns:
        The gradients of queries, keys and values, in the types of these.
    """
    fused = _fused()
    unused = jnp.zeros(0, heads.query.dtype)
    mask = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    settings = _settings(heads.query, mask, bias=False, forward=False)
    arrays = (*heads, unused, *given, unused, unused, statistics, output, output_gradient)
    return tuple(fused._dot_product_attention_bwd_p.bind(*arrays, **settings))


@functools.cache
def _fused() -> Any:
    from jax._src.cudnn import (
        fused_attention_stablehlo as fused,
    )  # seconds of imports that only GPUs need

    describe = fused.create_dot_product_attention_backend_config_base

    @functools.wraps(describe)
    def described(*arguments: Any, **settings: Any) -> dict[str, Any]:
        """What JAX tells XLA of a call, and whether its gradients must be the same bits in every
        run.

        XLA itself would add that after it has filed the compiled call under what it was told, and
        then not find it: its programs with `--xla_gpu_deterministic_ops` end in
        "raw_hash_map<>::at" (github.com/openxla/xla/pull/46500).
        """
        told: dict[str, Any] = describe(*arguments, **settings)
        if (
            inspect.signature(describe).bind(*arguments, **settings).arguments["is_bwd"]
            and _deterministic()
        ):
            told["cudnn_fmha_backend_config"]["force_deterministic"] = True
        return told

    fused.create_dot_product_attention_backend_config_base = described
    return fused


def _deterministic() -> bool:
    """Whether XLA_FLAGS asks for programs that give the same bits in every run; the last mention of
    a flag counts.
    """
    asked = dict.fromkeys(DETERMINISTIC, False)
    for flag in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = flag.partition("=")
        if name in asked:
            asked[name] = value.lower() in ("", "true", "1")
    return any(asked.values())


def _settings(query: Array, mask_type: Any, *, bias: bool, forward: bool) -> dict[str, Any]:
    """The parameters of JAX's primitives for cuDNN's attention."""
    fused = _fused()
    lowering = fused._dot_product_attention_fwd_cuda_lowering
    settings = {
        "scale": query.shape[3] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        # Whether there is a bias, and whether its gradient is wanted.
        "variadic_args": (bias, False),
        "mask_type": mask_type,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    # From JAX 0.12 on.
    further = ("score_mod_name", "score_mod_jaxpr")
    settings |= {name: None for name in further if name in inspect.signature(lowering).parameters}
    return settings | ({"is_training": True} if forward else {})


@jax.custom_vjp
def _masked(heads: Heads, visible: Array, sinks: Array | None) -> Array:
    return _masked_forward(heads, visible, sinks)[0]


def _bias(query: Array, visible: Bool[Array, "B t T"]) -> Array:
    return jnp.where(visible, 0, _fused().get_large_negative_number(query.dtype)).astype(
        query.dtype
    )[:, None]


def _masked_forward(
    heads: Heads, visible: Array, sinks: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    output, statistics = masked_forward_call(heads, visible)
    if sinks is not None:
        output, log_z = with_sinks(
            output, jnp.swapaxes(statistics, 1, 2), sinks.astype(statistics.dtype)
        )
        statistics = jnp.swapaxes(log_z, 1, 2)
    output, statistics = checkpoint_name(output, ATTENTION), checkpoint_name(statistics, ATTENTION)
    return output, (heads, visible, sinks, statistics, output)


def _masked_backward(residuals: tuple[Any, ...], output_gradient: Array) -> tuple[Any, ...]:
    heads, visible, sinks, statistics, output = residuals
    result = Result(output, jnp.swapaxes(statistics, 1, 2), output_gradient)
    of_sinks = None if sinks is None else _of_sinks(sinks, result)
    gradients = masked_backward_call(heads, visible, statistics, output, output_gradient)
    return Heads(*gradients), None, of_sinks


def masked_forward_call(
    heads: Heads, visible: Bool[Array, "B t T"]
) -> tuple[Float[Array, "B t N H"], Float[Array, "B N t"]]:
    """One call of cuDNN under a mask: its output, and the log-sum-exp of queries, float32."""
    fused, unused = _fused(), jnp.zeros(0, heads.query.dtype)
    settings = _settings(heads.query, fused.MaskType.NO_MASK, bias=True, forward=True)
    arrays = (*heads, _bias(heads.query, visible), *[unused] * 6)
    return tuple(fused._dot_product_attention_fwd_p.bind(*arrays, **settings))


def masked_backward_call(
    heads: Heads,
    visible: Bool[Array, "B t T"],
    statistics: Float[Array, "B N t"],
    output: Float[Array, "B t N H"],
    output_gradient: Float[Array, "B t N H"],
) -> tuple[Float[Array, "B t N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """The call for the gradients of what `masked_forward_call` computes.

    Args:
        heads: what the forward call was given.
        visible: what it was given.
        statistics: the log-sum-exp of queries, float32.
        output: of the forward pass.
        output_gradient: its gradient, in the same type.

    Returns:
        The gradients of queries, keys and values, in the types of these.
    """
    fused, unused = _fused(), jnp.zeros(0, heads.query.dtype)
    settings = _settings(heads.query, fused.MaskType.NO_MASK, bias=True, forward=False)
    bias = _bias(heads.query, visible)
    arrays = (*heads, bias, *[unused] * 6, statistics, output, output_gradient)
    return tuple(fused._dot_product_attention_bwd_p.bind(*arrays, **settings))


_masked.defvjp(_masked_forward, _masked_backward)
