"""The check against the published numbers: the seed's own experiments, emulated and held against what was measured."""
