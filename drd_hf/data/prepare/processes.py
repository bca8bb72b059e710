"""Work spread over processes that die with the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from drd_hf.errors import UserError


@contextmanager
def worker_pool(num_proc: int) -> Iterator[Executor | None]:
    """Processes for `each_result`; None for one process, which is this one."""
    if num_proc == 1:
        yield None
        return
    executor = ProcessPoolExecutor(num_proc, initializer=_start_worker)
    try:
        yield executor
    except BrokenProcessPool:
        raise UserError(f"a process died, most likely out of memory; use fewer than num_proc {num_proc}") from None
    finally:
        executor.shutdown(cancel_futures=True)


def each_result(executor: Executor | None, function: Callable, items: Iterable) -> Iterator[tuple[int, Any]]:
    """Yield `(index, function(item))` for all items, as they get ready."""
    if executor is None:
        yield from ((index, function(item)) for index, item in enumerate(items))
        return
    futures = {executor.submit(function, item): index for index, item in enumerate(items)}
    for future in as_completed(futures):
        yield futures.pop(future), future.result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A parent that is killed cannot stop its workers, and they would go on writing beside its successor.
    multiprocessing.parent_process().join()
    os._exit(1)
