"""penstockd: reads checkpoints into shared memory and hands it to inference processes."""
