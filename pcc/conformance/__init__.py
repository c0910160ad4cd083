"""What every backend must pass: each op on edge inputs, each query, the exact protocol."""
