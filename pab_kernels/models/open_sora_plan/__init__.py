"""Open-Sora-Plan 1.1 and 1.2: their checkpoints in classes of diffusers, their samplers and their autoencoder."""
