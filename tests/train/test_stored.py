"""Arrays of checkpoints that are read and written piece by piece."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from braeburn.config import Checkpoint
from braeburn.data.tokenizer import Tokenizer, train
from braeburn.errors import UserError
from braeburn.recipes import load
from braeburn.train import checkpoint, stored
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.piecewise import own_pieces
from braeburn.train.state import TrainState
from braeburn.train.stored import Pieces, StoredArray, placed, placed_pieces

SHAPES = {"layers": {"up": (6, 8, 16), "norm": (6, 8)}, "embedding": (40, 8)}
OPTIMIZER = optax.adam(1e-3)


def is_shape(leaf):
    return isinstance(leaf, tuple)


def values(dtype=np.float32):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: generator.standard_normal(shape).astype(dtype), SHAPES, is_leaf=is_shape
    )


def in_pieces(array: np.ndarray) -> Pieces:
    if array.ndim > 2:
        return Pieces.of_layers(array.shape, array.dtype, lambda layer: array[layer])
    return Pieces.whole(array.shape, array.dtype, lambda: array)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["the cat sat on the mat " * 20], 300)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Saves parameters at step 0, and opens the folder for reading."""

    def save(params) -> Checkpoints:
        writer = Checkpoints(tmp_path, Checkpoint())
        writer.save(0, TrainState(np.int32(0), params, None), load("afm-tiny"), tokenizer.to_json())
        writer.close()
        return Checkpoints(tmp_path)

    return save


def shapes(params, dtype=np.float32):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
def test_pieces_are_read_back(saved, dtype):
    """A checkpoint of pieces passes all checks, and a state to train on is read from it."""
    expected = values(dtype)
    checkpoints = saved(jax.tree.map(in_pieces, expected))
    assert checkpoints.newest_sound() == (0, [])
    read = checkpoints.stored_params(0, shapes(expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(dtype)}
    same(jax.tree.map(np.asarray, read), expected)
    as_float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), expected)
    same(checkpoints.restore_params(0, shapes(expected)), as_float32)

    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        expected,
    )
    optimizer = jax.eval_shape(OPTIMIZER.init, params)
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = TrainState(
        jax.ShapeDtypeStruct((), np.int32, sharding=everywhere),
        params,
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), optimizer
        ),
    )
    same(checkpoints.restore(0, shape, OPTIMIZER.init).params, as_float32)


@pytest.mark.parametrize("chunk_bytes", [1024, 2**26])
def test_a_layer_is_read_alone_where_chunks_are_of_one(saved, monkeypatch, chunk_bytes):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    expected = values()
    up = saved(jax.tree.map(jax.numpy.asarray, expected)).stored_params(0, shapes(expected))
    whole = []
    monkeypatch.setattr(StoredArray, "read", lambda self: whole.append(self) or expected_up)
    expected_up = expected["layers"]["up"]
    np.testing.assert_array_equal(up["layers"]["up"][3], expected_up[3])
    assert bool(whole) == (chunk_bytes > expected_up.nbytes)


@settings(max_examples=30)
@given(data=st.data())
def test_any_block_is_read(tmp_path_factory, data):
    """Whatever the bounds, chunks and pieces."""
    import tensorstore as ts

    folder = tmp_path_factory.mktemp("arrays")
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3), label="shape"))
    chunk = [data.draw(st.integers(1, size), label="chunk") for size in shape]
    expected = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    base = {"driver": "file", "path": f"{folder}/"}
    store = ts.open(
        {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": "one/"}},
        create=True,
        dtype=ts.float32,
        shape=shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
    ).result()
    store.write(expected).result()
    index = tuple(
        slice(*sorted((data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size)))))
        for size in shape
    )
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.int32]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "PIECE_BYTES", data.draw(st.integers(1, 200), label="piece"))
        found = StoredArray(folder, "one").read(index, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected[index])


@pytest.mark.parametrize("spec", [("a",), (None, "a"), (None, None, "b"), ("a", None, "b"), ()])
def test_arrays_are_placed_on_meshes(saved, spec):
    expected = values()
    mesh = jax.make_mesh((2, 4), ("a", "b"), devices=jax.devices()[:8])
    up = expected["layers"]["up"]
    wanted = jax.ShapeDtypeStruct(
        up.shape, jax.numpy.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    rounded = up.astype(jax.numpy.bfloat16)
    read = saved(jax.tree.map(in_pieces, expected)).stored_params(0, shapes(expected))
    for found in (
        placed(read["layers"]["up"], wanted),
        placed_pieces(in_pieces(up), wanted),
        placed_pieces(Pieces.whole(up.shape, up.dtype, lambda: up), wanted),
    ):
        assert found.sharding == wanted.sharding
        np.testing.assert_array_equal(found, rounded)


@given(
    number=st.integers(0, 20),
    layers=st.integers(1, 30),
    chunk=st.integers(1, 3),
    processes=st.integers(1, 9),
)
def test_each_piece_is_written_once(number, layers, chunk, processes):
    """And no chunk by two processes."""
    pieces = Pieces.of_layers((layers, 2, 2), np.float32, lambda layer: np.zeros((2, 2)))
    spec = {"metadata": {"chunks": [chunk, 2, 2]}}
    writers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: processes)
        for index in range(processes):
            patch.setattr(jax, "process_index", lambda index=index: index)
            for piece in own_pieces(number, pieces, spec):
                assert piece not in writers
                writers[piece] = index
    assert sorted(writers) == list(range(layers))
    chunks = {(piece // chunk, index) for piece, index in writers.items()}
    assert len(chunks) == -(-layers // chunk)


@pytest.mark.parametrize("error", [UserError("the source is gone"), KeyboardInterrupt()])
def test_a_failure_between_pieces_leaves_no_checkpoint(saved, tmp_path, error):
    expected = values()

    def layer(number):
        if number == 4:
            raise error
        return expected["layers"]["up"][number]

    params = jax.tree.map(in_pieces, expected)
    params["layers"]["up"] = Pieces.of_layers((6, 8, 16), np.float32, layer)
    with pytest.raises(type(error), match="gone" if isinstance(error, UserError) else None):
        saved(params)
    assert not list((tmp_path / "checkpoints").glob("0"))
