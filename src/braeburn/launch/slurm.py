"""The scripts for a SLURM cluster: to prepare text, to train, and for the jobs after training."""

import re
import shlex
from dataclasses import dataclass

from braeburn.errors import UserError
from braeburn.hardware.targets import Target
from braeburn.launch.job import Job, check_line
from braeburn.launch.places import comment
from braeburn.remote import RemoteFolder, is_remote
from braeburn.train.remote_run import check_machines

# Minutes, hours and days as sbatch reads them.
TIME_LIMIT = re.compile(
    r"\d{1,9}(:\d{1,2}){0,2}|\d{1,9}-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.ASCII
)

# srun runs in the background: bash takes a signal only once a command in the foreground has ended.
_TEMPLATE = """\
#!/bin/bash
# {name} on {target}: {shape}.
# Submit with `sbatch FILE`; run again, or requeued, it {begins}.
{places}
#SBATCH --job-name={job_name}
{resources}
#SBATCH --time={time}
{partition}
{account}
# The log of process 0, and of the others what goes wrong; a requeued job goes on writing to it.
#SBATCH --output={job_name}-%j.log
#SBATCH --open-mode=append
{warning}#SBATCH --requeue

# Make `braeburn` available to every node here, unless it is on the PATH already:
# source /shared/venv/bin/activate

{compiled}{environment}{result}
MAX_RESTARTS={max_restarts}

stopping=
# SIGTERM announces the time limit or a preemption. Every process is told{when_told}
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

restarts=0
while true; do
    # JAX learns from SLURM's variables which processes there are. When one has ended, the others
    # get half a minute to end by themselves: ended at once, their code would hide the first one's.
    srun --kill-on-bad-exit=0 --wait=30{srun} \\
        braeburn {arguments}{redirection} &
    tasks=$!
    # A signal interrupts `wait`, so it is asked again until srun itself has ended.
    while true; do
        wait "$tasks"
        code=$?
        kill -0 "$tasks" 2>/dev/null || break
    done
    if [ -n "$stopping" ]; then
{stopped}    fi
    # 0: all is done. 2: a mistake that its message explains, and no restart would mend.
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
        exit "$code"
    fi
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "$MAX_RESTARTS" ]; then
        echo "ended with code $code, and all $MAX_RESTARTS restarts are used up"
        exit "$code"
    fi
    again="restart $restarts of at most $MAX_RESTARTS, {origin}"
    echo "ended with code $code; $again"
done
"""

# What differs in the script of a run, which is saved when it is stopped and goes on from there.
_OF_TRAINING = {
    "warning": """\
# Two minutes before the time limit the script is told: the run is saved, the job queued again.
#SBATCH --signal=B:TERM@120
""",
    "result": "",
    "when_told": ", saves and stops.\n# (srun would kill them.)",
    "redirection": "",
    "stopped": """\
        # A job that was cancelled is told in the same way, but is not running any more.
        if [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ]; then
            echo "stopped before its time; queued again, to go on from the last checkpoint"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        exit 0
""",
}

# The same of a command that has nothing to save before it is done.
_AFTER_TRAINING = {
    "warning": "",
    "result": """\
# What process 0 prints is the result. It has a file of its own, which each start writes anew.
RESULT="{job_name}-$SLURM_JOB_ID.out"
echo "the result will be in $RESULT"
""",
    "when_told": ", and ends.",
    "redirection": ' >"$RESULT"',
    "stopped": """\
        echo "ended by SIGTERM before it was done"
        exit 143
""",
}

_PREPARE_TEMPLATE = """\
#!/bin/bash
# The text of {name}, prepared by {tasks} tasks, which share the work out among them.
# Submit with `sbatch FILE`; run again, or requeued, it goes on where it was. The training can wait
# for it: sbatch --dependency=afterok:ID FILE, with the number that sbatch printed.
# The files of the sources and data.cache ({cache}) must be on storage that all nodes share.
{places}
#SBATCH --job-name={job_name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks=1
# The processor cores of a task, each of which tokenises:
##SBATCH --cpus-per-task=16
#SBATCH --time={time}
{partition}
{account}
#SBATCH --output={job_name}-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue

# Make `braeburn` available to every node here, unless it is on the PATH already:
# source /shared/venv/bin/activate

braeburn {arguments}
"""


@dataclass(frozen=True)
class Account:
    """What SLURM asks of every job.

    Attributes:
        time: limit of the job, as SLURM writes it: minutes, HH:MM:SS or D-HH:MM:SS.
        partition: of the cluster; None leaves a line to fill in.
        account: to be charged; None leaves a line to fill in.
    """

    time: str
    partition: str | None = None
    account: str | None = None

    def lines(self) -> dict[str, str]:
        """What a script's header says of it.

        Raises:
            UserError: a value is none that SLURM reads.
        """
        if not TIME_LIMIT.fullmatch(self.time):
            raise UserError(
                f"--time {self.time[:80]!a} is no limit that SLURM reads; write HH:MM:SS or "
                f"D-HH:MM:SS, as in 1-00:00:00"
            )
        lines = {"time": self.time}
        for option in ("partition", "account"):
            given = getattr(self, option)
            if given is None:
                lines[option] = f"##SBATCH --{option}=NAME  # to fill in"
            elif re.fullmatch(r"[\w.,@+-]+", given):
                lines[option] = f"#SBATCH --{option}={given}"
            else:
                raise UserError(
                    f"--{option} {given[:80]!a} is no name of SLURM's; write the name that `sinfo` "
                    f"shows"
                )
        return lines


