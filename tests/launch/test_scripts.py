"""The launch scripts: dry runs, refused arguments, and how they handle the exit statuses of the processes they
started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.support.hosts import REPOSITORY, environment_without_ranks
from tests.support.runs import recipe_of, write_tasks

LAUNCH = REPOSITORY / "launch"


def run_script(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / name), *words],
        env={**environment_without_ranks(), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


TORCHRUN = "python -m torch.distributed.run"
END = "--max-restarts 3 -m dscl train r.yaml a=b --doctor\n"


@pytest.mark.parametrize(
    ("name", "environment", "shown"),
    [
        ("single.sh", {}, "python -m dscl train r.yaml a=b --doctor --nproc auto\n"),
        ("single.sh", {"NPROC_PER_NODE": "4"}, "python -m dscl train r.yaml a=b --doctor --nproc 4\n"),
        ("torchrun.sh", {"NPROC_PER_NODE": "2"}, f"{TORCHRUN} --nnodes 1 --nproc-per-node 2 --standalone {END}"),
        (
            "torchrun.sh",
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h0", "NPROC_PER_NODE": "8"},
            f"{TORCHRUN} --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint h0:29400 "
            f"--rdzv-id dscl --rdzv-conf is_host=false {END}",
        ),
        (
            "torchrun.sh",
            {"NNODES": "2:4", "MASTER_ADDR": "h0", "NPROC_PER_NODE": "8", "MASTER_PORT": "31000", "RDZV_ID": "mine"},
            f"{TORCHRUN} --nnodes 2:4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint h0:31000 "
            f"--rdzv-id mine {END}",
        ),
        (
            "torchrun.sh",  # as in a pod of Kubeflow's
            {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "h0", "PET_NPROC_PER_NODE": "4"},
            f"{TORCHRUN} --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint h0:29400 "
            f"--rdzv-id dscl --rdzv-conf is_host=true {END}",
        ),
        (
            "deepspeed.sh",
            {"HOSTFILE": str(LAUNCH / "hostfile.sample"), "NODE_RANK": "1", "MASTER_ADDR": "h0"},
            f"python -m deepspeed.launcher.runner --hostfile {LAUNCH}/hostfile.sample --master_port 29500 "
            "--no_ssh --node_rank 1 --master_addr h0 --module dscl train r.yaml a=b --doctor\n",
        ),
        (
            "deepspeed.sh",
            {"HOSTFILE": str(LAUNCH / "hostfile.sample")},
            f"python -m deepspeed.launcher.runner --hostfile {LAUNCH}/hostfile.sample --master_port 29500 "
            "--module dscl train r.yaml a=b --doctor\n",
        ),
        (
            "slurm.sh",
            {"NNODES": "2", "SBATCH": "--time=1:00:00 --partition=gpu"},
            "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=1:00:00 --partition=gpu "
            f"--export=ALL,DSCL_HOME={REPOSITORY},DSCL_JOB=1 {LAUNCH}/slurm.sh r.yaml a=b\n",
        ),
    ],
)
def test_a_dry_run_shows_the_command_and_does_nothing(name: str, environment: dict[str, str], shown: str) -> None:
    result = run_script(name, "r.yaml", "--dry-run", "a=b", **environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, shown, "")


def test_a_dry_run_of_the_quickstart_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "quickstart-3"
    run.mkdir()
    result = run_script("quickstart.sh", "--dry-run", "--out", str(tmp_path), "--seed", "3", "--fresh", "train.lr=1")
    assert (result.returncode, result.stderr) == (0, "")
    remove, make, train = result.stdout.splitlines()
    assert remove == f"rm -rf {run}"
    assert make == f"python tools/make_stage.py --out {tmp_path}/stage-3 --seed 3"
    assert train.startswith("exec python -m dscl train launch/recipes/quickstart.yaml --nproc ")
    assert train.endswith(f"stream.4.path={tmp_path}/stage-3/tense train.lr=1")
    assert list(tmp_path.iterdir()) == [run]


def write_fake_programs(folder: Path, **programs: str) -> dict[str, str]:
    """Write fake programs; the environment whose PATH finds them first."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "HERE": str(folder)}


