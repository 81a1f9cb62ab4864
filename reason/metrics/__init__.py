"""Numbers from outcomes: ranking metrics and the statistics of fair comparison.

Knows no method and no engine.
"""
