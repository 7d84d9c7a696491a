"""Runs the service under uvicorn, on a socket that somebody else holds open, and loses no request.

    python serve.py 3

The number is the file descriptor of the socket: systemd's first one is 3.
"""

import asyncio
import socket
import sys

import uvicorn

LINGER = 2.0  # seconds in which a client that has connected may send its request


class Server(uvicorn.Server):
    """One that, on SIGTERM, waits for the requests of those whose connections it has accepted.

    uvicorn closes each connection that has no request yet, though one may be on its way.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.sleep(LINGER)
        await super().shutdown(sockets)


if __name__ == "__main__":
    listener = socket.socket(fileno=int(sys.argv[1]))
    Server(uvicorn.Config("service:app", log_level="warning")).run([listener])
