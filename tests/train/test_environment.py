"""What is set for GPUs before JAX starts: never over what the user has set."""

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
