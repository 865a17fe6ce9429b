"""Measuring a guard: benchmarks, metrics with intervals, robustness, the reasoning audit, reports."""
