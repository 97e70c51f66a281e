"""A queue that joins what many clients ask for at once into batches for one worker thread.

Items of the same key (which scorer, which sigma, which shape) share a batch. A batch is begun when the worker is free and either
it is full or its first item has waited long enough; while the worker is busy the next ones fill up by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from drmcli.errors import DrmError

log = logging.getLogger("drmcli.serve")


class Full(Exception):
    """The queue has no room for a request now; it may after `retry_after` seconds."""

    def __init__(self, retry_after: float):
        super().__init__(f"full for another {retry_after:.1f} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The server is ending: what still waits is not computed."""


@dataclass
class Item:
    """One thing to score and where its answer goes."""

    payload: Any
    answer: asyncio.Future[Any]
    arrived: float
    """By the event loop's clock, seconds."""


class Batcher:
    """Joins items into batches for `score(key, payloads) -> one result a payload`, which runs in one thread of its own."""

    def __init__(
        self,
        score: Callable[[Any, list[Any]], Sequence[Any]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        observe: Callable[[Any, int, float], None] = lambda key, size, seconds: None,
    ):
        self.score = score
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.observe = observe
        """Told of every batch: key, size, seconds."""
        self.waiting: OrderedDict[Hashable, deque[Item]] = OrderedDict()
        self.count = 0
        """Items that wait or are being computed."""
        self.rate = 0.0
        """Items a second, a moving average."""
        self.changed = asyncio.Event()
        self.closed = False
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="drm-scorer")

    async def submit(self, work: Sequence[tuple[Hashable, Any]]) -> list[Any]:
        """Results of (key, payload) in their order; a payload that fails gives its exception, and fails alone.

        Raises Full when they do not all fit into the queue (none of them is then computed), Closed when the server is ending.
        """
        if self.closed:
            raise Closed
        if self.count + len(work) > self.max_queue:
            raise Full(max(1.0, self.count / self.rate if self.rate else 1.0))
        loop = asyncio.get_running_loop()
        items = [Item(payload, loop.create_future(), loop.time()) for _, payload in work]
        for (key, _), item in zip(work, items):
            self.waiting.setdefault(key, deque()).append(item)
        self.count += len(items)
        self.changed.set()
        try:
            return list(await asyncio.gather(*(item.answer for item in items), return_exceptions=True))
        finally:  # a client that is gone no longer waits
            for item in items:
                item.answer.cancel()

    async def run(self) -> None:
        """The loop: until `close`."""
        loop = asyncio.get_running_loop()
        try:
            while (key := await self._next()) is not None:
                batch = self._take(key)
                if not batch:
                    continue
                began = loop.time()
                results = await loop.run_in_executor(self.worker, settle, self.score, key, [i.payload for i in batch])
                seconds = loop.time() - began
                self.rate += 0.2 * (len(batch) / max(seconds, 1e-6) - self.rate)
                self.count -= len(batch)
                for item, result in zip(batch, results, strict=True):
                    if item.answer.done():
                        continue
                    if isinstance(result, BaseException):
                        item.answer.set_exception(result)
                    else:
                        item.answer.set_result(result)
                self.observe(key, len(batch), seconds)
        finally:
            self.close()

    async def _next(self) -> Hashable | None:
        """The key whose batch is due: one that is full, else the one that has waited long enough. None when the queue is closed."""
        loop = asyncio.get_running_loop()
        while not self.closed:
            self.changed.clear()
            oldest = sorted(self.waiting, key=lambda key: self.waiting[key][0].arrived)
            for key in oldest:
                if len(self.waiting[key]) >= self.max_batch:
                    return key
            left = self.waiting[oldest[0]][0].arrived + self.max_wait - loop.time() if oldest else None
            if left is not None and left <= 0:
                return oldest[0]
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), left)
        return None

    def _take(self, key: Hashable) -> list[Item]:
        queue = self.waiting[key]
        batch: list[Item] = []
        while queue and len(batch) < self.max_batch:
            item = queue.popleft()
            if item.answer.done():  # its client is gone
                self.count -= 1
            else:
                batch.append(item)
        if not queue:
            del self.waiting[key]
        return batch

    def close(self) -> None:
        """Answer what still waits with Closed and let the worker end."""
        self.closed = True
        for queue in self.waiting.values():
            for item in queue:
                if not item.answer.done():
                    item.answer.set_exception(Closed())
        self.waiting.clear()
        self.changed.set()
        self.worker.shutdown(wait=False)


def settle(score: Callable[[Any, list[Any]], Sequence[Any]], key: Any, payloads: list[Any]) -> list[Any]:
    """A result a payload. Where a batch fails, its halves are tried, down to the payloads that fail alone: theirs are exceptions."""
    try:
        results = list(score(key, payloads))
        if len(results) != len(payloads):
            raise RuntimeError(f"{len(results)} results for {len(payloads)} items")
        return results
    except Exception as error:
        if len(payloads) == 1:
            if not isinstance(error, DrmError):
                log.exception("%s: a bug, or too little memory", key)
            return [error]
    half = len(payloads) // 2
    return settle(score, key, payloads[:half]) + settle(score, key, payloads[half:])
