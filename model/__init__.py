"""Networks, losses, flow matching, training loop, vocoder and synthesis."""
