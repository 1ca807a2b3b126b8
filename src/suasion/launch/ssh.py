"""ssh to the rented machine, through OpenSSH's client: commands, files there, files back.

Files travel as tar streams, so that nothing but ssh and tar is needed at either end. The host's key is learned at the first connection
and held to from then on, in a file of the session's own.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from suasion.errors import UserError
from suasion.launch.machine import Upload

CONNECTION_LOST = 255  # ssh's own exit code; everything else is the command's


class Unreachable(Exception):
    """The machine did not answer; it may later, or be gone."""


@dataclass(frozen=True)
class Host:
    """Where to connect, as whom, with which key."""

    address: str
    key: Path
    user: str = "ubuntu"
    port: int = 22

    def command(self, *words: str) -> list[str]:
        """An ssh command line that never asks and never uses another key, agent or configuration."""
        options = {
            "BatchMode": "yes", "IdentitiesOnly": "yes", "IdentityAgent": "none", "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": str(self.key.with_name("known_hosts")), "ConnectTimeout": "10", "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4", "LogLevel": "ERROR",
        }  # fmt: skip
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return [
            "ssh",
            "-F",
            "/dev/null",
            *given,
            "-i",
            str(self.key),
            "-p",
            str(self.port),
            f"{self.user}@{self.address}",
            *words,
        ]

    def run(self, command: str, stdin: bytes = b"", timeout: float = 60.0) -> bytes:
        """Run a shell command; returns its output. Raises Unreachable, and UserError where the command fails."""
        try:
            done = subprocess.run(self.command(command), input=stdin, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unreachable(f"no answer in {timeout:.0f} s") from error
        if done.returncode == CONNECTION_LOST:
            raise Unreachable(done.stderr.decode(errors="replace").strip())
        if done.returncode:
            raise UserError(
                f"on the machine: {command.split()[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()[-500:]}"
            )
        return done.stdout

    def wait(self, seconds: float) -> None:
        """Until the machine lets us in. Raises UserError after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.run("true", timeout=20)
                return
            except Unreachable as error:
                if time.monotonic() > end:
                    raise UserError(
                        f"{self.address} did not let us in within {seconds:.0f} s ({error}). Does your network allow ssh to the outside, and did your "
                        "address change? Give it with --address."
                    ) from error
                time.sleep(min(5.0, seconds / 10))

    def push(self, uploads: Sequence[Upload], texts: dict[str, str], folder: str, timeout: float = 3600.0) -> None:
        """Send files, folders and texts (name -> content) into a folder of the machine."""
        with subprocess.Popen(
            self.command(f"mkdir -p {folder} && tar -xzf - -C {folder}"), stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin
            assert process.stderr
            try:
                with tarfile.open(fileobj=process.stdin, mode="w|gz") as archive:
                    for upload in uploads:
                        archive.add(upload.path, upload.name)
                    for name, text in texts.items():
                        content = text.encode()
                        entry = tarfile.TarInfo(name)
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
            except BrokenPipeError:
                pass  # the exit code below says what happened
            with suppress(BrokenPipeError):  # what is still in the buffer is sent now
                process.stdin.close()
            said = process.stderr.read().decode(errors="replace").strip()
            _wait(process, timeout)
        if process.returncode == CONNECTION_LOST:
            raise Unreachable(said)
        if process.returncode:
            raise UserError(f"could not copy to the machine: {said[-500:]}")

    def pull(self, names: Sequence[str], folder: str, into: Path) -> None:
        """Fetch files and folders below a folder of the machine; those that are not there are left out.

        Raises Unreachable where the connection ends before the last byte: what came is incomplete then.
        """
        into.mkdir(parents=True, exist_ok=True)
        quoted = " ".join(f"'{name}'" for name in names)
        there = f'cd {folder} && for name in {quoted}; do [ -e "$name" ] && echo "$name"; done | tar -czf - -T -'
        with subprocess.Popen(
            self.command(there), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout
            assert process.stderr
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|gz") as archive:
                    archive.extractall(into, filter="data")
            except (tarfile.ReadError, EOFError) as error:
                process.kill()
                raise Unreachable(f"the copy broke off: {error}") from error
            _wait(process, 60)
        if process.returncode:
            raise Unreachable(f"the copy ended with code {process.returncode}")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Raises Unreachable where ssh has not ended by then."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise Unreachable(f"no end of the copy in {seconds:.0f} s") from error
