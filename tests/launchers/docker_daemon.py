"""A stand-in for the Docker daemon: as much of its HTTP API as the launcher uses, over a Unix socket; a container is a process.

The client (the real `docker` package) and nemo-run are not replaced. What a daemon does with mounts, users, limits and GPUs is only
written down: `requests` has every call, `created` the body of every container.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socketserver
import subprocess
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

IMAGE_ID = f"sha256:{'1a' * 32}"


@dataclass
class Container:
    id: str
    name: str
    body: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    removed: bool = False

    @property
    def status(self) -> str:
        return "created" if self.process is None else "running" if self.process.poll() is None else "exited"


@dataclass
class Daemon:
    socket: Path
    images: set[str]
    info: dict[str, Any] = field(default_factory=lambda: {"SecurityOptions": ["name=seccomp,profile=builtin"]})
    start_error: str | None = None
    """What the daemon says instead of starting a container."""
    requests: list[str] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    networks: list[dict[str, Any]] = field(default_factory=list)

    def created(self, stage: str) -> dict[str, Any]:
        """Body of the stage's last container."""
        bodies = [c.body for c in self.containers if c.body["Labels"]["nemo-run/id"].endswith(f"/{stage}")]
        return bodies[-1]

    def there(self) -> list[Container]:
        """What `docker ps -a` would show: a container that has ended is removed (AutoRemove)."""
        return [c for c in self.containers if not c.removed and c.status != "exited"]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if path == "/_ping":
            return 200, "OK"
        if path == "/version":
            return 200, {"Version": "28.2.2", "ApiVersion": "1.50", "MinAPIVersion": "1.24"}
        if path == "/info":
            return 200, self.info
        if image := re.fullmatch(r"/images/(.+)/json", path):
            found = image[1] in self.images
            return (
                (200, {"Id": IMAGE_ID, "RepoTags": [image[1]]}) if found else (404, {"message": f"No such image: {image[1]}"})
            )
        if path == "/networks/create":
            if any(network["Name"] == body["Name"] for network in self.networks):
                return 409, {"message": f"network with name {body['Name']} already exists"}
            self.networks.append(body)
            return 201, {"Id": body["Name"], "Warning": ""}
        if path.startswith("/networks/"):
            return 200, {"Id": path.rpartition("/")[2], "Name": path.rpartition("/")[2]}
        if path == "/containers/create":
            container = Container(f"{len(self.containers):064x}", query["name"], body)
            self.containers.append(container)
            return 201, {"Id": container.id, "Warnings": []}
        if path == "/containers/json":
            wanted = [label.split("=", 1) for label in json.loads(query.get("filters", "{}")).get("label", [])]
            fitting = [c for c in self.there() if all(c.body["Labels"].get(key) == value for key, value in wanted)]
            return 200, [{"Id": c.id} for c in fitting]
        found = re.fullmatch(r"/containers/([^/]+)(?:/(\w+))?", path)
        container = next((c for c in self.there() if found and c.id == found[1]), None)
        if found is None or container is None:
            return 404, {"message": f"No such container: {path}"}
        return self.container(method, found[2], container, query)

    def container(self, method: str, what: str | None, container: Container, query: dict[str, str]) -> tuple[int, Any]:
        if method == "DELETE":
            self.end(container)
            container.removed = True
            return 204, None
        if what == "json":
            return 200, {
                "Id": container.id,
                "Name": f"/{container.name}",
                "State": {"Status": container.status},
                "Config": {"Labels": container.body["Labels"]},
                "Image": container.body["Image"],
            }
        if what == "start":
            if self.start_error:
                return 500, {"message": self.start_error}
            image_has = {key: value for key, value in os.environ.items() if key == "PATH" or key.startswith("FAKE_")}
            own = dict(entry.split("=", 1) for entry in container.body["Env"])
            container.process = subprocess.Popen(
                container.body["Cmd"], env={**image_has, **own}, cwd="/", stdin=subprocess.DEVNULL, start_new_session=True
            )
            return 204, None
        if what == "kill":
            if container.process is None:
                return 409, {"message": f"container {container.id} is not running"}
            number = signal.Signals[query["signal"]]
            # The end of process 1 is the end of all processes of a container.
            os.killpg(container.process.pid, number) if number == signal.SIGKILL else container.process.send_signal(number)
            return 204, None
        return 404, {"message": "page not found"}

    def end(self, container: Container) -> None:
        if container.process is not None and container.process.poll() is None:
            os.killpg(container.process.pid, signal.SIGTERM)  # the wrapper, if it is one, ends its stage
            container.process.wait(20)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def serve(daemon: Daemon) -> _Server:
    """Serve in a thread; the caller shuts it down and ends what still runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle_any(self) -> None:
            url = urlsplit(self.path)
            path = re.sub(r"^/v[0-9.]+(?=/)", "", url.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            daemon.requests.append(f"{self.command} {path}")
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            code, value = daemon.answer(self.command, path, query, body)
            data = b"" if value is None else value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
            if code != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = handle_any

    server = _Server(str(daemon.socket), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
