"""Vocoder: HiFi-GAN (Kong et al. 2020) for 16 kHz and a hop of 320, its training, and loading it for speech."""
