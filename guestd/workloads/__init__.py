"""Workloads: what the vCPUs of a guest access. One file each, registered by name in `registry`."""
