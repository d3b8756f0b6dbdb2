"""The decoder, top to bottom: embedding, layers of attention and SwiGLU, final norm.

Shapes are named by letters: B sequences, T positions, D d_model, N query heads, K key-value heads,
H head_dim, F ffn_dim, V vocabulary, L layers.

On a mesh of several devices this is the program of each, over its part of everything
(`braeburn.parallel`): its sequences, its piece of each, its heads, FFN units and vocabulary.
Between attention and FFN, where every token is for itself, the tensor shards share out the tokens
(sequence parallelism, arXiv 2205.05198).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from braeburn.config import (
    NO_OFFLOAD,
    ONE_DEVICE,
    MeshConfig,
    ModelConfig,
    Offload,
    Precision,
    Remat,
)
from braeburn.layers import rope
from braeburn.layers.attention import attention, cached_attention
from braeburn.layers.linear import linear
from braeburn.layers.spec import LAYERS, ParamSpec, Tree
from braeburn.layers.weights import gathered
from braeburn.parallel.collectives import (
    FSDP,
    TENSOR,
    all_gather,
    all_to_all,
    axis_index,
    gather_tokens,
    scatter_tokens,
)

# (query, key, value, the layer's state) -> (attended values, the layer's new state); the state is a
# cache or None.
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

# (logical axis, activations whose units it counts, the layer's state) -> the layer's new state.
Observe = Callable[[str, Array, Any], Any]

KEEP_ALL = Remat(policy="none")


def param_specs(model: ModelConfig) -> Tree:
    """The specs of every parameter of a model."""
    sizes = {
        "vocab": model.vocab_size,
        "embed": model.d_model,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "ffn": model.ffn_dim,
        LAYERS: model.num_layers,
    }

    def matrix(*axes: str, fan_in: tuple[str, ...]) -> ParamSpec:
        axes = (LAYERS, *axes)
        return ParamSpec(tuple(sizes[axis] for axis in axes), axes, "matrix", fan_in)

    def norm(*axes: str) -> ParamSpec:
        return ParamSpec(tuple(sizes[axis] for axis in axes), axes, "norm")

    # Rows as long as d_model give logits of unit variance, also where the embedding doubles as the
    # head.
    embedding = ParamSpec(
        (model.vocab_size, model.d_model), ("vocab", "embed"), "embedding", ("embed",)
    )
    layers = {
        "attention_norm": norm(LAYERS, "embed"),
        "query": matrix("embed", "heads", "head_dim", fan_in=("embed",)),
        "key": matrix("embed", "kv_heads", "head_dim", fan_in=("embed",)),
        "value": matrix("embed", "kv_heads", "head_dim", fan_in=("embed",)),
        "attention_output": matrix("heads", "head_dim", "embed", fan_in=("heads", "head_dim")),
        "ffn_norm": norm(LAYERS, "embed"),
        "gate": matrix("embed", "ffn", fan_in=("embed",)),
        "up": matrix("embed", "ffn", fan_in=("embed",)),
        "down": matrix("ffn", "embed", fan_in=("ffn",)),
    }
    if model.qk_norm:
        layers |= {"query_norm": norm(LAYERS, "head_dim"), "key_norm": norm(LAYERS, "head_dim")}
    specs: Tree = {"embedding": embedding, "layers": layers, "final_norm": norm("embed")}
    if not model.tied_embeddings:
        specs["head"] = embedding
    return specs


def head_matrix(params: Tree) -> Float[Array, "V D"]:
    """The matrix that turns final hidden states into logits: the embedding itself where they are
    tied.
    """
    return params["head"] if "head" in params else params["embedding"]


def rms_norm(
    x: Float[Array, "*S D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "*S D"]:
    """Root-mean-square normalisation over the last dimension in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normal * scale).astype(x.dtype)


