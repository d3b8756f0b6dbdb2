"""Generation: the cache changes nothing, rows do not see each other, and sampling follows the
filtered distribution.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.config import Execution, ModelConfig, Precision, RopeScaling
from braeburn.errors import UserError
from braeburn.evaluate.decoding import inference, last_logits, programs
from braeburn.evaluate.generate import Generation, generate, ready, round_up
from braeburn.evaluate.sampling import Sampling, choose, filter_logits
from braeburn.layers.spec import ParamSpec, Tree, map_specs
from braeburn.models import cached, decoder
from braeburn.parallel.layout import one_device

FLOAT32 = Precision(compute="float32")
SIZES = {
    "vocab_size": 101,
    "d_model": 48,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 64,
}
QWEN3 = ModelConfig(**SIZES)
LLAMA = ModelConfig(
    **SIZES,
    qk_norm=False,
    tied_embeddings=False,
    rope_scaling=RopeScaling(original_max_position_embeddings=32),
)
models = pytest.mark.parametrize("model", [QWEN3, LLAMA], ids=["qwen3", "llama"])
SAMPLING = [field.name for field in dataclasses.fields(Sampling)]
PROMPTS = [[5, 17, 3], [42], list(range(1, 71)), [9] * 12]


def make_params(model: ModelConfig) -> Tree:
    """Random weights, large enough in the layers for text that does not repeat itself; drawn
    without compiling.
    """
    generator = np.random.default_rng(0)

    def draw(_: str, spec: ParamSpec) -> np.ndarray:
        if spec.role == "norm":
            return generator.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        scale = spec.shape[-1] ** -0.5 if spec.role == "embedding" else 0.4
        return (generator.standard_normal(spec.shape) * scale).astype(np.float32)

    return jax.tree.map(jnp.asarray, map_specs(draw, decoder.param_specs(model)))


@jax.jit(static_argnames="model")
def _logits(params: Tree, tokens: jax.Array, model: ModelConfig) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = decoder.forward(
        params, (tokens, positions, jnp.zeros_like(tokens)), model, Execution(precision=FLOAT32)
    )
    return jnp.einsum("TD,VD->TV", hidden[0], decoder.head_matrix(params))


def all_logits(params: Tree, tokens: list[int], model: ModelConfig) -> np.ndarray:
    """Logits after every token, without a cache; padded on the right, where causality makes it
    harmless.
    """
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_logits(params, padded, model))[: len(tokens)]


def greedy(
    params: Tree, prompts: list[list[int]], model: ModelConfig, **options
) -> list[list[int]]:
    options = {"max_new_tokens": 40, "temperature": 0.0} | options
    drawn = {name: options.pop(name) for name in SAMPLING if name in options}
    return generate(
        params, prompts, model, FLOAT32, Generation(sampling=Sampling(**drawn), **options)
    )


@models
def test_the_cache_gives_what_recomputing_gives(model):
    params = make_params(model)
    for prompt, new in zip(PROMPTS, greedy(params, PROMPTS, model), strict=True):
        logits = all_logits(params, prompt + new, model)[len(prompt) - 1 : -1]
        assert new == logits.argmax(-1).tolist()
        assert len(set(new)) > 3  # not one token over and over


@models
def test_each_step_of_the_cache_gives_the_same_logits(model):
    params = make_params(model)
    tokens = PROMPTS[2]
    expected = all_logits(params, tokens, model)
    layout = one_device(decoder.param_specs(model), FLOAT32)
    at_hand, execution = ready(params, model, layout), inference(layout.execution)

    @jax.jit
    def read(rows, lengths):
        last, _ = cached.read(at_hand.params, rows, lengths, 192, model, execution)
        return last_logits(at_hand.params, last, execution)

    for length in (1, 37, 70):
        rows = np.zeros((4, 128), np.int32)
        rows[0, :length] = tokens[:length]
        lengths = np.array([length, 1, 1, 1], np.int32)
        np.testing.assert_allclose(read(rows, lengths)[0], expected[length - 1], atol=1e-5)


@models
def test_prompts_together_continue_as_each_alone(model):
    params = make_params(model)
    together = greedy(params, PROMPTS, model)
    assert together[:1] == greedy(params, PROMPTS[:1], model)
    for row, prompt in zip(
        together, PROMPTS, strict=True
    ):  # in the same shape, which needs no other program
        assert row == greedy(params, [[1], prompt, [2] * 90, [3, 4]], model)[1]


def test_sampling_does_not_depend_on_the_other_rows():
    params = make_params(QWEN3)
    generation = Generation(30, Sampling(temperature=0.9, top_k=50, top_p=0.95), seed=11)

    def drawn(prompts, generation=generation):
        return generate(params, prompts, QWEN3, FLOAT32, generation)

    first = drawn(PROMPTS)
    assert first == drawn(PROMPTS)
    others = drawn([[1] * 90, PROMPTS[1], [2, 3], PROMPTS[3]])
    assert (others[1], others[3]) == (first[1], first[3])
    assert drawn(PROMPTS[:1]) == first[:1]
    assert drawn(PROMPTS, dataclasses.replace(generation, seed=12)) != first
    same_prompt = drawn([[7] * 65] * 4)
    assert len(set(map(tuple, same_prompt))) == 4


def test_rows_are_cut_at_their_own_stop():
    params = make_params(QWEN3)
    whole = greedy(params, PROMPTS, QWEN3)
    stop = whole[0][5]
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert greedy(params, PROMPTS, QWEN3, stop_ids=[stop]) == expected
    assert len({len(row) for row in expected}) > 1
    assert greedy(params, PROMPTS[:1], QWEN3, stop_ids=[whole[0][0]]) == [[]]


@pytest.mark.parametrize("more", [0, 9])
def test_any_of_several_tokens_stops_a_row(more):
    params = make_params(QWEN3)
    whole = greedy(params, PROMPTS, QWEN3)
    stops = [whole[0][5], whole[1][3], whole[2][7]] + [200 + i for i in range(more)]
    ends = [
        min([row.index(stop) for stop in stops if stop in row], default=len(row)) for row in whole
    ]
    assert greedy(params, PROMPTS, QWEN3, stop_ids=stops) == [
        row[:end] for row, end in zip(whole, ends, strict=True)
    ]
    assert len(set(ends)) > 2


@pytest.mark.parametrize("count", [1, 64, 65])
def test_the_limit_is_exact(count):
    params = make_params(QWEN3)
    assert [len(row) for row in greedy(params, PROMPTS, QWEN3, max_new_tokens=count)] == [count] * 4


def test_other_prompts_and_limits_reuse_the_compiled_programs():
    params = make_params(QWEN3)
    greedy(params, PROMPTS, QWEN3, max_new_tokens=8)
    layout = one_device(decoder.param_specs(QWEN3), FLOAT32)
    run = programs(QWEN3, inference(layout.execution), layout.mesh, Sampling(0.0))
    compiled = run.begin._cache_size(), run.go_on._cache_size()
    assert min(compiled) > 0
    greedy(
        params, [[4] * 50, [5] * 128, [6], [7]], QWEN3, max_new_tokens=60, stop_ids=[3, 7], seed=5
    )
    assert (run.begin._cache_size(), run.go_on._cache_size()) == compiled


def test_bfloat16_generates():
    params = make_params(QWEN3)
    assert [len(row) for row in generate(params, PROMPTS, QWEN3, Precision(), Generation(5))] == [
        5
    ] * 4


def naive_filter(logits: np.ndarray, top_k: int | None, top_p: float) -> tuple[list[int], float]:
    """The ids to keep, and how far `top_p` is from the sums that decide."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    if top_p >= 1:
        return sorted(ranked), 1.0
    weights = np.exp(np.float64(logits[ranked]) - logits.max())
    kept, total, margin = [], 0.0, 1.0
    for i, probability in zip(ranked, weights / weights.sum(), strict=True):
        margin = min(margin, abs(total - top_p))
        if total >= top_p:
            break
        kept.append(i)
        total += probability
    return sorted(kept), margin


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=8, max_size=8),
    st.none() | st.integers(1, 10),
    st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
)
def test_filter_keeps_what_a_naive_one_keeps(quarters, top_k, top_p):
    logits = np.array(quarters, np.float32) / 4  # with ties
    filtered = np.asarray(filter_logits(jnp.array(logits), top_k, top_p))
    kept = np.flatnonzero(np.isfinite(filtered)).tolist()
    np.testing.assert_array_equal(filtered[kept], logits[kept])
    assert kept
    expected, margin = naive_filter(logits, top_k, top_p)
    if margin > 1e-5:  # closer than that, rounding decides
        assert kept == expected


