"""Messages between the tests and the process with the fake GPU."""

from typing import BinaryIO


def send(pipe: BinaryIO, message: bytes) -> None:
    """Writes a message."""
    pipe.write(len(message).to_bytes(8, "little") + message)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes:
    """Reads a message; empty at the end."""
    return pipe.read(int.from_bytes(pipe.read(8), "little"))
