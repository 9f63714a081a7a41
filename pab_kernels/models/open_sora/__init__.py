"""Open-Sora 1.2 from a prompt to a video, around the transformer `pab_kernels.models.stdit3.STDiT3`."""
