"""Runs on two hosts (network namespaces of this machine), started as the scripts in launchers/ start them.

Slurm and pdsh are not here: stand-ins of the commands that are called show what would be started, and Slurm's template
runs whole.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.commands import ROOT, SMALL, Command, free_port, python, rows, run, wait_until
from support.hosts import Host, NoHosts, two_hosts

STEPS = ("--train.steps", "3")
ENDLESS = ("--train.steps", "1000000")
FINISHED_SECONDS = 400
"""How long four ranks on two busy cores may take to start, train and end."""
STARTED_SECONDS = 150
"""How long a run may take to get through its first step on a busy machine."""
ENDED_SECONDS = 30
"""How long after a host is lost the last process of the other may live."""
ZERO2 = "ds_configs/zero2.json"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
SCRIPTS = sorted((ROOT / "launchers").glob("*.sh"))


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as made:
            yield made
    except NoHosts as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def selected_alone(tmp_path_factory) -> list[dict]:
    """What one process selects."""
    folder = tmp_path_factory.mktemp("alone")
    run([*python(), *SMALL, *STEPS, "--output_dir", str(folder / "run")], folder / "output").succeeded()
    return rows(folder / "run/selection.jsonl")


def torchrun(hosts: tuple[Host, Host], ranks: int, *options: str) -> list[list[str]]:
    """The same line on each host; they meet at the first one."""
    meeting = f"RDZV_ENDPOINT={hosts[0].address}:{free_port()}"
    return [host.command("env", meeting, *_agent(ranks), *options) for host in hosts]


def torchrun_static(hosts: tuple[Host, Host], ranks: int, *options: str) -> list[list[str]]:
    """Each host is told its place."""
    meeting = [f"MASTER_ADDR={hosts[0].address}", f"MASTER_PORT={free_port()}"]
    return [
        host.command("env", *meeting, f"NODE_RANK={place}", *_agent(ranks), *options)
        for place, host in enumerate(hosts)
    ]  # fmt: skip


def _agent(ranks: int) -> list[str]:
    return ["NNODES=2", f"NPROC_PER_NODE={ranks}", "MAX_RESTARTS=0", "launchers/torchrun.sh", "--", *SMALL]


def deepspeed(hosts: tuple[Host, Host], ranks: int, *options: str) -> list[list[str]]:
    """A line for each host, without ssh; the hostfile lies beside the run's folder."""
    hostfile = Path(options[options.index("--output_dir") + 1]).parent / "hosts.txt"
    write_hostfile(hostfile, hosts, ranks)
    start = ["launchers/deepspeed.sh", str(hostfile), "--no_ssh", f"--master_addr={hosts[0].address}"]
    start += [f"--master_port={free_port()}"]
    return [
        host.command(*start, f"--node_rank={place}", "--", *SMALL, *options)
        for place, host in enumerate(hosts)
    ]  # fmt: skip


def write_hostfile(path: Path, hosts: Sequence[Host], ranks: int) -> None:
    path.write_text("".join(f"{host.address} slots={ranks}\n" for host in hosts), "utf-8")


def start(stack: ExitStack, lines: list[list[str]], folder: Path) -> list[Command]:
    return [stack.enter_context(Command(line, folder / f"host-{place}")) for place, line in enumerate(lines)]


def reached_a_step(directory: Path) -> bool:
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and bool(metrics.read_text("utf-8"))


@pytest.mark.parametrize(("launcher", "engine"), [(torchrun, "ddp"), (deepspeed, "deepspeed")])
def test_two_hosts_select_what_one_process_selects(launcher, engine, hosts, selected_alone, tmp_path):
    directory = tmp_path / "run"
    with ExitStack() as stack:
        lines = launcher(hosts, 2, *STEPS, "--output_dir", str(directory))
        for command in start(stack, lines, tmp_path):
            command.outcome(FINISHED_SECONDS).succeeded()
    environment = json.loads((directory / "environment.json").read_text("utf-8"))
    assert (environment["world_size"], environment["engine"]) == (4, engine)
    selected = rows(directory / "selection.jsonl")
    assert [row["selected"] for row in selected] == [row["selected"] for row in selected_alone]
    assert [row["candidates"] for row in selected] == [row["candidates"] for row in selected_alone]


