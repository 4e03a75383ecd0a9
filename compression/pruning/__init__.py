"""How much goes, and the cut: rates, plans, budgets, surgery, narrow loading, and the run behind prune.py."""
