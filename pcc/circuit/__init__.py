"""Circuit level (`c.*`, `q.*`): units over random variables, and queries on them."""
