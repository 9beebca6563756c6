"""Baselines, measurements and what turns them into tables and plots.

Installed as ``stars_fast.benchmarks``: ``stars-fast bench`` runs the suites (``test_*.py``), the
other scripts of this folder say in their first lines how they are called.
"""
