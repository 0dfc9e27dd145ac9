"""Stable Diffusion's parts: schedule, UNet, autoencoder, text tower, conditioning projectors."""
