"""Measuring: latency, throughput, quality and kernels. Benchmarks live here, never in tests."""
