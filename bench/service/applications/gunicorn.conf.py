"""One worker, with the threads that the plan says."""

import os

worker_class = "gthread"
workers = 1
threads = int(os.environ["SERVICE_THREADS"])
graceful_timeout = 5
loglevel = "warning"
control_socket_disable = True


def post_worker_init(worker):
    """In the worker, after the fork: the clients connect."""
    import importlib

    importlib.import_module(worker.app.app_uri.partition(":")[0]).start()
