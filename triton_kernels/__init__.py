"""The kernels and the torch references they must equal.

reference   tree attention over slots, and the counter-based noise that makes samples independent of the schedule
"""
