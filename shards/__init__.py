"""The data contract: schema, lengths, shard files, dataset manifest and training stream. Knows no stage, no network."""
