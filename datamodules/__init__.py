"""Tars to batches: shard writing, index, the deterministic stream, decoding and augmentation."""
