"""Made-up runs, for the tests of what the benchmarks make of them."""

from benchmarks.bench import Run
from benchmarks.cgroup import Usage
from benchmarks.drive import Traffic
from benchmarks.spans import Phase
from benchmarks.worker import Outcome

GB = 10**9
USAGE = Usage(0, 3 << 30, 0, 0, 0, 0, 0, 0, 1.0, "")


def span(seconds, read, foreign_read=0, foreign_cpu=0.0):
    return Phase(seconds, Traffic(read + foreign_read, 0), Traffic(read, 0), foreign_cpu)


def a_run(
    tool="zinfer",
    seconds=2.0,
    first=3.0,
    foreign_read=0,
    foreign_cpu=0.0,
    probe_rates=(4 * GB, 4 * GB),
    tokens=(1, 2, 3),
):
    outcome = Outcome(
        tool,
        versions={"torch": "2.13.0"},
        first_token=span(first, 7 * GB),
        tokens_each=[span(seconds, 6 * GB)] * 3,
        decode=span(3 * seconds, 18 * GB, foreign_read, foreign_cpu),
        probes=[span(1.0, 4 * GB)] * 2,
        probe_rates=list(probe_rates),
        tokens=list(tokens),
        resident=2 * GB,
        report={"bytes_written": 0},
    )
    return Run(outcome, USAGE)
