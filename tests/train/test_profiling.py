"""A profile of some steps, as `--profile-steps` asks for it."""

import gzip
import json
from pathlib import Path

import jax
import pytest

from braeburn.train.profiling import Profile
from support import braeburn, rows

CHANGES = ("--set", "mesh.fsdp=1", "--set", "checkpoint.every_steps=100", "--stop-after-steps")


def names(out: Path) -> set[str]:
    """The names of all events of a profile."""
    (trace,) = (out / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {event.get("name", "") for event in events}


@pytest.mark.deep
def test_the_steps_of_a_window_are_profiled_and_train_as_without(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "profiled"
    assert braeburn("train", "afm-tiny", "--out", plain, *CHANGES, "5").code == 0
    answer = braeburn("train", "afm-tiny", "--out", out, *CHANGES, "5", "--profile-steps", "2:3")
    assert answer.code == 0, answer.err
    assert "profiled steps 2 to 3" in answer.err
    assert any(name == "train" or name.startswith("train ") for name in names(out))
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(plain)]
    again = braeburn("train", "afm-tiny", "--out", out, *CHANGES, "1", "--profile-steps", "2:3")
    assert again.code == 0
    assert "nothing was profiled: this call made none of the steps 2 to 3" in again.err


@pytest.mark.deep
def test_a_call_that_stops_within_the_window_ends_the_profile(tmp_path: Path) -> None:
    answer = braeburn(
        "train", "afm-tiny", "--out", tmp_path, *CHANGES, "3", "--profile-steps", "2:9"
    )
    assert answer.code == 0 and "profiled steps 2 to 3" in answer.err, answer.err
    assert names(tmp_path)


def test_a_window_that_is_cut_short_is_profiled_to_the_last_step(tmp_path: Path) -> None:
    said: list[str] = []
    profile = Profile(tmp_path, range(2, 10), said.append)
    double = jax.jit(lambda x: 2 * x)
    state = jax.numpy.ones(8)
    for step in (1, 2, 3):
        profile.before(step, state)
        state = double(state)
        profile.after(step, state)
    profile.close(3)
    assert said == [f"profiled steps 2 to 3: {str(tmp_path / 'profile')!r}"]
    assert names(tmp_path)


@pytest.mark.parametrize("text", ["3", "0:2", "5:4", "a:b", "1:100000000", ":"])
def test_what_is_no_window_is_refused_with_one_that_works(text: str, tmp_path: Path) -> None:
    answer = braeburn("train", "afm-tiny", "--out", tmp_path / "a", "--profile-steps", text)
    assert answer.code == 2 and f"--profile-steps={text!r}" in answer.err
    assert "write it as --profile-steps 3:5" in answer.err
    assert not (tmp_path / "a").exists()
