"""Tensor level (`t.*`): arrays with dtype, shape and numeric representation."""
