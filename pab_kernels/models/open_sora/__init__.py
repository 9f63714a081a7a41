"""Open-Sora 1.2: sampling and video autoencoder; its transformer is `pab_kernels.models.stdit3`."""
