"""The host: frames per tier, an EPT per VM, provisioning, host-side tiering, the hypercall server."""
