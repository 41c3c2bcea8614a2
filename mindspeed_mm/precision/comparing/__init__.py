"""Two records, or the steps of one, against what should hold: findings, and what explains them."""
