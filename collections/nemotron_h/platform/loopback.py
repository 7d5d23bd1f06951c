"""The meeting point of ranks of one machine, out of reach of others. Imports PyTorch alone."""

from __future__ import annotations

import functools
import socket

from torch.distributed import TCPStore

ADDRESS = "127.0.0.1"


@functools.cache  # runs of one process meet at one port, as they do with PyTorch's
def local_store(port: int, rank: int) -> TCPStore:
    """Return a rank's store, whose server listens on loopback.

    PyTorch's own listens on every interface and asks nobody who he is, also where the ranks meet at 127.0.0.1.

    Args:
        port: the same on all ranks.
        rank: 0 has the server; the others wait for it as long as for PyTorch's.
    """
    if rank:
        return TCPStore(ADDRESS, port, is_master=False)
    listener = socket.create_server((ADDRESS, port), backlog=1024)
    return TCPStore(ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
