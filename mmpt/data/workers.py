"""Worker processes whose results reach the main process through shared memory that is used again and again.

    requests --pipe--> worker: function(request) --tensors, arrays--> a slot of shared memory --> views of it, in order
                                                 --all else, pickled--> pipe

A slot's pages are mapped once. So a batch costs its worker one copy and the main process next to nothing; a new shared
tensor for every batch costs a file, the way of its descriptor through a socket, and a fault for each page on both sides.
"""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mmpt.types import UserError

Request = TypeVar("Request")
Result = TypeVar("Result")

# A forked worker starts at once and shares what its parent has read. It computes with one thread, so it never waits for the
# OpenMP threads of its parent, which a fork does not copy. Other systems have no safe fork.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"
_SLOT_BYTES = 1 << 26  # of address space: memory is taken as far as results fill it
_ALIGNMENT = 64  # bytes; a line of the cache, and no element is larger


class _Waiting(NamedTuple):
    """A request that has been sent and not been answered."""

    worker: int
    slot: int | None  # where the answer's arrays will lie; None: within the answer


class Workers(Generic[Request, Result]):
    """Computes `function` of requests in `count` processes, or in this one for 0, with `ahead` requests waiting at each.

    Results are dataclasses, tuples and the like with tensors and numpy arrays in them. Their memory is used again once
    nothing refers to it. So they may be kept, but while many are kept those that follow pass through the pipe, which is slow.
    """

    def __init__(
        self, function: Callable[[Request], Result], count: int, ahead: int = 2, held: int = 1, slot_bytes: int = _SLOT_BYTES
    ) -> None:
        """`held`: results that the caller keeps at a time; `slot_bytes`: the most that a result's arrays take."""
        self._function, self._ahead, self._busy = function, ahead, False
        # One slot for each request on its way, those for the results in use, one for the result that comes next.
        self._slots = [_shared(slot_bytes) for _ in range(count * ahead + held + 1 if count else 0)]
        self._made = _shared(8 * count).view(torch.int64) if count else torch.zeros(0, dtype=torch.int64)  # answers, by worker
        self._received = 0
        self._free = deque(range(len(self._slots)))
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context(_START_METHOD)
        for number in range(count):
            here, there = context.Pipe()
            mine = (function, there, self._slots, self._made, number, os.getpid())
            process = context.Process(target=_work, args=mine, name=f"data-{number}", daemon=True)
            process.start()
            there.close()  # so that the pipe breaks when the worker ends
            self._pipes.append(here)
            self._processes.append(process)
        self.close = weakref.finalize(self, _end, self._processes, self._pipes)
        """End the processes; also called when this object, or the program, ends."""

    @property
    def ready(self) -> int:
        """Results that are made and wait to be taken."""
        return int(self._made.sum()) - self._received

    def map(self, requests: Iterable[Request]) -> Iterator[Result]:
        """`function` of every request, in order. One walk at a time; it may be left early.

        Raises UserError as `function` does, and RuntimeError, with the worker's traceback, for any other fault of it; the workers
        are closed then.
        """
        if not self._pipes:
            yield from map(self._function, requests)
            return
        if self._busy:
            raise RuntimeError("the workers are still busy with another walk; end that one first")
        if not self.close.alive:
            raise RuntimeError("the workers are closed")
        faults: list[Exception] = []
        self._busy, source, waiting = True, _until_fault(requests, faults), deque[_Waiting]()
        try:
            for worker in list(range(len(self._pipes))) * self._ahead:
                self._send(worker, source, waiting)
            while waiting:
                first = waiting.popleft()
                result = self._receive(first)
                self._send(first.worker, source, waiting)
                yield result
                del result  # its slot is free as soon as the caller lets go of it
            for fault in faults:  # after the results of all requests before it, however many workers there are
                raise fault
        except Exception:
            self.close()  # else this would wait until all that was asked for is made
            raise
        finally:
            for left in waiting:
                self._discard(left)
            self._busy = False

    def _send(self, worker: int, source: Iterator[Request], waiting: deque[_Waiting]) -> None:
        for request in source:  # the next one, if there is one
            slot = self._free.popleft() if self._free else None
            try:
                self._pipes[worker].send((slot, request))
            except OSError as error:
                raise self._ended(worker) from error
            waiting.append(_Waiting(worker, slot))
            return

    def _receive(self, sent: _Waiting) -> Result:
        failed, spans, pickled = self._answer(sent)
        buffers: list[np.ndarray] = []
        if sent.slot is not None:
            memory = np.frombuffer(self._slots[sent.slot].numpy().data, dtype=np.uint8)  # lives as long as the last view of it
            weakref.finalize(memory, self._free.append, sent.slot)
            buffers = [memory[start:stop] for start, stop in spans]
            if not pickled:
                pickled = buffers.pop().tobytes()
        result = pickle.loads(pickled, buffers=buffers)
        if failed:
            raise result
        return result

    def _answer(self, sent: _Waiting) -> Any:
        try:
            answer = self._pipes[sent.worker].recv()
            self._received += 1
            return answer
        except (EOFError, OSError) as error:
            raise self._ended(sent.worker) from error
        except BaseException:  # Ctrl-C: nobody knows how much of the answer was read
            self.close()
            raise

    def _ended(self, worker: int) -> RuntimeError:
        self._processes[worker].join(timeout=5)
        code = self._processes[worker].exitcode
        return RuntimeError(f"data worker {worker} has ended with exit code {code}; -9 is the kernel's, when memory runs out")

    def _discard(self, sent: _Waiting) -> None:
        try:
            self._pipes[sent.worker].recv_bytes()
            self._received += 1
        except (EOFError, OSError):
            return  # the worker has ended, and its slot with it
        if sent.slot is not None:
            self._free.append(sent.slot)


