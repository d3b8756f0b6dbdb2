"""What is set for GPUs before JAX starts: never over what the user has set."""

from pathlib import Path

import pytest

from braeburn.train import environment


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "version", lambda name: "0.12.0.1")


def test_memory_and_the_kernel_that_fails_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = "--xla_gpu_experimental_use_collective_kernels=-ALL_REDUCE"
    assert environment.gpu_environment() == {"XLA_CLIENT_MEM_FRACTION": "0.92", "XLA_FLAGS": flag}
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    assert environment.gpu_environment()["XLA_FLAGS"] == f"--xla_dump_to=/tmp/x {flag}"


def test_what_the_user_sets_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_experimental_use_collective_kernels=ALL_COLLECTIVES")
    assert environment.gpu_environment() == {"XLA_CLIENT_MEM_FRACTION": "0.5"}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert environment.gpu_environment() == {}


def test_earlier_versions_do_not_know_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise environment.PackageNotFoundError(name)

    for answer in (lambda name: "0.11.2", missing):
        monkeypatch.setattr(environment, "version", answer)
        assert "XLA_FLAGS" not in environment.gpu_environment()


def test_a_gpu_that_jax_does_not_use_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert environment.unused_accelerator("cpu", tmp_path) is None
    for driver, what in {
        "nvidia0": "an NVIDIA GPU",
        "kfd": "an AMD GPU",
        "accel3": "a TPU",
    }.items():
        (tmp_path / driver).touch()
        warning = environment.unused_accelerator("cpu", tmp_path)
        assert warning and f"this machine has {what}, but JAX computes on the CPU" in warning
        assert environment.unused_accelerator("gpu", tmp_path) is None
        (tmp_path / driver).unlink()
    (tmp_path / "nvidiactl").touch()
    assert environment.unused_accelerator("cpu", tmp_path) is None
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert environment.unused_accelerator("cpu", tmp_path) is None
