"""The script that trains on a SLURM cluster."""

import re
import shlex

from braeburn.errors import UserError
from braeburn.launch.job import Job

# Minutes, hours and days as sbatch reads them.
TIME_LIMIT = re.compile(
    r"\d{1,9}(:\d{1,2}){0,2}|\d{1,9}-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.ASCII
)

# srun runs in the background: bash takes a signal only once a command in the foreground has ended.
_TEMPLATE = """\
#!/bin/bash
# {name} on {target}: {shape}.
# Submit with `sbatch FILE`; run again, or requeued, it goes on from the last checkpoint in {out}.

#SBATCH --job-name={job_name}
{resources}
#SBATCH --time={time}
{partition}
{account}
# The log of process 0, and of the others what goes wrong; a requeued job goes on writing to it.
#SBATCH --output={job_name}-%j.log
#SBATCH --open-mode=append
# Two minutes before the time limit the script is told: the run is saved, the job queued again.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue

# Make `braeburn` available to every node here, unless it is on the PATH already:
# source /shared/venv/bin/activate

# Compiled programs are kept on storage that all nodes share: a restart does not compile again.
export JAX_COMPILATION_CACHE_DIR="${{JAX_COMPILATION_CACHE_DIR:-"$(realpath -m {out})/.cache/jax"}}"
{environment}
MAX_RESTARTS={max_restarts}

stopping=
# SIGTERM announces the time limit or a preemption. Every process is told, saves and stops.
# (srun would kill them.)
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

restarts=0
while true; do
    # JAX learns from SLURM's variables which processes there are. When one has ended, the others
    # get half a minute to end by themselves: ended at once, their code would hide the first one's.
    srun --kill-on-bad-exit=0 --wait=30{srun} \\
        braeburn train {arguments} &
    tasks=$!
    # A signal interrupts `wait`, so it is asked again until srun itself has ended.
    while true; do
        wait "$tasks"
        code=$?
        kill -0 "$tasks" 2>/dev/null || break
    done
    if [ -n "$stopping" ]; then
        # A job that was cancelled is told in the same way, but is not running any more.
        if [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ]; then
            echo "stopped before its time; queued again, to go on from the last checkpoint"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        exit 0
    fi
    # 0: the run is finished. 2: a mistake that its message explains, and no restart would mend.
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
        exit "$code"
    fi
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "$MAX_RESTARTS" ]; then
        echo "ended with code $code, and all $MAX_RESTARTS restarts are used up"
        exit "$code"
    fi
    again="restart $restarts of at most $MAX_RESTARTS, from the last checkpoint"
    echo "ended with code $code; $again"
done
"""


def script(job: Job, time: str, partition: str | None, account: str | None) -> str:
    """A commented sbatch script: one task for each GPU, or for each CPU process.

    Args:
        job: whose run directory is on storage that all nodes share, and whose restarts are within
            one job of SLURM.
        time: limit of the job, as SLURM writes it: minutes, HH:MM:SS or D-HH:MM:SS.
        partition: of the cluster; None leaves a line to fill in.
        account: to be charged; None leaves a line to fill in.

    Returns:
        The text of the script.

    Raises:
        UserError: the target is one of TPUs, or has no JAX that could be installed, or a value
            would not stay within its line of the script.
    """
    job.check()
    target = job.target
    if not TIME_LIMIT.fullmatch(time):
        raise UserError(
            f"--time {time[:80]!a} is no limit that SLURM reads; write HH:MM:SS or D-HH:MM:SS, as "
            f"in 1-00:00:00"
        )
    for option, given in (("--partition", partition), ("--account", account)):
        if given is not None and not re.fullmatch(r"[\w.,@+-]+", given):
            raise UserError(
                f"{option} {given[:80]!a} is no name of SLURM's; write the name that `sinfo` shows"
            )
    nodes, each = (
        target.slices * target.nodes_per_slice,
        target.chips_per_node * target.facts.devices_per_chip,
    )
    environment, srun = "", ""
    if target.facts.maker == "google":
        raise UserError(
            f"--on {str(target)!r}: SLURM does not schedule TPUs; use `braeburn launch kubernetes`"
        )
    if target.facts.maker == "cpu":
        shape = f"{target.chips} processes on CPUs"
        resources = [f"#SBATCH --ntasks={target.chips}"]
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
    return _TEMPLATE.format(
        name=job.name,
        # Spaces would end the name.
        job_name="braeburn-" + re.sub(r"[^\w.+=@-]+", "-", job.name),
        target=target,
        shape=shape,
        out=shlex.quote(str(job.out)),
        resources="\n".join(resources),
        time=time,
        partition=f"#SBATCH --partition={partition}"
        if partition
        else "##SBATCH --partition=NAME  # to fill in",
        account=f"#SBATCH --account={account}"
        if account
        else "##SBATCH --account=NAME  # to fill in",
        environment=environment,
        max_restarts=job.max_restarts,
        srun=srun,
        arguments=shlex.join(job.arguments),
    )