def test_filter_works_on_each_row():
    logits = jax.random.normal(jax.random.key(0), (3, 5, 17))
    filtered = filter_logits(logits, 6, 0.8)
    rows = [filter_logits(row, 6, 0.8) for row in logits.reshape(-1, 17)]
    assert len({int(jnp.isfinite(row).sum()) for row in rows}) > 1
    np.testing.assert_array_equal(filtered.reshape(-1, 17), jnp.stack(rows))


def test_samples_follow_the_filtered_distribution():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0, 1.5, 0.5])
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.95)
    count = 20_000
    tokens = choose(
        jnp.tile(logits, (count, 1)), jax.random.split(jax.random.key(1), count), sampling
    )
    expected = jax.nn.softmax(filter_logits(logits / 0.7, 4, 0.95))
    found = np.bincount(tokens, minlength=6) / count
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))


def test_round_up():
    assert [round_up(n) for n in (1, 64, 65, 128, 1500)] == [64, 64, 128, 128, 2048]


def test_no_prompts_give_no_rows():
    assert greedy(make_params(QWEN3), [], QWEN3) == []


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([[1], []], {}, r"prompts\[1\] is empty; start it with the tokenizer's begin token"),
        ([[1, 101]], {}, r"prompts\[0\] has the token 101, but vocab_size=101"),
        ([[-1]], {}, "has the token -1"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5 is not 0 or more"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan is not 0 or more"),
        ([[1]], {"top_k": 0}, "top_k=0 leaves no token"),
        ([[1]], {"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ([[1]], {"top_p": 1.5}, "top_p=1.5"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 adds nothing"),
    ],
)
def test_bad_requests_are_refused(prompts, options, sentence):
    with pytest.raises(UserError, match=sentence):
        greedy({}, prompts, QWEN3, **options)


