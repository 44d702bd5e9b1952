"""Models as they are looked into: held still, tapped at named layers, left as they were."""