def prepare_script(job: Job, tasks: int, cache: str, account: Account) -> str:
    """A commented sbatch script: an array of tasks that prepare the text of a run together.

    Args:
        job: of the command `prepare`.
        tasks: of the array.
        cache: the folder that the text is prepared in, on storage that all nodes share.
        account: what SLURM asks of every job.

    Returns:
        The text of the script.

    Raises:
        UserError: a value would not stay within its line of the script, or the cache is a URL.
    """
    job.check()
    check_line("data.cache", cache)
    if is_remote(cache) and tasks > 1:
        raise UserError(
            f"data.cache={cache!r} is a URL, and {tasks} tasks share the work out through a "
            f"folder; set data.cache to one that all nodes mount, or use --prepare 1"
        )
    return _PREPARE_TEMPLATE.format(
        name=job.name,
        tasks=tasks,
        last=tasks - 1,
        cache=cache,
        places=comment(job.places),
        job_name=_job_name(f"prepare-{job.name}"),
        arguments=shlex.join([job.command, *job.arguments]),
        **account.lines(),
    )


def _compiled(job: Job) -> str:
    """Where compiled programs are kept: with a run on the disk of all nodes."""
    if not job.keeps_programs:
        return ""  # in the home folder
    folder = f"$(realpath -m {shlex.quote(job.home.path)})/.cache/jax"
    return (
        "# Compiled programs are kept on storage that all nodes share: a restart does not compile "
        "again.\n"
        f'export JAX_COMPILATION_CACHE_DIR="${{JAX_COMPILATION_CACHE_DIR:-"{folder}"}}"\n'
    )


def _job_name(name: str) -> str:
    """A name for a job; spaces would end it."""
    return "braeburn-" + re.sub(r"[^\w.+=@-]+", "-", name)


def processes_of(target: Target) -> int:
    """How many tasks a job has: one for each GPU, or for each CPU process.

    Raises:
        UserError: the target is one of TPUs.
    """
    if target.facts.maker == "google":
        raise UserError(
            f"--on {str(target)!r}: SLURM does not schedule TPUs; use `braeburn launch kubernetes`"
        )
    return target.devices


def script(job: Job, account: Account) -> str:
    """A commented sbatch script: one task for each GPU, or for each CPU process.

    Args:
        job: whose restarts are within one job of SLURM. The directory of a run that is trained is
            on storage that all nodes share, or a URL if there is one node.
        account: what SLURM asks of every job.

    Returns:
        The text of the script.

    Raises:
        UserError: the target is one of TPUs, or has no JAX that could be installed, the directory
            of a run that is trained is a URL and there are several nodes, or a value would not stay
            within its line of the script.
    """
    job.check()
    processes_of(job.target)  # refuses TPUs
    target, trains_at_url = job.target, job.trains and job.home.is_remote
    header = account.lines()
    nodes, each = (
        target.slices * target.nodes_per_slice,
        target.chips_per_node * target.facts.devices_per_chip,
    )
    environment, srun = "", ""
    if trains_at_url and target.facts.maker != "cpu":
        check_machines(RemoteFolder(job.home.path, job.home.field), nodes > 1)
    if target.facts.maker == "cpu":
        shape = f"{target.chips} processes on CPUs"
        resources = [f"#SBATCH --ntasks={target.chips}"]
        if trains_at_url:
            resources.append("#SBATCH --nodes=1")  # they work on the run in one folder
        environment = "export JAX_PLATFORMS=cpu\n"
    else:
        shape = f"{nodes} node{'s' * (nodes > 1)} of {each} GPUs, a process for each GPU"
        resources = [
            f"#SBATCH --nodes={nodes}",
            f"#SBATCH --ntasks-per-node={each}",
            f"#SBATCH --gpus-per-node={each}",
            "# The processor cores of a task, for reading text; as many as the nodes have for "
            "each GPU:",
            "##SBATCH --cpus-per-task=8",
        ]
        # JAX takes the GPU of the task's number on its node, so a task must see them all.
        srun = " --gpu-bind=none"
    job_name = _job_name(job.name)
    differing = dict(_OF_TRAINING if job.trains else _AFTER_TRAINING)
    differing["result"] = differing["result"].format(job_name=job_name)
    return _TEMPLATE.format(
        name=job.name,
        job_name=job_name,
        target=target,
        shape=shape,
        begins=job.begins,
        origin=job.origin,
        places=comment(job.places),
        compiled=_compiled(job),
        resources="\n".join(resources),
        **header,
        environment=environment,
        max_restarts=job.max_restarts,
        srun=srun,
        arguments=shlex.join([job.command, *job.arguments]),
        **differing,
    )
