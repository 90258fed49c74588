"""Fields from object stores: transport, index, order, and a pool that processes share (ours)."""
