"""Memory management of a kernel over two nodes: used by a guest over its GPT and by the host over an EPT."""