def embed(
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    precision: Precision,
    mesh: MeshConfig,
) -> Float[Array, "B T D"]:
    """The rows of the embedding for this device's tokens.

    The table stays split. Each device looks up, in the part that it has, the tokens of all that
    share the rest of the table with it, and the rows are exchanged: far less than the table.
    """
    tokens = all_gather(tokens, FSDP, 0, mesh)
    if mesh.tensor == 1:
        x_BTD = embedding[tokens].astype(precision.compute)
    else:
        own = tokens - axis_index(TENSOR, mesh) * embedding.shape[0]
        x_BTD = (
            embedding.at[own]
            .get(mode="fill", fill_value=0, wrap_negative_indices=False)
            .astype(precision.compute)
        )
    return all_to_all(scatter_tokens(x_BTD, mesh), FSDP, 0, 2, mesh)


def unobserved(axis: str, activations: Array, state: Any) -> Any:
    """The state as it is: nobody looks."""
    return state


def layer(
    x_BTD: Float[Array, "B T D"],
    weights: Tree,
    state: Any,
    rotation: tuple[Array, Array],
    attend: Attend,
    model: ModelConfig,
    mesh: MeshConfig,
    observe: Observe = unobserved,
) -> tuple[Float[Array, "B T D"], Any]:
    """One pre-norm block: attention, then SwiGLU, each added to the residual stream.

    `observe` sees what each block reads ("embed", [B, T, D], twice), each head's result ("heads",
    [B, T, N, H]) and the FFN's hidden units ("ffn", [B, T, F]).
    """
    dtype, epsilon = x_BTD.dtype, model.norm_epsilon

    with jax.named_scope("attention"):
        normal_BTD = gather_tokens(rms_norm(x_BTD, weights["attention_norm"], epsilon), mesh)
        state = observe("embed", normal_BTD, state)
        query_BTNH = jnp.einsum("BTD,DNH->BTNH", normal_BTD, weights["query"].astype(dtype))
        key_BTKH = jnp.einsum("BTD,DKH->BTKH", normal_BTD, weights["key"].astype(dtype))
        value_BTKH = jnp.einsum("BTD,DKH->BTKH", normal_BTD, weights["value"].astype(dtype))
        if model.qk_norm:
            query_BTNH = rms_norm(query_BTNH, weights["query_norm"], epsilon)
            key_BTKH = rms_norm(key_BTKH, weights["key_norm"], epsilon)
        query_BTNH = checkpoint_name(rope.rotate(query_BTNH, *rotation), "query")
        key_BTKH = checkpoint_name(rope.rotate(key_BTKH, *rotation), "key")
        value_BTKH = checkpoint_name(value_BTKH, "value")
        attended_BTNH, state = attend(query_BTNH, key_BTKH, value_BTKH, state)
        state = observe("heads", attended_BTNH, state)
        output_BTD = jnp.einsum(
            "BTNH,NHD->BTD", attended_BTNH, weights["attention_output"].astype(dtype)
        )
        output_BTD = scatter_tokens(output_BTD, mesh)
        x_BTD = x_BTD + checkpoint_name(output_BTD, "attention_output")

    with jax.named_scope("ffn"):
        normal_BTD = gather_tokens(rms_norm(x_BTD, weights["ffn_norm"], epsilon), mesh)
        state = observe("embed", normal_BTD, state)
        gate_BTF = checkpoint_name(linear(normal_BTD, weights["gate"].astype(dtype)), "ffn_gate")
        up_BTF = checkpoint_name(linear(normal_BTD, weights["up"].astype(dtype)), "ffn_up")
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        state = observe("ffn", hidden_BTF, state)
        output_BTD = scatter_tokens(linear(hidden_BTF, weights["down"].astype(dtype)), mesh)
        return x_BTD + checkpoint_name(output_BTD, "ffn_output"), state