IN_A_JOB = {"DSCL_JOB": "1", "SLURM_JOB_ID": "7", "DSCL_HOME": str(REPOSITORY)}
# In a program that a script has started: wait until the script waits for it.
WAITED_FOR = 'until [ "$(cut -d " " -f 3 "/proc/$PPID/stat")" = S ]; do sleep 0.01; done'
# The batch shell gets the signal that the job will end. Each start ends with the next status in the file `ends`.
SRUN = f"""
echo "started" >>"$HERE/log"
if [ -n "${{ANNOUNCED:-}}" ]; then
    trap 'echo heard >>"$HERE/log"' USR1
    {WAITED_FOR}
    kill -USR1 "$PPID"
    until grep -q heard "$HERE/log"; do sleep 0.01; done
fi
read -r status rest <"$HERE/ends"
echo "$rest" >"$HERE/ends"
exit "$status"
"""


@pytest.mark.parametrize(
    ("ends", "announced", "status", "log"),
    [
        ("1 0", "", 0, ["started", "started"]),
        ("75", "", 75, ["started", "requeue 7"]),
        ("1 0", "1", 1, ["started", "heard", "requeue 7"]),  # not saved in time
        ("138 0", "1", 138, ["started", "heard", "requeue 7"]),  # killed by it
        ("0", "1", 0, ["started", "heard"]),  # it was over
        ("2", "1", 2, ["started", "heard"]),
    ],
)
def test_a_slurm_job_whose_end_was_announced_does_not_start_again_within_it(
    tmp_path: Path, ends: str, announced: str, status: int, log: list[str]
) -> None:
    (tmp_path / "ends").write_text(f"{ends}\n")
    environment = write_fake_programs(tmp_path, srun=SRUN, scontrol='echo "$*" >>"$HERE/log"')
    result = run_script("slurm.sh", "r.yaml", **environment, **IN_A_JOB, ANNOUNCED=announced)
    assert (result.returncode, (tmp_path / "log").read_text().splitlines()) == (status, log), result.stderr


def test_a_slurm_job_told_before_it_has_ranks_goes_back_into_the_queue(tmp_path: Path) -> None:
    """The signal comes while the script checks or creates the Python environment."""
    python = f'[ "$1" != - ] || kill -USR1 "$PPID"; exec {sys.executable} "$@"'
    environment = write_fake_programs(tmp_path, srun=SRUN, scontrol='echo "$*" >>"$HERE/log"', python=python)
    result = run_script("slurm.sh", "r.yaml", **{**environment, "PYTHON": str(tmp_path / "bin" / "python")}, **IN_A_JOB)
    assert (result.returncode, (tmp_path / "log").read_text()) == (75, "requeue 7\n"), result.stderr


@pytest.mark.parametrize(("given", "kept"), [({}, str(REPOSITORY / ".cache")), ({"DSCL_CACHE": "/c"}, "/c")])
def test_the_nodes_of_a_slurm_job_prepare_data_once(tmp_path: Path, given: dict[str, str], kept: str) -> None:
    result = run_script(
        "slurm.sh", "r.yaml", **write_fake_programs(tmp_path, srun='echo "$DSCL_CACHE"'), **IN_A_JOB, **given
    )
    assert (result.returncode, result.stdout) == (0, f"{kept}\n"), result.stderr


def test_what_ssh_takes_along_is_removed_at_the_end(tmp_path: Path) -> None:
    """After a normal end, and after a signal."""
    (tmp_path / "tmp").mkdir()
    python = f"""
case "$*" in
*deepspeed.launcher.runner*)
    grep -q NCCL_MINE=1 "$DS_ENV_FILE" || exit 3
    {WAITED_FOR}
    kill "-$SIGNAL" "$PPID"
    [ "$SIGNAL" != TERM ] || sleep 60
    ;;
*) exec {sys.executable} "$@" ;;
esac"""
    environment = write_fake_programs(tmp_path, python=python)
    environment |= {"PYTHON": str(tmp_path / "bin" / "python"), "TMPDIR": str(tmp_path / "tmp"), "NCCL_MINE": "1"}
    for number, status in (("0", 0), ("TERM", 75), ("KILL", -9)):
        result = run_script(
            "deepspeed.sh", "r.yaml", HOSTFILE=str(LAUNCH / "hostfile.sample"), SIGNAL=number, **environment
        )
        assert result.returncode == status, result.stderr
        assert bool(list((tmp_path / "tmp").iterdir())) == (number == "KILL")  # else this would see nothing


