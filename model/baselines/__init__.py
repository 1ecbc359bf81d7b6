"""Systems that the comparison is with, small and on the same lip encoder, up-sampling and training loop."""
