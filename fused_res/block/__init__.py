"""The block operator: its registration (op), and the schedules of primitives it runs (forward, backward)."""
