"""A job that several processes do together, and what each of them returns."""

import os
import socket
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict  # Loaded by sharded models in each process, unless it is here before.
import torch.multiprocessing as mp


def on(world, folder, job, *, group=False):
    """Run a job on several processes and return what each returns.

    They are forked: a spawned one would first import all that this one has, for seconds.

    Args:
        world: How many.
        folder: Where their files go.
        job: Called without arguments, in each.
        group: Whether they are put into a process group. Strategies of Lightning make their own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = Path(tempfile.mkdtemp(dir=folder))
    mp.start_processes(_run, (world, port, files, job, group), nprocs=world, start_method="fork")
    return [torch.load(files / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank, world, port, files, job, group):
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    warnings.simplefilter("ignore")  # Of few workers.
    if group:
        limit = timedelta(minutes=1)  # Of processes that wait for each other in vain.
        dist.init_process_group("gloo", init_method=f"file://{files}/store", rank=rank, world_size=world, timeout=limit)
    torch.save(job(), files / f"{rank}.pt")
    if dist.is_initialized():  # Left to the end of the process, threads of the group may outlive what they use.
        dist.barrier()
        dist.destroy_process_group()
