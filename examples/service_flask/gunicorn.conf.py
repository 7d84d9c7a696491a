"""How gunicorn runs the service: when each worker connects, and when it may end."""

import service

from unsync import unsync

worker_class = "gthread"
threads = 16
graceful_timeout = 30  # seconds from SIGTERM to SIGKILL: requests of up to 10, then 10 + 5 + 3


def post_worker_init(worker: object) -> None:
    """In the worker, after the fork: one that cannot connect does not serve."""
    service.start().result(10)


def worker_exit(server: object, worker: object) -> None:
    """In the worker, after its last request."""
    unsync.drain(10)  # what requests have called, and did not wait for
    service.stop().result(5)
    unsync.shutdown(3)
