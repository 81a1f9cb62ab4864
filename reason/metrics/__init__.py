"""Numbers from outcomes: ranking, calibration, trivial baselines, and the statistics of fair comparison.

Knows no method and no engine.
"""
