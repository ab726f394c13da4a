"""Tiering designs: stages over a `PageView`, composed into named policies."""