def test_one_machine_alone(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path, "run", 2)))
    environment = {"NPROC_PER_NODE": "2", "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = run_script("single.sh", str(recipe), "train.epochs=1", "--no-doctor", **environment)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["complete"]
    state = next((tmp_path / "run" / "checkpoints").iterdir()) / "state.json"
    assert json.loads(state.read_text())["world_size"] == 2


def test_without_the_doctor() -> None:
    assert (
        run_script("single.sh", "r.yaml", "--dry-run", "--no-doctor").stdout
        == "python -m dscl train r.yaml --nproc auto\n"
    )
    assert run_script("slurm.sh", "r.yaml", "--dry-run", "--no-doctor").stdout.endswith("slurm.sh r.yaml --no-doctor\n")


@pytest.mark.parametrize("name", ["single.sh", "torchrun.sh", "deepspeed.sh", "slurm.sh"])
def test_help_is_the_head_of_the_script(name: str) -> None:
    result = run_script(name, "--help")
    assert result.returncode == 0
    assert f"./launch/{name} RECIPE.yaml [key=value ...]" in result.stdout
    assert "--dry-run" in result.stdout
    assert "MAX_RESTARTS" in result.stdout
    assert "#" not in result.stdout
    assert "SBATCH -" not in result.stdout


@pytest.mark.parametrize(
    ("name", "words", "environment", "message"),
    [
        ("single.sh", [], {}, "no recipe given; give RECIPE.yaml"),
        ("single.sh", ["-x"], {}, "-x: not understood; allowed: --dry-run, --no-doctor, --help, a recipe, key=value"),
        ("single.sh", ["r.yaml"], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: given '-1'; a whole number is needed"),
        ("torchrun.sh", ["r"], {"NNODES": "2"}, "MASTER_ADDR: not set, with NNODES=2; give the address of one of"),
        ("torchrun.sh", ["r"], {"NNODES": "two"}, "NNODES: given 'two'; a number, or a range like 2:4, is needed"),
        ("torchrun.sh", ["r"], {"NPROC_PER_NODE": "x"}, "NPROC_PER_NODE: given 'x'; a whole number is needed"),
        ("deepspeed.sh", ["r"], {}, "HOSTFILE: not set; name a file like launch/hostfile.sample"),
        ("deepspeed.sh", ["r"], {"HOSTFILE": "no"}, "HOSTFILE: no is not there; name a file like"),
        (
            "deepspeed.sh",
            ["r"],
            {"HOSTFILE": str(LAUNCH / "hostfile.sample"), "NODE_RANK": "0"},
            "MASTER_ADDR: not set, with NODE_RANK=0; give the address of node 0",
        ),
        ("slurm.sh", ["r"], {"NNODES": "x"}, "NNODES: given 'x'; a whole number is needed"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    name: str, words: list[str], environment: dict[str, str], message: str
) -> None:
    result = run_script(name, *words, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{name}: {message}")
    assert result.stderr.endswith("; see --help\n")
    assert len(result.stderr.splitlines()) == 1


# Stands for a launcher: a process without LOCAL_RANK, whose children are ranks with LOCAL_RANK.
LAUNCHER = """
import os, subprocess, sys
words = [sys.executable, sys.argv[1]]
ranks = [subprocess.Popen(words, env={**os.environ, "LOCAL_RANK": str(n)}, start_new_session=True) for n in range(2)]
print("up", flush=True)
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""


# The beginning of every rank; the file lets the fixture find and end its process.
RANK = """
import os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
(here / f"{os.getpid()}.pid").touch()
"""
LISTENING = """
def heard(number, frame):
    os.write(1, f"heard {signal.Signals(number).name}\\n".encode())  # in one piece, beside another rank's
    Path(os.environ["DSCL_STATUS_TO"]).write_text("75")
    (here / "heard").touch()
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): signal.signal(number, heard)
os.write(1, b"ready\\n")
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
time.sleep(60)
"""

Supervised = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    """`supervised(rank, restarts)`: supervise.sh over a launcher whose ranks run this program."""
    started: list[subprocess.Popen[str]] = []

    def start(rank: str, restarts: int = 0, launcher: str = LAUNCHER) -> subprocess.Popen[str]:
        sources = [tmp_path / "launcher.py", tmp_path / "rank.py"]
        sources[0].write_text(launcher)
        sources[1].write_text(RANK + rank)
        body = f'source {LAUNCH}/supervise.sh; launch {restarts} {sys.executable} "$@"'
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", body, "script", *map(str, sources)],
            env=environment_without_ranks(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell starts by `&`
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    for rank in tmp_path.glob("*.pid"):
        with suppress(OSError):
            if str(tmp_path).encode() in Path(f"/proc/{rank.stem}/cmdline").read_bytes():
                os.kill(int(rank.stem), signal.SIGKILL)
    for process in started:
        process.communicate()


def wait_for(process: subprocess.Popen[str], word: str, times: int) -> None:
    assert process.stdout is not None
    while times:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        times -= line.strip() == word


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_goes_to_the_ranks_and_their_status_comes_back(supervised: Supervised, number: signal.Signals) -> None:
    process = supervised(LISTENING)
    wait_for(process, "ready", 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert [line for line in out.splitlines() if line != "up"] == [f"heard {number.name}"] * 2


def test_ranks_that_come_up_after_the_signal_are_told_too(supervised: Supervised) -> None:
    """For example a rank that its launcher restarts because the signal killed it during start-up."""
    late = """
env = dict(os.environ)
if env.get("LOCAL_RANK") == "1":
    del env["LOCAL_RANK"]  # this becomes no rank, as seen from outside
    os.execve(sys.executable, [sys.executable, __file__], env)
if "LOCAL_RANK" not in env:
    os.write(1, b"ready\\n")
    while not (here / "heard").exists(): time.sleep(0.01)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until the rank listens
    os.execve(sys.executable, [sys.executable, __file__], {**env, "LOCAL_RANK": "late"})
"""
    process = supervised(late + LISTENING)
    wait_for(process, "ready", 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert out.splitlines().count("heard SIGTERM") == 2


def test_a_second_signal_ends_the_launcher_too(supervised: Supervised) -> None:
    deaf = "signal.signal(signal.SIGTERM, lambda *a: os.write(1, b'heard\\n'))\nos.write(1, b'ready\\n')\n"
    process = supervised(deaf + "while True: time.sleep(0.1)")
    wait_for(process, "ready", 2)
    process.send_signal(signal.SIGTERM)
    wait_for(process, "heard", 2)
    deadline = time.monotonic() + 30
    # Until the script has forwarded the signal and sleeps again, it may lose the next one.
    while "sleep" not in child_names(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    wait_for(process, "heard", 2)
    assert process.wait(30) == 128 + signal.SIGTERM


def child_names(pid: int) -> list[str]:
    """The programs that a process has started, by name."""
    names = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            names.append(Path(f"/proc/{child}/comm").read_text().strip())
    return names


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "starts"),
    [("[0]", 3, 0, 1), ("[1, 1, 0]", 3, 0, 3), ("[1, 1, 1]", 1, 1, 2), ("[2]", 3, 2, 1), ("[75]", 3, 75, 1)],
)
def test_what_failed_is_started_again_as_often_as_asked(
    supervised: Supervised, tmp_path: Path, ends: str, restarts: int, status: int, starts: int
) -> None:
    """A wrong recipe and a requested stop are not restarted: the ranks write these statuses to a file, whatever the
    launcher returns."""
    rank = f"""
mine = here / os.environ["LOCAL_RANK"]
count = len(mine.read_text()) if mine.exists() else 0
mine.write_text("x" * (count + 1))
end = {ends}[count]
if end in (2, 75): Path(os.environ["DSCL_STATUS_TO"]).write_text(str(end)); end = 0
sys.exit(end)
"""
    process = supervised(rank, restarts)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert (tmp_path / "0").read_text() == "x" * starts
    assert err.count("starting again") == starts - 1
    if starts > 1:
        assert f"ended with status 1; starting again (then {restarts - 1} times more)" in err


def test_a_signal_before_there_are_ranks_ends_the_launcher(supervised: Supervised) -> None:
    process = supervised("", 3, "import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    wait_for(process, "up", 1)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert time.monotonic() - start < 10
