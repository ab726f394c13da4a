"""The contract between the processes of a fleet: messages, codec, transport, shared layouts, counter names, units.

Imports none of the other packages; they all may import it.
"""
