"""How fast the emulator is on this machine; ``python -m benchmarks`` runs all of it, ``--help`` says what there is."""
