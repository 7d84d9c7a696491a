"""How gunicorn runs an application: one worker, with the threads that the plan says."""

from __future__ import annotations

import importlib
from typing import Any

from service.applications import THREADS, settle

worker_class = "gthread"
workers = 1
threads = THREADS
graceful_timeout = 5
loglevel = "warning"
control_socket_disable = True


def application(worker: Any) -> Any:
    return importlib.import_module(worker.app.app_uri.partition(":")[0])


def post_worker_init(worker: Any) -> None:
    """In the worker, after the fork: the clients connect."""
    application(worker).start()
    settle()


def worker_exit(server: Any, worker: Any) -> None:
    """In the worker, after its last request."""
    application(worker).stop()
