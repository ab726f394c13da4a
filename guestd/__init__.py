"""One guest: vCPUs, MMU, scheduler, PEBS, agent, workloads; its memory management and tiering as pure libraries."""
