"""The benchmark suite: one registry of cases, measured side by side with what a user would take otherwise."""