def decoder(
    params: Tree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Attend,
    states: Any,
    model: ModelConfig,
    precision: Precision,
    remat: Remat = KEEP_ALL,
    offload: Offload = NO_OFFLOAD,
    mesh: MeshConfig = ONE_DEVICE,
    observe: Observe = unobserved,
) -> tuple[Float[Array, "B T D"], Any]:
    """Hidden states after the final norm, of this tensor shard's tokens, and each layer's new
    state, stacked.
    """
    specs = param_specs(model)
    # The norms of all layers at once: they are small. A layer's matrices are gathered as it is
    # reached, and again for its backward pass.
    params = gathered(params, specs, ("norm",), precision, mesh)
    frequencies = rope.inverse_frequencies(model.head_dim, model.rope_base, model.rope_scaling)
    rotation = rope.rotation(positions, frequencies)

    def body(x_BTD: Array, weights_and_state: tuple[Tree, Any]) -> tuple[Array, Any]:
        weights, state = weights_and_state
        weights = gathered(weights, specs["layers"], ("matrix",), precision, mesh)
        return layer(x_BTD, weights, state, rotation, attend, model, mesh, observe)

    body = rematerialized(body, remat, offload, mesh)
    with jax.named_scope("embedding"):
        x_BTD = embed(params["embedding"], tokens, precision, mesh)
    stacked = (params["layers"], states)
    if model.scan_layers:
        x_BTD, states = jax.lax.scan(body, x_BTD, stacked)
    else:
        new_states = []
        for one_layer in unstack(stacked, model.num_layers):
            x_BTD, state = body(x_BTD, one_layer)
            new_states.append(state)
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *new_states)
    with jax.named_scope("final_norm"):
        return rms_norm(x_BTD, params["final_norm"], model.norm_epsilon), states


def unstack(stacked: Any, num_layers: int) -> list[Any]:
    """The trees of single layers.

    Split, not indexed: the gradient is then one concatenation and not L paddings.
    """
    leaves, structure = jax.tree.flatten(stacked)
    split = [jax.lax.split(leaf, [1] * num_layers, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [jnp.squeeze(parts[i], 0) for parts in split])
        for i in range(num_layers)
    ]


def rematerialized(body: Callable, remat: Remat, offload: Offload, mesh: MeshConfig) -> Callable:
    """A layer that keeps for the backward pass only what the policy says, and never its gathered
    weights.
    """
    policies = jax.checkpoint_policies
    if offload.activations:
        kept = [name for name in remat.names if name not in offload.activations]
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=list(offload.activations),
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif remat.policy == "save_named":
        policy = policies.save_only_these_names(*remat.names)
    elif remat.policy == "full":
        policy = policies.nothing_saveable
    elif mesh.fsdp == 1:
        return body
    else:

        def policy(primitive: Any, *_: Any, **settings: Any) -> bool:
            return not (primitive.name == "all_gather" and FSDP in settings["axis_name"])

    return jax.checkpoint(body, policy=policy)


def forward(
    params: Tree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    model: ModelConfig,
    precision: Precision,
    remat: Remat = KEEP_ALL,
    offload: Offload = NO_OFFLOAD,
    mesh: MeshConfig = ONE_DEVICE,
) -> Float[Array, "B T D"]:
    """Final hidden states of packed sequences; a token attends to the earlier ones of its own
    segment.
    """

    def attend(query: Array, key: Array, value: Array, state: None) -> tuple[Array, None]:
        return attention(query, key, value, segment_ids, mesh), state

    hidden, _ = decoder(
        params, tokens, positions, attend, None, model, precision, remat, offload, mesh
    )
    return gather_tokens(hidden, mesh)


def empty_cache(
    model: ModelConfig, batch: int, length: int, precision: Precision
) -> tuple[Array, Array]:
    """Keys and values of `length` positions for every layer, [L, B, length, K, H]."""
    shape = (model.num_layers, batch, length, model.num_kv_heads, model.head_dim)
    return jnp.zeros(shape, precision.compute), jnp.zeros(shape, precision.compute)


def forward_cached(
    params: Tree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: tuple[Array, Array],
    model: ModelConfig,
    precision: Precision,
) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    """Final hidden states of new tokens and the cache with their keys and values at their
    positions.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]

    def attend(
        query: Array, key: Array, value: Array, state: tuple[Array, Array]
    ) -> tuple[Array, Any]:
        keys, values = state
        keys, values = keys.at[rows, positions].set(key), values.at[rows, positions].set(value)
        return cached_attention(query, keys, values, positions), (keys, values)

    return decoder(params, tokens, positions, attend, cache, model, precision)
