"""Start the ranks of a run on this node, and start all of them again when one fails or hangs.

`python -m nemotron_h.launch.restarts --run FOLDER --restarts 3 ... -m MODULE ARGUMENTS`: what `executor.restarts` of a
cluster file starts, once per node; ranks are processes `-m MODULE ARGUMENTS` under a monitor each.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError, report
from nemotron_h.launch.faults import Restarts, exit_code
from nemotron_h.platform import quiet
from nemotron_h.training.sections import LEAST, STACKS, limits, read_longest

#: ours: seconds that ranks have to write a checkpoint where they are told to leave; else as torchrun is told
LEAVE, LEAVE_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 600.0


def options(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a command line; the module of a rank is `module`, its arguments are `rest`."""
    parser = argparse.ArgumentParser("python -m nemotron_h.launch.restarts", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--restarts", type=int, required=True, help="how often it may be started again")
    parser.add_argument("--hang-after", type=float, required=True, help="least limit of a section, in seconds")
    parser.add_argument("--nodes", type=int, required=True, help="of the run; this is started on each")
    parser.add_argument("--devices", type=int, required=True, help="ranks of this node")
    parser.add_argument("-m", dest="module", required=True, metavar="MODULE ...", help="of a rank, with its arguments")
    own = arguments[: arguments.index("-m") + 2] if "-m" in arguments else arguments
    return parser.parse_args(own, argparse.Namespace(rest=arguments[len(own) :]))


def meeting(nodes: int) -> tuple[str, str]:
    """Return where the nodes meet, and the name of their meeting.

    Errors:
        UserError: there are several, and srun did not start this.
    """
    if nodes == 1:
        return "localhost:0", str(os.getpid())
    address, job = os.environ.get("SLURM_LAUNCH_NODE_IPADDR"), os.environ.get("SLURM_JOB_ID")
    if not address or not job:
        raise UserError(f"{nodes} nodes, and srun did not start this process", hint="submit with executor=slurm")
    return f"{address}:{15000 + int(job[-4:])}", f"{job}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def launch(given: argparse.Namespace, allowed: dict[str, float]) -> int:
    """Start the ranks, and return the exit code of the run."""
    from nvidia_resiliency_ext.fault_tolerance import FaultToleranceConfig, launcher, rank_monitor_server

    from nemotron_h.launch.restart_agent import CHECK_S, Agent, HangMonitor, Over

    endpoint, name = meeting(given.nodes)
    agents: list[Agent] = []

    def agent(*args: Any, **kwargs: Any) -> Agent:
        agents.append(Agent(*args, restarts=Restarts(given.run, given.restarts), nodes=given.nodes, **kwargs))
        return agents[0]

    rank_monitor_server.RankMonitorServer = HangMonitor  # NVRx makes both by these names
    launcher.LocalElasticAgent = agent
    launcher._register_ft_rdzv_handler()
    config = launcher.LaunchConfig(
        min_nodes=given.nodes,
        max_nodes=given.nodes,
        nproc_per_node=given.devices,
        fault_tol_cfg=FaultToleranceConfig(
            workload_check_interval=CHECK_S,
            initial_rank_heartbeat_timeout=None,  # sections, not heartbeats
            rank_heartbeat_timeout=None,
            rank_section_timeouts=allowed,
            enable_nic_monitor=False,  # asks for a file of the cluster's topology
        ),
        run_id=name,
        role="default",
        rdzv_endpoint=endpoint,
        rdzv_backend="c10d",
        max_restarts=given.restarts + 1,  # the agent says when it is over
        term_timeout=float(os.environ.get(LEAVE, LEAVE_S)),
        monitor_interval=0.1,
        local_addr="127.0.0.1" if given.nodes == 1 else None,
    )
    signal.signal(signal.SIGUSR1, functools.partial(_leave, launcher))
    ended = 1
    try:
        launcher.elastic_launch(config, sys.executable)("-u", "-m", "nemotron_h.launch.rank", given.module, *given.rest)
    except launcher.SignalException as error:
        ended = 128 + int(error.sigval)
    except (Over, launcher.ChildFailedError):
        pass
    codes = [code for code in (agents[0].codes() if agents else {}).values() if code is not None]
    return exit_code(codes) if codes else ended


def _leave(launcher: Any, number: int, frame: Any) -> None:
    """Tell the ranks to leave, as at SIGTERM: Slurm announces the end of a job with this one."""
    raise launcher.SignalException(f"signal {number}", sigval=signal.Signals(number))


def main() -> None:
    """Run the command line, and exit as the run does."""
    given = options(sys.argv[1:])
    try:
        allowed = limits(read_longest(given.run), given.hang_after)
        meeting(given.nodes)
    except UserError as error:
        report(error)
        sys.exit(error.EXIT_CODE)
    # NVRx's sockets too, which take pickles: of this user alone
    folder = tempfile.tempdir = os.environ[STACKS] = tempfile.mkdtemp(prefix="nemotron_h_")
    os.environ[LEAST] = str(given.hang_after)
    if not quiet.verbose():  # NVRx has several lines for each of its steps, and for a machine without a GPU
        logging.disable()
    try:
        code = launch(given, allowed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
