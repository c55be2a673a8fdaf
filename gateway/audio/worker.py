"""Decode each file in a process of its own: ``python -m gateway.audio.worker DESCRIPTOR``.

``pool.FilePool`` starts one such server, which loads the decoders once and forks for each file. A fork takes a millisecond
or two, so each file has its own limits of CPU time and memory, its process ends as soon as no client waits for it, and a file
that crashes the decoder crashes nothing else.

The descriptor is a Unix socket of type SEQPACKET. Each message on it is a ``Job`` as JSON, with three descriptors: the file, a
socket of the same type for the answer, and a pipe with requests for more. The answer is one message ``STARTED``, one
``OPENED``, any number of ``SAMPLES`` with a ``PAUSED`` after each batch, and one ``DONE``, ``FAILED`` or ``DIED``. The job ends
when the other end of its socket is closed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import resource
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from gateway.audio import BYTES_PER_SAMPLE, RATE
from gateway.audio.convert import Pcm
from gateway.audio.files import decode_blocks, decode_stream
from gateway.audio.jobs import DIED, DONE, FAILED, MAX_MESSAGE_BYTES, OPENED, PAUSED, SAMPLES, STARTED, Failure, Job
from gateway.audio.media_types import CONTAINERS
from gateway.audio.sniff import DECODABLE, Content
from gateway.errors import ApiError, ErrorKind

CRASH_SCORE = "800"
"""oom_score_adj (proc(5)): when memory runs out, the kernel ends a decoding process, not the gateway or Triton."""

BATCH_SECS = 8.0
"""Length of the audio that is decoded ahead of its reader, in seconds."""


class Server:
    """Forks for each job until the other end of its socket is closed.

    Args:
        control: socket with the jobs.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, socket.socket] = {}
        self._woken, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serve."""
        for end in (self._woken, self._wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the wakeup descriptor
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway, which then closes the socket
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._reap()
                elif key.fileobj is not self._control:
                    self._end(key.data)
                elif not self._accept():
                    for pid in self._children:
                        os.kill(pid, signal.SIGKILL)
                    return

    def _accept(self) -> bool:
        """Start the next job; return whether there was one."""
        message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 3)
        if not message:
            return False
        if len(descriptors) < 3:  # noqa: PLR2004 (this process has as many as it may have)
            for descriptor in descriptors:
                os.close(descriptor)  # which ends the job
            return True
        file, demand, answer = descriptors[0], descriptors[2], socket.socket(fileno=descriptors[1])
        with contextlib.suppress(OSError):  # no client waits for it any more
            answer.send(STARTED, socket.MSG_DONTWAIT)
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes
            for descriptor in (file, demand):
                os.close(descriptor)
            answer.close()
            return True
        if pid == 0:
            try:
                self._become_child()
                decode(Job(**json.loads(message)), file, answer, demand)
            except ConnectionError:
                os._exit(0)  # no client waits for the answer
            except BaseException:  # noqa: BLE001 (after any error, this process must not go on as a server)
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(file)
        os.close(demand)
        self._children[pid] = answer
        self._selector.register(answer, selectors.EVENT_READ, pid)
        return True

    def _become_child(self) -> None:
        """Release the server's resources: the end of other jobs must be noticed, and signals must end this process."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for end in (self._control, self._woken, self._wake, *self._children.values()):
            end.close()
        _silence_libraries()

    def _end(self, pid: int) -> None:
        """End a job: the other end of its socket was closed."""
        if answer := self._children.get(pid):
            self._selector.unregister(answer)
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Report jobs whose process ended without its last message."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(MAX_MESSAGE_BYTES)
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            answer = self._children.pop(pid)
            with contextlib.suppress(KeyError):  # ended by us
                self._selector.unregister(answer)
            with answer, contextlib.suppress(OSError):  # no client waits for the answer, or earlier messages were not read
                if code := os.waitstatus_to_exitcode(status):
                    answer.send(DIED + str(code).encode(), socket.MSG_DONTWAIT)


def decode(job: Job, file: int, answer: socket.socket, demand: int) -> None:
    """Decode a file within the job's limits.

    Args:
        job: the job.
        file: descriptor of the file.
        answer: socket for the messages.
        demand: descriptor of a pipe with requests for the next batch.

    Raises:
        ConnectionError: the other end of the socket was closed.
    """
    limits = Limits(job)
    try:
        format_ = DECODABLE[job.format]
        if job.live:
            with os.fdopen(file, "rb", buffering=0) as pipe:
                _send(decode_stream(format_, pipe, job.max_secs), answer, None, limits)
        else:
            blocks = decode_blocks(_map(file), Content(format_, job.start), job.max_secs, separate=job.separate)
            _send(blocks, answer, demand, limits)
    except ApiError as error:
        failure = Failure(error.kind.name, error.message, error.param)
    except MemoryError:
        message = f"The {job.format} file needs more than {job.memory_bytes >> 20} MiB of memory to decode."
        failure = Failure(ErrorKind.UNDECODABLE_AUDIO.name, message)
    else:
        answer.send(DONE)
        return
    answer.send(FAILED + json.dumps(asdict(failure)).encode())


def _map(file: int) -> mmap.mmap:
    """Map a file.

    Raises:
        MemoryError: the file is larger than the limit of memory.
    """
    try:
        return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise MemoryError from error


def _send(blocks: Iterable[Pcm], answer: socket.socket, demand: int | None, limits: Limits) -> None:
    """Send samples: each batch when it is requested, or all as they are decoded."""
    decoded = sent = 0
    for block in blocks:
        channels, length = block.shape
        if not decoded:
            answer.send(OPENED + str(channels).encode())
        decoded += length
        limits.allow(decoded / RATE)
        data = block.T.tobytes()
        frame_bytes = BYTES_PER_SAMPLE * channels
        step = (MAX_MESSAGE_BYTES - len(SAMPLES)) // frame_bytes * frame_bytes
        for at in range(0, len(data), step):
            answer.send(SAMPLES + data[at : at + step])
        sent += length
        if demand is not None and sent >= BATCH_SECS * RATE:
            answer.send(PAUSED)
            if not os.read(demand, 1):
                raise BrokenPipeError
            sent = 0


class Limits:
    """Limits of this process.

    Args:
        job: the job with its limits.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(CRASH_SCORE, encoding="ascii")
        own_bytes = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        memory_bytes = own_bytes + job.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.allow(0.0)

    def allow(self, decoded_secs: float) -> None:
        """Set the limit of CPU time for ``decoded_secs`` of decoded audio."""
        most = self._job.cpu_limit(self._job.max_secs) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (min(most, self._job.cpu_limit(decoded_secs)), most))


def _silence_libraries() -> None:
    """Drop the output of C libraries, such as a line per damaged frame of an MP3, and keep Python's standard error."""
    sys.stderr = os.fdopen(os.dup(2), "w", 1, encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def main() -> None:
    """Serve on the socket whose descriptor is the only argument."""
    with socket.socket(fileno=int(sys.argv[1])) as control:
        server = Server(control)
        if CONTAINERS:
            importlib.import_module("gateway.audio.containers")  # once, and not in each child
        gc.collect()
        gc.freeze()  # otherwise each child's first collection would copy the server's memory
        server.run()


if __name__ == "__main__":
    main()
