"""Metrics of a run over HTTP, in the text format of Prometheus, by its own client library."""

from collections.abc import Iterator, Mapping
from typing import Any

from gemel.edge.counts import Counts
from gemel.edge.watch import Watch
from gemel.results_store.files import ResultsError


class _Collector:
    """Reads the counts of a run whenever they are asked for."""

    def __init__(self, counts: Counts, described: Mapping[str, Any], family: Any):
        self.counts, self.described, self.family = counts, described, family

    def collect(self) -> Iterator[Any]:
        families = self.family
        frames = families.CounterMetricFamily("gemel_frames", "Frames by what became of them", labels=["task", "state"])
        latency = families.GaugeMetricFamily("gemel_latency_seconds", "Newest answers", labels=["task", "quantile"])
        waited = families.CounterMetricFamily("gemel_swap_seconds", "Turns waited for weights", labels=["task"])
        for name, task in self.counts.tasks.items():
            summary = task.summary()
            for state in ("processed", "late", "dropped"):
                frames.add_metric([name, state], summary[state])
            for quantile, ms in zip(("0.5", "0.95", "0.99"), summary["latency_ms"].values(), strict=True):
                if ms is not None:
                    latency.add_metric([name, quantile], ms / 1e3)
            waited.add_metric([name], task.swap_seconds)
        yield from (frames, latency, waited)
        moved, peak = self.counts.bytes_moved, self.counts.peak_resident_bytes
        yield families.CounterMetricFamily("gemel_moved_bytes", "Bytes of weights that were loaded", value=moved)
        yield families.GaugeMetricFamily("gemel_peak_resident_bytes", "Most bytes of weights in memory", value=peak)
        budget = self.described["budget_bytes"]
        yield families.GaugeMetricFamily("gemel_budget_bytes", "Bytes that weights may take", value=budget)
        if self.counts.watch is not None:
            yield from self._watched(self.counts.watch)

    def _watched(self, watch: Watch) -> Iterator[Any]:
        kinds = {
            "sampled": ("gemel_compared_frames", "Frames on which merged and unmerged model were compared"),
            "agreement_recently": ("gemel_agreement", "Of merged and unmerged model, on the newest compared frames"),
            "agreed": ("gemel_agreed", "Agreement of merged and unmerged model when they were merged"),
            "level": ("gemel_agreement_level", "Agreement below which a task goes back to its unmerged model"),
            "evidence": ("gemel_agreement_evidence", "That it has fallen below; a task goes back from a limit on"),
        }
        found = {key: self.family.GaugeMetricFamily(*text, labels=["task"]) for key, text in kinds.items()}
        back = self.family.GaugeMetricFamily("gemel_went_back", "1 if served by its unmerged model", labels=["task"])
        for name, task in watch.tasks.items():
            summary = task.summary()
            for key, family in found.items():
                if summary[key] is not None:
                    family.add_metric([name], summary[key])
            back.add_metric([name], int(task.went_back_at is not None))
        yield from (*found.values(), back)


def serve(address: tuple[str, int], counts: Counts, described: Mapping[str, Any]) -> tuple[Any, Any]:
    """Serves http://HOST:PORT/metrics from a thread; (server, thread), as prometheus_client returns them.

    Raises ResultsError if prometheus_client is not installed, or the address cannot be used.
    """
    try:
        from prometheus_client import CollectorRegistry, metrics_core, start_http_server
    except ImportError:
        raise ResultsError("serve: needs prometheus_client: pip install 'gemel-merging[edge]'") from None
    host, port = address
    registry = CollectorRegistry()
    registry.register(_Collector(counts, described, metrics_core))
    try:
        return start_http_server(port, host, registry=registry)
    except OSError as error:
        raise ResultsError(f"serve: {host}:{port} cannot be used: {error.strerror or error}") from None
