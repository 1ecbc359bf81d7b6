"""A dataset on one page, and one clip of it on the terminal."""