def _until_fault(requests: Iterable[Request], faults: list[Exception]) -> Iterator[Request]:
    """The requests as far as there are any; what ended them early is put into `faults`."""
    try:
        yield from requests
    except Exception as error:
        faults.append(error)


def _shared(size: int) -> UInt8[Tensor, " bytes"]:
    """Memory that all workers see. A fork inherits an anonymous map, which no small /dev/shm (64 MB in containers) bounds."""
    if _START_METHOD == "fork":
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    return torch.empty(size, dtype=torch.uint8).share_memory_()


def _end(processes: list[BaseProcess], pipes: list[Connection]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.kill()  # it only reads: there is nothing to finish
        process.join()


def _work(function: Callable[[Any], Any], pipe: Connection, slots: list[Tensor], made: Tensor, number: int, parent: int) -> None:
    """A worker's life: requests and their answers, until the main process is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers itself
    torch.set_num_threads(1)
    requests: SimpleQueue[tuple[int | None, Any]] = SimpleQueue()
    for name, target, arguments in (("watch-parent", _end_with, (parent,)), ("requests", _receive_all, (pipe, requests))):
        threading.Thread(target=target, args=arguments, daemon=True, name=name).start()
    memories = [slot.numpy() for slot in slots]
    try:
        while True:
            slot, request = requests.get()
            try:
                answer = (False, *_pack(function(request), None if slot is None else memories[slot]))
            except UserError as error:
                answer = (True, [], pickle.dumps(error))
            except Exception:
                answer = (True, [], pickle.dumps(RuntimeError(f"in a data worker:\n{traceback.format_exc()}")))
            made[number] += 1  # before it is sent: what is received was counted
            pipe.send(answer)
    except OSError:
        return


def _receive_all(pipe: Connection, requests: SimpleQueue) -> None:
    """Takes requests out of the pipe at once: else both sides could wait to send, each into a pipe that is full."""
    try:
        while True:
            requests.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # the main process has closed the pipe


def _end_with(parent: int) -> None:
    # A killed parent does not always break the pipe: workers that were forked later hold its other end, too.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _pack(value: Any, memory: UInt8[np.ndarray, " bytes"] | None) -> tuple[list[tuple[int, int]], bytes]:
    """Pickle `value`, its arrays put into `memory` as far as they fit: (start, stop) of each of these, and the pickle.

    Where it fits, the pickle lies in the last of these, and what goes through the pipe is short: a worker that had to wait
    until its answer is read could not go on to the next request.
    """
    spans: list[tuple[int, int]] = []

    def put(array: UInt8[np.ndarray, " bytes"]) -> bool:
        start = -(-spans[-1][1] // _ALIGNMENT) * _ALIGNMENT if spans else 0
        stop = start + len(array)
        if memory is None or stop > len(memory):
            return False
        memory[start:stop] = array
        spans.append((start, stop))
        return True

    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=lambda buffer: not put(np.asarray(buffer.raw()))).dump(value)
    pickled = file.getvalue()
    return spans, b"" if put(np.frombuffer(pickled, dtype=np.uint8)) else pickled


class _Pickler(pickle.Pickler):
    """Gives the memory of tensors, as pickle does that of numpy arrays, to `buffer_callback`."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().reshape(-1)
            flat = flat.as_strided(flat.shape, (1,))  # one of no or one element counts as contiguous with any stride
            return _tensor, (flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape))  # not all types are numpy's
        return NotImplemented


def _tensor(flat: UInt8[np.ndarray, " bytes"], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(flat).view(dtype).reshape(shape)
