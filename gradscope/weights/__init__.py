"""One checkpoint examined: roles, statistics, health, and the rules that judge them."""
