"""HTML pages of one file, and the pictures on them."""
