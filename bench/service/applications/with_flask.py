"""Flask: handlers in gunicorn's threads, which ask async clients."""

from __future__ import annotations

from flask import Flask, Response, jsonify

from service import bridges
from service.applications import SEVERAL

app = Flask(__name__)
bridge = bridges.chosen()
clients = bridges.clients_of(bridge)
get = bridge.one(clients.get)
get_each = bridge.many(clients.get)
get_all = bridge.one(clients.get_all)
query = bridge.one(clients.query)
fetch = bridge.one(clients.fetch)


def start() -> None:
    """In the worker, after the fork."""
    bridge.one(clients.connect)()


def stop() -> None:
    """After the last request."""
    bridge.one(clients.disconnect)()
    bridge.close()


def several(number: int) -> list[int]:
    return [(number + more) % SEVERAL for more in range(SEVERAL)]


@app.get("/nothing/<int:number>")
def handle_nothing(number: int) -> Response:
    return jsonify({"value": f"value {number}"})


@app.get("/redis/<int:number>")
def handle_redis(number: int) -> Response:
    return jsonify({"value": get(number)})


@app.get("/several/<int:number>")
def handle_several(number: int) -> Response:
    return jsonify({"values": get_each(several(number))})


@app.get("/gathered/<int:number>")
def handle_gathered(number: int) -> Response:
    return jsonify({"values": get_all(several(number))})


@app.get("/postgres/<int:number>")
def handle_postgres(number: int) -> Response:
    return jsonify({"value": query(number)})


@app.get("/http/<int:number>")
def handle_http(number: int) -> Response:
    return jsonify({"value": fetch(number)})
