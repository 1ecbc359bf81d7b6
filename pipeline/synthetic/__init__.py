"""A seeded corpus of synthetic talking faces, for the demo and the tests."""