def test_a_lost_host_ends_the_other(hosts, tmp_path):
    """The lost one holds the store in which failures are announced."""
    directory, (lost, left) = tmp_path / "run", hosts
    with ExitStack() as stack:
        lines = torchrun_static(hosts, 1, *ENDLESS, "--output_dir", str(directory))
        commands = start(stack, lines, tmp_path)
        wait_until(lambda: reached_a_step(directory), STARTED_SECONDS)
        lost.kill()
        wait_until(lambda: not left.alive(), ENDED_SECONDS)
        assert commands[1].outcome(1).code != 0


SEPARATE = (
    *SMALL,
    *("--train.steps", "8", "--checkpoint.every", "1"),
    *("--selection.candidates", "18", "--selection.budget", "9"),  # for three ranks
)


def separate(hosts: tuple[Host, Host], folder: Path, *options: str) -> list[list[str]]:
    """Two ranks on the first host and one on the second, which finds another folder there, with nothing in it."""
    meeting = [f"MASTER_ADDR={hosts[0].address}", f"MASTER_PORT={free_port()}"]
    first, second = (
        host.command("env", *meeting, f"NODE_RANK={place}", *_agent(ranks), *options)
        for place, (host, ranks) in enumerate(zip(hosts, (2, 1)))
    )
    own = folder.parent / "own"
    own.mkdir(exist_ok=True)
    return [first, hosts[1].with_own(folder, own, second)]


@pytest.mark.slow
def test_hosts_of_unequal_size_and_separate_folders_train_and_resume(hosts, tmp_path):
    """Only rank 0's folder counts: what it holds, and that others hold nothing."""
    folder, own = tmp_path / "shared", tmp_path / "own"
    folder.mkdir()
    run([*python(), *SEPARATE, "--output_dir", str(tmp_path / "alone")], tmp_path / "output").succeeded()
    with ExitStack() as stack:
        start(stack, separate(hosts, folder, *SEPARATE, "--output_dir", str(folder / "run")), tmp_path / "killed")
        wait_until(lambda: list(folder.glob("run/checkpoints/step-*")), STARTED_SECONDS)
        for host in hosts:
            host.kill()
            wait_until(lambda: not host.alive(), ENDED_SECONDS)  # noqa: B023
    with ExitStack() as stack:
        lines = separate(hosts, folder, *SEPARATE, "--output_dir", str(folder / "run"))
        for command in start(stack, lines, tmp_path / "resumed"):
            command.outcome(FINISHED_SECONDS).succeeded()
    assert json.loads((folder / "run/environment.json").read_text("utf-8"))["world_size"] == 3
    selected, alone = rows(folder / "run/selection.jsonl"), rows(tmp_path / "alone/selection.jsonl")
    assert [row["selected"] for row in selected] == [row["selected"] for row in alone]
    assert not list(own.iterdir())


def test_a_file_that_one_host_lacks_is_named_with_it(hosts, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 40, "utf-8")
    data = ("--data.train", str(folder / "train.jsonl"), "--output_dir", str(tmp_path / "run"))
    with ExitStack() as stack:
        commands = start(stack, separate(hosts, folder, *SEPARATE, *data), tmp_path)
        errors = [line for command in commands for line in command.outcome(FINISHED_SECONDS).errors]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: rank 2 on {hosts[1].name}: ")
    assert str(folder / "train.jsonl") in errors[0]


# By ssh, and under Slurm: neither is here


def test_deepspeed_by_ssh_starts_its_launcher_on_every_host(tmp_path):
    stand_in(tmp_path / "ssh", "echo 10.77.0.1\n")
    stand_in(tmp_path / "pdsh", f'echo "$@" > {tmp_path}/pdsh.txt\n')
    write_hostfile(tmp_path / "hosts.txt", [Host("first", "10.77.0.1"), Host("second", "10.77.0.2")], 2)
    path = {"PATH": f"{tmp_path}:{PATH}"}
    line = ["launchers/deepspeed.sh", str(tmp_path / "hosts.txt"), "--", *STEPS]
    run(line, tmp_path / "output", **path).succeeded()
    started = (tmp_path / "pdsh.txt").read_text("utf-8")
    assert "-w 10.77.0.1,10.77.0.2 " in started
    assert f"cd {ROOT}; " in started
    assert "--node_rank=%n --master_addr=10.77.0.1 " in started
    assert started.rstrip().endswith(f"launchers/train.py {' '.join(STEPS)} --ds_config launchers/../{ZERO2}")


def stand_in(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}", "utf-8")
    path.chmod(0o755)


