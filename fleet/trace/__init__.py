"""Recorded memory accesses: import from Valgrind Lackey, perf and tables, and what a trace looks like.

The file format and what a guest needs of it is in `proto.trace`.
"""
