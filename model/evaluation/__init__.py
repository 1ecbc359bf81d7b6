"""The paper's metrics on pairs of generated and reference speech, and the tables made of them."""
