"""A port for a process group on this machine."""

import random
import socket


def free_port():
    """A free port below the range that systems give to outgoing connections.

    A process that waits for its group tries to connect again and again; within that range it could
    be given, as its own end, the very port that it is looking for.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port on 127.0.0.1 between 20000 and 30000")
