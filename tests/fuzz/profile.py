"""How many cases are drawn, and how: the same ones in every run."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings


def fuzz(cases: int) -> settings:
    """Settings of a test of so many cases."""
    return settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
