"""What several tests use: models, batches, oracles, inputs."""
