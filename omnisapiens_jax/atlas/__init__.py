"""The benchmark: schema, label scheme, sources, the plan, and the Grain pipeline that executes it."""
