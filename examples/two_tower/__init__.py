"""A two-tower retrieval model whose history and candidates look into a compressed table."""