@pytest.mark.parametrize("temperature", [1e-40, 1e-38, 5e-324])
def test_a_temperature_below_what_float32_holds_is_greedy(temperature: float) -> None:
    logits = jnp.asarray([[0.5, 3.0, -2.0, 2.9], [-1e4, -3e4, -2e4, -9e3]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert choose(logits, keys, Sampling(temperature)).tolist() == [1, 3]


def test_extreme_temperatures_and_masses_still_write() -> None:
    logits = jnp.asarray([[0.5, 3.0, -2.0, 2.9]])
    for sampling in (
        Sampling(1e-29),
        Sampling(1e300),
        Sampling(1.0, None, 1e-40),
        Sampling(1.0, 2, 1e-300),
    ):
        (token,) = choose(logits, jax.random.split(jax.random.key(1), 1), sampling).tolist()
        assert 0 <= token < 4
    for top_p in (1e-40, 1e-300):
        assert np.isfinite(filter_logits(logits, None, top_p)).tolist() == [
            [False, True, False, False]
        ]


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1, 2**200])
def test_any_seed_samples(seed: int) -> None:
    params = make_params(QWEN3)
    drawn = [
        generate(params, [[5, 17, 3]], QWEN3, FLOAT32, Generation(8, seed=s))
        for s in (seed, seed, seed % 2**32)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
