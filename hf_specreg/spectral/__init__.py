"""Top singular values, and the penalty on them."""
