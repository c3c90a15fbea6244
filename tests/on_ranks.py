"""Several processes as torchrun starts them, forked from here."""

import logging
import os
import socket


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def on_ranks(count, body):
    """Run in forked processes with torchrun's variables; their exit codes."""
    port, children = free_port(), []
    for rank in range(count):
        if (child := os.fork()) == 0:
            code = 70
            try:
                logging.disable()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                numbers = {"RANK": rank, "LOCAL_RANK": rank}
                sizes = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                for key, value in {**addresses, **numbers, **sizes}.items():
                    os.environ[key] = str(value)
                code = body()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
