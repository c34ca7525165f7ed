"""Latents, captions, and images made of them."""
