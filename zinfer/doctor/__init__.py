"""What this machine and a drive offer zinfer: facts, and what to do about each shortfall.

facts = gather("/mnt/nvme")        # effects: looks, measures, leaves nothing behind
findings = judge(facts)            # pure: ok, note or problem, each with its remedy
print(as_text(findings))
"""

from __future__ import annotations

from zinfer.doctor.facts import Facts, gather
from zinfer.doctor.findings import NOTE, OK, PROBLEM, Finding, as_text, judge

__all__ = ["NOTE", "OK", "PROBLEM", "Facts", "Finding", "as_text", "gather", "judge"]
