"""What every command shares: the report model, rules and their registry, the gate, formats."""
