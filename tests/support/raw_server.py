"""A server that answers every request with the same bytes, whatever they are."""

from __future__ import annotations

import socket
import threading
import time


class RawServer:
    """Listens at `url` inside a `with` block; `pause` is the seconds between two bytes. `requests` are what came."""

    def __init__(self, answer: bytes, pause: float = 0.0) -> None:
        self._answer, self._pause = answer, pause
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.requests = list[bytes]()

    def __enter__(self) -> RawServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while request := connection.recv(65536):
                    self.requests.append(request)
                    send(connection, self._answer, self._pause)
                    if b"Content-Length" not in self._answer:  # only the end of the connection ends such a body
                        connection.shutdown(socket.SHUT_WR)
            except OSError:  # a client that gave up
                return


def send(connection: socket.socket, answer: bytes, pause: float) -> None:
    if not pause:
        connection.sendall(answer)
        return
    for byte in answer:
        connection.sendall(bytes([byte]))
        time.sleep(pause)
