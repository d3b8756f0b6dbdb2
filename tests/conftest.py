"""What the tests share: a home for caches, a small corpus, and one finished tiny run."""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

# Before JAX is imported, here and in the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Simulated devices for meshes: eight in every process, since their number changes how a CPU shares
# out work, and so the last bit of sums. Runs that name no mesh are held to the first.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Programs are tiny and many: compiling them takes longer than running them. Tests marked
# `optimized`, which guard rounding and resuming, run in a process of their own as users' programs
# are compiled: `pytest -m optimized`.
OPTIMIZED = "optimized"
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (
    0,
    11,
):  # later ones have only the emitters that take long
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
# Coverage is not counted in these, which run much Python of JAX or the same loops thousands of
# times, and so take a quarter longer with it. What they run is run by others too: the figure that
# is printed is a lower bound.
NOT_COUNTED = (
    "tests/parallel/test_layouts.py",
    "tests/parallel/test_traffic.py",
    "tests/parallel/test_distillation_sharded.py",
    "tests/parallel/test_loss_sharded.py",
    "tests/transforms/test_units.py",
    "tests/transforms/test_importance.py",
    "tests/objectives/test_cross_entropy.py",
    "tests/data/test_cutting.py",
    "tests/data/test_mixture.py",
    "tests/plan/test_cost.py",
    "tests/plan/test_search.py",
    "tests/test_golden_losses.py",
    "tests/train/test_resume.py",
)
if "BRAEBURN_TEST_CACHE" in os.environ:
    os.environ["XDG_CACHE_HOME"] = os.environ["BRAEBURN_TEST_CACHE"]
else:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="braeburn-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and types that functions of these packages are annotated with are checked at every call,
# which under `jit` is once for each compilation.
CHECKED = (
    "braeburn.layers",
    "braeburn.models",
    "braeburn.objectives",
    "braeburn.optim",
    "braeburn.parallel",
    "braeburn.transforms",
)
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

from braeburn.config import Run, override  # noqa: E402
from braeburn.recipes import load  # noqa: E402
from support import braeburn  # noqa: E402


def optimized(config: pytest.Config) -> bool:
    """Whether this process compiles as users' do."""
    return config.option.markexpr.split()[:1] == [OPTIMIZED]


def pytest_configure(config: pytest.Config) -> None:
    """Sets XLA's options, which JAX reads when the first program is compiled, here and in processes
    of tests.
    """
    if optimized(config):
        os.environ.pop("XLA_FLAGS", None)
    else:
        os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Says how to run tests at XLA's default level where this process has another, and marks those
    not counted.
    """
    for item in items:
        if item.path.relative_to(REPOSITORY).as_posix() in NOT_COUNTED:
            item.add_marker("no_cover")
    if optimized(config):
        return
    elsewhere = pytest.mark.skip(reason="compiled at XLA's default level: pytest -m optimized")
    for item in items:
        if item.get_closest_marker(OPTIMIZED):
            item.add_marker(elsewhere)


# Programs that a process has compiled stay in its memory, and tests compile thousands.
MOST_BYTES = 2_500_000_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drops compiled programs after a module where they have grown large."""
    yield
    status = Path("/proc/self/statm")
    if status.exists() and int(status.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > (
        MOST_BYTES
    ):
        import jax

        jax.clear_caches()
        gc.collect()


# How long an example takes depends on what else the machine does, and on what has been compiled.
hypothesis.settings.register_profile("braeburn", deadline=None)
hypothesis.settings.load_profile("braeburn")

# In the standard library of every Python from 3.11 to 3.13; the last seven are of more than 32 KiB.
FILES = [
    "abc",
    "bisect",
    "calendar",
    "cmd",
    "code",
    "codeop",
    "colorsys",
    "contextlib",
    "copy",
    "csv",
    "dis",
    "filecmp",
    "fileinput",
    "fnmatch",
    "fractions",
    "getopt",
    "gettext",
    "graphlib",
    "gzip",
    "heapq",
    "hmac",
    "keyword",
    "linecache",
    "netrc",
    "numbers",
    "operator",
    "pprint",
    "queue",
    "reprlib",
    "sched",
    "selectors",
    "shlex",
    "string",
    "tabnanny",
    "textwrap",
    "timeit",
    "token",
    "tokenize",
    "trace",
    "uuid",
    "codecs",
    "functools",
    "os",
    "smtplib",
    "socket",
    "statistics",
    "traceback",
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes have among which this session's tests are dealt out."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextlib.contextmanager
def first(folder: Path) -> Iterator[bool]:
    """Whether this process is the first to come here, and makes a folder; the others wait until it
    is made.
    """
    done = folder.with_suffix(".done")
    with open(folder.with_suffix(".lock"), "w") as lock:  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Path:
    """A folder of real Python files."""
    folder = shared / "corpus"
    with first(folder) as make:
        if make:
            folder.mkdir(exist_ok=True)
            for name in FILES:
                shutil.copy(Path(sysconfig.get_path("stdlib"), f"{name}.py"), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_fields(corpus: Path) -> dict[str, Any]:
    """What makes `afm-tiny` small enough for tests: 6 + 4 + 4 steps on the corpus."""
    return {
        **{f"data.sources.{name}.paths": [str(corpus)] for name in ("code", "prose", "long")},
        "data.held_out": 0.1,
        "stages.core.tokens": 6 * 1024,
        "stages.core.schedule.warmup_steps": 2,
        "stages.continued.tokens": 4 * 1024,
        "stages.continued.schedule.warmup_steps": 1,
        "stages.context.tokens": 4 * 1024,
        "stages.context.schedule.warmup_steps": 1,
        "evaluation.tokens": 2048,
        "mesh.fsdp": 1,
    }


@pytest.fixture(scope="session")
def tiny(tiny_fields: dict[str, Any]) -> Run:
    """The tiny run."""
    return override(load("afm-tiny"), tiny_fields)


@pytest.fixture(scope="session")
def tiny_arguments(tiny_fields: dict[str, Any]) -> list[str]:
    """The tiny run for the command line: the recipe and its overrides."""
    return [
        "afm-tiny",
        *(part for path, v in tiny_fields.items() for part in ("--set", f"{path}={json.dumps(v)}")),
    ]


@pytest.fixture(scope="session")
def finished(shared: Path, tiny_arguments: list[str]) -> Path:
    """The directory of the tiny run, trained by the command line without interruption; not to be
    changed.
    """
    directory = shared / "finished"
    with first(directory) as make:
        if make:
            answer = braeburn("train", *tiny_arguments, "--out", directory)
            assert answer.code == 0, answer.err
    return directory


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for a test to damage."""
    return shutil.copytree(finished, tmp_path / "copied")