@pytest.fixture
def job(hosts, tmp_path) -> dict[str, str]:
    """What Slurm sets for a job on two hosts. Its commands: srun starts a program on each host and hands signals on,
    scontrol names the hosts and writes down what it is asked, scancel signals every process of the job."""
    commands = tmp_path / "commands"
    commands.mkdir()
    tasks = "\n".join(f'{shlex.join(host.command())} "$@" &' for host in hosts)
    stand_in(
        commands / "srun",
        f'printf "%s\\n" "$@" > {tmp_path}/srun.txt\nwhile [[ $1 == --* ]]; do shift; done\n{tasks}\n'
        f"trap 'touch {tmp_path}/terminated; kill -TERM $(jobs -p)' TERM\nwhile ! wait; do :; done\n",
    )
    listed = "; ".join(f"ip netns pids {host.name}" for host in hosts)
    stand_in(commands / "scancel", f'[[ $* == "--signal=USR1 4242" ]] && kill -USR1 $({listed})\n')
    names = "\\n".join(host.address for host in hosts)
    stand_in(
        commands / "scontrol",
        f'echo "$@" >> {tmp_path}/scontrol.txt\n[[ $1 == show ]] && printf "{names}\\n" || true\n',
    )
    (tmp_path / "launchers").symlink_to(ROOT / "launchers")
    return {
        "PATH": f"{commands}:{PATH}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "host[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "3",
    }


def test_a_slurm_job_trains_on_all_hosts_and_goes_back_into_the_queue(job, hosts, selected_alone, tmp_path):
    directory = tmp_path / "runs/slurm-4242"
    with Command(["bash", "launchers/slurm.sbatch", *SMALL, *ENDLESS], tmp_path / "output", **job) as command:
        wait_until(lambda: reached_a_step(directory), STARTED_SECONDS)
        command.process.send_signal(signal.SIGTERM)  # Slurm's warning, to the batch script alone
        wait_until(lambda: not command.alive(), ENDED_SECONDS)
        assert command.outcome(1).code == 0
    assert not [pid for host in hosts for pid in host.alive()]
    assert (tmp_path / "scontrol.txt").read_text("utf-8").splitlines() == [
        "show hostnames host[1-2]",
        "requeue 4242",
    ]
    assert not (tmp_path / "terminated").exists()  # torchrun would have killed the ranks after its own grace
    assert list((directory / "checkpoints").glob("step-*"))
    assert "--cpus-per-task=3" in (tmp_path / "srun.txt").read_text("utf-8").splitlines()
    assert json.loads((directory / "environment.json").read_text("utf-8"))["world_size"] == 2
    # The learning rate's schedule depends on the number of steps, so only the first step is the same.
    assert rows(directory / "selection.jsonl")[0]["selected"] == selected_alone[0]["selected"]


# What the scripts refuse


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_explains_itself(script, tmp_path):
    shown = run([str(script), "--help"], tmp_path).succeeded().stdout
    assert f"launchers/{script.name} " in shown
    assert "#" not in shown


REFUSED = {
    "no folder": ("torchrun.sh", "--nnodes 2 -- --train.steps 3", {}, "--output_dir"),
    "nowhere to meet": ("torchrun.sh", "-- --output_dir x", {}, "RDZV_ENDPOINT"),
    "no place": ("torchrun.sh", "-- --output_dir x", {"MASTER_ADDR": "10.77.0.1"}, "NODE_RANK"),
    "unknown host": ("torchrun.sh", "-- --output_dir x", {"RDZV_ENDPOINT": "nowhere.invalid:1"}, "nowhere.invalid"),
    "loopback": ("torchrun.sh", "-- --output_dir x", {"RDZV_ENDPOINT": "localhost:1", "NNODES": "2"}, "loopback"),
    "no hosts": ("deepspeed.sh", "-- --train.steps 3", {}, "HOSTFILE"),
    "lost hosts": ("deepspeed.sh", "nowhere.txt", {}, "nowhere.txt"),
    "no address": ("deepspeed.sh", "README.md --no_ssh --node_rank=0", {}, "--master_addr"),
    "no rank": ("deepspeed.sh", "README.md --no_ssh --master_addr=10.77.0.1", {}, "--node_rank"),
}


@pytest.mark.parametrize(("script", "line", "variables", "named"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_one_line(script, line, variables, named, tmp_path):
    outcome = run([f"launchers/{script}", *line.split()], tmp_path, **variables)
    (error,) = outcome.stderr.splitlines()
    assert outcome.code == 2
    assert error.startswith("error: ")
    assert named in error
