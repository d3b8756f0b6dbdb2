import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.config import Stage
from braeburn.data.mixture import BLOCK, Mixture, derive_key, permute, rounded_shares
from braeburn.recipes import BUILT_IN, load

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 3000), KEYS)
@settings(deadline=None)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(st.integers(1, 2**62).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), KEYS)
@settings(deadline=None)
def test_permute_stays_within_any_size(size_index: tuple[int, int], key: int) -> None:
    size, index = size_index
    assert 0 <= permute(index, size, key) < size


def test_permute_depends_on_the_key_and_mixes() -> None:
    images = np.array(
        [[permute(index, 1000, derive_key(i)) for index in range(1000)] for i in range(200)]
    )
    assert len({image.tobytes() for image in images}) == 200
    # Each place's mean over keys is that of a uniform draw: 499.5 with a standard error of 20.4.
    assert abs(images.mean(axis=0) - 499.5).max() < 5 * 20.4


WEIGHTS = st.dictionaries(st.text(max_size=5), st.floats(0, 1e300), min_size=1, max_size=6).filter(
    lambda weights: sum(weights.values()) > 0
)


@given(WEIGHTS, st.integers(0, 2**64 - 1), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_each_index_is_used_once_in_proportion(
    weights: dict[str, float], seed: int, first: int
) -> None:
    mixture = Mixture(weights, seed)
    drawn = [mixture.at(first * BLOCK + position) for position in range(BLOCK)]
    positive = {name: weight for name, weight in weights.items() if weight > 0}
    largest = max(positive.values())
    total = sum(weight / largest for weight in positive.values())
    for name, weight in positive.items():
        indices = sorted(index for source, index in drawn if source == name)
        count = len(indices)
        assert indices == list(range(first * count, (first + 1) * count))
        assert count >= 1
        assert abs(count - weight / largest / total * BLOCK) <= len(positive)
    assert {name for name, _ in drawn} == set(positive)


def test_order_of_names_changes_nothing_and_the_seed_does() -> None:
    a, b = Mixture({"x": 1, "y": 2}, 0), Mixture({"y": 200, "x": 100}, 0)
    assert [a.at(i) for i in range(5000)] == [b.at(i) for i in range(5000)]
    assert [a.at(i) for i in range(50)] != [Mixture({"x": 1, "y": 2}, 1).at(i) for i in range(50)]


def test_values_are_pinned() -> None:
    # A change here changes the data of every run that resumes.
    assert derive_key(0, "core", "sequences") == 16885759983617818705
    assert [permute(i, 10, 1) for i in range(10)] == [6, 1, 8, 0, 2, 9, 4, 7, 5, 3]


def staged(**mixture: float) -> dict[str, Stage]:
    return {
        "core": Stage(
            tokens=64, sequence_length=8, batch_tokens=64, mixture=mixture, learning_rate=1
        )
    }


def test_shares_that_are_rounded_are_told() -> None:
    assert rounded_shares(staged(web=0.8, code=0.2)) == []
    assert rounded_shares(staged(web=3, code=0, maths=1e9)) != []
    (line,) = rounded_shares(staged(web=1.0, code=1e-6))
    assert line == (
        "warning: stages.core.mixture.code=1e-06 asks for 1e-06 of the sequences but gets 1 of "
        "each 1024, which is 0.00098; raise it, or set it to 0"
    )
    assert len(rounded_shares(staged(web=1e308, code=1e-308))) == 1
    assert rounded_shares(staged(**{f"s{i}": 1.0 for i in range(3000)})) == []


def test_no_built_in_recipe_is_rounded_unawares() -> None:
    assert {name: rounded_shares(load(name).stages) for name in BUILT_IN} == {
        name: [] for name in BUILT_IN
    }
