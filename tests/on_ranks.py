"""Several processes as torchrun starts them, forked from here."""

import os
import socket
import tempfile
from itertools import count

from forked import exit_code, fork

# Ports below those that the system gives to whoever asks for any, and others in each process:
# a rank that found somebody else's store at its address would wait for it for days.
_PORTS = count(10_000 + os.getpid() % 1_000 * 20)


def free_port():
    """Return a port that nobody listens at and that no other process of the tests will take."""
    for port in _PORTS:
        with socket.socket() as server:
            if server.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("ports do not end")


def on_ranks(count, body, said=os.devnull):
    """Run in forked processes with torchrun's variables; their exit codes.

    Args:
        count: how many
        body: what each runs, which returns an exit code
        said: file for what they write to stderr
    """
    port = free_port()

    def on(rank):
        addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        numbers = {"RANK": rank, "LOCAL_RANK": rank}
        sizes = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        for key, value in {**addresses, **numbers, **sizes}.items():
            os.environ[key] = str(value)
        return body()

    children = [fork(lambda rank=rank: on(rank), said) for rank in range(count)]
    return [exit_code(child) for child in children]


def succeed(count, body):
    """Run in forked processes what has to end well, or show what they wrote to stderr."""
    with tempfile.NamedTemporaryFile("r") as said:
        assert on_ranks(count, body, said.name) == [0] * count, said.read()[-8000:]
