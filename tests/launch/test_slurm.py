"""The script for SLURM: what it says, and what it does with each way that a step may end.

`make test-slurm` runs it on a real SLURM.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support import Answer, braeburn

# Ends as the next line of `codes` says, or when its step is told to stop.
SRUN = """#!/bin/bash
echo "srun $*" >> calls
echo "printed in call $(wc -l < calls)"
code=$(head -1 codes); sed -i 1d codes
if [ "$code" = stop ]; then touch waiting; until [ -e stopped ]; do sleep 0.05; done; code=0; fi
exit "$code"
"""


def launch(on: str, *more: object, recipe: str = "afm-tiny") -> Answer:
    return braeburn("launch", "slurm", recipe, "--on", on, "--out", "/shared/runs/a b", *more)


EXPORT = ["export", "/shared/run", "--out", "/shared/run-hf"]


def start(on: str, *words: object) -> Answer:
    """Launches a command on a trained model."""
    return braeburn("launch", "slurm", "--on", on, *words)


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def test_gpus() -> None:
    script = launch(
        "h100:16",
        "--set",
        "name=it's",
        "--partition",
        "gpu",
        "--time",
        "08:00:00",
        recipe="llama3-8b",
    ).out
    for directive in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "partition=gpu",
        "time=08:00:00",
    ):
        assert f"--{directive}" in directives(script)
    assert "--signal=B:TERM@120" in directives(script) and "--requeue" in directives(script)
    assert not [directive for directive in directives(script) if directive.startswith("--account")]
    assert "srun --kill-on-bad-exit=0 --wait=30 --gpu-bind=none" in script
    assert "braeburn train llama3-8b --out '/shared/runs/a b' --set 'name=it'\"'\"'s'" in script
    assert script.startswith(
        "#!/bin/bash\n# it's on h100:16: 2 nodes of 8 GPUs, a process for each GPU.\n"
    )


def test_modules_of_two_gpus_and_chips_without_jax() -> None:
    script = launch("mi250x:8", recipe="llama3-8b").out
    for directive in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8"):
        assert f"--{directive}" in directives(script)
    assert (
        "--on 'gaudi3:8': no JAX for Intel Gaudi 3 can be installed"
        in launch("gaudi3:8", recipe="llama3-8b").error
    )


def test_cpus_json_and_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = launch("cpu:2", "--account", "me").out
    assert "--ntasks=2" in directives(script) and "--account=me" in directives(script)
    assert "export JAX_PLATFORMS=cpu" in script and "gpu" not in script.lower()
    told = json.loads(launch("cpu:2", "--account", "me", "--json").out)
    assert told["script"] == script and told["submitted"] is None
    assert told["shared"][0]["path"] == "/shared/runs/a b"
    assert (
        "SLURM does not schedule TPUs; use `braeburn launch kubernetes`"
        in launch("v5p:256", recipe="llama3-8b").error
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--submit needs 'sbatch', which is not on the PATH" in launch("cpu:2", "--submit").error
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\nread first\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    assert launch("cpu:2", "--submit").out == "Submitted batch job 7\n"
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Invalid account' >&2\nexit "
        "1\n"
    )
    assert launch("cpu:2", "--submit").error == (
        "error: sbatch refused the job (Batch job submission failed: Invalid account)"
    )


def test_an_array_that_prepares_the_text(tmp_path: Path) -> None:
    cache = ("--set", f"data.cache={tmp_path}/to kens")
    script = launch("h100:16", "--prepare", 12, "--account", "me", *cache, recipe="llama3-8b").out
    for directive in ("array=0-11", "ntasks=1", "account=me", "time=1-00:00:00", "requeue"):
        assert f"--{directive}" in directives(script)
    assert not [directive for directive in directives(script) if "gpu" in directive]
    assert script.splitlines()[-1] == (
        f"braeburn prepare llama3-8b --set 'data.cache={tmp_path}/to kens'"
    )
    assert f"data.cache ({tmp_path}/to kens) must be on storage that all nodes share" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "--prepare" in launch("cpu:2", "--prepare", 0).error
    assert "--time '1 day'" in launch("cpu:2", "--prepare", 2, "--time", "1 day").error


@pytest.mark.parametrize(
    ("codes", "code", "calls", "state"),
    [
        ([0], 0, 1, "RUNNING"),
        ([1, 137, 0], 0, 3, "RUNNING"),
        ([2], 2, 1, "RUNNING"),
        ([1, 1, 1], 1, 3, "RUNNING"),
        (["stop"], 0, 1, "RUNNING"),
        (["stop"], 0, 1, "COMPLETING"),  # cancelled
    ],
)
def test_what_follows_the_end_of_a_step(
    codes: list[int | str], code: int, calls: int, state: str, tmp_path: Path
) -> None:
    script = launch("cpu:2", "--max-restarts", 2).out
    made = run(script, codes, state, tmp_path, code)
    assert sum(call.startswith("srun ") for call in made) == calls
    assert ("scontrol requeue 7" in made) == (codes == ["stop"] and state == "RUNNING")


@pytest.mark.parametrize(
    ("codes", "code", "calls"),
    [([0], 0, 1), ([1, 137, 0], 0, 3), ([2], 2, 1), ([1, 1, 1], 1, 3), (["stop"], 143, 1)],
)
def test_what_follows_the_end_of_a_step_after_training(
    codes: list[int | str], code: int, calls: int, tmp_path: Path
) -> None:
    """The job begins anew, and what the last attempt printed is the result, whole and alone."""
    script = start("cpu:2", "--max-restarts", 2, "--", *EXPORT).out
    made = run(script, codes, "RUNNING", tmp_path, code)
    assert made == ["srun --kill-on-bad-exit=0 --wait=30 braeburn " + " ".join(EXPORT)] * calls
    result = tmp_path / "braeburn-export-run-7.out"
    assert result.read_text() == f"printed in call {calls}\n"
    log = (tmp_path / "log").read_text()
    assert "the result will be in braeburn-export-run-7.out" in log and "printed" not in log
    assert ("from the beginning" in log) == (calls > 1)
    assert ("ended by SIGTERM before it was done" in log) == (codes == ["stop"])


def run(
    script: str, codes: list[int | str], state: str, tmp_path: Path, expected: int
) -> list[str]:
    """Runs a script whose steps end as `codes` say, and looks at its own code.

    Returns:
        The calls of srun and scontrol.
    """
    (tmp_path / "script").write_text(script)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*" >> calls\n')
    (tmp_path / "scancel").write_text(
        '#!/bin/bash\n[ "$*" = "--signal=TERM 7" ] && touch stopped\n'
    )
    (tmp_path / "squeue").write_text(f"#!/bin/bash\necho {state}\n")
    for name in ("srun", "scontrol", "scancel", "squeue"):
        (tmp_path / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(["bash", "script"], cwd=tmp_path, env=environ, stdout=log)
    if codes == ["stop"]:
        while not (tmp_path / "waiting").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == expected
    return [
        call
        for call in (tmp_path / "calls").read_text().splitlines()
        if call.startswith(("srun ", "scontrol "))
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--time", "1:00\n#SBATCH --wrap=evil"],
            r"--time '1:00\n#SBATCH --wrap=evil' is no limit that SLURM reads; write",
        ),
        (
            ["--time", "soon"],
            "--time 'soon' is no limit that SLURM reads; write HH:MM:SS or D-HH:MM:SS",
        ),
        (
            ["--out", "/runs/a\necho evil"],
            r"--out '/runs/a\necho evil' has a line break or control character; write it",
        ),
        (
            ["--partition", "gpu\n#SBATCH --uid=0"],
            r"--partition 'gpu\n#SBATCH --uid=0' is no name of SLURM's",
        ),
        (
            ["--account", "me too"],
            "--account 'me too' is no name of SLURM's; write the name that `sinfo` shows",
        ),
        (
            ["--set", 'name="a\\nb"'],
            r"name: 'a\nb' cannot be a name; use up to 100 letters, digits",
        ),
    ],
)
def test_nothing_that_is_given_becomes_a_line_of_its_own(
    arguments: list[str], sentence: str
) -> None:
    assert sentence in launch("cpu:2", *arguments).error


@pytest.mark.parametrize(
    "time", ["30", "90:00", "1:30:00", "2-12", "2-12:30", "2-12:30:00", "UNLIMITED"]
)
def test_limits_as_sbatch_reads_them(time: str) -> None:
    assert f"--time={time}" in directives(launch("cpu:2", "--time", time).out)


def test_a_name_with_spaces_is_one_word_of_its_directive() -> None:
    assert "--job-name=braeburn-two-words" in directives(
        launch("cpu:2", "--set", "name=two words").out
    )


def test_what_must_be_shared_is_said_and_looked_at(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(
        "from braeburn.recipes import load\n\n\ndef run():\n    return load('llama3-8b')\n"
    )
    recipe = f"{tmp_path}/recipe.py:run"
    changes = ["--set", "initial_weights=/shared/base", "--set", "data.cache=s3://bucket/tokens"]
    changes += ["--set", 'data.sources.web.paths=["/usr/li?"]', "--json"]
    told = json.loads(launch("h100:16", *changes, recipe=recipe).out)
    assert [(place["field"], place["path"]) for place in told["shared"]] == [
        ("--out", "/shared/runs/a b"),
        ("RECIPE", f"{tmp_path}/recipe.py"),
        ("data.cache", "s3://bucket/tokens"),
        ("data.sources.web.paths", "/usr/li?"),
        ("initial_weights", "/shared/base"),
    ]
    own, missing = told["warnings"]
    assert own.startswith(f"warning: RECIPE='{tmp_path}/recipe.py' lies in ")
    assert "which every machine has for itself; name a folder on storage that all" in own
    assert missing.startswith("warning: initial_weights='/shared/base' is not there, as seen from")
    header = told["script"].partition("#SBATCH")[0]
    assert "# All machines of the job must reach these, each under this name:" in header
    assert "#   data.cache s3://bucket/tokens: prepared text, made once for all; each" in header


def test_a_run_at_a_url_needs_one_node() -> None:
    command = ["launch", "slurm", "llama3-8b", "--out", "s3://bucket/run", "--on"]
    script = braeburn(*command, "h100:8").out
    assert "braeburn train llama3-8b --out s3://bucket/run" in script
    assert "realpath" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    refused = braeburn(*command, "h100:16").error
    assert "--out 's3://bucket/run' cannot be written by processes on several machines" in refused
    tasks = ["--prepare", 3, "--set", "data.cache=s3://bucket/tokens"]
    assert (
        "is a URL, and 3 tasks share the work out through a folder"
        in braeburn(*command, "h100:8", *tasks).error
    )


def test_a_command_on_a_trained_model(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    words = ["generate", f"{tmp_path}/run", "--prompts", "/shared/a b.txt", "--mesh", "fsdp=-1"]
    options = ["--partition", "gpu", "--time", "02:00:00", "--json"]
    told = json.loads(start("h100:64", *options, "--", *words).out)
    script = told["script"]
    assert script.startswith(
        "#!/bin/bash\n# generate-run on h100:64: 8 nodes of 8 GPUs, a process for each GPU.\n"
        "# Submit with `sbatch FILE`; run again, or requeued, it starts from the beginning.\n"
    )
    for directive in ("nodes=8", "ntasks-per-node=8", "partition=gpu", "time=02:00:00", "requeue"):
        assert f"--{directive}" in directives(script)
    assert not [directive for directive in directives(script) if "signal" in directive]
    assert "checkpoint" not in script
    assert (
        f"        braeburn generate {tmp_path}/run --prompts '/shared/a b.txt' --mesh fsdp=-1 "
        f'>"$RESULT" &\n'
    ) in script
    assert f'"$(realpath -m {tmp_path}/run)/.cache/jax"' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0

    assert [(place["field"], place["path"]) for place in told["shared"]] == [
        ("DIR", f"{tmp_path}/run"),
        ("--prompts", "/shared/a b.txt"),
    ]
    assert "#   --prompts /shared/a b.txt: prompts\n" in script.partition("#SBATCH")[0]
    own, missing = told["warnings"]
    assert own.startswith(f"warning: DIR='{tmp_path}/run' lies in ")
    assert missing.startswith("warning: --prompts '/shared/a b.txt' is not there, as seen from")
    assert told["submitted"] is None


def test_what_is_made_at_a_url_needs_one_process() -> None:
    words = ["export", "s3://bucket/run", "--out", "s3://bucket/hf"]
    assert "--out 's3://bucket/hf' is a URL, and 8 processes write into one folder; name" in (
        start("h100:8", "--", *words).error
    )
    script = start("h100:1", "--", *words).out
    assert "braeburn export s3://bucket/run --out s3://bucket/hf" in script
    assert "realpath" not in script
    # What is only read may be at a URL: each node makes a copy.
    assert start("cpu:2", "--", "export", "s3://bucket/run", "--out", "/shared/hf").code == 0


def test_submission_of_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\nread -r; read -r line; echo "got: $line"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert start("cpu:2", "--submit", "--", *EXPORT).out == (
        "got: # export-run on cpu:2: 2 processes on CPUs.\n"
    )
