"""Counters of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histogram of a batch's time."""


class Metrics:
    """What was asked and answered since the start. Used by the event loop's thread alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.items: Counter[str] = Counter()
        self.batches: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.buckets: Counter[tuple[str, float]] = Counter()

    def batch(self, scorer: str, size: int, seconds: float) -> None:
        self.items[scorer] += size
        self.batches[scorer] += 1
        self.seconds[scorer] += seconds  # type: ignore[assignment]
        for end in SECONDS:
            self.buckets[scorer, end] += seconds <= end

    def text(self, *, waiting: int) -> str:
        """The page of `/metrics`."""
        out: list[str] = []

        def family(name: str, kind: str, what: str, rows: list[tuple[str, Any]]) -> None:
            out.extend(
                [f"# HELP {name} {what}", f"# TYPE {name} {kind}", *(f"{name}{tail} {value}" for tail, value in rows)]
            )

        family("drm_requests_total", "counter", "Requests answered, by path and status.", [
            (f'{{path="{path}",code="{code}"}}', n) for (path, code), n in sorted(self.requests.items())
        ])  # fmt: skip
        family("drm_scores_total", "counter", "Pictures or latents that went through a scorer.", _by_scorer(self.items))
        family("drm_failed_total", "counter", "Those that gave no score.", _by_scorer(self.failed))
        family("drm_queue_items", "gauge", "Scores waiting or being computed.", [("", waiting)])
        family(
            "process_cpu_seconds_total",
            "counter",
            "Processor time of the server.",
            [("", round(time.process_time(), 3))],
        )
        rows: list[tuple[str, Any]] = []
        for scorer in sorted(self.batches):
            rows += [
                (f'_bucket{{scorer="{quoted(scorer)}",le="{end:g}"}}', self.buckets[scorer, end]) for end in SECONDS
            ]
            rows.append((f'_bucket{{scorer="{quoted(scorer)}",le="+Inf"}}', self.batches[scorer]))
            rows.append((f'_sum{{scorer="{quoted(scorer)}"}}', round(self.seconds[scorer], 6)))
            rows.append((f'_count{{scorer="{quoted(scorer)}"}}', self.batches[scorer]))
        family("drm_batch_seconds", "histogram", "Seconds a batch took, by scorer.", rows)
        return "\n".join(out) + "\n"


def _by_scorer(counts: Counter[str]) -> list[tuple[str, Any]]:
    return [(f'{{scorer="{quoted(scorer)}"}}', n) for scorer, n in sorted(counts.items())]


def quoted(text: str) -> str:
    """A label's value: backslash, quote and line end escaped."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
