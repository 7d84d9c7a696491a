"""Bridges in real services under real load: `make bench-service`; see `docs/services.md`.

- `__main__.py` is the command; `plan.py` says what is measured, and what is to be reached.
- `running.py` starts servers, loads them and reads what they cost; `tables.py` shows the outcome.
- `applications/` has a service for each framework, `bridges/` a module for each way to call from
  it, `clients/` what is called. They run in the servers' processes and know nothing of the rest.
"""
